"""Mean-shifted start noise: what the UNet sees first is algorithm 2's z, whichever scheduler paints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.collage import Piece
from pipelines.errors import StudioError
from pipelines.events import Snapshot
from pipelines.generate import generate
from pipelines.latents import Latents, small_mask
from pipelines.model import Model
from pipelines.request import Request
from pipelines.schedulers import SCHEDULERS, make_scheduler
from pipelines.start_noise import box_layout, encoded, mask_layout, mean_shift, pieces_of, random_layout, shifted
from tests.test_collage import A, B, piece, source
from tests.tiny import tiny_model

SIZE = (48, 64)
REQUEST = Request("a cat and a dog", seeds=(3, 8), steps=4, width=64, height=48, preview_every=0)
PIECES = {A: [piece(A), piece(A, 30, 50)], B: [piece(B)]}
SPACINGS = ("leading", "linspace", "trailing")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, 4, 12, 16, generator=torch.Generator().manual_seed(1))


def sdxl(name: str, spacing: str, steps: int) -> Any:
    """A scheduler with Stable Diffusion's own schedule, its timesteps set."""
    schedule: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options = {"num_train_timesteps": 1000, "timestep_spacing": spacing, "steps_offset": 1, "clip_sample": False}
    scheduler = make_scheduler(name, schedule | options)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_unet_first_sees_algorithm_2_under_every_scheduler(name: str, spacing: str) -> None:
    """z0 = sqrt(a) gamma z + sqrt(1 - a) eps at the scheduler's own first timestep."""
    clean, eps, gamma = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6), 2.0
    scheduler = sdxl(name, spacing, 25)
    first = scheduler.timesteps[0]
    latents = shifted(eps, clean, scheduler, gamma) * scheduler.init_noise_sigma
    seen = scheduler.scale_model_input(latents, first)
    a = scheduler.alphas_cumprod[int(first)]
    expected = a.sqrt() * gamma * clean + (1 - a).sqrt() * eps
    torch.testing.assert_close(seen, expected, atol=2e-3, rtol=2e-3)
    plain = scheduler.scale_model_input(eps * scheduler.init_noise_sigma, first)
    assert (seen - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("spacing", "steps", "root", "sigma"),
    [("trailing", 25, 0.0683, 14.61), ("leading", 50, 0.0760, 13.12), ("leading", 30, 0.0868, 11.48)],
)
def test_the_published_numbers_of_the_schedule(spacing: str, steps: int, root: float, sigma: float) -> None:
    """sqrt(a_t0) and sigma_0 of SDXL's schedule; so gamma = 2 moves the mean by about 0.15 z, not by 2 z."""
    ones = torch.ones(1, 4, 2, 2)
    ddim, euler = sdxl("ddim", spacing, steps), sdxl("euler", spacing, steps)
    assert shifted(torch.zeros_like(ones), ones, ddim, 1.0).mean().item() == pytest.approx(root, abs=5e-4)
    moved = shifted(torch.zeros_like(ones), ones, euler, 1.0) * euler.init_noise_sigma
    assert moved.mean().item() == pytest.approx(1.0, abs=1e-4)  # gamma z + sigma_0 eps
    blurred = shifted(ones, torch.zeros_like(ones), euler, 1.0) * euler.init_noise_sigma
    assert blurred.mean().item() == pytest.approx(sigma, abs=0.02)


def test_gamma_zero_is_the_plain_noise_bit_for_bit(model: Model) -> None:
    start = mean_shift(model, REQUEST, random_layout(PIECES, SIZE), 0.0)
    assert torch.equal(start(noise(), (3, 8)), noise())
    pictures = [
        [event.image for event in generate(model, REQUEST, start=one) if isinstance(event, Snapshot)]
        for one in (None, start, mean_shift(model, REQUEST, random_layout(PIECES, SIZE), 2.0))
    ]
    assert all(np.array_equal(a, b) for a, b in zip(pictures[0], pictures[1], strict=True))
    assert not np.array_equal(pictures[0][0], pictures[2][0])


def test_only_the_subjects_shift_the_mean(model: Model) -> None:
    """Outside the masks nothing of white's own latent is added."""
    collage = random_layout(PIECES, SIZE)(3)
    z = encoded(Latents(model), model, collage, SIZE)
    cells = small_mask(collage.mask, model.scale_factor)[0]
    assert z.shape == (4, 12, 16) and not z[:, cells == 0].any() and (z[:, cells == 1] != 0).all()
    assert (cells == 0).any() and (cells == 1).any()
    with torch.no_grad():
        pixels = torch.from_numpy(collage.image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        mean = model.vae.encode(pixels).latent_dist.mean[0] * model.vae.config.scaling_factor
    torch.testing.assert_close(z, mean * cells)


def test_every_seed_has_its_own_layout_in_any_batch(model: Model) -> None:
    request = replace(REQUEST, scheduler="euler")
    start = mean_shift(model, request, random_layout(PIECES, SIZE), 2.0)
    both = start(noise(), (3, 8))
    again = mean_shift(model, request, random_layout(PIECES, SIZE), 2.0)
    assert torch.equal(both[1:], again(noise()[1:], (8,))) and torch.equal(both[:1], again(noise()[:1], (3,)))
    assert torch.equal(both, start(noise(), (3, 8)))
    layout = random_layout(PIECES, SIZE)
    assert not np.array_equal(layout(3).image, layout(8).image)
    half = start(noise().bfloat16(), (3, 8))
    assert half.dtype == torch.bfloat16 and (half.float() - both).abs().max() < 0.05


def test_boxes_and_masks_say_where(model: Model) -> None:
    boxes = {A: (0.0, 0.0, 0.5, 1.0), B: (0.5, 0.5, 1.0, 1.0)}
    made = box_layout(PIECES, boxes, SIZE)(1)
    assert not made.masks[A][:, 32:].any() and made.masks[A].any()
    assert not made.masks[B][:24].any() and not made.masks[B][:, :32].any() and made.masks[B].any()
    region = np.zeros(SIZE, np.uint8)
    region[8:40, 8:24] = 255
    painted = mask_layout({A: PIECES[A]}, {A: region}, SIZE)(1)
    assert not painted.mask[region == 0].any() and painted.mask.any()
    start = mean_shift(model, REQUEST, box_layout(PIECES, boxes, SIZE), 3.0)
    scheduler = make_scheduler("ddim", model.scheduler_config)
    scheduler.set_timesteps(REQUEST.steps)
    blurred = noise() * (1 - scheduler.alphas_cumprod[scheduler.timesteps[0]]).sqrt()
    moved = (start(noise(), (3, 8)) - blurred).abs()
    assert moved[:, :, :5, 9:].max() < 1e-5 and moved[:, :, 8:, 10:14].max() > 0.05  # nothing in the empty corner


def test_pieces_are_cut_from_photos_with_masks() -> None:
    found = pieces_of([source(A), source(B), source(A, 1)])
    assert [len(found[A]), len(found[B])] == [2, 1] and isinstance(found[A][0], Piece)
    assert found[A][0].mask.shape == (30, 30) and (found[A][0].image == piece(A).image[0, 0]).all()


def test_what_cannot_be_laid_out_is_told(model: Model) -> None:
    with pytest.raises(StudioError, match="No photo with a mask of <b>"):
        random_layout({A: PIECES[A], B: []}, SIZE)
    with pytest.raises(StudioError, match="of any subject"):
        random_layout({}, SIZE)
    with pytest.raises(StudioError, match="marked for <c>"):
        mask_layout(PIECES, {"<c>": np.full(SIZE, 255, np.uint8)}, SIZE)
    with pytest.raises(StudioError, match="marked for <c>"):
        box_layout(PIECES, {"<c>": (0, 0, 1, 1)}, SIZE)
    with pytest.raises(StudioError, match="made for 32 x 32 pixels, the picture has 64 x 48"):
        mean_shift(model, REQUEST, random_layout(PIECES, (32, 32)))(noise(), (3, 8))
    for gamma in (-1.0, 21.0, float("nan")):
        with pytest.raises(StudioError, match="2 is usual"):
            mean_shift(model, REQUEST, random_layout(PIECES, SIZE), gamma)
