"""generate() against diffusers' own pipelines, and its promises as a generator of events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.errors import StudioError
from pipelines.events import Finished, Note, Preview, Progress, Snapshot
from pipelines.generate import decode, denoise, generate, sized
from pipelines.model import Model
from pipelines.preview import encode_pictures, from_vae, rough_picture, steady_vae, to_vae
from pipelines.request import Request, usual_guidance
from pipelines.scene import make_scene
from pipelines.schedulers import SCHEDULERS, make_scheduler
from tests.tiny import KINDS, tiny_model, tiny_pipeline

REQUEST = Request("a photo of a cat in the snow", negative="blurry dog", seeds=(7,), steps=6, preview_every=0)


def latents(model: Model, request: Request) -> torch.Tensor:
    """The first batch before decoding (n, c, h, w)."""
    work = denoise(model, make_scene(model, sized(model, request)))
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def ours(model: Model, request: Request) -> np.ndarray[Any, Any]:
    """The first batch as floats (n, height, width, 3) in [0, 1]."""
    return decode(model, latents(model, request)).permute(0, 2, 3, 1).cpu().numpy()


def theirs(kind: str, request: Request, output: str = "np", **place: Any) -> Any:
    pipeline = tiny_pipeline(kind)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            torch.nn.Module.to(module.requires_grad_(False), **place)  # torch's fp16 on the CPU depends on that
    pipeline.scheduler = make_scheduler(request.scheduler, pipeline.scheduler.config)
    return pipeline(
        request.prompt,
        negative_prompt=request.negative,
        num_inference_steps=request.steps,
        guidance_scale=request.scale,
        width=request.width or None,
        height=request.height or None,
        generator=torch.Generator().manual_seed(request.seeds[0]),
        output_type=output,
    ).images


def pictures(model: Model, request: Request) -> list[np.ndarray[Any, Any]]:
    return [event.image for event in generate(model, request) if isinstance(event, Snapshot)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(kind: str, scheduler: str) -> None:
    request = replace(REQUEST, scheduler=scheduler, width=72, height=40)
    mine, other = ours(tiny_model(kind), request), theirs(kind, request)
    assert other.std() > 0.01  # not a flat picture that would equal anything
    assert np.abs(mine - other).max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"guidance": 1.0}, {"negative": None}, {"negative": ""}, {"prompt": ""}])
def test_equals_diffusers_at_the_edges(kind: str, change: dict[str, Any]) -> None:
    request = replace(REQUEST, **change)
    assert np.abs(ours(tiny_model(kind), request) - theirs(kind, request)).max() <= 1e-4


def placed(kind: str, **place: Any) -> Model:
    model = tiny_model(kind)
    for module in (model.unet, model.vae, *model.text_encoders):
        torch.nn.Module.to(module, **place)
    return model


@pytest.mark.parametrize("kind", ["sd1", "sd2v", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_diffusers_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """The same operations in the same order, so that even the rounding agrees."""
    request, model = replace(REQUEST, scheduler="euler_a", steps=3), placed(kind, dtype=dtype)
    assert torch.equal(latents(model, request), theirs(kind, request, "latent", dtype=dtype))


def test_the_vae_of_sdxl_is_lent_in_fp32_and_comes_back_exactly() -> None:
    model = placed("sdxl", dtype=torch.float16)
    before = {name: (weight, weight.clone()) for name, weight in model.vae.named_parameters()}
    with steady_vae(model) as vae:
        assert vae is model.vae and {weight.dtype for weight in vae.parameters()} == {torch.float32}
    for name, weight in model.vae.named_parameters():
        assert weight is before[name][0] and torch.equal(weight, before[name][1]) and weight.dtype == torch.float16
    with steady_vae(placed("sd1", dtype=torch.float16)) as vae:
        assert vae.dtype == torch.float16


def test_latents_of_a_vae_with_its_own_statistics_come_back() -> None:
    model = tiny_model("sdxl")
    model.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    known = torch.randn(1, 4, 3, 5)
    expected = known * torch.tensor([1.0, 2, 3, 4])[None, :, None, None] / model.vae.config.scaling_factor
    expected += torch.tensor([0.1, 0.2, 0.3, 0.4])[None, :, None, None]
    assert torch.allclose(to_vae(model, known), expected)
    assert torch.allclose(from_vae(model, to_vae(model, known)), known, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_diffusers_on_an_accelerator(kind: str, dtype: torch.dtype) -> None:
    request = replace(REQUEST, scheduler="euler_a")
    mine = latents(placed(kind, device="cuda", dtype=dtype), request)
    other = theirs(kind, request, "latent", device="cuda", dtype=dtype)
    assert torch.allclose(mine, other, atol=1e-4)


def test_the_picture_is_the_one_diffusers_would_save() -> None:
    model = tiny_model("sdxl")
    expected = (theirs("sdxl", REQUEST)[0] * 255).round().astype(np.uint8)
    picture = pictures(model, REQUEST)[0]
    assert picture.shape == (64, 64, 3)
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1  # a value at .5 may round either way


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
def test_batched_pictures_equal_single_ones(scheduler: str) -> None:
    model = tiny_model("sdxl")
    request = replace(REQUEST, scheduler=scheduler, seeds=(3, 4, 5))
    alone, together = pictures(model, request), pictures(model, replace(request, batch=2))
    assert len(alone) == len(together) == 3
    assert not np.array_equal(alone[0], alone[1])
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_a_seed_gives_the_same_bits_again_whatever_runs_between() -> None:
    model = tiny_model()
    first = pictures(model, replace(REQUEST, seeds=(1, 2)))
    torch.rand(5)
    assert np.array_equal(first[1], pictures(model, replace(REQUEST, seeds=(2,)))[0])


def test_only_kept_seeds_of_a_batch_become_pictures() -> None:
    request = replace(REQUEST, seeds=(1, 2, 3), batch=3)
    model = tiny_model()
    assert np.array_equal(pictures(model, replace(request, keep=(2,)))[0], pictures(model, request)[1])


def test_events_come_in_order() -> None:
    events = list(generate(tiny_model(), replace(REQUEST, seeds=(1, 2), preview_every=2)))
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in progress] == list(range(1, 13))
    assert {event.total for event in progress} == {12}
    assert all(event.eta is not None and event.eta >= 0 for event in progress)
    previews = [(event.index, event.step) for event in events if isinstance(event, Preview)]
    assert previews == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert all(event.image.shape == (64, 64, 3) for event in events if isinstance(event, Preview))
    last = events[-1]
    assert isinstance(last, Finished)
    assert [info["seed"] for info in last.value] == [1, 2]


def test_previews_do_not_change_the_picture() -> None:
    model = tiny_model("sd2v")
    with_previews = pictures(model, replace(REQUEST, preview_every=1, scheduler="euler"))
    assert np.array_equal(with_previews[0], pictures(model, replace(REQUEST, scheduler="euler"))[0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_last_preview_shows_the_picture_to_come(scheduler: str) -> None:
    """What the map is given must be the clean latents, whichever scale the scheduler keeps its own in."""
    model = tiny_model("sd2v")
    request = replace(REQUEST, scheduler=scheduler, steps=20, preview_every=19)
    work, shown = denoise(model, make_scene(model, sized(model, request))), []
    while True:
        try:
            event = next(work)
            shown += [event.image] if isinstance(event, Preview) else []
        except StopIteration as end:
            final = rough_picture(model, end.value[0], (64, 64))
            break
    assert np.abs(shown[0].astype(int) - final.astype(int)).mean() < 12


def test_the_preview_map_knows_colours_it_was_not_fitted_on() -> None:
    """Even a VAE of random weights keeps some colour, so the map must beat one grey for everything."""
    model = tiny_model()
    coarse = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    fields = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)
    truth = fields.permute(0, 2, 3, 1).numpy() * 255
    shown = np.stack([rough_picture(model, cells, (64, 64)) for cells in encode_pictures(model, fields)])
    assert ((shown - truth) ** 2).mean() < 0.95 * ((truth - truth.mean()) ** 2).mean()


def test_closing_keeps_what_is_done_and_the_consumer_keeps_its_gradients() -> None:
    model = tiny_model()
    work = generate(model, replace(REQUEST, seeds=(1, 2)))
    assert isinstance(work, Iterator)
    done = []
    for event in work:
        assert torch.is_grad_enabled()
        if isinstance(event, Snapshot):
            done.append(event)
        elif done:
            break
    work.close()  # type: ignore[attr-defined]
    assert len(done) == 1
    assert np.array_equal(done[0].image, pictures(model, replace(REQUEST, seeds=(1,)))[0])


def test_a_prompt_that_is_too_long_is_cut_and_said_so() -> None:
    request = replace(REQUEST, prompt="cat " * 74 + "in the {0} %s snow")
    notes = [event.text for event in generate(tiny_model(), request) if isinstance(event, Note)]
    assert len(notes) == 1
    assert notes[0].startswith("The prompt is longer") and notes[0].endswith("“the {0} %s snow”")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"width": 70}, "nearest size is 72 x 64"),
        ({"height": 4096}, "nearest size is 64 x 512"),
        ({"scheduler": "heun"}, "dpmpp_2m"),
        ({"steps": 0}, "steps"),
        ({"seeds": ()}, "pictures"),
        ({"seeds": (-1,)}, "seed"),
        ({"guidance": float("nan")}, "guidance"),
        ({"prompt": "\ud800"}, "Unicode"),
    ],
)
def test_bad_requests_get_a_sentence(change: dict[str, Any], word: str) -> None:
    with pytest.raises(StudioError, match=word):
        list(generate(tiny_model(), replace(REQUEST, **change)))


def test_guidance_that_nobody_chose_is_what_suits_the_base() -> None:
    model, request = tiny_model(), replace(REQUEST, guidance=None)
    assert sized(model, request).guidance == 7.5 and sized(model, replace(REQUEST, guidance=3.0)).guidance == 3.0
    assert Request.from_json(request.to_json()).guidance is None
    chosen = pictures(model, replace(request, guidance=7.5))
    assert all(np.array_equal(a, b) for a, b in zip(pictures(model, request), chosen, strict=True))
    model.kind = "toybox"
    assert sized(model, request).guidance == usual_guidance("toybox") != 7.5


def test_an_overflow_is_not_painted_black() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(StudioError, match="overflowed"):
        pictures(model, REQUEST)


def test_start_replaces_the_first_noise_before_the_scheduler_scales_it() -> None:
    model, seen = tiny_model(), []
    request = replace(REQUEST, scheduler="euler", seeds=(7, 8), batch=2)

    def same(noise: torch.Tensor, seeds: tuple[int, ...]) -> torch.Tensor:
        seen.append((noise.clone(), seeds))
        return noise

    def swapped(noise: torch.Tensor, seeds: tuple[int, ...]) -> torch.Tensor:
        return noise.flip(0)

    def started(start: Any) -> list[np.ndarray[Any, Any]]:
        return [event.image for event in generate(model, request, start=start) if isinstance(event, Snapshot)]

    plain, unchanged, other = pictures(model, request), started(same), started(swapped)
    assert np.array_equal(plain, unchanged) and seen[0][1] == (7, 8) and 0.9 < seen[0][0].std() < 1.1
    assert np.array_equal(other, plain[::-1]) and not np.array_equal(other, plain)
    with pytest.raises(ValueError, match="start"):
        list(generate(model, request, start=lambda noise, seeds: noise[:1]))
