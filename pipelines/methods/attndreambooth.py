"""AttnDreamBooth: learn the word first, then where it looks, then what it looks like.

Paper: Pang et al., "AttnDreamBooth: Towards Text-Aligned Personalized Text-to-Image Generation", NeurIPS 2024,
arXiv:2406.05000. Three stages, each with an optimizer of its own, all on "a photo of a <new word> cat":

    1 "embedding"  the new word's row alone, very shortly, starting from the category's
    2 "attention"  every weight of the cross-attention layers
    3 "identity"   every weight of the UNet, or (`identity = "lora"`) a low-rank change of its linear layers

    L = |e - e_θ(z_t, t, c)|^2 + R        R: `pipelines.attention.regularizer`, in every stage (eq. 2)

The text encoder never trains. The fast preset has a shorter third stage.

Departures from the released code: R is normalised by the number of pictures (`map_reduction = "sum"` is the released
sum) and the paper's pooled form can be chosen; photos are turned and mirrored as there by the published presets alone
(`pipelines.augment`); the category's row is the mean of its tokens where it has several (released: the first);
gradients are never clipped unless asked (released: by accident of its parameters); only the two tokens' columns of the
attention are kept; a wrong checkpoint is an error rather than a silent start from the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.methods import Stage
from pipelines.params import BASIC, TrainParams

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.augment import Augment
    from pipelines.batch import Batch
    from pipelines.fulltune import FullTune
    from pipelines.learned_tokens import LearnedTokens
    from pipelines.lora import Lora
    from pipelines.model import Model

name = "attndreambooth"
title = "AttnDreamBooth"
paper = "https://arxiv.org/abs/2406.05000"

EMBEDDING, ATTENTION, IDENTITY = "embedding", "attention", "identity"


class Params(TrainParams):
    """The defaults are the published ones (for SD 2.1 at 512 pixels)."""

    steps: int = Field(
        500, ge=0, le=100_000, description="Steps of stage 3, the identity (0 = leave it out)", json_schema_extra=BASIC
    )
    lr: float = Field(2e-6, gt=0, le=1, description="Learning rate of stage 3", json_schema_extra=BASIC)
    batch_size: int = Field(8, ge=1, le=256, description="Photos a step (all processes together)")
    max_grad_norm: float = Field(0.0, ge=0, description="Gradient clipping (0 = off)")
    embedding_steps: int = Field(60, ge=0, le=100_000, description="Steps of stage 1, the new word (0 = leave it out)")
    embedding_lr: float = Field(1e-3, gt=0, le=1, description="Learning rate of stage 1")
    attention_steps: int = Field(
        100, ge=0, le=100_000, description="Steps of stage 2, the cross-attention (0 = leave it out)"
    )
    attention_lr: float = Field(2e-5, gt=0, le=1, description="Learning rate of stage 2")
    identity_batch: int = Field(0, ge=0, le=256, description="Photos a step in stage 3 (0 = as in the others)")
    identity: Literal["full", "lora"] = Field(
        "full", description="What stage 3 trains: every weight, or low-rank changes"
    )
    lora_lr: float = Field(1e-4, gt=0, le=1, description="Learning rate of stage 3 where it is low-rank")
    rank: int = Field(32, ge=1, le=512, description="Rank of stage 3's low-rank changes")
    embedding_mean: float = Field(0.1, ge=0, le=1e4, description="Weight of the maps' means in stage 1")
    embedding_variance: float = Field(0.0, ge=0, le=1e4, description="Weight of the maps' variances in stage 1")
    map_mean: float = Field(2.0, ge=0, le=1e4, description="Weight of the maps' means in stages 2 and 3")
    map_variance: float = Field(5.0, ge=0, le=1e4, description="Weight of the maps' variances in stages 2 and 3")
    identity_maps: float = Field(
        1.0, ge=0, le=100, description="Factor on the maps' weights in stage 3; with a mean alone, as sums carry theirs"
    )
    map_form: Literal["released", "printed"] = Field(
        "released", description="Statistics of each layer (released code) or of all layers together (paper)"
    )
    map_reduction: Literal["mean", "sum"] = Field(
        "mean", description="8 times the mean over the photos, or their sum (released code; grows with the batch)"
    )
    tokens: int = Field(1, ge=1, le=16, description="New tokens for the subject")
    start_word: str = Field("", max_length=100, description="Word the new tokens start from (empty = the noun)")
    prompt: str = Field(
        "a photo of a {}",
        max_length=300,
        description="What it reads, {} for the subject (empty = the photos' captions)",
    )

    rotate: float = Field(0.0, ge=0, le=180, description="Turn photos by up to so many degrees at random (0 = off)")
    rotate_chance: float = Field(0.75, ge=0, le=1, description="How often a photo is turned")
    corners: Literal["mirror", "black"] = Field(
        "mirror", description="What fills a turned photo's corners: the photo mirrored, or black (released code)"
    )
    flip_chance: float = Field(0.5, ge=0, le=1, description="How often a photo is mirrored, where flip is on")

    @field_validator("prompt")
    @classmethod
    def _has_a_place(cls, prompt: str) -> str:
        if prompt and prompt.count("{}") != 1:
            raise ValueError("it needs {} once, where the subject goes")
        return prompt


def stages(params: Params) -> Sequence[Stage]:
    """Those of the three that have steps. StudioError when none has."""
    decay, norm = params.weight_decay, params.max_grad_norm
    identity_batch = params.identity_batch or params.batch_size
    wanted = (
        Stage(EMBEDDING, params.embedding_steps, params.batch_size, decay, norm),
        Stage(ATTENTION, params.attention_steps, params.batch_size, decay, norm),
        Stage(IDENTITY, params.steps, identity_batch, decay, norm),
    )
    found = tuple(stage for stage in wanted if stage.steps)
    if not found:
        raise StudioError("All three stages have 0 steps. Give at least one of them some.")
    return found


def augment(params: Params) -> Augment:
    """How photos are turned and mirrored."""
    from pipelines.augment import Augment

    return Augment(params.rotate, params.rotate_chance, params.corners, params.flip_chance)


@contextmanager
def attach(model: Model, params: Params, subjects: Sequence[Subject]) -> Iterator[Staged]:
    """The new word in the table, and changes of nothing waiting for their stages.

    StudioError for more than one subject.
    """
    from pipelines.fulltune import fulltune
    from pipelines.learned_tokens import learned_tokens
    from pipelines.lora import lora

    if len(subjects) != 1:
        raise StudioError("attndreambooth learns one subject at a time. Train each by itself, then use them together.")
    with ExitStack() as stack:
        tokens = stack.enter_context(learned_tokens(model, subjects, count=params.tokens, start=params.start_word))
        crossing = stack.enter_context(fulltune(model, "cross-attention", on=False))
        rest: FullTune | Lora
        if params.identity == "lora":
            rest = stack.enter_context(lora(model, rank=params.rank, alpha=params.rank, targets="all-linear", on=False))
        else:
            rest = stack.enter_context(fulltune(model, "rest", on=False))
        yield Staged(tokens, crossing, rest, params, subjects[0])


def loss(model: Model, adapter: Staged, batch: Batch, stage: Stage) -> dict[str, Tensor]:
    """Denoising, and "maps": R of the photos (class pictures are never held)."""
    from pipelines.attention.probe import Step, probe_attention
    from pipelines.attention.regularizer import TokenMoments, map_loss, token_positions
    from pipelines.losses import denoising_loss

    adapter.focus(stage)
    text = model.encode(adapter.prompts(batch))
    mean_weight, variance_weight = adapter.map_weights(stage)
    if not mean_weight and not variance_weight:
        return denoising_loss(model, adapter, batch, adapter.params, text)
    photos = int((~batch.prior).sum())  # they come first
    probe = TokenMoments([token_positions(prompt, adapter.subject.token) for prompt in text.prompts[:photos]])
    with probe_attention(model.unet, probe) as tap:
        tap.at(Step(cond=slice(0, photos)))
        losses = denoising_loss(model, adapter, batch, adapter.params, text)
    form, reduction = adapter.params.map_form, adapter.params.map_reduction
    maps = map_loss(list(probe.seen.values()), mean_weight, variance_weight, form, reduction)
    return losses | {"maps": maps}


class Staged:
    """The adapter: the new word, the cross-attention's weights, and all other weights or a low-rank change."""

    def __init__(
        self, tokens: LearnedTokens, crossing: FullTune, rest: FullTune | Lora, params: Params, subject: Subject
    ) -> None:
        self.params = params
        self.subject = subject
        self._tokens = tokens
        self._crossing = crossing
        self._rest = rest
        self._stage = ""

    @property
    def strength(self) -> float:
        return self._tokens.strength

    @strength.setter
    def strength(self, value: float) -> None:
        for part in (self._tokens, self._crossing, self._rest):
            part.strength = value

    def param_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """What the stage trains. The third also goes on with what the second trained, as released."""
        params = self.params
        last = params.lora_lr if params.identity == "lora" else params.lr  # a low-rank change needs far more
        rates = {EMBEDDING: params.embedding_lr, ATTENTION: params.attention_lr, IDENTITY: last}
        return [{"params": self._trained(stage.name), "lr": rates[stage.name]}]

    def focus(self, stage: Stage) -> None:
        """Let only what the stage trains learn, and the changes it needs take part."""
        if stage.name == self._stage:
            return
        self._stage = stage.name
        self._tokens.learn(stage.name == EMBEDDING)
        if stage.name != EMBEDDING:
            self._crossing.switch_on()
        if stage.name == IDENTITY:
            self._rest.switch_on()
        learning = {id(parameter) for parameter in self._trained(stage.name)}
        for parameter in [*self._crossing.parameters(), *self._rest.parameters()]:
            parameter.requires_grad_(id(parameter) in learning)
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The tokens' rows, whole weights that moved, and the low-rank factors where there are some."""
        return self._tokens.tensors() | self._crossing.tensors() | self._rest.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        own, inside = set(self._tokens.keys()), self._crossing.names()
        crossing = {name: values for name, values in tensors.items() if name in inside}
        rest = {name: values for name, values in tensors.items() if name not in inside and name not in own}
        self._tokens.load(tensors)
        self._crossing.load(crossing)
        self._rest.load(rest)

    def bake(self) -> None:
        for part in (self._tokens, self._crossing, self._rest):
            part.bake()

    def map_weights(self, stage: Stage) -> tuple[float, float]:
        """Of means and variances in this stage.

        `identity_maps` gives a mean the weight that the released sum has over stage 3's batch. A sum has it by itself.
        """
        params = self.params
        if stage.name == EMBEDDING:
            return params.embedding_mean, params.embedding_variance
        factor = params.identity_maps if stage.name == IDENTITY and params.map_reduction == "mean" else 1.0
        return factor * params.map_mean, factor * params.map_variance

    def prompts(self, batch: Batch) -> list[str]:
        """What each row's text is; class pictures keep their own."""
        if not self.params.prompt:
            return list(batch.captions)
        fixed = self.params.prompt.replace("{}", self.subject.token)
        return [
            caption if prior else fixed for caption, prior in zip(batch.captions, batch.prior.tolist(), strict=True)
        ]

    def _trained(self, stage: str) -> list[nn.Parameter]:
        if stage == EMBEDDING:
            return self._tokens.parameters()
        if stage == ATTENTION:
            return self._crossing.parameters()
        crossing = [] if self.params.identity == "lora" else self._crossing.parameters()
        return [*crossing, *self._rest.parameters()]
