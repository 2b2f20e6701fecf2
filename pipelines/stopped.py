"""Runs that stopped on the way: what is left of them, and how they are taken up again or thrown away."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.checkpoint import newest
from pipelines.errors import StudioError
from pipelines.files import is_locked
from pipelines.joblog import RUN_LOCK
from pipelines.library import Library
from pipelines.run_recipe import NAME, Recipe, read_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.concept import Concept, Trained
    from pipelines.events import Picture
    from pipelines.workspace import Workspace

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Unfinished:
    """A run that stopped on the way and can be resumed."""

    id: str
    recipe: Recipe
    done: int  # steps in its newest checkpoint

    @property
    def name(self) -> str:
        return self.recipe.name


def unfinished(workspace: Workspace) -> list[Unfinished]:
    """Runs that can be resumed, the newest first; those that another process is training are left out."""
    found = []
    for folder in workspace.runs.iterdir():
        if folder.name.startswith(".") or not (folder / NAME).is_file() or is_locked(folder / RUN_LOCK):
            continue
        recipe = read_recipe(folder)
        if not recipe.concept:
            point = newest(folder / CHECKPOINTS)
            found.append(Unfinished(folder.name, recipe, point.done if point else 0))
    return sorted(found, key=lambda run: run.recipe.created, reverse=True)


def discard(workspace: Workspace, run_id: str) -> None:
    """Throw an unfinished run away, with the concept that was kept of it. StudioError when it is still running."""
    folder = workspace.folder(workspace.runs, run_id, "run")
    if is_locked(folder / RUN_LOCK):
        raise StudioError("This run is still training. Stop it first.")
    library = Library(workspace)
    for entry in _partial(library, run_id):
        library.delete(entry)
    shutil.rmtree(folder)


def publish(workspace: Workspace, folder: Path, trained: Trained, preview: Picture | None) -> Concept:
    """Put a run's concept into the library, in the place of what was kept of the run when it was stopped earlier."""
    library = Library(workspace)
    earlier = [library.delete(entry) for entry in _partial(library, folder.name)]
    try:
        concept = library.save(trained, preview, folder)
    except BaseException:
        for trash in earlier:
            library.restore(trash)
        raise
    for trash in earlier:
        library.empty_trash(trash)
    return concept


def _partial(library: Library, run_id: str) -> list[str]:
    """Ids of the concepts that were kept of a stopped run."""
    found = ((entry.id, entry.concept.recipe) for entry in library.entries())
    return [name for name, recipe in found if recipe.get("run") == run_id and "steps_done" in recipe]
