"""An attention store as an .npz file, made to be read with plain numpy too.

`heat` is (labels, rows, height, width): for each word the mean over steps, layers and heads. `index` is JSON text:
format, tokens (label -> positions, in the order of `heat`), note, budget, sites, and for every batch (take) its
detail and, per site, the number of steps summed and the indices of the steps kept. `sum.<take>.<site>` are float32
(rows, heads or 1, queries, labels), `steps.<take>.<site>` float16 (steps, rows, heads or 1, queries, labels): half
precision is enough to look at single steps and halves the file.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.attention.protocol import Site
from pipelines.attention.store import MEGABYTE, AttentionStore
from pipelines.attention.take import DETAILS, Take
from pipelines.errors import StudioError
from pipelines.files import write_atomic


def save_npz(store: AttentionStore, path: str | Path) -> None:
    """Write `store` atomically. StudioError when it is empty or the disk is full."""
    arrays = {"heat": np.stack([store.maps(label) for label in store.tokens])}
    sites = store.sites()
    takes: list[dict[str, Any]] = []
    for number, take in enumerate(store.takes):
        kept = {site.name: sorted(take.steps.get(site.name, {})) for site in sites}
        takes.append({"detail": take.detail, "counts": [take.counts[s.name] for s in sites], "steps": [*kept.values()]})
        for place, site in enumerate(sites):
            arrays[f"sum.{number}.{place}"] = take.sums[site.name].cpu().numpy()
            if kept[site.name]:
                steps = torch.stack([take.steps[site.name][index] for index in kept[site.name]])
                arrays[f"steps.{number}.{place}"] = steps.half().cpu().numpy()
    index = {
        "format": 1,
        "tokens": store.tokens,
        "note": store.note,
        "budget": store.budget,
        "sites": [asdict(site) for site in sites],
        "takes": takes,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, index=np.array(json.dumps(index)), **arrays)
    write_atomic(path, buffer.getvalue())


def load_npz(path: str | Path) -> AttentionStore:
    """A store as `save_npz` wrote it. StudioError when the file isn't one."""
    try:
        data = io.BytesIO(Path(path).read_bytes())  # numpy would leave a broken file open
        with np.load(data, allow_pickle=False) as arrays:
            index = json.loads(str(arrays["index"]))
            sites = [Site(**site) for site in index["sites"]]
            store = AttentionStore(index["tokens"], index["budget"] / MEGABYTE)
            store.note = str(index["note"])
            takes = [_take(arrays, number, take, sites) for number, take in enumerate(index["takes"])]
    except (OSError, KeyError, IndexError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StudioError(f"'{Path(path).name}' isn't a readable attention file ({error}). Save it again.") from error
    store.restore(sites, takes)
    return store


def _take(arrays: Any, number: int, index: dict[str, Any], sites: list[Site]) -> Take:
    take = Take(index["detail"] if index["detail"] in DETAILS else "mean")
    for place, site in enumerate(sites):
        take.sums[site.name] = _tensor(arrays[f"sum.{number}.{place}"])
        take.counts[site.name] = int(index["counts"][place])
        if index["steps"][place]:
            kept = _tensor(arrays[f"steps.{number}.{place}"])
            take.steps[site.name] = dict(zip(map(int, index["steps"][place]), kept, strict=True))
    return take


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).float()
