"""Events on disk come back as they went in, and a killed writer spoils nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.eventlog import LOG_NAME, EventLog, parse_log, read_events, training_log
from pipelines.events import Finished, Heatmap, Note, Preview, Progress, Snapshot


def picture(shade: int = 7) -> np.ndarray:
    image = np.zeros((6, 9, 3), np.uint8)
    image[2, 3] = (shade, 20, 200)
    return image


def test_every_kind_comes_back(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    concept = Concept("cat", (Subject("<cat>", "cat"),), "svdiff", {"id": "x", "fingerprint": "f"})
    with EventLog(tmp_path) as log:
        for event in (
            Note("hello é"),
            Progress("train", 1, 3, {"loss": 0.25}, eta=2.5),
            Preview(picture(), index=2, step=1, total=3),
            Heatmap("<cat>", values, picture(9), step=4),
            Snapshot("picture", picture(11), info={"seed": 5, "norm": np.float32(0.5)}),
            Finished(Trained(concept, {})),
        ):
            log.append(event)
    note, progress, preview, heatmap, snapshot, finished = read_events(tmp_path)
    assert note == Note("hello é") and progress == Progress("train", 1, 3, {"loss": 0.25}, eta=2.5)
    assert isinstance(preview, Preview) and np.array_equal(preview.image, picture()) and preview.index == 2
    assert isinstance(heatmap, Heatmap) and np.array_equal(heatmap.values, values) and heatmap.image is not None
    assert heatmap.values.dtype == np.float32 and heatmap.step == 4 and np.array_equal(heatmap.image, picture(9))
    assert isinstance(snapshot, Snapshot) and snapshot.path is not None and Path(snapshot.path).parent == tmp_path
    assert snapshot.info == {"seed": 5, "norm": 0.5}
    assert finished == Finished(concept)


def test_a_log_can_move_with_its_pictures(tmp_path: Path) -> None:
    with EventLog(tmp_path / "a") as log:
        kept = log.append(Snapshot("sample", picture()))
    assert isinstance(kept, Snapshot) and kept.path is not None and Path(kept.path).is_file()
    (tmp_path / "a").rename(tmp_path / "b")
    (snapshot,) = read_events(tmp_path / "b")
    assert isinstance(snapshot, Snapshot) and Path(str(snapshot.path)).is_file()


def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.append(Snapshot("sample", picture(1)))
        log.append(Note("whole"))
    with open(tmp_path / LOG_NAME, "ab") as file:
        file.write(b'{"event": "Note", "te')
    assert [type(event) for event in read_events(tmp_path)] == [Snapshot, Note]
    with EventLog(tmp_path) as log:
        second = log.append(Snapshot("sample", picture(2)))
    first, note, again = read_events(tmp_path)
    assert isinstance(first, Snapshot) and isinstance(second, Snapshot) and first.path != second.path
    assert note == Note("whole") and isinstance(again, Snapshot) and again.path == second.path


def test_nonsense_lines_are_skipped(tmp_path: Path) -> None:
    lines = [b"[1]", b'{"event": "Nope"}', b'{"event": "Note"}', b"\xff\xfe", b'{"event": "Note", "text": "ok"}']
    (tmp_path / LOG_NAME).write_bytes(b"\n".join(lines) + b"\n")
    assert list(read_events(tmp_path)) == [Note("ok")]
    assert list(read_events(tmp_path / "nowhere")) == []


def test_a_recorded_picture_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "secret.png")
    (tmp_path / "log" / LOG_NAME).write_text('{"event": "Preview", "index": 0, "image": "../secret.png"}\n')
    (preview,) = read_events(tmp_path / "log")
    assert isinstance(preview, Preview) and preview.image.shape == (1, 1, 3)


def test_a_nan_loss_survives_as_nan() -> None:
    (event,) = parse_log(training_log(iter([Progress("train", 1, 2, {"loss": math.nan})])))
    assert isinstance(event, Progress) and math.isnan(event.values["loss"])


def test_a_training_log_keeps_curves_and_notes_only() -> None:
    events = [Note("a"), Preview(picture()), Progress("train", 1, 2, {"loss": 1.0}), Finished(None)]
    assert parse_log(training_log(iter(events))) == [Note("a"), Progress("train", 1, 2, {"loss": 1.0})]
    with pytest.raises(StudioError, match="training log"):
        parse_log(b'{"event": "Progress", "stage": "x"}')


def test_a_value_json_does_not_know_is_a_bug(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log, pytest.raises(TypeError):
        log.append(Finished(object()))
