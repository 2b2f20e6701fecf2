"""How masks are found, in the Train tab: the settings of attention, and those of a detector with Segment Anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from pipelines import MaskParams, StudioError, fields, mask_params
from studio.forms import component, read
from studio.page import Page, Watch
from studio.session import Studio
from studio.work import Look

SEGMENTER, ATTENTION = "Segment Anything", "The base's attention"


@dataclass(frozen=True)
class MaskSettings:
    """The components; their values are read by `by_attention` and `by_detector`."""

    seer: gr.Textbox
    where: gr.Textbox
    sure: gr.Number
    margin: gr.Number
    outlines: gr.Radio
    soft: gr.Checkbox
    params: dict[str, Any]  # of MaskParams, by name

    @property
    def all(self) -> list[Any]:
        """As inputs of an event."""
        return [self.seer, self.where, self.sure, self.margin, self.soft, *self.params.values()]


def build(studio: Studio, page: Page) -> MaskSettings:
    with gr.Row():
        seer = gr.Textbox(
            label="Detector", placeholder="google/owlv2-base-patch16-ensemble",
            info="Hub id or folder, for real photos. Toybox has one of its own", elem_id="masks-detector",
        )  # fmt: skip
        where = gr.Textbox(
            label="Segment Anything checkpoint", placeholder="/path/to/sam_vit_b.pth",
            info="For outlines in real photos. Toybox has one of its own", elem_id="masks-checkpoint",
        )  # fmt: skip
    with gr.Accordion("How masks are found", open=False, elem_id="masks-how"):
        with gr.Row(elem_classes="fields"):
            sure = gr.Number(Look().sure, label="The detector is sure from", info="0 to 1", elem_id="masks-sure")
            margin = gr.Number(
                Look().margin, label="Its boxes are made larger by", info="A share of the photo, 0 to 0.5",
                elem_id="masks-margin",
            )  # fmt: skip
            outlines = gr.Radio(
                [SEGMENTER, ATTENTION], value=SEGMENTER, label="Find in the painter asks", elem_id="masks-outlines"
            )
        soft = gr.Checkbox(label="By attention: grey where it is unsure", elem_id="masks-soft")
        gr.HTML('<p class="hint">By attention, as iSeg; what suits the loaded base stands here:</p>')
        with gr.Row(elem_classes="fields"):
            usual = mask_params(studio.base.kind)
            params = {each.name: component(each, getattr(usual, each.name), "iseg") for each in fields(MaskParams)}
    page.watch(Watch(list(params.values()), lambda: studio.base.kind, lambda: _usual(studio)))
    return MaskSettings(seer, where, sure, margin, outlines, soft, params)


def _usual(studio: Studio) -> list[Any]:
    return list(mask_params(studio.base.kind).model_dump().values())


def by_attention(studio: Studio, values: Sequence[Any]) -> Look:
    """How to look, from the values of `MaskSettings.all`: of the settings only those that aren't the base's own."""
    soft, *given = values[4:]
    usual = mask_params(studio.base.kind)
    params = read(MaskParams, dict(zip(MaskParams.model_fields, given, strict=True)))
    changed = {key: value for key, value in params.model_dump().items() if value != getattr(usual, key)}
    return Look(bool(soft), tuple(f"{key}={value}" for key, value in changed.items()))


def by_detector(studio: Studio, values: Sequence[Any]) -> Look:
    """How to look, from the values of `MaskSettings.all`. StudioError when no detector is named for real photos."""
    seer, where, sure, margin = values[:4]
    seer = (seer or "").strip() or ("toybox" if studio.base.kind == "toybox" else "")
    if not seer:
        raise StudioError("Name a detector below, such as google/owlv2-base-patch16-ensemble.")
    numbers = [
        usual if value is None else float(value) for value, usual in ((sure, Look().sure), (margin, Look().margin))
    ]
    return Look(detector=seer, segmenter=(where or "").strip(), sure=numbers[0], margin=numbers[1])
