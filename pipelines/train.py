"""train(): the training loop, written out. Photos and chance live in data.py, what goes onto the disk in resume.py."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.checkpoint import Checkpoints, config_hash
from pipelines.concept import Concept, Trained
from pipelines.errors import StudioError
from pipelines.events import Event, Finished, Progress
from pipelines.processes import average, average_gradients
from pipelines.resume import Run

if TYPE_CHECKING:
    from pipelines.batch import Batch
    from pipelines.data import Data
    from pipelines.methods import Adapter, Method, Stage
    from pipelines.model import Model
    from pipelines.params import TrainParams

FP16_SCALE = 1024.0  # keeps small gradients above fp16's smallest number; a power of two, so it divides out exactly


def train(
    model: Model,
    method: Method,
    data: Data,
    params: TrainParams,
    *,
    seed: int,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Generator[Event, None, None]:
    """Learn the subjects of `data`; the last event is Finished(Trained).

    The model is restored when the generator ends, however it ends. Closing it first saves a checkpoint in the folder
    `checkpoint` ("stop and keep"); `resume` goes on from the newest one there, bit for bit as if never stopped. Under
    several processes each takes its share of every batch, and only the main one writes.
    StudioError when the loss or a gradient is no longer a number.
    """
    checkpoints = Checkpoints(checkpoint, _config(model, method, data, params, seed)) if checkpoint else None
    with ExitStack() as stack:
        adapter = _attached(stack, model, method, params, data, seed)
        run = Run(model, method, adapter, method.stages(params), data.share, checkpoints)
        yield from run.restored(resume)
        with run.saved_on_close():
            for stage in run.stages_left():
                for batch in data.batches(stage, run.step):
                    values = _step(run, batch, stage, params.micro_batch)
                    run.step += 1
                    yield Progress(stage.name, run.step, stage.steps, values, run.eta)
                    if params.checkpoint_every and run.step % params.checkpoint_every == 0:
                        yield from run.saved()
        yield Finished(Trained(_concept(model, method, data, params, seed), adapter.tensors()))


def _step(run: Run, batch: Batch, stage: Stage, micro_batch: int) -> dict[str, float]:
    """One optimizer step; the losses and the gradient's norm over all processes. `micro_batch` photos at a time."""
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    scale = FP16_SCALE if run.model.dtype == torch.float16 else 1.0
    run.optimizer.zero_grad(set_to_none=True)
    values: dict[str, float] = {}
    with _memory_told():
        for part, share in batch.parts(micro_batch):
            losses = _losses(run, part, stage)
            (sum(losses.values(), start=torch.zeros((), device=run.model.device)) * (scale * share)).backward()
            values = {name: values.get(name, 0.0) + share * loss.item() for name, loss in losses.items()}
    average_gradients(trained, run.share)
    norm = torch.nn.utils.get_total_norm([p.grad.div_(scale) for p in trained if p.grad is not None])
    values = average(values, run.share) | {"gradient": norm.item()}
    if not all(math.isfinite(value) for value in values.values()):
        raise StudioError(
            f"Training went wrong at step {run.step + 1} of '{stage.name}': the loss is no longer a number. Nothing "
            "of this step was kept. Lower lr (a tenth is a good try) and train again."
        )
    if stage.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, stage.max_grad_norm, norm)
    run.optimizer.step()
    return values


def _losses(run: Run, part: Batch, stage: Stage) -> dict[str, torch.Tensor]:
    with _autocast(run.model):
        return run.method.loss(run.model, run.adapter, part, stage)


def _attached(stack: ExitStack, model: Model, method: Method, params: Any, data: Data, seed: int) -> Adapter:
    """Attach with the seed's own randomness; the global generator is as before when this returns."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return stack.enter_context(method.attach(model, params, data.subjects))


def _concept(model: Model, method: Method, data: Data, params: TrainParams, seed: int) -> Concept:
    base = {"id": model.id, "fingerprint": model.fingerprint, "kind": model.kind}
    name = "-and-".join(subject.token.strip("<>") for subject in data.subjects)
    return Concept(name, data.subjects, method.name, base, params.model_dump(mode="json"), seed)


def _config(model: Model, method: Method, data: Data, params: TrainParams, seed: int) -> str:
    """A hash of all that the result depends on; a run that ran out of memory goes on in smaller parts."""
    matters = params.model_dump(mode="json", exclude={"sample_every", "checkpoint_every", "micro_batch"})
    subjects = [[subject.token, subject.noun] for subject in data.subjects]
    return config_hash([method.name, matters, subjects, seed, model.fingerprint, data.digest()])


def _autocast(model: Model) -> Any:
    """A half-precision base computes in its own precision, while what is trained stays fp32."""
    if model.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(model.device.type, model.dtype)


@contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StudioError(
            "The device has no memory left for a training step. Lower micro_batch, batch_size or resolution, or "
            "close what else uses the device."
        ) from error
