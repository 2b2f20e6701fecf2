"""kill -9 at random moments, then going on: to the bit what an uninterrupted run gives.

One Python child imports and builds everything once, then forks a run for every kill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.methods import method_names

KILLS = 20
ROOT = Path(__file__).parents[1]
CHILD = '''
"""Argument: method, folder, number of kills. Prints {"kills": steps done at each, "different": [...]} as JSON."""
import json, os, random, signal, sys, time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
from pipelines.checkpoint import newest
from pipelines.data import prepare
from pipelines.methods import get_method
from pipelines.train import train
from tests.test_data import CAT, photos
from tests.tiny import tiny_model

name, root, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
method, model = get_method(name), tiny_model("sd1")
stages = {field: 2 for field in method.Params.model_fields if field.endswith("_steps")}  # every stage, and short
params = method.Params(
    steps=6 - 2 * bool(stages), batch_size=1, lr=1e-3, prior_weight=0, checkpoint_every=1, flip=True, masked_loss=True,
    resolution=32, **stages
)


def run(folder, resume=False):
    data = prepare(model, photos(), params, CAT, 1)
    *_, last = train(model, method, data, params, seed=1, checkpoint=folder, resume=resume)
    return last.value.tensors


def forked(folder, resume=False, after=None):
    """A run in a process of its own, killed after so many seconds; its tensors are in folder/done when it ends."""
    child = os.fork()
    if child == 0:
        save_file(run(folder, resume), folder / "part")
        os.rename(folder / "part", folder / "done")
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), status


expected = run(None)
begun = time.monotonic()
run(root / "timed")
length = time.monotonic() - begun
chance, report = random.Random(0), {"kills": [], "different": []}
for number in range(kills):
    folder = root / str(number)
    folder.mkdir(parents=True)
    while True:  # a kill that came too late is no kill
        killed, status = forked(folder, after=chance.random() * length)
        if killed:
            break
        (folder / "done").unlink()
        for old in folder.glob("checkpoint-*"):
            old.unlink()
    point = newest(folder)
    report["kills"].append(point.done if point else 0)
    _, status = forked(folder, resume=True)
    found = load_file(folder / "done") if status == 0 else {}
    if found.keys() != expected.keys() or not all(torch.equal(found[key], expected[key]) for key in expected):
        report["different"].append(number)
print(json.dumps(report))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", method_names())
def test_twenty_kills(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, name, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["different"] == []
    assert len(report["kills"]) == KILLS and len(set(report["kills"])) > 2, report  # they came at different moments
