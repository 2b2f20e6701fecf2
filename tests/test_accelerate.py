"""`accelerate launch --num_processes 2`: two processes learn what one learns, wherever the adapter sits."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.methods import method_names
from pipelines.processes import Share, average_gradients

ROOT = Path(__file__).parents[1]
STEPS = 20
SCRIPT = '''
"""Arguments: a folder for the results. Each method learns in every process; the main one writes."""
import json, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
from pipelines.data import prepare
from pipelines.errors import StudioError
from pipelines.events import Finished, Note, Progress
from pipelines.methods import get_method, method_names
from pipelines.processes import join
from pipelines.runs import train_concept
from pipelines.train import train
from pipelines.workspace import Workspace
from tests.test_data import CAT, photos
from tests.tiny import tiny_model

out, share, model, said = Path(sys.argv[1]), join(), tiny_model("sd1"), {"processes": 0}
said["processes"] = share.count
for name in method_names():
    method = get_method(name)
    steps = {"steps": 20}
    if "embedding_steps" in method.Params.model_fields:
        steps = {"embedding_steps": 5, "attention_steps": 5, "steps": 10}
    params = method.Params(
        **steps, batch_size=2, lr=1e-3, checkpoint_every=5, masked_loss=True, resolution=32, prior_count=2
    )
    data = prepare(model, photos(), params, CAT, 1, prior=[(photos(1)[0].image, "a photo of a cat")])
    losses = []
    for event in train(model, method, data, params, seed=1, checkpoint=out / name):
        losses += [event.values] if isinstance(event, Progress) else []
    if share.main:
        save_file(event.value.tensors, out / f"{name}.safetensors")
        said[name] = losses
if len(sys.argv) > 2:
    try:
        odd = params.model_copy(update={"batch_size": 3, "prior_weight": 0.0})
        list(train(model, method, prepare(model, photos(), odd, CAT, 1), odd, seed=1))
    except StudioError as error:
        said["odd"] = str(error)
    quick = params.model_copy(update={"steps": 2, "sample_every": 2})
    workspace = Workspace(out / "workspace")
    events = list(train_concept(workspace, model, method=name, photos=Path(sys.argv[2]), noun="cat", name="my-cat",
                                params=quick, seed=3))
    assert isinstance(events[-1], Finished) and (share.main or len(events) == 1), events
if share.main:
    (out / "said.json").write_text(json.dumps(said))
'''


def launched(out: Path, *command: str, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    out.mkdir()
    script = out / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(out), *arguments],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads((out / "said.json").read_text())
    return said


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _folder(path: Path) -> Path:
    from PIL import Image

    from tests.test_data import photos

    path.mkdir()
    for photo in photos():
        Image.fromarray(photo.image).save(path / photo.path.name)
        Image.fromarray(photo.masks[""]).save(path / f"{photo.path.stem}-masklabel.png")
    return path


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch knows no processes")
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    # Without --multi_gpu, accelerate 1.15 starts a single process on a machine without GPUs, whatever the number.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", _free_port()]
    two = launched(tmp_path / "two", *launch, arguments=(str(_folder(tmp_path / "photos")),))
    one = launched(tmp_path / "one", sys.executable)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert "multiple of 2" in two["odd"]
    for name in method_names():
        ours, theirs = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("one", "two"))
        flat = [torch.cat([tensors[key].flatten() for key in sorted(tensors)]) for tensors in (ours, theirs)]
        assert flat[0].norm() > 0 and (flat[0] - flat[1]).norm() <= 1e-4 * flat[0].norm()
        assert len(one[name]) == len(two[name]) == STEPS
        for a, b in zip(one[name], two[name], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
        assert len(list((tmp_path / "two" / name).glob("checkpoint-*"))) == 2
    workspace = tmp_path / "two" / "workspace"
    assert len(list(workspace.glob("concepts/*/concept.json"))) == 1 and len(list(workspace.glob("runs/*/"))) == 1


def test_one_process_needs_no_group() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    average_gradients([parameter], Share())
    assert parameter.grad is None and not torch.distributed.is_initialized()
