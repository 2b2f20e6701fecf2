"""Jobs: one at a time, in order, stoppable between two events, found again after a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines import Event, Finished, Heatmap, Note, Preview, Progress, Snapshot, StudioError, Workspace, read_events
from pipelines.files import lock
from pipelines.joblog import RUN_LOCK, history
from studio.jobs import JobRunner
from studio.kept import Kept

PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[JobRunner]:
    runner = JobRunner(Workspace(tmp_path))
    yield runner
    runner.close()


def steps(count: int, until: threading.Event | None = None) -> Callable[[], Iterator[Event]]:
    """Work of `count` steps that waits for `until` before the second."""

    def work() -> Iterator[Event]:
        for step in range(1, count + 1):
            if step == 2 and until is not None:
                assert until.wait(20)
            yield Progress("train", step, count, {"loss": 1 / step})
        yield Finished(count)

    return work


def test_jobs_run_in_order_one_at_a_time(runner: JobRunner) -> None:
    go, running, most = threading.Event(), [], []

    def work(name: str) -> Callable[[], Iterator[Event]]:
        def run() -> Iterator[Event]:
            running.append(name)
            most.append(threading.current_thread().name)
            assert go.wait(20)
            yield Finished(name)

        return run

    jobs = [runner.submit(name, work(name)) for name in "abc"]
    while not running:
        time.sleep(0.01)
    assert [job.place for job in jobs] == [0, 1, 2] and [job.state for job in jobs] == ["running", "queued", "queued"]
    assert runner.active() == jobs and running == ["a"]
    go.set()
    assert all(job.wait(20) for job in jobs)
    assert running == ["a", "b", "c"] and set(most) == {"attune-worker"}
    assert [job.state for job in jobs] == ["done"] * 3 and runner.active() == []


def test_a_watcher_sees_every_step_and_a_late_one_too(runner: JobRunner) -> None:
    job = runner.submit("x", steps(50))
    seen = [event for _, events in job.follow(every=0.01) for event in events]
    assert [event.step for event in seen if isinstance(event, Progress)] == list(range(1, 51))
    assert seen[-1] == Finished(50) and job.events == seen
    number, rest = job.since(48)
    assert number == 51 and rest == seen[48:] and list(job.follow(51)) == []


def test_stop_unwinds_in_the_worker_and_keeps_what_is_done(runner: JobRunner) -> None:
    places: list[str] = []

    def work() -> Iterator[Event]:
        try:
            for step in range(1, 10**6):
                yield Progress("train", step, 10**6)
                time.sleep(0.001)
        finally:
            places.append(threading.current_thread().name)

    job, after = runner.submit("long", work), runner.submit("next", steps(2))
    while not job.events:
        time.sleep(0.01)
    began = time.monotonic()
    job.cancel()
    assert job.wait(5) and time.monotonic() - began < 2
    assert job.state == "stopped" and job.events and places == ["attune-worker"] and not job.stopping
    assert after.wait(5) and after.state == "done"


def test_a_waiting_job_is_stopped_at_once(runner: JobRunner) -> None:
    go = threading.Event()
    first, second, third = runner.submit("a", steps(3, go)), runner.submit("b", steps(3)), runner.submit("c", steps(3))
    second.cancel()
    assert second.state == "stopped" and third.place == 1
    go.set()
    assert third.wait(10) and first.state == third.state == "done" and second.events == []


def test_a_finished_job_is_done_even_when_a_stop_comes_late(runner: JobRunner) -> None:
    holder: list[object] = []

    def work() -> Iterator[Event]:
        yield Note("almost")
        runner.cancel(str(holder[0]))
        yield Finished("whole")

    job_id = "late-0000"
    holder.append(job_id)
    job = runner.submit("late", work, job_id=job_id)
    assert job.wait(10) and job.state == "done"


def test_errors_are_told_apart_and_the_worker_lives_on(runner: JobRunner) -> None:
    def broken() -> Iterator[Event]:
        yield Note("here")
        raise ZeroDivisionError("oh")

    def refused() -> Iterator[Event]:
        yield from ()
        raise StudioError("No photos. Add some.")

    def bad_start() -> Iterator[Event]:
        raise KeyError("no iterator at all")

    bug, user, start = (runner.submit("x", work) for work in (broken, refused, bad_start))
    last = runner.submit("y", steps(1))
    assert last.wait(10) and last.state == "done"
    assert bug.state == "failed" and bug.is_bug and "ZeroDivisionError: oh" in bug.trace and "bug" in bug.error
    assert "ZeroDivisionError: oh" in (bug.record.folder / "error.txt").read_text()
    assert user.state == "failed" and not user.is_bug and user.error == "No photos. Add some." and user.trace == ""
    assert start.state == "failed" and start.is_bug


def test_events_are_on_disk_and_a_new_runner_finds_the_run(tmp_path: Path) -> None:
    runner = JobRunner(Workspace(tmp_path))
    job = runner.submit("Train ünï <x>", steps(3), kind="train", meta={"name": "x"})
    assert job.wait(10)
    stopped = runner.submit("waits", steps(2, threading.Event()))
    runner.cancel(stopped.id)
    runner.close()
    again = JobRunner(Workspace(tmp_path))
    by_id = {record.id: record for record in again.history()}
    again.close()
    record = by_id[job.id]
    assert (record.title, record.kind, record.state, record.meta) == ("Train ünï <x>", "train", "done", {"name": "x"})
    assert list(record.events()) == job.events and not record.unfinished


def test_a_picture_is_kept_on_disk_not_in_memory(runner: JobRunner) -> None:
    job = runner.submit("x", lambda: iter([Snapshot("sample", PICTURE), Finished(None)]))
    assert job.wait(10)
    snapshot = job.events[0]
    assert isinstance(snapshot, Snapshot) and snapshot.image is None and Path(str(snapshot.path)).is_file()


def test_work_that_records_itself_is_not_recorded_twice(runner: JobRunner) -> None:
    job = runner.submit("x", steps(3), record=False)
    assert job.wait(10) and len(job.events) == 4 and list(read_events(job.record.folder)) == []


def test_a_run_can_be_taken_up_again_under_its_id_but_not_twice_at_once(runner: JobRunner) -> None:
    go = threading.Event()
    job = runner.submit("x", steps(2, go))
    with pytest.raises(StudioError, match="already in the queue"):
        runner.submit("x", steps(2), job_id=job.id)
    go.set()
    assert job.wait(10)
    again = runner.submit("x", steps(1), job_id=job.id)
    assert again.wait(10) and [r.id for r in runner.history()] == [job.id]
    assert len(list(read_events(job.record.folder))) == 5


def test_eta_follows_the_pace_or_the_work_itself(runner: JobRunner) -> None:
    go = threading.Event()

    def work() -> Iterator[Event]:
        yield Progress("a", 1, 100)
        time.sleep(0.05)
        yield Progress("a", 2, 100)
        assert go.wait(20)
        yield Progress("b", 1, 5, eta=1000.0)
        go.clear()
        assert go.wait(20)

    job = runner.submit("x", work)
    wait_for(lambda: len(job.events) == 2)
    assert job.eta is not None and 1 < job.eta < 60
    go.set()
    wait_for(lambda: len(job.events) == 3)
    assert job.eta is not None and 990 < job.eta <= 1000
    go.set()
    assert job.wait(10) and job.eta is None


def test_closing_stops_everything_and_refuses_more(tmp_path: Path) -> None:
    before = threading.active_count()
    runner = JobRunner(Workspace(tmp_path))
    unwound: list[int] = []

    def work() -> Iterator[Event]:
        try:
            while True:
                yield Note("on")
                time.sleep(0.001)
        finally:
            unwound.append(1)

    job, waiting = runner.submit("endless", work), runner.submit("waits", steps(1))
    wait_for(lambda: bool(job.events))
    runner.close()
    assert unwound == [1] and job.state == waiting.state == "stopped" and threading.active_count() == before
    with pytest.raises(StudioError, match="shutting down"):
        runner.submit("x", steps(1))
    assert not list(tmp_path.glob("runs/.runner-*")) and all(r.unfinished for r in history(Workspace(tmp_path)))


def test_a_killed_process_leaves_an_interrupted_run(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pipelines import Note, Workspace
        from studio.jobs import JobRunner
        def work():
            while True:
                yield Note("on")
                time.sleep(0.01)
        runner = JobRunner(Workspace(sys.argv[1]))
        job = runner.submit("endless", work, kind="train")
        runner.submit("waits", work)
        while not job.events: time.sleep(0.01)
        print("up", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with child:
        assert child.stdout is not None and child.stdout.readline().strip() == b"up"
        assert sorted(r.state for r in history(Workspace(tmp_path))) == ["queued", "running"]
        child.send_signal(signal.SIGKILL)
    states = {record.title: record.state for record in history(Workspace(tmp_path))}
    assert states == {"endless": "interrupted", "waits": "interrupted"}
    JobRunner(Workspace(tmp_path)).close()
    (left,) = tmp_path.glob("runs/.runner-*")  # too young to be sure that nobody is about to lock it
    os.utime(left, (0, 0))
    JobRunner(Workspace(tmp_path)).close()
    assert not list(tmp_path.glob("runs/.runner-*"))


def test_runs_without_a_runner_are_found_too(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    (space.runs / "a").mkdir()
    (space.runs / "b").mkdir()
    (space.runs / "b" / "events.jsonl").write_text('{"event": "Finished", "value": null}\n')
    (space.runs / "c").mkdir()
    (space.runs / "c" / "job.json").write_text('{"id": "c", "title": "broken"')
    with lock(space.runs / "a" / RUN_LOCK):
        assert {r.id: r.state for r in history(space)} == {"a": "running", "b": "done"}
    assert {r.id: r.state for r in history(space)} == {"a": "interrupted", "b": "done"}


def test_old_records_go_but_trainings_stay(tmp_path: Path) -> None:
    runner = JobRunner(Workspace(tmp_path))
    runs = [runner.submit(f"t{i}", steps(1), kind="train") for i in range(3)]
    jobs = [runner.submit(f"j{i}", lambda: iter([Finished(None)]), record=False) for i in range(110)]
    assert all(job.wait(20) for job in (*runs, *jobs)) and len(runner.jobs()) < 120
    runner.close()
    again = JobRunner(Workspace(tmp_path))
    titles = [record.title for record in again.history()]
    again.close()
    assert len(titles) == 103 and {"t0", "t1", "t2", "j109"} <= set(titles) and "j0" not in titles


def test_memory_stays_bounded() -> None:
    kept = Kept()
    for step in range(1, 5001):
        kept.add(Progress("train", step, 5000, {"loss": 1.0, "norm": 2.0}, eta=None if step % 2 else 3.0))
        kept.add(Preview(PICTURE, index=step % 3, step=step))
        kept.add(Heatmap(f"<{step % 2}>", np.ones((2, 2), np.float32), step=step))
        kept.add(Snapshot("picture", PICTURE))
        kept.add(Note(str(step)))
    events = kept.since(0)
    kinds = [type(event) for event in events]
    assert kinds.count(Progress) == 5000 and kinds.count(Preview) == 3 and kinds.count(Heatmap) == 2
    assert kinds.count(Note) == 200 and kinds.count(Snapshot) == 2000
    assert sum(isinstance(event, Snapshot) and event.image is not None for event in events) == 8
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[7] == Progress("train", 8, 5000, {"loss": 1.0, "norm": 2.0}, eta=3.0) and progress[6].eta is None
    assert kept.since(kept.count) == [] and kept.since(kept.count - 1) == [Note("5000")]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
