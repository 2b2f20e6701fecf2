"""A browser, a tiny base, an example to train: everything local, nothing mocked."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pipelines import Library, Request, Workspace, get_method, load_model, make_pictures, train_concept
from pipelines.toybox.photos import Shoot, shoot, write_photos
from tests.browser.chromium import MISSING, find_chromium
from tests.browser.server import HOST, running
from tests.tiny import tiny_folder

PATIENCE = 300_000  # ms; the engine alone may take minutes to import on two busy cores


@dataclass
class Site:
    """Where the studio is, and what pages complained about."""

    url: str
    port: int
    workspace: Path
    base: Path
    example: Path
    complaints: list[str] = field(default_factory=list)

    def open(self, browser: Browser, **options: object) -> Page:
        """A new page in a context of its own; console errors and foreign requests are remembered."""
        page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._check(request.url))
        page.goto(self.url)
        page.wait_for_selector("#train-button")
        return page

    def _check(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.complaints.append(f"a request to {url}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Closed after each module: while Playwright runs, no other test of the process can start it."""
    found = find_chromium()
    if found is None:
        pytest.fail(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(found), args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A tiny base, five photos of one toy, an empty workspace and a free port; not served yet."""
    folder = tmp_path_factory.mktemp("studio")
    example = folder / "example"
    write_photos(shoot(Shoot(seeds=(7,), count=5, category="robot")), example)
    settings = {"steps": 150, "batch_size": 2, "sample_every": 15, "checkpoint_every": 50, "masked_loss": True}
    about = {"name": "my-robot", "noun": "robot", "method": "svdiff", "settings": settings}
    (folder / "example.json").write_text(json.dumps(about))
    return new_site(folder / "workspace", tiny_folder(folder / "base"), example)


def new_site(workspace: Path, base: Path, example: Path) -> Site:
    """A site at a free port."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    return Site(f"http://{HOST}:{port}", port, workspace, base, example)


@pytest.fixture(scope="module")
def served(grounds: Site) -> Iterator[Site]:
    """The studio, running for all tests of the module."""
    with running(grounds.workspace, grounds.base, grounds.example, grounds.port):
        yield grounds


@pytest.fixture
def site(served: Site) -> Iterator[Site]:
    """The running studio; at the end no page may have complained."""
    yield served
    complaints, served.complaints = served.complaints, []
    assert complaints == []


@pytest.fixture
def furnished(site: Site) -> Site:
    """The same with a concept and a picture of it, made without the page where there are none yet."""
    if not list(site.workspace.glob("concepts/*/concept.json")):
        _train(site)
    if not list(site.workspace.glob("results/*/0001.png")):
        _paint(site)
    return site


def _train(site: Site) -> None:
    params = get_method("svdiff").Params(steps=2, prior_weight=0, sample_every=2, train_text_encoder=False)
    names = {"method": "svdiff", "noun": "robot", "name": "my-robot"}
    list(
        train_concept(
            Workspace(site.workspace), load_model(str(site.base)), photos=site.example, params=params, **names
        )
    )


def _paint(site: Site) -> None:
    workspace = Workspace(site.workspace)
    request = Request("a photo of <my-robot> in the snow", seeds=(5,), steps=4)
    (concept, *_) = Library(workspace).concepts()
    concepts = [(Library(workspace).load(concept.name), 1.0)]
    list(make_pictures(workspace, load_model(str(site.base)), request, concepts, attention=["snow", "<my-robot>"]))
