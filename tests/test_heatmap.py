"""Heat maps: right colours, right place, and numbers that can be checked by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipelines.attention.heatmap import atlas, colour, inside, iou, overlay, overlay_rgba, palette, scaled, upscale
from pipelines.attention.probe import find_sites, probe_attention
from pipelines.attention.store import MEGABYTE, AttentionStore
from pipelines.attention.take import DETAILS
from pipelines.errors import StudioError
from tests.tiny import tiny_pipeline


def spot(height: int, width: int, y: int, x: int) -> np.ndarray:
    values = np.zeros((height, width), np.float32)
    values[y, x] = 0.5
    return values


def test_the_palette_goes_from_dark_to_bright() -> None:
    table = palette()
    assert table.shape == (256, 3) and table.dtype == np.uint8 and palette() is table
    light = table @ np.array([0.299, 0.587, 0.114])
    assert light[0] < 5 and light[-1] > 230 and (np.diff(light) > -1).all()
    assert not np.array_equal(palette("viridis"), table)
    with pytest.raises(StudioError, match="'mud'"):
        palette("mud")


def test_importing_it_does_not_load_matplotlib_or_torch() -> None:
    code = "import sys, pipelines.attention.heatmap; print(*({'matplotlib', 'torch', 'diffusers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


def test_upscaling_keeps_place_and_sum() -> None:
    big = upscale(spot(4, 6, 1, 4), (40, 60))
    assert big.shape == (40, 60) and big.dtype == np.float32
    y, x = np.unravel_index(big.argmax(), big.shape)
    assert 10 <= y < 20 and 40 <= x < 50
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(spot(4, 6, 1, 4))[None, None], (40, 60), mode="bilinear"
    )
    np.testing.assert_allclose(big, reference[0, 0].numpy(), atol=1e-6)
    assert upscale(np.full((40, 60), 0.25), (4, 6)) == pytest.approx(0.25)


def test_scaling_has_a_top_and_bears_nothing() -> None:
    assert scaled(np.array([[0.0, 0.1, 0.2]])).tolist() == [[0, 0.5, 1]]
    assert scaled(np.array([[0.1, 0.4]]), top=0.2).tolist() == [[0.5, 1]]
    assert not scaled(np.zeros((2, 2))).any()
    assert np.array_equal(colour(np.zeros((2, 3))), np.broadcast_to(palette()[0], (2, 3, 3)))
    assert np.array_equal(colour(np.ones((2, 3))), np.broadcast_to(palette()[255], (2, 3, 3)))


def test_an_overlay_colours_where_the_word_looks_and_leaves_the_rest() -> None:
    picture = np.full((32, 48, 3), 100, np.uint8)
    values = np.zeros((8, 12), np.float32)
    values[2:4, 8:11] = 0.3
    shown = overlay(values, picture)
    assert shown.shape == picture.shape and shown.dtype == np.uint8 and (picture == 100).all()
    assert (shown[:, :24] == 100).all() and (shown[20:] == 100).all()
    assert np.abs(shown[10:14, 36:40].astype(int) - (palette()[255] * 0.75 + 25)).max() <= 1.5
    layer = overlay_rgba(values, (32, 48))
    assert layer.shape == (32, 48, 4) and layer[12, 38, 3] == round(255 * 0.75) and not layer[20:, :, 3].any()
    assert np.array_equal(overlay(np.zeros((8, 12)), picture), picture)
    assert np.abs(overlay(values, picture, opacity=1)[12, 38].astype(int) - palette()[255]).max() == 0


def test_without_a_picture_the_map_stands_alone() -> None:
    shown = overlay(spot(8, 12, 2, 3))
    assert shown.shape[0] * 12 == shown.shape[1] * 8 and max(shown.shape) >= 256
    assert np.array_equal(shown[-1, -1], palette()[0])


def test_the_mass_inside_a_mask() -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[:, :48] = 255
    values = np.ones((8, 12), np.float32)
    assert inside(values, mask) == pytest.approx(0.5)
    assert inside(spot(8, 12, 3, 2), mask) == pytest.approx(1)
    assert inside(spot(8, 12, 3, 9), mask) == pytest.approx(0)
    assert inside(values, np.zeros_like(mask)) == 0 == inside(np.zeros((8, 12)), mask)
    assert inside(values, mask > 0) == pytest.approx(0.5)
    with pytest.raises(StudioError, match="grey"):
        inside(values, np.zeros((8, 12, 3)))


def test_iou_at_a_threshold() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    values = mask.astype(np.float32) * 0.01
    assert iou(values, mask) == 1
    values[2:6, 6] = 0.006
    assert iou(values, mask, 0.5) == pytest.approx(16 / 20) and iou(values, mask, 0.7) == 1
    assert iou(np.zeros((8, 8)), np.zeros((8, 8))) == 0 == iou(np.zeros((8, 8)), mask)


@pytest.fixture(scope="module", params=list(DETAILS))
def store(request: pytest.FixtureRequest) -> AttentionStore:
    """Two pictures of 10x16 latents, four steps, each amount of detail."""
    unet = tiny_pipeline("sd1").unet
    sites = [site.on((10, 16)) for site, _ in find_sites(unet) if site.kind == "cross"]
    budget = 4 * 2 * 2 * DETAILS[request.param].cells(sites, 4) / MEGABYTE
    kept = AttentionStore({"cat": [5], "<dog>": [7, 8]}, budget_mb=budget)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), probe_attention(unet, kept) as tap:
        for index in range(4):
            tap.at(type(tap.step)(index, 4))
            latents = torch.randn(2, 4, 10, 16, generator=generator)
            unet(latents, 900 - index, torch.randn(2, 77, 32, generator=generator))
    assert kept.detail == request.param
    return kept


def test_every_cell_of_the_atlas_is_its_map(store: AttentionStore) -> None:
    sheet, index = atlas(store, "<dog>", row=1)
    assert json.loads(json.dumps(index)) == index
    height, width = index["cell"]
    assert (height, width) == (10, 16) and index["steps"] == store.steps and index["heads"] == (store.detail != "mean")
    assert sheet.dtype == np.uint8
    assert sheet.shape == (height * len(index["tracks"]), width * (1 + len(store.steps)))
    assert [t["site"] for t in index["tracks"] if t["head"] is None] == [None, *(s.name for s in store.sites())]
    for row, track in enumerate(index["tracks"]):
        for column, step in enumerate([None, *store.steps]):
            cell = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
            if track["head"] is not None and step is not None and store.detail != "heads":
                assert not cell.any()
                continue
            values = store.maps("<dog>", step, track["site"], track["head"], (height, width))[1]
            np.testing.assert_allclose(cell / 255 * track["top"], values, atol=track["top"] / 500)
        assert sheet[row * height : (row + 1) * height].max() == 255


def test_a_small_atlas_shrinks_its_cells_and_then_leaves_heads_out(store: AttentionStore) -> None:
    whole, full = atlas(store, "cat")
    if not full["heads"]:
        return
    _, small = atlas(store, "cat", max_pixels=whole.size - 1)
    assert not small["heads"]  # half of 10 is under 8 pixels
    sheet, index = atlas(store, "cat", max_pixels=1)
    assert index["cell"] == [10, 16] and sheet.shape[0] == 10 * (1 + len(store.sites()))


def test_unknown_words_and_pictures_are_refused(store: AttentionStore) -> None:
    with pytest.raises(StudioError, match="<dog>"):
        atlas(store, "fox")
    with pytest.raises(StudioError, match="0 to 1"):
        atlas(store, "cat", row=2)
