"""Layout guidance: the published weight maps and formula, repeated steps, the guidance ramp, trimmed prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.attention.guidance import LayoutGuidance, drawn_weights, on_grid, sigma_ramp
from pipelines.attention.probe import Site, Step, find_sites, probe_attention
from pipelines.attention.store import AttentionStore
from pipelines.events import Note, Snapshot
from pipelines.generate import denoise, generate, sized
from pipelines.layout import Area, Bound, Layout, Region, colour_areas
from pipelines.model import Model
from pipelines.noise import alphas
from pipelines.request import Request
from pipelines.sampling import Sampler
from pipelines.scene import make_scene
from pipelines.schedulers import SCHEDULERS
from tests.test_layout import GREEN, RED, WHITE, drawn
from tests.tiny import KINDS, tiny_model

LEFT, RIGHT = Area.box((0, 0, 8, 16), (16, 16)), Area.box((8, 0, 16, 16), (16, 16))
REQUEST = Request("a cat and a dog", seeds=(3,), steps=4, preview_every=0)
BOTH = Layout((Region("cat", LEFT), Region("dog", RIGHT)))


def schedule() -> torch.Tensor:
    """Stable Diffusion's alphas_cumprod, (1000,)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def maps(layout: Layout, *tokens: int) -> tuple[list[int], list[torch.Tensor]]:
    return drawn_weights(layout, [Bound(one, (at,)) for one, at in zip(layout.regions, tokens, strict=True)])


def latents(model: Model, request: Request, probes: tuple[Any, ...] = ()) -> torch.Tensor:
    with probe_attention(model.unet, *probes) as tap:
        work = denoise(model, make_scene(model, sized(model, request)), 0, tap if probes else None)
        while True:
            try:
                next(work)
            except StopIteration as end:
                return end.value


def pictures(model: Model, request: Request, **options: Any) -> list[np.ndarray[Any, Any]]:
    return [event.image for event in generate(model, request, **options) if isinstance(event, Snapshot)]


# Cells with a positive weight at 96, 48, 24 and 12, measured on two released layouts
CAT_AND_DOG = drawn((768, 768), RED, ((385, 127, 721, 671), GREEN))
FLOWER = drawn(
    (768, 768), WHITE, ((215, 254, 524, 756), RED), ((525, 254, 525, 756), (255, 253, 253)), ((211, 7, 527, 247), GREEN)
)
GOLDEN = [
    (CAT_AND_DOG, GREEN, [2856, 714, 170, 40]),
    (CAT_AND_DOG, RED, [6360, 1590, 406, 104]),
    (FLOWER, GREEN, [1170, 300, 63, 12]),
    (FLOWER, RED, [2356, 589, 135, 28]),
]


@pytest.mark.parametrize("image, colour, expected", GOLDEN)
def test_the_published_layouts_give_the_published_cells(image: Image.Image, colour: Any, expected: list[int]) -> None:
    area = colour_areas(image.convert("RGBA"), [colour], (768, 768))[colour]
    _, weights = maps(Layout((Region("cat", area),)), 2)
    assert [int((on_grid(weights, (side, side)) > 0).sum()) for side in (96, 48, 24, 12)] == expected


def test_the_ramp_is_the_published_one_however_many_steps_are_guided() -> None:
    ramp = sigma_ramp(schedule(), 50)
    published = {0: 1.074, 5: 0.846, 10: 0.652, 20: 0.355, 25: 0.247, 30: 0.162, 40: 0.050, 45: 0.017, 49: 0.0002}
    assert all(abs(0.08 * 2.5 * ramp[step] - value) < 6e-4 for step, value in published.items())
    assert ramp[0] == pytest.approx(5.369, abs=1e-3) and ramp[49] == pytest.approx(0.00085, abs=1e-6)
    assert sigma_ramp(schedule(), 10)[::9] == pytest.approx([ramp[0], ramp[49]])
    assert sigma_ramp(schedule(), 1) == pytest.approx([ramp[0]])


def test_strict_forbids_everywhere_else_and_the_figure_only_others_regions() -> None:
    third = Layout((Region("cat", Area.box((0, 0, 4, 4), (4, 12))), Region("dog", Area.box((4, 0, 8, 4), (4, 12)))))
    for mode, background in (("strict", -7.0), ("figure", 0.0)):
        columns, (cat, dog) = maps(replace(third, mode=mode, negative=-7.0), 2, 5)
        assert columns == [2, 5]
        assert cat[0].tolist() == [2.5] * 4 + [-7] * 4 + [background] * 4
        assert dog[0].tolist() == [-7] * 4 + [2.5] * 4 + [background] * 4


def test_one_word_may_look_into_two_regions() -> None:
    """In the released code the weights are added, and the word can look nowhere."""
    bound = [Bound(Region("cat", LEFT), (2,)), Bound(Region("cat", RIGHT, weight=1.0), (2,))]
    columns, (weights,) = drawn_weights(BOTH, bound)
    assert columns == [2] and weights[0].tolist() == [2.5] * 8 + [1.0] * 8


def test_the_formula_on_the_prompts_rows_alone() -> None:
    """A' = S + g W ln(1 + sigma^2) std(S), std over all heads, cells and tokens of each row, unbiased."""
    layout = Layout((Region("cat", Area.box((0, 0, 8, 12), (12, 20)), weight=1.5),), 0.1, 3, -4.0)
    probe = LayoutGuidance(layout, [Bound(layout.regions[0], (2, 3))], schedule(), 5)
    site = Site("x", "mid", "cross", 2, 0, 6, 10)
    scores = torch.randn(4, 2, 60, 9, generator=torch.Generator().manual_seed(0))
    scores[3] *= 5  # every row has its own spread
    before = scores.clone()
    edited = probe.edit(site, scores, Step(1, 5, 500.0, slice(2, 4)))
    assert torch.equal(scores, before) and torch.equal(edited[:2], before[:2])
    inside = torch.nn.functional.interpolate(
        torch.where(torch.arange(20) < 8, 1.5, -4.0).expand(12, 20)[None, None],
        (6, 10),
        mode="bilinear",
        align_corners=True,
    ).flatten()
    for row in (2, 3):
        expected = before[row].clone()
        factor = 0.1 * sigma_ramp(schedule(), 3)[1] * before[row].flatten().std()
        expected[:, :, 2:4] += factor * inside[None, :, None]
        assert torch.allclose(edited[row], expected, atol=1e-5)
        alone = probe.edit(site, before[row : row + 1], Step(1, 5, 500.0, slice(0, 1)))
        assert torch.allclose(alone[0], edited[row], atol=1e-6)
    assert probe.edit(site, scores, Step(3, 5, 500.0, slice(2, 4))) is scores  # after the last guided step
    assert probe.wants(replace(site, kind="self")) is None


@pytest.mark.parametrize("kind", KINDS)
def test_words_look_into_their_regions_only(kind: str) -> None:
    model = tiny_model(kind)
    request = replace(REQUEST, layout=BOTH, width=96, height=64, seeds=(3, 4), batch=2)
    prompt = model.tokenize(request.prompt)
    store = AttentionStore({"cat": [prompt.words.index("cat")], "dog": [prompt.words.index("dog")]})
    guided = pictures(model, request, probes=(store,))
    for row in range(2):
        cat, dog = store.maps("cat")[row], store.maps("dog")[row]
        assert cat.shape == (16, 24) if kind != "sdxl" else (8, 12)
        middle = cat.shape[1] // 2
        assert cat[:, middle + 1 :].max() == 0 < cat[:, : middle - 1].min()
        assert dog[:, : middle - 1].max() == 0 < dog[:, middle + 1 :].min()
    plain = pictures(model, replace(request, layout=None))
    assert not np.array_equal(guided[0], plain[0])
    for off in (replace(BOTH, strength=0.0), replace(BOTH, steps=0)):
        assert np.array_equal(pictures(model, replace(request, layout=off))[0], plain[0])


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 300.0)])
def test_words_look_nowhere_else_in_half_precision(dtype: torch.dtype, size: float) -> None:
    """Neither the weight outside, -1e8, nor scores beyond fp16's 65,504 (as in SD 2) make anything infinite."""
    model = tiny_model()
    with torch.no_grad():
        for site, attn in find_sites(model.unet):
            for layer in (attn.to_q, attn.to_k) if site.kind == "cross" else ():
                layer.weight.mul_(size)
    for part in (model.unet, *model.text_encoders):
        part.to(dtype)
    seen: list[torch.Tensor] = []
    model.unet.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    words = model.tokenize(REQUEST.prompt).words
    store = AttentionStore({word: [words.index(word)] for word in ("cat", "dog")})
    pictures(model, replace(REQUEST, layout=BOTH, steps=2, width=96, height=64), probes=(store,))
    assert BOTH.negative == -1e8 and len(seen) >= 2
    assert all(one.dtype == dtype and one.isfinite().all() for one in seen)
    cat, dog = store.maps("cat")[0], store.maps("dog")[0]
    assert np.isfinite(cat).all() and np.isfinite(dog).all() and cat.any() and dog.any()
    assert not cat[:, 13:].any() and not dog[:, :11].any()
    assert size > 1 or (cat[:, :11].all() and dog[:, 13:].all())


def test_guidance_ends_with_its_last_step_and_comes_with_a_word_about_doubles() -> None:
    model = tiny_model()
    twice = Layout((Region("cat", LEFT), Region("cat", RIGHT)), steps=2)
    request = replace(REQUEST, prompt="a cat and a cat", layout=twice)
    store = AttentionStore({"cat": [2]})
    notes = [event.text for event in generate(model, request, probes=(store,)) if isinstance(event, Note)]
    assert ["'cat' has token 2, 'cat' has token 5" in text for text in notes] == [True]
    shares = [store.maps("cat", step)[0][:, 9:].sum() for step in range(4)]
    assert shares[:2] == [0, 0] and min(shares[2:]) > 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_step_taken_again_starts_from_its_own_noise_level(scheduler: str) -> None:
    """With a guess that is always right, noise of the right size is seen at every turn, and the picture is reached."""
    truth = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    request = Request("", steps=8, scheduler=scheduler, recur=2)
    sampler = Sampler(request, tiny_model().scheduler_config, torch.device("cpu"), generators)
    noise = torch.stack([torch.randn(4, 32, 32, generator=one) for one in generators])
    first = 1 / (1 + sampler.sigma(0) ** 2)
    latents = noise * sampler.scheduler.init_noise_sigma
    if sampler.scheduler.init_noise_sigma == 1:
        latents = first**0.5 * truth + (1 - first) ** 0.5 * noise
    else:
        latents = latents + truth
    for index, t in enumerate(sampler.timesteps):
        kept = 1 / (1 + sampler.sigma(index) ** 2)
        for turn in range(3):
            latents = sampler.back(latents, index) if turn else sampler.mark(latents)
            seen = sampler.scaled(latents, t)
            left = (seen - kept**0.5 * truth) / (1 - kept) ** 0.5
            assert left.std() == pytest.approx(1, abs=0.05), (index, turn)
            latents = sampler.step(left, t, latents)
    assert (latents - truth).abs().mean() < 0.05


def test_recurrence_is_the_published_loop() -> None:
    """Euler by hand on a base that predicts v, each step twice with the seed's own stream of noise."""
    model = tiny_model("sd2v")
    request = replace(REQUEST, scheduler="euler", recur=1, ramp=True, guidance=3.0)
    scene = make_scene(model, sized(model, request))
    chance = torch.Generator().manual_seed(3)
    sampler = Sampler(request, model.scheduler_config, model.device, [chance])
    sigmas = [sampler.sigma(index) for index in range(5)]
    z = torch.randn(1, 4, 16, 16, generator=chance) * sampler.scheduler.init_noise_sigma
    for index, t in enumerate(sampler.timesteps):
        high, low = sigmas[index : index + 2]
        for turn in range(2):
            if turn:
                z = z + (high**2 - low**2) ** 0.5 * torch.randn(1, 4, 16, 16, generator=chance)
            with torch.no_grad():
                seen = (z / (high**2 + 1) ** 0.5).repeat(2, 1, 1, 1)
                negative, positive = model.unet(seen, t, encoder_hidden_states=scene.text.states).sample.chunk(2)
            v = negative + 3.0 * (1 + high / sigmas[0]) * (positive - negative)
            clean = -v * high / (high**2 + 1) ** 0.5 + z / (high**2 + 1)
            z = z + (low - high) * (z - clean) / high
    assert torch.allclose(latents(model, request), z, atol=1e-3)


def test_only_guided_steps_are_taken_again() -> None:
    model, calls = tiny_model(), []
    with_layout = replace(REQUEST, recur=1, layout=replace(BOTH, steps=3))
    handle = model.unet.register_forward_hook(lambda *_: calls.append(1))
    store = AttentionStore({"cat": [2]})
    for request, expected in ((REQUEST, 4), (replace(REQUEST, recur=2), 12), (with_layout, 7)):
        calls.clear()
        list(generate(model, request, probes=(store,)))
        assert len(calls) == expected
    handle.remove()
    assert store.rows == 3 and store.steps == [0, 1, 2, 3]  # each picture is one, each step seen once


def test_the_guidance_ramp_falls_from_twice_to_once() -> None:
    sampler = Sampler(Request("", steps=50, scheduler="euler"), tiny_model().scheduler_config, torch.device("cpu"), [])
    assert sampler.guidance(7.5, 0, True) == pytest.approx(15.0)
    assert sampler.guidance(7.5, 49, True) == pytest.approx(7.515, abs=2e-3)
    assert sampler.guidance(7.5, 0, False) == 7.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_trimmed_prompt_keeps_every_token(kind: str) -> None:
    model = tiny_model(kind)
    request = replace(REQUEST, prompt="a teapot, in the snow.", trim=True)
    read = model.tokenize(request.prompt)
    length = max(at for at, word in enumerate(read.words) if word) + 2  # and the end
    whole, short = (make_scene(model, sized(model, one)).text for one in (replace(request, trim=False), request))
    assert short.states.shape[1] == length < 77
    assert torch.equal(short.states, whole.states[:, :length])
    negative = replace(request, negative="a blurry mushroom on the beach, and more")
    assert make_scene(model, sized(model, negative)).text.states.shape[1] > length
    assert not np.array_equal(pictures(model, request)[0], pictures(model, replace(request, trim=False))[0])


def test_the_schedule_is_the_bases_own() -> None:
    model = tiny_model()
    assert torch.allclose(alphas(model), schedule(), rtol=1e-4)
    probe = LayoutGuidance(BOTH, [], alphas(model), 4)
    assert probe._ramp == pytest.approx(sigma_ramp(schedule(), 4), rel=1e-3)
