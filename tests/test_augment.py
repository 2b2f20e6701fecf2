"""Photos turned by chance: all of it stays to be seen, masks turn along, corners are nobody's, no other draw shifts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.augment import Augment, turn
from pipelines.concept import Subject
from pipelines.data import prepare
from pipelines.methods import Stage
from pipelines.params import TrainParams
from pipelines.photos import Photo
from pipelines.prior import ClassPicture
from pipelines.sources import Source
from tests.tiny import tiny_model

CAT = (Subject("<my-cat>", "cat"),)


def photo(size: tuple[int, int] = (64, 80)) -> Photo:
    """White with a red block, which the mask marks."""
    image, mask = np.full((*size, 3), 255, np.uint8), np.zeros(size, np.uint8)
    image[20:40, 30:50], mask[20:40, 30:50] = (250, 0, 0), 255
    return Photo(Path("x.png"), image, {"": mask}, None, size[::-1])


@pytest.mark.parametrize("angle", [0.0, 20.0, -45.0, 90.0])
def test_all_of_the_photo_is_on_the_larger_canvas(angle: float) -> None:
    image = np.full((60, 90), 200, np.uint8)
    radians = np.radians(abs(angle))
    turned = turn(image, angle, "black")
    expected = (
        np.ceil(60 * np.cos(radians) + 90 * np.sin(radians)),
        np.ceil(90 * np.cos(radians) + 60 * np.sin(radians)),
    )
    assert np.allclose(turned.shape, expected, atol=1)
    assert abs(int((turned > 100).sum()) - 60 * 90) < 300  # of 5400
    if angle % 90:
        assert turned[0, 0] == turned[-1, -1] == 0
        assert turn(image, angle, "mirror").min() > 190


def test_it_turns_counter_clockwise_like_its_mask() -> None:
    one = photo()
    image, mask = (turn(part, 90.0, "black") for part in (one.image, one.masks[""]))
    red = (image[..., 0] > 128) & (image[..., 1] < 128)
    assert np.abs(red.astype(int) - (mask > 128)).mean() < 0.02
    rows, columns = np.nonzero(red)
    assert abs(rows.mean() - (80 - 39.5)) < 2 and abs(columns.mean() - 29.5) < 2


def test_how_often_and_how_far() -> None:
    source = Source(photo().image, "x", (640, 800), {"<my-cat>": photo().masks[""]}, ("<my-cat>",))
    augment, turned, sizes = Augment(45.0, 0.75), 0, set()
    for seed in range(200):
        made = augment.turned(source, torch.Generator().manual_seed(seed), 64)
        if made is source:
            continue
        turned += 1
        sizes.add(made.original)
        assert min(made.image.shape[:2]) == 64 and made.masks["<my-cat>"].shape == made.image.shape[:2]
        assert made.original[0] >= 640 and made.original[1] >= 790
    assert 0.65 < turned / 200 < 0.85 and len(sizes) > 30
    assert Augment().turned(source, torch.Generator(), 64) is source
    again = [augment.turned(source, torch.Generator().manual_seed(3), 64).image for _ in range(2)]
    assert np.array_equal(*again)


def rows(augment: Augment | None, flip: bool = False, **options: Any) -> Any:
    model = tiny_model("sd1")
    prior = [ClassPicture(photo((64, 64)).image, "a photo of a cat")]
    params = TrainParams(flip=flip, prior_weight=1.0, masked_loss=True)
    data = prepare(model, [photo()], params, CAT, seed=2, prior=prior, augment=augment, **options)
    return data, [data.batch(Stage("test", 6, 4), step) for step in range(1, 4)]


def test_a_turned_photo_is_a_row_of_its_own_and_shifts_no_other_draw() -> None:
    plain_data, plain = rows(None)
    data, turned = rows(Augment(45.0, 0.5))
    differs = 0
    for one, two in zip(plain, turned, strict=True):
        assert torch.equal(one.noise, two.noise) and torch.equal(one.timesteps, two.timesteps)
        assert torch.equal(one.latents[4:], two.latents[4:])  # class pictures stand upright
        alike = [torch.equal(a, b) for a, b in zip(one.latents[:4], two.latents[:4], strict=True)]
        differs += alike.count(False)
        assert two.masks is not None and bool((two.masks.flatten(1).sum(1) > 0).all())
    assert 2 < differs < 10
    assert len(data.latents._kept) <= len(plain_data.latents._kept)  # no angle is seen twice
    _, again = rows(Augment(45.0, 0.5))
    assert all(torch.equal(one.latents, two.latents) for one, two in zip(turned, again, strict=True))


def test_the_chance_of_mirroring_counts_only_where_photos_are_mirrored() -> None:
    never, always = (rows(Augment(flip_chance=chance), flip=True)[1] for chance in (0.0, 1.0))
    off, none = (rows(augment)[1] for augment in (Augment(flip_chance=1.0), None))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(off, none, strict=True))
    assert all(torch.equal(a.latents[:4], b.latents[:4]) for a, b in zip(never, none, strict=True))
    assert not any(torch.equal(a.latents[:4], b.latents[:4]) for a, b in zip(always, none, strict=True))
