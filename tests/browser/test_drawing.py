"""Drawing in a real browser: a layout that pictures follow and a reload keeps, and masks of photos."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from pipelines import read_picture
from tests.browser.conftest import PATIENCE, Site

UPLOAD = "[data-testid='Add photos-upload-button']"
PROMPT = "a red cat and a dog on the grass"
expect.set_options(timeout=PATIENCE)


def drag(page: Page, canvas: str, *corners: float) -> None:
    """From one point to another, as shares of the canvas: left, top, right, bottom."""
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    assert box is not None
    left, top, right, bottom = corners
    page.mouse.move(box["x"] + left * box["width"], box["y"] + top * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + right * box["width"], box["y"] + bottom * box["height"], steps=4)
    page.mouse.up()


def open_layout(page: Page) -> None:
    page.get_by_role("tab", name="Generate").click()
    page.click("#layout button >> nth=0")


def drawn(page: Page, painter: str = "#painter") -> str:
    return page.locator(f"{painter} canvas").get_attribute("data-drawn") or ""


def test_a_layout_is_painted_kept_and_comes_back(site: Site, browser: Browser) -> None:
    page = site.open(browser)
    open_layout(page)
    page.fill("#prompt textarea", PROMPT)
    expect(page.locator("#painter [data-part=invite]")).to_contain_text("cat")
    drag(page, "#painter canvas", 0.02, 0.02, 0.5, 0.98)
    page.click("#painter [data-part=add]")
    page.click("#painter [data-tool=brush]")
    drag(page, "#painter canvas", 0.75, 0.25, 0.75, 0.75)
    expect(page.locator("#painter canvas")).to_have_attribute("data-drawn", re.compile(r"cat:4\d dog:\d+"))
    page.fill("#painter .region >> nth=1 >> input", "4")
    page.press("#painter .region >> nth=1 >> input", "Tab")
    page.select_option("#painter .region >> nth=1 >> select", label="grass")
    page.click("#painter [data-part=undo]")  # the word, not the weight
    expect(page.locator("#painter .region >> nth=1 >> select")).to_have_value(
        json.dumps(["dog", None], separators=(",", ":"))
    )
    before = drawn(page)

    page.reload()
    open_layout(page)
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(page.locator("#painter canvas")).to_have_attribute("data-drawn", before)
    page.click("#generate-button")
    page.wait_for_selector("#generate-live .live:is([data-state=done], [data-state=failed])")
    (picture,) = site.workspace.glob("results/*/0001.png")
    regions = read_picture(picture)["attune"]["request"]["layout"]["regions"]
    assert [(one["words"], one["weight"]) for one in regions] == [("cat", 2.5), ("dog", 4)]

    page.click("#painter [data-part=clear]")
    expect(page.locator("#painter .region")).to_have_count(0)
    page.click("#results .card >> nth=0")
    with page.expect_download() as configured:
        page.click("#result-guidance")
    assert configured.value.suggested_filename == "0001-guidance.zip"
    page.click("#result-settings")
    expect(page.locator("#painter canvas")).to_have_attribute("data-drawn", before)
    page.fill("#prompt textarea", "a red cat")
    page.click("#generate-button")
    expect(page.locator("#generate-message")).to_contain_text("'dog', which is not in the prompt")
    page.context.close()


def where(page: Page) -> list[int]:
    """Of the chosen region, as a screen reader is told: left, right, top, bottom in percent."""
    return [int(number) for number in re.findall(r"\d+", page.inner_text("#painter [data-part=said]"))]


def test_a_layout_is_made_by_keyboard(site: Site, browser: Browser) -> None:
    page = site.open(browser)
    open_layout(page)
    page.fill("#prompt textarea", PROMPT)
    expect(page.locator("#painter [data-part=invite]")).to_contain_text("cat")
    canvas = page.locator("#painter canvas")
    canvas.press("Enter")
    expect(canvas).to_have_attribute("data-drawn", "cat:25")
    assert where(page) == [25, 75, 25, 75]
    for key, times in (("ArrowLeft", 9), ("ArrowUp", 4), ("Shift+ArrowRight", 8), ("Shift+ArrowUp", 30)):
        for _ in range(times):
            canvas.press(key)
    assert where(page) == [0, 75, 13, 16]  # it stops at the edge, and never gets flat
    for _ in range(16):
        canvas.press("Shift+ArrowDown")
    assert where(page) == [0, 75, 13, 66]
    before = drawn(page)
    page.click("#painter [data-part=add]")
    canvas.press("Enter")
    assert drawn(page) != before.replace(" dog", "")  # it covers the first one
    for _ in range(40):
        canvas.press("ArrowDown")
        canvas.press("Shift+ArrowUp")
    assert drawn(page).split()[0] == before and drawn(page).split()[1].startswith("dog:")  # which is whole again
    canvas.press("Control+z")
    canvas.press("Delete")
    expect(canvas).to_have_attribute("data-drawn", before)
    page.locator("#painter .region .swatch").press("Enter")
    expect(page.locator("#painter .region .swatch")).to_be_focused()

    page.fill("#painter .region input", "4")
    page.press("#painter .region input", "Tab")
    page.fill("#painter .region input", "")
    page.press("#painter .region input", "Tab")
    expect(page.locator("#painter .region input")).to_have_value("4")
    page.click("#painter [data-part=clear]")
    page.context.close()


def test_masks_are_found_and_painted(site: Site, browser: Browser, tmp_path: Path) -> None:
    page = site.open(browser)
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"{name}.png")
    page.set_input_files(UPLOAD, [tmp_path / "one.png", tmp_path / "two.png"])
    expect(page.locator("#train-gallery .card")).to_have_count(2)
    expect(page.locator("#train-noun input, #train-noun textarea")).to_have_value("")  # no longer the example's
    page.click("#masks button >> nth=0")
    page.click("#masks-find")
    expect(page.locator("#masks-message")).to_contain_text("What do the photos show?")
    page.click("#masks-detect")
    expect(page.locator("#masks-message")).to_contain_text(re.compile("Name a detector|What do the photos show"))

    page.click("#train-gallery .card >> nth=0")
    expect(page.locator("#mask-title")).to_contain_text("one.png")
    page.click("#mask-painter [data-tool=box]")
    drag(page, "#mask-painter canvas", 0.25, 0.25, 0.75, 0.75)
    assert drawn(page, "#mask-painter") == ":25"
    page.click("#mask-save")
    expect(page.locator("#masks-message")).to_contain_text("Saved: one-masklabel.png")
    expect(page.locator("#train-gallery .badge")).to_have_count(1)
    (mask,) = site.workspace.glob("datasets/*/one-masklabel.png")
    painted = mask.read_bytes()

    page.click("#train-gallery .card >> nth=1")  # left without saving, by another photo and by Close: kept all the same
    expect(page.locator("#mask-title")).to_contain_text("two.png")
    drag(page, "#mask-painter canvas", 0.25, 0.25, 0.5, 0.75)
    assert (first := drawn(page, "#mask-painter")) in (":12", ":13")
    page.click("#train-gallery .card >> nth=0")
    expect(page.locator("#masks-message")).to_contain_text("Saved: two-masklabel.png")
    page.click("#train-gallery .card >> nth=1")
    expect(page.locator("#mask-painter canvas")).to_have_attribute("data-drawn", first)
    drag(page, "#mask-painter canvas", 0.5, 0.25, 0.75, 0.75)
    page.click("#mask-close")
    expect(page.locator("#masks-message")).to_contain_text("Saved: two-masklabel.png")
    (other,) = site.workspace.glob("datasets/*/two-masklabel.png")
    before = other.read_bytes()
    page.click("#train-gallery .card >> nth=1")
    expect(page.locator("#mask-painter canvas")).to_have_attribute("data-drawn", ":25")
    page.click("#mask-painter [data-part=clear]")
    drag(page, "#mask-painter canvas", 0.25, 0.25, 0.75, 0.75)
    page.click("#mask-painter [data-part=undo]")  # nothing is painted now, as a reload finds it
    page.wait_for_timeout(1500)  # until it is kept
    page.reload()
    expect(page.locator("#masks-message")).to_contain_text("Saved: two-masklabel.png")
    assert not other.exists()
    other.write_bytes(before)
    page.reload()  # once is enough
    expect(page.locator("#train-gallery .card")).to_have_count(2)
    page.wait_for_timeout(1500)
    assert other.read_bytes() == before
    page.click("#masks button >> nth=0")
    expect(page.locator("#masks-find")).to_be_visible()
    assert np.asarray(Image.open(other)).mean() == 255 / 4
    other.unlink()

    page.fill("#train-noun input, #train-noun textarea", "cat")
    page.click("#masks-find")
    expect(page.locator("#masks-live [data-state=done]")).to_contain_text("1 that a person made are kept")
    assert mask.read_bytes() == painted
    found = len(list(site.workspace.glob("datasets/*/two-masklabel.png")))
    expect(page.locator("#train-gallery .badge")).to_have_count(1 + found)
    page.context.close()
