"""What the attention store keeps is what was there, no more than the budget allows, for every picture and size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.attention.probe import Columns, Edit, Site, Step, find_sites, probe_attention
from pipelines.attention.store import MEGABYTE, AttentionStore
from pipelines.attention.take import DETAILS
from pipelines.errors import StudioError
from pipelines.events import Snapshot
from pipelines.generate import generate
from pipelines.model import Model
from pipelines.request import Request
from pipelines.tokens import find_word
from tests.tiny import tiny_model

STEPS = 3


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("sd1")


class Everything:
    """All cross-attention of every step, in full: what the store is compared with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Site, Step, Tensor]] = []

    def wants(self, site: Site) -> Columns | None:
        return Columns(None) if site.kind == "cross" else None

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        return logits

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        self.seen.append((site, step, columns))

    def maps(self, positions: Sequence[int], **only: Any) -> Tensor:
        """(looks, rows, heads, queries), the positions summed; `only` picks by name or index."""
        chosen = [
            columns[..., list(positions)].sum(-1)
            for site, step, columns in self.seen
            if only.get("site") in (None, site.name) and only.get("step") in (None, step.index)
        ]
        return torch.stack(chosen)


def paint(model: Model, *probes: Any, prompt: str = "a photo of a cat and a mushroom", **more: Any) -> list[Any]:
    settings: dict[str, Any] = {"steps": STEPS, "seeds": (1,), "preview_every": 0} | more
    events = generate(model, Request(prompt, **settings), probes=probes)
    return [event.image for event in events if isinstance(event, Snapshot)]


def positions(model: Model, word: str, prompt: str = "a photo of a cat and a mushroom") -> list[int]:
    return find_word(model.encode([prompt]).prompts[0], word)


def one_site(model: Model) -> Site:
    return next(site for site, _ in find_sites(model.unet) if site.kind == "cross")


def test_a_whole_picture_is_bit_identical_with_capture_on(model: Model) -> None:
    plain = paint(model, seeds=(1, 2), batch=2, width=64, height=40)
    store = AttentionStore({"cat": positions(model, "cat"), "mushroom": positions(model, "mushroom")})
    watched = paint(model, store, seeds=(1, 2), batch=2, width=64, height=40)
    assert len(plain) == 2 and all(np.array_equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert store.rows == 2 and store.maps("cat").shape == (2, 10, 16)


def test_each_step_layer_and_head_is_what_the_layer_computed(model: Model) -> None:
    cat, both = positions(model, "cat"), positions(model, "mushroom")
    assert len(cat) == 1 and len(both) > 1
    store, truth = AttentionStore({"mushroom": both, "cat": cat}), Everything()
    paint(model, store, truth, width=64, height=40)
    assert store.detail == "heads" and store.steps == [0, 1, 2]
    for site in store.sites():
        for step in store.steps:
            [expected] = truth.maps(both, site=site.name, step=step)
            for head in range(site.heads):
                got = store.maps("mushroom", step, site.name, head, (site.height, site.width))
                np.testing.assert_allclose(got, expected[:, head].view(1, site.height, site.width), atol=1e-6)


def test_the_running_mean_is_the_mean_of_the_steps(model: Model) -> None:
    store, truth = AttentionStore({"cat": positions(model, "cat")}), Everything()
    paint(model, store, truth)
    slim = AttentionStore({"cat": positions(model, "cat")}, budget_mb=0)
    paint(model, slim)
    assert slim.detail == "mean" and slim.steps == []
    for site in store.sites():
        grid = (site.height, site.width)
        steps = np.mean([store.maps("cat", step, site.name, size=grid) for step in store.steps], axis=0)
        expected = truth.maps(positions(model, "cat"), site=site.name).mean((0, 2)).view(1, *grid)
        for kept in (store, slim):
            np.testing.assert_allclose(kept.maps("cat", site=site.name, size=grid), steps, atol=1e-6)
            np.testing.assert_allclose(kept.maps("cat", site=site.name, size=grid), expected, atol=1e-6)


def test_the_mean_does_not_grow_with_the_steps(model: Model) -> None:
    sizes = set()
    for steps in (1, 4):
        store = AttentionStore({"cat": [5]}, budget_mb=0)
        paint(model, store, steps=steps)
        sizes.add(store.nbytes)
    assert len(sizes) == 1


def test_a_word_that_comes_twice_is_summed_or_told_apart(model: Model) -> None:
    prompt = "a cat on a cat"
    read = model.encode([prompt]).prompts[0]
    both, first, second = (find_word(read, "cat", occurrence) for occurrence in (None, 0, 1))
    assert both == [*first, *second]
    store = AttentionStore({"cats": both, "first": first, "second": second})
    paint(model, store, prompt=prompt)
    np.testing.assert_allclose(store.maps("cats"), store.maps("first") + store.maps("second"), atol=1e-6)
    assert not np.allclose(store.maps("first"), store.maps("second"))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_pictures_of_a_batch_are_their_own_rows(model: Model, guidance: float) -> None:
    store, truth = AttentionStore({"cat": [5]}), Everything()
    paint(model, store, truth, seeds=(1, 2, 3), batch=3, guidance=guidance)
    site = one_site(model)
    assert store.rows == 3
    expected = truth.maps([5], site=site.name).mean((0, 2)).view(3, 16, 16)
    np.testing.assert_allclose(store.maps("cat", site=site.name), expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_batches_follow_each_other(model: Model, steps: int) -> None:
    """Three seeds, two at a time: the rows are the pictures in order, whatever the batch."""
    single, paired = AttentionStore({"cat": [5]}), AttentionStore({"cat": [5]})
    paint(model, single, seeds=(1, 2, 3), steps=steps)
    paint(model, paired, seeds=(1, 2, 3), steps=steps, batch=2)
    assert single.rows == paired.rows == 3 and [take.rows for take in paired.takes] == [2, 1]
    np.testing.assert_allclose(single.maps("cat"), paired.maps("cat"), atol=1e-5)
    last = steps - 1
    np.testing.assert_allclose(single.maps("cat", last), paired.maps("cat", last), atol=1e-5)


def need(detail: str, model: Model, rows: int = 1, steps: int = STEPS) -> int:
    sites = [site.on((16, 16)) for site, _ in find_sites(model.unet) if site.kind == "cross"]
    return 4 * rows * DETAILS[detail].cells(sites, steps)


@pytest.mark.parametrize("detail", list(DETAILS))
def test_the_budget_is_respected_to_the_byte(model: Model, detail: str) -> None:
    exact = need(detail, model)
    store = AttentionStore({"cat": [5]}, budget_mb=exact / MEGABYTE)
    paint(model, store)
    assert store.detail == detail and store.nbytes == exact
    assert detail == "heads" or "would take" in store.note
    less = AttentionStore({"cat": [5]}, budget_mb=(exact - 1) / MEGABYTE)
    paint(model, less)
    assert detail == "mean" or (less.nbytes < exact and less.detail != detail)


def test_all_pictures_share_the_budget(model: Model) -> None:
    budget = need("heads", model) * 2 + 4
    store = AttentionStore({"cat": [5]}, budget_mb=budget / MEGABYTE, pictures=4)
    paint(model, store, seeds=(1, 2, 3, 4))
    assert {take.detail for take in store.takes} != {"heads"} and len({take.detail for take in store.takes}) == 1
    assert store.nbytes <= budget
    greedy = AttentionStore({"cat": [5]}, budget_mb=budget / MEGABYTE)
    paint(model, greedy, seeds=(1, 2, 3))
    assert [take.detail for take in greedy.takes] == ["heads", "heads", "mean"] and greedy.detail == "mean"
    with pytest.raises(StudioError, match="budget"):
        greedy.maps("cat", step=0)


def test_what_was_not_kept_says_how_to_keep_it(model: Model) -> None:
    store = AttentionStore({"cat": [5]}, budget_mb=need("layers", model) / MEGABYTE)
    paint(model, store)
    name = one_site(model).name
    assert store.maps("cat", step=1, site=name).shape == (1, 16, 16)
    assert store.maps("cat", site=name, head=1).shape == (1, 16, 16)
    with pytest.raises(StudioError, match="budget"):
        store.maps("cat", step=1, site=name, head=1)
    with pytest.raises(StudioError, match="Steps 0 to 2"):
        store.maps("cat", step=3, site=name)


def test_unknown_labels_layers_and_heads_are_named(model: Model) -> None:
    with pytest.raises(StudioError, match="word"):
        AttentionStore({})
    with pytest.raises(StudioError, match="word"):
        AttentionStore({"cat": []})
    with pytest.raises(StudioError, match="budget"):
        AttentionStore({"cat": [1]}, budget_mb=-1)
    store = AttentionStore({"cat": [5]})
    with pytest.raises(StudioError, match="No attention was recorded"):
        store.maps("cat")
    paint(model, store, steps=1)
    name = one_site(model).name
    with pytest.raises(StudioError, match="one of: cat"):
        store.maps("dog")
    with pytest.raises(StudioError, match=name):
        store.maps("cat", site="elsewhere")
    with pytest.raises(StudioError, match="layer as well"):
        store.maps("cat", head=0)
    with pytest.raises(StudioError, match="0 to 3"):
        store.maps("cat", site=name, head=4)


def test_layers_count_the_same_and_are_resampled_to_the_finest(model: Model) -> None:
    store = AttentionStore({"cat": [5]})
    paint(model, store, width=64, height=40)
    fine, coarse = store.sites(grid=(10, 16)), store.sites("mid", grid=(5, 8))
    assert len(fine) + len(coarse) == len(store.sites()) and fine and coarse
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(store.maps("cat", site=coarse[0].name))[:, None], (10, 16), mode="bilinear"
    )[:, 0]
    mean = (store.maps("cat", site=[site.name for site in fine]) * len(fine) + upsampled.numpy()) / (len(fine) + 1)
    np.testing.assert_allclose(store.maps("cat"), mean, atol=1e-6)
    assert store.maps("cat", size=(3, 4)).shape == (1, 3, 4)


def test_where_narrows_the_layers(model: Model) -> None:
    store = AttentionStore({"cat": [5]}, where=lambda site: site.place == "mid")
    paint(model, store)
    assert [site.place for site in store.sites()] == ["mid"] and store.maps("cat").shape == (1, 8, 8)


def test_gradient_checkpointing_counts_a_step_once() -> None:
    model = tiny_model("sd1")
    model.unet.train().requires_grad_(True).enable_gradient_checkpointing()
    store = AttentionStore({"cat": [5]})
    with probe_attention(model.unet, store) as tap:
        for index in range(2):
            tap.at(Step(index, 2))
            model.unet(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 77, 32)).sample.mean().backward()
    assert store.takes[0].counts.values() and set(store.takes[0].counts.values()) == {2} and len(store.takes) == 1
    assert not any(tensor.requires_grad for tensor in store.takes[0].sums.values())


@torch.no_grad()
def test_an_unknown_number_of_steps_keeps_the_mean(model: Model) -> None:
    store = AttentionStore({"cat": [5]})
    with probe_attention(model.unet, store):
        for _ in range(5):
            model.unet(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 77, 32))
    assert store.detail == "mean heads" and set(store.takes[0].counts.values()) == {5}


def test_an_edit_is_what_the_store_sees(model: Model) -> None:
    class Away(Everything):
        def wants(self, site: Site) -> Any:
            return Edit() if site.kind == "cross" else None

        def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
            return logits.index_fill(-1, torch.tensor([5]), -1e9)

    store = AttentionStore({"cat": [5], "a": [1]})
    paint(model, Away(), store)
    assert float(store.maps("cat").max()) == 0 < float(store.maps("a").min())


def test_the_report_is_json(model: Model) -> None:
    store = AttentionStore({"cat": [5]})
    assert json.loads(json.dumps(store.report()))["sites"] == []
    paint(model, store)
    report = json.loads(json.dumps(store.report()))
    assert report["detail"] == "heads" and report["steps"] == [0, 1, 2] and report["rows"] == 1
    assert report["nbytes"] == store.nbytes == need("heads", model)
    assert report["sites"][0]["name"] == one_site(model).name and "each step, layer and head" in report["note"]


def test_saved_and_loaded_it_shows_the_same(model: Model, tmp_path: Path) -> None:
    store = AttentionStore({"cat": [5], "<my-cat>": [3, 4]})
    paint(model, store, seeds=(1, 2), width=64, height=40)
    store.save_npz(tmp_path / "attention.npz")
    again = AttentionStore.load_npz(tmp_path / "attention.npz")
    assert again.report() == store.report()
    for label in store.tokens:
        np.testing.assert_array_equal(again.maps(label), store.maps(label))
        for site in store.sites():
            got, kept = (s.maps(label, 2, site.name, site.heads - 1) for s in (again, store))
            np.testing.assert_allclose(got, kept, rtol=1e-3, atol=1e-6)
    with np.load(tmp_path / "attention.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["heat"][1], store.maps("<my-cat>"))


def test_broken_files_are_refused(model: Model, tmp_path: Path) -> None:
    store = AttentionStore({"cat": [5]})
    with pytest.raises(StudioError, match="No attention was recorded"):
        store.save_npz(tmp_path / "empty.npz")
    paint(model, store, steps=1)
    store.save_npz(tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", heat=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", index=np.array([{}], dtype=object))
    for name in ("half", "text", "other", "pickle", "missing"):
        with pytest.raises(StudioError, match=f"{name}.npz"):
            AttentionStore.load_npz(tmp_path / f"{name}.npz")
