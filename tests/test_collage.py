"""Collages: every pixel is the subject's own or white, sizes and places keep the published bounds on any canvas."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.collage import Piece, Recipe, box_region, cut_mix, cut_out, seg_mix, set_in
from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.mixers import CutMixer, SegMixer, counted_prompt, relative_sizes
from pipelines.noise import generator
from pipelines.sources import Source

A, B, C = "<a>", "<b>", "<c>"
COLORS = {A: (250, 10, 10), B: (10, 250, 10), C: (10, 10, 250)}


def piece(name: str, height: int = 60, width: int = 40, hole: bool = False) -> Piece:
    """A plain block of the name's colour; with a hole, the colour in it is wrong and must never show."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = COLORS[name]
    mask = np.full((height, width), 255, np.uint8)
    if hole:
        image[20:40, 10:30], mask[20:40, 10:30] = (0, 0, 0), 0
    return Piece(name, image, mask)


def source(name: str, number: int = 0, side: int = 64) -> Source:
    """A grey photo with a block of the subject's colour, whose mask it has."""
    image = np.full((side, side, 3), 90, np.uint8)
    mask = np.zeros((side, side), np.uint8)
    image[20:50, 10 + number : 40] = COLORS[name]
    mask[20:50, 10 + number : 40] = 255
    return Source(image, f"a photo of {name}", (side, side), {name: mask}, (name,))


def like(image: NDArray[np.uint8], name: str) -> NDArray[np.bool_]:
    return np.asarray((image == np.array(COLORS[name], np.uint8)).all(-1))


def test_inside_the_masks_are_the_subjects_and_outside_is_white() -> None:
    seen = set()
    for seed in range(40):
        made = seg_mix([piece(A), piece(B)], (256, 256), Recipe(), generator("t", seed))
        assert made.image.shape == (256, 256, 3) and made.image.dtype == np.uint8
        for name, mask in made.masks.items():
            assert set(np.unique(mask)) <= {0, 255} and np.array_equal(mask > 0, like(made.image, name))
        assert np.array_equal(made.mask == 0, (made.image == 255).all(-1))
        (a, b) = (made.boxes[name] for name in (A, B))
        overlap = a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        if overlap:
            whole = {name: (box[2] - box[0]) * (box[3] - box[1]) for name, box in made.boxes.items()}
            (top,) = [name for name, mask in made.masks.items() if (mask > 0).sum() == whole[name]]
            seen.add(("on top", top))
        seen.add(("left", A if a[0] + a[2] < b[0] + b[2] else B))
    assert seen == {("on top", A), ("on top", B), ("left", A), ("left", B)}


def test_what_the_mask_leaves_out_never_shows() -> None:
    made = seg_mix([piece(A, hole=True), piece(B)], (256, 256), Recipe(), generator("t", 3))
    assert not (made.image == 0).all(-1).any()


@pytest.mark.parametrize("side", [1024, 64])
def test_sizes_and_places_keep_the_published_bounds(side: int) -> None:
    """At 1024: a box of 480 x 992, 0.75 to 1 of it, 1 to 256 from the edges. Elsewhere the same shares."""
    lefts, rights, tops, widths = [], [], [], []
    for seed in range(150 if side == 64 else 40):
        made = seg_mix([piece(A, 30, 30), piece(B, 30, 30)], (side, side), Recipe(), generator("t", seed))
        boxes = sorted(made.boxes.values())
        lefts.append(boxes[0][0])
        rights.append(side - boxes[1][2])
        tops += [box[1] for box in boxes]
        widths += [box[2] - box[0] for box in boxes]
        assert all(0 <= box[0] < box[2] <= side and 0 <= box[1] < box[3] <= side for box in boxes)
    fits = side * 480 // 1024
    assert int(0.75 * fits) <= min(widths) < 0.85 * fits < 0.92 * fits < max(widths) <= fits
    for edges in (lefts, rights):
        assert 1 <= min(edges) < 0.1 * side < 0.2 * side < max(edges) <= side // 4
    assert min(tops) < 0.1 * side and max(tops) > 0.4 * side
    tall = seg_mix([piece(A, 400, 10), piece(B)], (side, side), Recipe(smallest=1.0), generator("t", 0)).boxes[A]
    assert tall[3] - tall[1] == side * 992 // 1024


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_any_number_stands_on_a_canvas_that_need_not_be_square(count: int) -> None:
    pieces = [Piece(f"<{n}>", piece(A).image, piece(A).mask) for n in range(count)]
    made = seg_mix(pieces, (192, 320), Recipe(), generator("t", count))
    assert made.masks.keys() == {one.name for one in pieces} and made.image.shape == (192, 320, 3)
    for box in made.boxes.values():
        assert 0 <= box[0] < box[2] <= 320 and 0 <= box[1] < box[3] <= 192
    assert all((mask > 0).any() for mask in made.masks.values())
    rows = -(-count // 3)
    assert all(box[3] - box[1] <= 192 / rows - 192 / 32 for box in made.boxes.values())


def test_relative_sizes_are_exact_and_other_draws_stay() -> None:
    plain = seg_mix([piece(A, 30, 30), piece(B, 30, 30)], (1024, 1024), Recipe(), generator("t", 5))
    for sizes in ({A: 1.0, B: 0.5}, {A: 0.25, B: 1.0}):
        made = seg_mix([piece(A, 30, 30), piece(B, 30, 30)], (1024, 1024), Recipe(sizes=sizes), generator("t", 5))
        assert {name: box[2] - box[0] for name, box in made.boxes.items()} == {
            n: int(480 * s) for n, s in sizes.items()
        }
        assert (made.boxes[A][0] < made.boxes[B][0]) == (plain.boxes[A][0] < plain.boxes[B][0])


def test_relative_sizes_are_those_of_each_of_three() -> None:
    sizes = relative_sizes("1 0.5 0.25", [Subject(name, "toy") for name in (A, B, C)])
    pieces = [piece(name, 30, 30) for name in (A, B, C)]
    for seed in range(6):  # wherever they stand
        made = seg_mix(pieces, (960, 960), Recipe(sizes=sizes), generator("t", seed))
        widths = [box[2] - box[0] for box in made.boxes.values()]
        assert widths == pytest.approx([290, 145, 72.5], abs=1)  # a third of 960 without the gutter


def test_a_grey_mask_is_the_subject_above_122() -> None:
    """As published, wherever a mask's edge was smoothed."""
    image = np.full((40, 40, 3), COLORS[A], np.uint8)
    mask = np.repeat(np.array([255, 125, 123, 122, 100, 60, 0, 255], np.uint8), 5)[:, None].repeat(40, 1)
    seen = np.array([True, True, True, False, False, False, False, True]).repeat(5)
    whole = np.full((40, 40), 255, np.uint8)
    made = set_in([cut_out(A, image, mask)], {A: whole}, (40, 40))
    assert (made.masks[A].all(1) == seen).all() and (made.masks[A].any(1) == seen).all()
    assert np.array_equal(like(made.image, A), made.masks[A] > 0)
    halves = cut_mix((A, image, mask), (B, image, None), (40, 40))
    assert (halves.masks[A][:, :20].all(1) == seen).all() and (halves.masks[A][:, :20].any(1) == seen).all()


def test_order_level_and_flip_are_as_asked() -> None:
    recipe = Recipe(swap=False, level=True)
    for seed in range(8):
        made = seg_mix([piece(A), piece(B, 30, 40)], (256, 256), recipe, generator("t", seed))
        assert made.boxes[A][0] < made.boxes[B][0] and made.boxes[A][1] == made.boxes[B][1]
    half = Piece(A, piece(A).image, piece(A).mask.copy())
    half.mask[:, :20] = 0
    sides = set()
    for seed in range(12):
        made = seg_mix([half], (128, 128), Recipe(flip=True), generator("t", seed))
        left, _, right, _ = made.boxes[A]
        sides.add(bool(made.masks[A][:, left : (left + right) // 2 - 1].any()))
    assert sides == {True, False}


def test_the_same_chance_is_the_same_collage() -> None:
    one, other, third = (seg_mix([piece(A), piece(B)], (96, 96), Recipe(), generator("t", seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.image, other.image) and not np.array_equal(one.image, third.image)


def test_the_cut_out_keeps_its_last_row_and_column() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 7:19] = 255
    mask[0, 0] = 128  # not above the threshold
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    cut = cut_out(A, image, mask)
    assert cut.mask.shape == (5, 12) and np.array_equal(cut.image, image[4:9, 7:19])
    with pytest.raises(StudioError, match="mask of <a> is empty"):
        cut_out(A, image, np.zeros((20, 30), np.uint8))
    with pytest.raises(StudioError, match="each subject once"):
        seg_mix([piece(A), piece(A)], (64, 64), Recipe(), generator("t"))


def test_painted_places_hold_their_subject() -> None:
    regions = {A: box_region((0.1, 0.2, 0.5, 0.9), (100, 200)), B: np.zeros((100, 200), np.uint8)}
    regions[B][10:90, 120:180] = 255
    regions[B][10:40, 120:150] = 0  # a corner that isn't painted
    made = set_in([piece(A), piece(B)], regions, (100, 200))
    left, top, right, bottom = made.boxes[A]
    assert (left, top, right, bottom) == (37, 20, 83, 90)  # 46 x 70 in the middle of 80 x 70
    assert not made.masks[B][10:40, 120:150].any() and made.masks[B][50:80, 130:170].all()
    with pytest.raises(StudioError, match="No place is marked for <b>"):
        set_in([piece(B)], {A: regions[A]}, (100, 200))
    with pytest.raises(StudioError, match="200 x 100 pixels, the picture 64 x 64"):
        set_in([piece(A)], regions, (64, 64))
    with pytest.raises(StudioError, match="has no area"):
        box_region((0.5, 0.5, 0.5, 0.9), (64, 64))


def test_cut_mix_shows_half_of_each() -> None:
    one, other = source(A), source(B, side=96)
    made = cut_mix((A, one.image, one.masks[A]), (B, other.image, None), (64, 64))
    assert like(made.image[:, :32], A).any() and not like(made.image[:, 32:], A).any()
    assert not made.masks[A][:, 32:].any() and made.masks[B][:, 32:].all() and not made.masks[B][:, :32].any()
    assert np.array_equal(made.masks[A][:, :32] > 0, like(made.image[:, :32], A))
    assert np.flatnonzero(made.masks[A].any(0)).tolist() == list(range(1, 31))  # centred, with all it has


def test_seg_mixer_mixes_as_often_as_asked_and_names_whom_it_shows() -> None:
    sources = [source(A, n) for n in range(3)] + [source(B, n) for n in range(2)] + [source(C)]
    mixer, partners, mixed = SegMixer((A, B, C), 0.3), set(), 0
    for seed in range(300):
        made = mixer.mix(sources[0], sources, generator("m", seed), 64)
        if made is sources[0]:
            continue
        mixed += 1
        assert made.image.shape == (64, 64, 3) and made.original == (64, 64) and len(made.masks) == 2
        assert made.shows == tuple(made.masks) and made.shows[0] == A and made.shows[1] != A
        assert made.caption == f"a photo of a <a> and a {made.shows[1]}, simple background."
        assert all(np.array_equal(mask > 0, like(made.image, name)) for name, mask in made.masks.items())
        partners.add(made.shows[1])
    assert 60 < mixed < 120 and partners == {B, C}  # 90 expected
    three = SegMixer((A, B, C), 1.0, count=3, phrases={A: "cat"}).mix(sources[0], sources, generator("m", 1), 64)
    assert set(three.shows) == {A, B, C}
    assert three.caption in [f"a photo of a cat, a {x} and a {y}, simple background." for x, y in ((B, C), (C, B))]
    assert all(SegMixer((A, B), 0.0).mix(s, sources, generator("m"), 64) is s for s in sources)


def test_mixers_are_pure_and_leave_the_global_state_alone() -> None:
    sources = [source(A), source(B), source(C)]
    state = torch.random.get_rng_state()
    for mixer in (SegMixer((A, B, C), 1.0), CutMixer((A, B, C), 1.0)):
        first, again = (mixer.mix(sources[1], sources, generator("m", 7), 64) for _ in range(2))
        assert np.array_equal(first.image, again.image) and first.caption == again.caption
    assert torch.equal(state, torch.random.get_rng_state())


def test_only_subjects_with_masks_of_their_own_are_cut_out() -> None:
    both = source(A)
    shared = Source(both.image, "a photo of <a> and <b>", (64, 64), {A: both.masks[A], B: both.masks[A]}, (A, B))
    mixer = SegMixer((A, B), 1.0)
    assert mixer.mix(shared, [shared, source(B)], generator("m"), 64) is shared
    for lonely in ([source(A)], [source(A), shared]):
        with pytest.raises(StudioError, match="no photo has a mask of <b> alone"):
            mixer.mix(source(A), lonely, generator("m"), 64)
    mixer.check([source(A), source(B)])
    with pytest.raises(StudioError, match="Cut-Mix needs a photo of <b> alone"):
        CutMixer((A, B)).check([source(A), shared])


def test_cut_mixer_says_the_sides_it_shows() -> None:
    sources = [source(A), source(B)]
    captions = set()
    for seed in range(60):
        made = CutMixer((A, B), 1.0).mix(sources[seed % 2], sources, generator("m", seed), 64)
        captions.add(made.caption)
        left = A if like(made.image[:, :32], A).any() else B
        assert like(made.image[:, 32:], A if left == B else B).any()
        if "left" in made.caption:
            other = A if left == B else B
            assert made.caption == f"a photo of a {left} on the left and a {other} on the right"
    assert len(captions) == 4  # either on the left, either named first
    for sides, says in (("always", True), ("never", False)):
        mixer = CutMixer((A, B), 1.0, sides)
        made = [mixer.mix(sources[0], sources, generator("m", seed), 64).caption for seed in range(10)]
        assert all(("left" in caption) == says for caption in made)


def test_prompts_and_sizes_for_several() -> None:
    assert counted_prompt("a <a> and a <b> on the sand", [A, B, C]) == "a <a> and a <b> on the sand"
    three = "a <a>, a <b> and a <c> on the sand"
    assert counted_prompt(three, [C, A, B, A]) == f"3 objects: {three}"
    assert counted_prompt(three, [A, B, C], "animals") == f"3 animals: {three}"
    assert counted_prompt(f"3 toys: {three}", [A, B, C]) == f"3 toys: {three}"
    subjects = (Subject(A, "cat"), Subject(B, "dog"))
    assert relative_sizes("1, 0.5", subjects) == {A: 1.0, B: 0.5} and relative_sizes(" ", subjects) == {}
    for wrong in ("1", "1 2", "0 1", "big small", "nan 1"):
        with pytest.raises(StudioError, match="write 2 numbers from 0 to 1"):
            relative_sizes(wrong, subjects)


def test_pieces_of_a_row_stand_in_their_columns() -> None:
    """Three in a row: the middle one is between the others' middles."""
    for seed in range(10):
        made = seg_mix([piece(A), piece(B), piece(C)], (96, 192), Recipe(swap=False), generator("t", seed))
        middles = [(box[0] + box[2]) / 2 for box in made.boxes.values()]
        assert all(left < right for left, right in pairwise(middles))
