"""A newcomer's whole way through the studio in a real browser; then the ways that go wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import PATIENCE, Site, new_site
from tests.browser.server import running

UPLOAD = "[data-testid='Add photos-upload-button']"
IMPORT = "[data-testid='Choose the file-upload-button']"
expect.set_options(timeout=PATIENCE)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def trained_steps(page: Page) -> int:
    return int(page.locator("#train-live .live").get_attribute("data-step") or 0)


def wait_for_step(page: Page, step: int) -> None:
    page.wait_for_function(
        "step => Number(document.querySelector('#train-live .live')?.dataset.step) >= step", arg=step
    )


def state(page: Page, panel: str) -> str:
    return page.locator(f"{panel} .live").get_attribute("data-state") or ""


def wait_for_end(page: Page, panel: str, how: str = "done") -> None:
    page.wait_for_selector(f"{panel} .live:is([data-state=done], [data-state=failed], [data-state=stopped])")
    assert state(page, panel) == how, page.inner_text(panel)


def generate(page: Page, prompt: str) -> None:
    tab(page, "Generate")
    page.fill("#prompt textarea", prompt)
    page.wait_for_selector(f"#prompt-chips .chip >> nth={len(prompt.split()) - 1}")
    page.press("#prompt textarea", "Control+Enter")


def test_a_newcomers_journey(grounds: Site, browser: Browser, tmp_path: Path) -> None:
    site = new_site(tmp_path / "workspace", grounds.base, grounds.example)
    with running(site.workspace, site.base, site.example, site.port):
        page = site.open(browser)
        train_the_example(site, browser, page)
        generate_with_it(page)
        look_at_its_attention(page)
        find_it_in_the_library(page)
        page.context.close()
    assert site.complaints == []


def train_the_example(site: Site, browser: Browser, page: Page) -> None:
    page.click("#example-button")
    expect(page.locator("#jobs .job", has_text="Train my-robot")).to_be_visible()

    # loss and heat map move
    page.wait_for_selector("#train-heatmap img")
    heat = page.get_attribute("#train-heatmap img", "src")
    line = page.get_attribute("#train-live .plot polyline", "points")
    page.wait_for_function("old => document.querySelector('#train-heatmap img').src !== old", arg=heat)
    assert page.get_attribute("#train-live .plot polyline", "points") != line
    assert "of its attention is on the subject" in page.inner_text("#train-live")

    # a reload in the middle, and a second browser, find the run again
    before = trained_steps(page)
    page.reload()
    wait_for_step(page, before)
    assert len((page.get_attribute("#train-live .plot polyline", "points") or "").split()) >= before - 1
    other = site.open(browser)
    wait_for_step(other, before)
    other.context.close()
    wait_for_end(page, "#train-live")
    expect(page.locator("#toast .toast")).to_contain_text("Finished: Train my-robot")


def generate_with_it(page: Page) -> None:
    """Watching one more word."""
    tab(page, "Generate")
    page.fill("#prompt textarea", "a photo of <my-robot> in the snow")
    page.click("#prompt-chips [data-word=snow]")
    expect(page.locator("#prompt-chips [data-word=snow]")).to_have_attribute("aria-pressed", "true")
    page.click("#prompt-chips [data-word='<my-robot>']")
    expect(page.locator("#prompt-chips [data-word='<my-robot>']")).to_have_attribute("aria-pressed", "true")
    page.press("#prompt textarea", "Control+Enter")
    wait_for_end(page, "#generate-live")
    expect(page.locator("#generate-live figure.ready")).to_have_count(1)
    page.click("#results .card >> nth=0")
    expect(page.locator("#result-facts")).to_contain_text("my-robot at 1")


def look_at_its_attention(page: Page) -> None:
    """From the picture into the scrubber."""
    page.click("#result-attention")
    canvas = page.locator("#scrubber canvas")
    expect(canvas).to_have_attribute("data-cell", "0/0")
    mean = canvas.evaluate("canvas => canvas.toDataURL()")
    slide(page, "step", 5)
    expect(canvas).to_have_attribute("data-cell", "0/5")
    slide(page, "site", 1)
    expect(canvas).to_have_attribute("data-cell", "1/5")
    slide(page, "head", 2)
    expect(canvas).to_have_attribute("data-cell", "3/5")
    assert canvas.evaluate("canvas => canvas.toDataURL()") != mean
    page.click("#scrubber [data-word='<my-robot>']")
    expect(page.locator("#scrubber [data-word='<my-robot>']")).to_have_attribute("aria-pressed", "true")
    with page.expect_download() as saved:
        page.click("#scrubber [data-part=save]")
    assert saved.value.suggested_filename == "attention-my-robot.png"


def find_it_in_the_library(page: Page) -> None:
    tab(page, "Library")
    page.click("#library-cards .card >> nth=0")
    expect(page.locator("#library-details")).to_contain_text("<my-robot> (robot)")
    page.fill("#library-search input, #library-search textarea", "nothing like it")
    expect(page.locator("#library-cards")).to_contain_text("No concept has these words")


def slide(page: Page, part: str, value: int) -> None:
    page.locator(f"#scrubber [data-part={part}]").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def test_pictures_live_on_and_go(furnished: Site, browser: Browser, tmp_path: Path) -> None:
    """After a restart: history, settings from a picture and from a file, zip, delete."""
    page = furnished.open(browser)
    tab(page, "Generate")
    page.click("#results .card >> nth=0")
    page.click("#result-settings")
    expect(page.locator("#prompt textarea")).to_have_value("a photo of <my-robot> in the snow")
    expect(page.locator("#seed input, #seed textarea")).to_have_value(re.compile(r"\d+"))
    with page.expect_download() as zipped:
        page.click("#result-zip")
    assert zipped.value.suggested_filename.endswith(".zip")
    page.click("#measure button >> nth=0")
    page.click("#measure-button")
    expect(page.locator("#measure-message")).to_contain_text("Choose the concept to measure")

    picture = next(furnished.workspace.glob("results/*/0001.png"))
    page.fill("#prompt textarea", "something else")
    page.click("#drop button >> nth=0")
    page.set_input_files("#drop-file input[type=file]", picture)
    expect(page.locator("#prompt textarea")).to_have_value("a photo of <my-robot> in the snow")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.click("#drop-file [aria-label='Clear'], #drop-file [aria-label='Remove this file']")
    page.set_input_files("#drop-file input[type=file]", tmp_path / "plain.png")
    expect(page.locator("#drop-message")).to_contain_text("doesn't say how it was made")

    page.click("#result-delete")
    page.click("#result-really")
    expect(page.locator("#results")).to_contain_text("No pictures yet")
    assert not list(furnished.workspace.glob("results/*/0001.png"))
    page.context.close()


def test_library_undoes_and_exports(furnished: Site, browser: Browser, tmp_path: Path) -> None:
    page = furnished.open(browser)
    tab(page, "Library")
    page.click("#library-cards .card >> nth=0")
    with page.expect_download() as exported:
        page.click("#library-export")
    archive = tmp_path / "concept.zip"
    exported.value.save_as(archive)

    page.fill("#library-name input, #library-name textarea", "our robot")
    page.click("#library-rename")
    expect(page.locator("#library-cards")).to_contain_text("our robot")
    page.click("#library-delete")
    expect(page.locator("#library-cards")).to_contain_text("No concepts yet")
    page.click("#library-undo")
    expect(page.locator("#library-cards")).to_contain_text("our robot")

    page.click("#library-import button >> nth=0")
    page.set_input_files(IMPORT, archive)
    expect(page.locator("#import-message")).to_contain_text("my-robot is in the library")
    expect(page.locator("#library-cards .card")).to_have_count(2)
    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"PK\x03\x04 nothing")
    page.set_input_files(IMPORT, bad)
    expect(page.locator("#import-message .problem")).to_be_visible()
    page.context.close()


def test_what_cannot_be_is_told_in_place(site: Site, browser: Browser, tmp_path: Path) -> None:
    """Bad input gets its sentence and loses nothing."""
    page = site.open(browser)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files(UPLOAD, tmp_path / "broken.png")
    expect(page.locator("#photos-message")).to_contain_text("broken.png")

    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        Image.fromarray(rng.integers(0, 255, (80, 96, 3), np.uint8)).save(tmp_path / f"{name}.png")
    files = [tmp_path / f"{name}.png" for name in ("one", "two", "three")]
    page.set_input_files(UPLOAD, files)
    expect(page.locator("#train-gallery .card")).to_have_count(3)
    page.click("#train-gallery .card >> nth=1")
    page.fill("#photo-caption textarea", "a photo of <thing>")
    for key in ("Enter", "Enter"):  # an empty line stands between two captions
        page.press("#photo-caption textarea", key)
    page.type("#photo-caption textarea", "<thing> again")
    page.click("#photo-save")
    expect(page.locator("#train-gallery")).to_contain_text("a photo of <thing>")
    page.click("#train-gallery .card >> nth=1")
    expect(page.locator("#photo-caption textarea")).to_have_value("a photo of <thing>\n\n<thing> again")

    page.click("#train-button")
    expect(page.locator("#train-message")).to_contain_text("What is it?")
    page.fill("#train-noun input, #train-noun textarea", "thing")
    page.fill("#train-name input, #train-name textarea", "thing")
    page.fill("#param-steps input", "0")
    page.click("#train-button")
    expect(page.locator("#train-message")).to_contain_text("steps")

    tab(page, "Generate")
    page.click("#generate-button")
    expect(page.locator("#generate-message")).to_contain_text("The prompt is empty")
    generate(page, "a photo of <nobody> here")
    expect(page.locator("#generate-message")).to_contain_text("no concept <nobody>")
    page.context.close()


def test_a_file_of_prompts_is_painted(furnished: Site, browser: Browser, tmp_path: Path) -> None:
    """Instead of the prompt, until it is taken out."""
    page = furnished.open(browser)
    tab(page, "Generate")
    page.click("#prompt-file button >> nth=0")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    page.set_input_files("#prompt-file-drop-zone input[type=file]", tmp_path / "binary.txt")
    expect(page.locator("#prompt-file-told .problem")).to_contain_text("is no UTF-8 text")
    page.click("#prompt-file-drop")
    expect(page.locator("#prompt-file-row")).to_be_hidden()
    (tmp_path / "prompts.txt").write_text("a photo of <my-robot>\n\na photo of a dog\n")
    page.set_input_files("#prompt-file-drop-zone input[type=file]", tmp_path / "prompts.txt")
    expect(page.locator("#prompt-file-told")).to_contain_text("the 2 prompts in prompts.txt instead")
    page.click("#generate-button")
    expect(page.locator("#generate-message")).to_contain_text("2 prompts, 2 pictures")
    expect(page.locator("#generate-live .live[data-state=done] figure.ready")).to_have_count(2)
    expect(page.locator("#generate-live")).to_contain_text("a photo of a dog")
    page.click("#prompt-file-drop")
    page.click("#generate-button")
    expect(page.locator("#generate-message")).to_contain_text("The prompt is empty")
    page.context.close()


def test_class_pictures_can_be_chosen(site: Site, browser: Browser, tmp_path: Path) -> None:
    """The form reads them only when it is drawn, so the page could take the list for an output."""
    page = site.open(browser)
    page.click("#classes button >> nth=0")
    page.fill("#train-noun input, #train-noun textarea", "")
    page.click("#classes-button")
    expect(page.locator("#classes-message")).to_contain_text("What is it?")
    row = {"id": "x", "file_name": "1.png", "mask_path": "m1.png", "text": "A photo of a cat"}
    (tmp_path / "class_metadata.jsonl").write_text(f"{json.dumps({'id': {'x': 'cat'}})}\n{json.dumps(row)}\n")
    for name in ("1.png", "m1.png"):
        Image.new("L", (64, 64), 255).save(tmp_path / name)
    page.set_input_files(UPLOAD, sorted(tmp_path.iterdir()))
    page.click("#train-classes input")
    page.get_by_role("option", name="1 of cat").click()
    expect(page.locator("#train-classes input")).to_have_value("1 of cat")
    for field in ("noun", "name"):
        page.fill(f"#train-{field} input, #train-{field} textarea", "cat")
    page.click("#train-advanced button >> nth=0")
    page.fill("#param-prior_weight input", "0")
    page.click("#train-button")
    expect(page.locator("#train-message .problem")).to_contain_text("count only where prior_weight is above 0")
    page.context.close()


def test_a_reload_keeps_what_was_filled_in(furnished: Site, browser: Browser, tmp_path: Path) -> None:
    """And leaves out what is gone meanwhile: a photo set, a concept."""
    page = furnished.open(browser)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "mine.png")
    page.set_input_files(UPLOAD, tmp_path / "mine.png")
    expect(page.locator("#train-gallery .card")).to_have_count(1)
    expect(page.locator("#train-noun input, #train-noun textarea")).to_have_value("")
    page.click("#train-more")
    for field, text in (("noun", "cat"), ("name", "my-cat"), ("noun-2", "dog"), ("name-2", "my-dog")):
        page.fill(f"#train-{field} input, #train-{field} textarea", text)
    page.get_by_label("Seg-Mix").check()
    tab(page, "Generate")
    page.fill("#seed input, #seed textarea", "42")
    page.click("#generate-concepts input")
    page.get_by_role("option", name="my-robot").first.click()
    expect(page.locator("#prompt textarea")).to_have_value(re.compile("<my-robot>"))
    page.fill("#prompt textarea", "something else")  # the word was taken out by hand, and stays out
    page.fill("#strength-0 input[type=number]", "0.5")
    page.press("#strength-0 input[type=number]", "Tab")
    page.wait_for_timeout(1000)

    page.reload()
    expect(page.locator("#train-gallery .card")).to_have_count(1)
    for field, text in (("noun", "cat"), ("name", "my-cat"), ("noun-2", "dog"), ("name-2", "my-dog")):
        expect(page.locator(f"#train-{field} input, #train-{field} textarea")).to_have_value(text)
    expect(page.get_by_label("Seg-Mix")).to_be_checked()
    tab(page, "Generate")
    expect(page.locator("#seed input, #seed textarea")).to_have_value("42")
    expect(page.locator("#generate-concepts")).to_contain_text("my-robot")
    expect(page.locator("#strength-0 input[type=number]")).to_have_value("0.5")
    expect(page.locator("#prompt textarea")).to_have_value("something else")

    (dataset,) = [path.parent for path in furnished.workspace.glob("datasets/*/mine.png")]
    dataset.rename(tmp_path / "gone")
    concepts = list(furnished.workspace.glob("concepts/*/concept.json"))
    for concept in concepts:
        concept.parent.rename(tmp_path / concept.parent.name)
    page.reload()
    expect(page.locator("#train-gallery .card")).to_have_count(5)  # the example's
    expect(page.locator("#train-noun input, #train-noun textarea")).to_have_value("cat")
    tab(page, "Generate")
    expect(page.locator("#seed input, #seed textarea")).to_have_value("42")
    expect(page.locator("#generate-concepts")).not_to_contain_text("my-robot")
    for concept in concepts:
        (tmp_path / concept.parent.name).rename(concept.parent)
    page.context.close()


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_broken_off_training_goes_on(grounds: Site, browser: Browser, tmp_path: Path, how: str) -> None:
    """Stop and keep, or a program that dies: either way the run is offered again and goes on where it was."""
    mine = new_site(tmp_path / "workspace", grounds.base, grounds.example)
    with running(mine.workspace, mine.base, mine.example, mine.port) as process:
        page = mine.open(browser)
        page.fill("#param-steps input", "400")
        page.fill("#train-noun input, #train-noun textarea", "robot")
        page.fill("#train-name input, #train-name textarea", f"robot-{how}")
        page.locator("#train-advanced button").first.click()
        page.fill("#param-checkpoint_every input", "5")
        page.fill("#param-prior_weight input", "0")
        page.click("#train-button")
        wait_for_step(page, 12)
        if how == "stopped":
            page.keyboard.press("Escape")
            wait_for_end(page, "#train-live", "stopped")
        else:
            process.kill()
            process.wait()
        page.context.close()
    mine.complaints.clear()  # a page whose server is gone complains, rightly
    with running(mine.workspace, mine.base, mine.example, mine.port):
        page = mine.open(browser)
        row = page.locator("#train-unfinished .run", has_text=f"robot-{how}")
        row.get_by_role("button", name="Resume").click()
        wait_for_step(page, 15)
        expect(page.locator("#train-live")).to_contain_text("Going on after step")
        page.locator("#jobs .job.running button.halt").click()
        wait_for_end(page, "#train-live", "stopped")
        row.get_by_role("button", name="Throw away").click()
        assert list(mine.workspace.glob("runs/*/run.json"))  # one click is not enough
        row.get_by_role("button", name="Throw away for good?").click()
        expect(row).to_have_count(0)
        page.context.close()
    assert not list(mine.workspace.glob("runs/*/run.json")) and not list(mine.workspace.glob("concepts/*/concept.json"))
    assert mine.complaints == []


def test_nothing_of_the_workspace_is_served(site: Site, browser: Browser) -> None:
    page = site.open(browser)
    secret = site.workspace / "secret.txt"
    secret.write_text("mine")
    for route in ("file=", "gradio_api/file=", "gradio_api/file/"):
        assert page.request.get(f"{site.url}/{route}{secret}").status in (403, 404)
    page.context.close()
