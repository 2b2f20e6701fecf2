"""Batches: the same whoever asks, cached or not, however many processes share them; captions, masks, crops, losses."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from pipelines.batch import Batch
from pipelines.captions import caption, class_prompt
from pipelines.concept import Subject
from pipelines.data import Data, Photo, prepare
from pipelines.errors import StudioError
from pipelines.latents import small_mask
from pipelines.losses import denoising_loss, masked_mean
from pipelines.methods import Stage
from pipelines.model import Model
from pipelines.noise import diffused, generator, turn
from pipelines.params import TrainParams
from pipelines.processes import Share
from tests.tiny import tiny_model

CAT = (Subject("<my-cat>", "cat"),)
STAGE = Stage("learn", steps=6, batch_size=4)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


def photos(count: int = 3, size: tuple[int, int] = (64, 64), masked: bool = True) -> list[Photo]:
    """Random pictures (height, width), each with its own mask."""
    chance = np.random.default_rng(5)
    made = []
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        mask[8:40, 12 + number : 48] = 255
        image = chance.integers(0, 256, (*size, 3), dtype=np.uint8)
        made.append(Photo(Path(f"{number}.png"), image, {"": mask} if masked else {}, None, size[::-1]))
    return made


def data(model: Model, size: tuple[int, int] = (64, 64), **settings: Any) -> Data:
    params = TrainParams(masked_loss=True, flip=True, **settings)
    return prepare(model, photos(size=size), params, CAT, seed=3, prior=[(photos()[0].image, "a photo of a cat")])


def equal(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_batches_are_pure_and_cached_ones_are_bitwise_the_uncached(model: Model) -> None:
    cached, uncached, again = (data(model, size=(64, 90)) for _ in range(3))
    uncached.latents.budget = 0
    first = list(cached.batches(STAGE))
    for one, other in zip(first, uncached.batches(STAGE), strict=True):
        assert equal(one, other)
    for one, other in zip(first[3:], again.batches(STAGE, start=3), strict=True):  # a resumed run
        assert equal(one, other)
    torch.manual_seed(99)  # the global generator has no say
    assert equal(first[1], again.batch(STAGE, 2))
    assert not equal(first[0], first[1])
    assert not torch.equal(first[0].noise, data(model, size=(64, 90)).batch(replace(STAGE, name="other"), 1).noise)
    assert uncached.latents.encoded == 24 > cached.latents.encoded
    before = cached.latents.encoded
    assert all(equal(one, other) for one, other in zip(first, cached.batches(STAGE), strict=True))
    assert cached.latents.encoded == before


def test_nothing_is_encoded_twice_without_random_crops(model: Model) -> None:
    plain = prepare(model, photos(size=(64, 90)), TrainParams(random_crop=False, flip=True), CAT, seed=0)
    list(plain.batches(replace(STAGE, steps=50)))
    assert plain.latents.encoded == 6  # three photos and their mirror images


def test_the_cache_stays_within_its_budget(model: Model) -> None:
    small = data(model, size=(64, 400))
    one = small.latents.moments(("probe",), small.sources[0].image[:64, :64])
    small.latents.budget = 5 * one.numel() * 4
    expected = list(data(model, size=(64, 400)).batches(STAGE))
    assert all(equal(a, b) for a, b in zip(small.batches(STAGE), expected, strict=True))
    assert sum(kept.numel() * 4 for kept in small.latents._kept.values()) <= small.latents.budget


def test_every_step_takes_one_of_several_captions(model: Model) -> None:
    said = "a photo of a cat\na cat on sand"
    wish = (TrainParams(prior_weight=1.0), CAT)
    prior = [(photos()[0].image, "a cat\nthe cat")]
    one, same, plain = (
        prepare(model, [replace(photo, caption=text) for photo in photos()], *wish, seed=3, prior=prior)
        for text in (said, said, "a photo of a cat")
    )
    steps = [one.batch(STAGE, step) for step in range(1, 7)]
    assert {text for step in steps for text in step.captions} == {
        "a photo of a <my-cat>", "a <my-cat> on sand", "a cat", "the cat",
    }  # fmt: skip
    for step, batch in enumerate(steps, 1):
        assert equal(batch, same.batch(STAGE, step))
        assert torch.equal(batch.latents, plain.batch(STAGE, step).latents)  # no other draw is shifted
    assert one.digest() == same.digest() != plain.digest()
    with pytest.raises(StudioError, match="'a dog', does not name"):
        prepare(model, [replace(photo, caption="a cat\na dog") for photo in photos()], *wish, seed=3, prior=prior)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batch_of_one(model: Model, count: int) -> None:
    whole = data(model, prior_weight=1.0)
    parts = [replace(whole, share=Share(index, count)) for index in range(count)]
    for step in (1, 5):
        one, shares = whole.batch(STAGE, step), [part.batch(STAGE, step) for part in parts]
        for prior in (False, True):
            for name in ("latents", "noise", "timesteps", "masks"):
                rows = torch.cat([getattr(share, name)[share.prior == prior] for share in shares])
                assert torch.equal(getattr(one, name)[one.prior == prior], rows)


def test_a_batch_that_cannot_be_shared_is_refused(model: Model) -> None:
    with pytest.raises(StudioError, match="multiple of 3"):
        list(replace(data(model), share=Share(0, 3)).batches(STAGE))


def test_class_pictures_only_with_prior_weight(model: Model) -> None:
    assert not data(model).prior and not data(model).batch(STAGE, 1).prior.any()
    batch = data(model, prior_weight=0.5).batch(STAGE, 1)
    assert batch.prior.tolist() == [False] * 4 + [True] * 4
    assert batch.captions == ["a photo of <my-cat>"] * 4 + ["a photo of a cat"] * 4
    assert batch.masks is not None and (batch.masks[4:] == 1).all() and not (batch.masks[:4] == 1).all()
    with pytest.raises(StudioError, match="prior_weight to 0"):
        prepare(model, photos(), TrainParams(prior_weight=1.0), CAT, seed=0)


def test_mask_and_photo_are_cut_alike(model: Model) -> None:
    """A photo that is its own mask: after crop, flip and shrinking both must still be the same picture."""
    image = np.zeros((64, 120), np.uint8)
    image[10:30, 30:70] = 255
    own = Photo(Path("x.png"), np.repeat(image[..., None], 3, 2), {"": image}, None, (120, 64))
    made = prepare(model, [own], TrainParams(masked_loss=True, flip=True), CAT, seed=1)
    seen: dict[tuple[Any, ...], np.ndarray] = {}
    encode = made.latents.moments
    made.latents.moments = lambda key, picture: (seen.update({key: picture}), encode(key, picture))[1]  # type: ignore
    for step in range(1, 7):
        seen.clear()
        batch = made.batch(replace(STAGE, batch_size=1), step)
        (picture,) = seen.values()
        assert batch.masks is not None and torch.equal(batch.masks[0], small_mask(picture[..., 0], model.scale_factor))
        assert batch.masks.shape == (1, 1, 16, 16) and batch.latents.shape == (1, 4, 16, 16)
        assert batch.crops[0][0] == 0 and batch.crops[0][1] % model.scale_factor == 0
        assert batch.original_sizes == [(64, 120)] and batch.target_sizes == [(64, 64)]


def test_small_mask_is_the_share_of_each_cell() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :2] = 255
    assert small_mask(mask, 4).tolist() == [[[0.5, 0.0], [0.0, 0.0]]]


def test_photos_are_all_seen_in_every_round() -> None:
    rounds = [[turn(5, position, "photo", 1) for position in range(start, start + 5)] for start in (0, 5, 10)]
    assert all(sorted(seen) == list(range(5)) for seen in rounds) and rounds[0] != rounds[1]


def test_every_timestep_can_come(model: Model) -> None:
    drawn = torch.cat([data(model).batch(replace(STAGE, batch_size=64), step).timesteps for step in range(1, 20)])
    assert 0 <= drawn.min() < 20 and 980 < drawn.max() < 1000 and abs(drawn.float().mean() - 500) < 40


def test_what_is_missing_is_said(model: Model) -> None:
    with pytest.raises(StudioError, match=r"0\.png has no mask"):
        prepare(model, photos(masked=False), TrainParams(masked_loss=True), CAT, seed=0)
    with pytest.raises(StudioError, match="multiples of 4"):
        prepare(model, photos(), TrainParams(resolution=66), CAT, seed=0)
    with pytest.raises(StudioError, match="no photos"):
        prepare(model, [], TrainParams(), CAT, seed=0)


def test_masks_count_only_when_asked_for(model: Model) -> None:
    plain = prepare(model, photos(), TrainParams(), CAT, seed=0).batch(STAGE, 1)
    plain.captions = ["a photo of a cat"] * 4
    assert plain.masks is not None and not (plain.masks == 1).all()  # there to be looked at
    with torch.no_grad():
        losses = [denoising_loss(model, None, batch, TrainParams()) for batch in (plain, replace(plain, masks=None))]
    assert torch.equal(losses[0]["denoising"], losses[1]["denoising"])


def test_masks_of_several_subjects_are_united(model: Model) -> None:
    (photo,) = photos(1)
    other = np.zeros((64, 64), np.uint8)
    other[50:60, 50:60] = 255
    photo.masks = {"my-cat": photo.masks[""], "my-dog": other, "tree": np.full((64, 64), 255, np.uint8)}
    both = (*CAT, Subject("<my-dog>", "dog"))
    made = prepare(model, [photo], TrainParams(masked_loss=True), both, seed=0).sources[0]
    assert made.mask is not None and np.array_equal(made.mask, np.maximum(photo.masks["my-cat"], other))
    assert made.caption == "a photo of <my-cat> and <my-dog>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "a photo of <my-cat>"),
        ("", "a photo of <my-cat>"),
        ("a red cat and a cat on sand", "a red <my-cat> and a cat on sand"),
        ("A CAT, sleeping", "A <my-cat>, sleeping"),
        ("<my-cat> beside a cat", "<my-cat> beside a cat"),
        ("a concat of cat", "a concat of <my-cat>"),
    ],
)
def test_captions(text: str | None, expected: str) -> None:
    assert caption(text, CAT) == expected


def test_captions_of_several_subjects_and_without_the_noun() -> None:
    robots = (Subject("<a>", "toy robot"), Subject("<b>", "toy robot"))
    assert caption("a toy  robot and a toy robot", robots) == "a <a> and a <b>"
    for text in ("a photo of a dog", "cats", "a cat-like dog"):
        with pytest.raises(StudioError, match="does not name 'cat'"):
            caption(text, CAT, "x.txt")


def test_what_the_subject_was_called_before_is_the_subject() -> None:
    assert caption("a photo of <tom>, and <tom> again", CAT) == "a photo of <my-cat>, and <my-cat> again"
    assert caption("a cat beside <tom>", CAT) == "a <my-cat> beside <tom>"
    with pytest.raises(StudioError, match="does not name 'cat'"):
        caption("<tom> beside <max>", CAT)
    assert class_prompt(Subject("<x>", "owl")) == "a photo of an owl"


def test_masked_loss_does_not_depend_on_the_area() -> None:
    error = torch.full((3, 4, 16, 16), 2.0)
    masks = torch.zeros(3, 1, 16, 16)
    masks[0, :, :4, :4], masks[1, :, :8], masks[2] = 1, 1, 1
    assert torch.allclose(masked_mean(error, masks, 0.0), torch.tensor([2.0, 2.0, 2.0]))
    error[:, :, 15] = 100.0  # outside of the first two
    assert torch.allclose(masked_mean(error, masks, 0.0)[:2], torch.tensor([2.0, 2.0]))
    assert torch.allclose(masked_mean(error, masks, 1.0), error.mean(dim=(1, 2, 3)))
    masks[0] = 0
    masks[0, 0, 0, 0] = 1  # one cell counts as one of sixteen
    assert masked_mean(error, masks, 0.0)[0].item() == pytest.approx(2.0 / 16)


@pytest.mark.parametrize("kind", ["sd1", "sd2v", "sdxl"])
def test_denoising_loss_is_the_formula(kind: str) -> None:
    model = tiny_model(kind)
    params = TrainParams(masked_loss=True, prior_weight=0.5)
    plain = [replace(photo, caption="a photo of a cat") for photo in photos()]
    named = prepare(model, plain, params, (Subject("<x>", "photo"),), 0, prior=[(photos()[1].image, "a photo")])
    batch = replace(named.batch(STAGE, 1), captions=["a photo of a cat"] * 4 + ["a photo of a dog"] * 4)
    with torch.no_grad():
        losses = denoising_loss(model, None, batch, params)
        text = model.encode(batch.captions)
        scheduler: Any = DDPMScheduler.from_config(model.scheduler_config)
        noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = batch.noise
        if kind == "sd2v":
            target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        sizes = model.conditioning(text, batch.original_sizes, batch.crops, batch.target_sizes)
        error = (model.unet(noisy, batch.timesteps, text.states, **sizes).sample - target) ** 2
    assert batch.masks is not None
    mask = 0.05 + 0.95 * batch.masks[:4]
    expected = ((error[:4] * mask).sum(dim=(1, 2, 3)) / (4 * mask.sum(dim=(1, 2, 3)))).mean()
    assert losses["denoising"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["prior"].item() == pytest.approx(0.5 * error[4:].mean().item(), rel=1e-5)
    ours, wanted = diffused(model, batch.latents, batch.noise, batch.timesteps)
    assert torch.allclose(ours, noisy, atol=1e-6) and torch.allclose(wanted, target, atol=1e-6)


def test_private_chance_is_private() -> None:
    state = torch.get_rng_state()
    one, other = (torch.randn(4, generator=generator("sample", 1, "learn", 2, 3)) for _ in range(2))
    assert torch.equal(one, other) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, torch.randn(4, generator=generator("sample", 1, "learn", 23)))
