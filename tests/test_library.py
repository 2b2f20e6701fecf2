"""The library: nothing is lost, nothing is overwritten, damage is found."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipelines.concept import Subject, Trained
from pipelines.concept_folder import record
from pipelines.errors import StudioError
from pipelines.events import Finished, Note, Preview, Progress
from pipelines.library import Library, check_base
from pipelines.workspace import Workspace
from tests.concepts import BASE, trained

ROOT = Path(__file__).parents[1]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(Workspace(tmp_path))


def same(a: Trained, b: Trained) -> bool:
    return a.concept == b.concept and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_what_is_saved_is_loaded(library: Library) -> None:
    image = np.full((600, 900, 3), 40, np.uint8)
    events = [Progress("train", 1, 2, {"loss": 0.5}), Preview(image), Note("ok"), Finished(None)]
    assert library.save(trained(), image, events) == trained().concept
    back = library.load("my-cat")
    assert same(back, trained()) and set(back.tensors) == set(trained().tensors)
    entry = library.find("<my-cat>")
    assert entry.version == 1 and entry.preview is not None and sorted(os.listdir(entry.folder)) == [
        "concept.json", "preview.png", "run.jsonl", "weights.safetensors",
    ]  # fmt: skip
    assert entry.size == sum(p.stat().st_size for p in entry.folder.iterdir() if p.name != "concept.json")
    assert library.log("my-cat") == [events[0], events[2]]
    assert library.find(entry.id).id == entry.id and library.find("MY-CAT").id == entry.id


def test_other_programs_can_read_the_weights_header(library: Library) -> None:
    library.save(trained())
    with safe_open(library.find("my-cat").folder / "weights.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["modelspec.title"] == "my-cat"
    assert metadata["modelspec.trigger_phrase"] == "<my-cat>" and metadata["modelspec.date"].startswith("2023-11-14T")
    assert metadata["modelspec.hash_sha256"].startswith("0x") and len(metadata["modelspec.hash_sha256"]) == 66
    assert json.loads(metadata["attune.concept"])["base_model"] == BASE


def test_a_second_one_gets_a_number_and_overwrites_nothing(library: Library) -> None:
    library.save(trained())
    second = library.save(trained("My-Cat", seed=1))
    third = library.save(trained(seed=2))
    other = library.save(trained("else", token="<my-cat>", seed=3))
    assert (second.name, second.subjects[0].token) == ("My-Cat-2", "<My-Cat-2>")
    assert (third.name, third.subjects[0].token) == ("my-cat-3", "<my-cat-3>")
    assert (other.name, other.subjects[0].token) == ("else", "<my-cat-4>")
    assert same(library.load("my-cat"), trained()) and len(library.concepts()) == 4


def test_the_list_is_sorted_and_searched(library: Library) -> None:
    for name, noun in (("zebra", "horse"), ("Apple", "fruit"), ("émile", "man")):
        library.save(trained(name, noun=noun))
    assert [concept.name for concept in library.concepts()] == ["Apple", "zebra", "émile"]
    assert [concept.name for concept in library.concepts("HORSE")] == ["zebra"]
    assert [concept.name for concept in library.concepts("svdiff zeb")] == ["zebra"]
    assert [concept.name for concept in library.concepts("e\u0301mile")] == ["émile"]
    assert library.concepts("nothing") == []


def test_rename_takes_the_token_along_and_counts_versions(library: Library) -> None:
    library.save(trained())
    library.save(trained("dog", noun="dog"))
    renamed = library.rename("my-cat", "Mimi 2", version=1)
    assert (renamed.name, renamed.subjects[0].token) == ("Mimi 2", "<Mimi-2>") and library.find("Mimi 2").version == 2
    with pytest.raises(StudioError, match="changed meanwhile"):
        library.rename("Mimi 2", "x", version=1)
    with pytest.raises(StudioError, match="'DOG' or its word is already in the library"):
        library.rename("Mimi 2", "DOG")
    assert library.rename("dog", "DOG").name == "DOG"
    assert torch.equal(library.load("Mimi 2").tensors["layer.0"], trained().tensors["layer.0"])


def test_several_words_follow_a_name_that_has_one_for_each(library: Library) -> None:
    one = trained("thing1-and-thing2")
    pair = (Subject("<thing1>", "cat"), Subject("<thing2>", "dog"))
    library.save(replace(one, concept=replace(one.concept, subjects=pair)))
    library.save(trained("max"))
    kept = library.rename("thing1-and-thing2", "my pets")
    assert kept.name == "my pets" and kept.subjects == pair
    with pytest.raises(StudioError, match="its word is already in the library"):
        library.rename("my pets", "tom-and-max")
    assert library.rename("my pets", "tom-and-tom").subjects == pair
    both = library.rename("tom-and-tom", "tom-and-rex")
    assert [(each.token, each.noun) for each in both.subjects] == [("<tom>", "cat"), ("<rex>", "dog")]
    library.save(trained("other", "<tim>"))
    numbered = library.save(trained("tim"))
    assert numbered.subjects[0].token == "<tim-2>" and library.rename("tim", "ben").subjects[0].token == "<ben>"


def test_delete_can_be_undone(library: Library) -> None:
    library.save(trained())
    trash_id = library.delete("my-cat")
    assert library.concepts() == [] and [entry.id for entry in library.trashed()] == [trash_id]
    with pytest.raises(StudioError, match="no concept 'my-cat'"):
        library.load("my-cat")
    library.save(trained(seed=5))
    back = library.restore(trash_id)
    assert back.name == "my-cat-2" and library.trashed() == []
    assert torch.equal(library.load("my-cat-2").tensors["layer.1"], trained().tensors["layer.1"])
    with pytest.raises(StudioError, match="Reload the list"):
        library.restore(trash_id)
    first, second = library.delete("my-cat"), library.delete("my-cat-2")
    library.empty_trash(first)
    assert [entry.id for entry in library.trashed()] == [second]
    library.empty_trash()
    assert library.trashed() == []


def test_restore_without_a_twin_is_exactly_as_before(library: Library) -> None:
    library.save(trained())
    before = library.find("my-cat")
    library.restore(library.delete("my-cat"))
    assert library.find("my-cat") == before


def test_the_base_is_checked_and_can_be_set(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    model = cast(Any, SimpleNamespace(id="sd-9", fingerprint="feedfacefeedface"))
    library.save(trained())
    with pytest.raises(StudioError, match="toybox .*sd-9"):
        check_base(library.load("my-cat").concept, model)
    library.set_base("my-cat", {"id": "unknown", "fingerprint": ""})
    assert "may not work on sd-9" in check_base(library.load("my-cat").concept, model) and caplog.messages
    library.set_base("my-cat", {"id": model.id, "fingerprint": model.fingerprint})
    assert check_base(library.load("my-cat").concept, model) == "" and library.find("my-cat").version == 3
    with pytest.raises(StudioError, match="base"):
        library.set_base("my-cat", {"id": "x"})


def test_numbers_that_are_none_are_never_saved(library: Library) -> None:
    bad = trained()
    bad.tensors["layer.2"][1] = float("inf")
    with pytest.raises(StudioError, match="layer.2"):
        library.save(bad)
    assert library.concepts() == [] and os.listdir(library.workspace.concepts) in ([], [".lock"])


def test_a_concept_that_could_not_be_read_again_is_not_written(library: Library) -> None:
    for concept in (
        replace(trained().concept, method="../x"),
        replace(trained().concept, subjects=()),
        replace(trained().concept, seed=-1),
        replace(trained().concept, name="a\nb"),
        replace(trained().concept, base_model={"id": "x", "fingerprint": "../"}),
    ):
        with pytest.raises(StudioError):
            library.save(Trained(concept, trained().tensors))
    assert library.concepts() == []


def test_what_is_too_large_to_be_read_is_not_written() -> None:
    with pytest.raises(StudioError, match="weights.safetensors has 5,000.0 MB"):
        record(trained().concept, {"weights.safetensors": {"bytes": 5 * 10**9, "sha256": ""}}, 1)


def test_every_flipped_bit_is_found(library: Library) -> None:
    library.save(trained(), np.zeros((8, 8, 3), np.uint8), [Note("x")])
    entry = library.find("my-cat")
    path = entry.folder / "weights.safetensors"
    sound = path.read_bytes()
    for position in range(0, len(sound), 37):
        broken = bytearray(sound)
        broken[position] ^= 1 << (position % 8)
        path.write_bytes(broken)
        with pytest.raises(StudioError, match="damaged"):
            library.load("my-cat")
    path.write_bytes(sound[:-1])
    with pytest.raises(StudioError, match="damaged"):
        library.load("my-cat")
    path.unlink()
    with pytest.raises(StudioError, match="missing"):
        library.load("my-cat")


def test_a_broken_record_is_named_and_the_others_still_work(library: Library) -> None:
    library.save(trained())
    library.save(trained("dog"))
    path = library.find("dog").folder / "concept.json"
    for text in ('{"name": 1', "[]", "{}", '{"format": 2}', path.read_text().replace('"seed"', '"sead"')):
        path.write_text(text)
        assert [concept.name for concept in library.concepts()] == ["my-cat"]
        (reason,) = library.broken().values()
        assert "concept.json" in reason


def test_a_full_disk_loses_nothing(library: Library) -> None:
    library.save(trained())
    code = """
        import resource, sys
        from pipelines.errors import StudioError
        from pipelines.library import Library
        from pipelines.workspace import Workspace
        from tests.concepts import trained
        library, refused, base = Library(Workspace(sys.argv[1])), 0, {"id": "x", "fingerprint": ""}
        for limit in range(0, 2000, 150):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for action in (lambda: library.save(trained("new")), lambda: library.set_base("my-cat", base)):
                try:
                    action()
                except StudioError as error:
                    refused += 1
                    assert "full" in str(error)
            assert not library.broken()
            for name in ["my-cat", *(concept.name for concept in library.concepts())]:
                library.load(name)
        assert 5 < refused < 28 and len(library.concepts()) > 1  # some fitted, some didn't
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(library.workspace.root)], cwd=ROOT, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()
    assert not list(library.workspace.concepts.glob("*/.*")) and not list(library.workspace.concepts.glob(".*.tmp"))


def work(root: str, me: str, turns: int) -> None:
    """One process's operations; what it knows to be there, or gone, goes into the file `me` line by line."""
    dice, library = random.Random(me), Library(Workspace(root))
    with open(Path(root) / me, "w", buffering=1) as told:
        for turn in range(turns):
            mine = library.save(trained("cat", seed=turn)).name
            told.write(f"+ {mine}\n")
            library.load(mine)
            if dice.random() < 0.5:
                new = library.rename(mine, f"{me}-{turn}").name
                told.write(f"- {mine}\n+ {new}\n")
                mine = new
            if dice.random() < 0.3:
                trash_id = library.delete(mine)
                if dice.random() < 0.5:
                    library.restore(trash_id)
                else:
                    told.write(f"- {mine}\n")


def test_processes_share_one_library(library: Library) -> None:
    """8 processes, two of them killed in the middle of their work: every operation happened or not, never half."""
    context, root = multiprocessing.get_context("forkserver"), library.workspace.root
    context.set_forkserver_preload(["torch", "safetensors.torch"])  # one slow import instead of eight
    workers = {f"p{i}": context.Process(target=work, args=(str(root), f"p{i}", 8)) for i in range(6)}
    victims = {f"v{i}": context.Process(target=work, args=(str(root), f"v{i}", 10_000)) for i in range(2)}
    for process in (*workers.values(), *victims.values()):
        process.start()
    for me, victim in victims.items():
        while not ((root / me).exists() and (root / me).stat().st_size > 40):
            time.sleep(0.01)
        victim.kill()
        victim.join()
    expected: set[str] = set()
    for me, worker in workers.items():
        worker.join(60)
        assert worker.exitcode == 0
        for line in (root / me).read_text().splitlines():
            sign, name = line.split(" ", 1)
            expected.add(name) if sign == "+" else expected.discard(name)
    names = [concept.name for concept in library.concepts()]
    assert len(names) == len(set(names)) and not library.broken()
    known = {name for name in names if name.startswith("p")}
    assert known == {name for name in expected if name.startswith("p")}
    assert all(library.load(name) for name in names)


def test_kill_in_the_middle_of_an_edit_keeps_the_concept(library: Library) -> None:
    library.save(trained())
    code = """
        import itertools, sys
        from pipelines.library import Library
        from pipelines.workspace import Workspace
        library = Library(Workspace(sys.argv[1]))
        for n in itertools.count():
            library.set_base("my-cat", {"id": f"base {n}", "fingerprint": ""})
            if n == 1: print("up", flush=True)
    """
    for wait in (0.0, 0.011, 0.023):
        command = [sys.executable, "-c", textwrap.dedent(code), str(library.workspace.root)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline()
            time.sleep(wait)
            child.send_signal(signal.SIGKILL)
        assert library.load("my-cat").concept.base_model["id"].startswith("base ")


def test_a_missing_name_lists_the_known(library: Library) -> None:
    with pytest.raises(StudioError, match="empty"):
        library.find("x")
    library.save(trained())
    with pytest.raises(StudioError, match="The library has: my-cat"):
        library.find("x")


def test_listing_needs_no_torch() -> None:
    code = """
        import sys, tempfile
        from pipelines import Library, Workspace
        assert Library(Workspace(tempfile.mkdtemp())).concepts() == []
        heavy = {"torch", "diffusers", "transformers", "gradio"} & set(sys.modules)
        assert not heavy, heavy
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
