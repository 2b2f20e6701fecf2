"""How a picture was made, complete enough to make it again bit for bit on the same machine."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.pictures import read_picture
from pipelines.request import Request

if TYPE_CHECKING:
    from pipelines.concept import Trained
    from pipelines.library import Library
    from pipelines.model import Model

FORMAT = 1


def write_recipe(
    model: Model, request: Request, concepts: Sequence[tuple[Trained, float]], attention: Sequence[str]
) -> dict[str, Any]:
    """Plain JSON data about everything that decides the pictures of a request, its seeds apart."""
    return {
        "format": FORMAT,
        "request": request.to_json(),
        "base": {"id": model.id, "kind": model.kind, "fingerprint": model.fingerprint},
        "concepts": [_concept(trained, strength) for trained, strength in concepts],
        "attention": list(attention),
        "versions": versions(),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def for_picture(recipe: dict[str, Any], request: Request, index: int) -> dict[str, Any]:
    """The recipe of one picture: its seed, and its neighbours where several were painted in one batch."""
    first = index // request.batch * request.batch
    batch = request.seeds[first : first + request.batch]
    keep = (request.seeds[index],) if len(batch) > 1 else ()
    alone = replace(request, seeds=batch, batch=len(batch), keep=keep)
    return recipe | {"request": alone.to_json(), "seed": request.seeds[index]}


def _concept(trained: Trained, strength: float) -> dict[str, Any]:
    from pipelines.fingerprint import content_hash

    concept = trained.concept
    return {
        "name": concept.name,
        "method": concept.method,
        "subjects": [{"token": subject.token, "noun": subject.noun} for subject in concept.subjects],
        "hash": content_hash(trained),
        "strength": float(strength),
    }


@lru_cache
def versions() -> dict[str, str]:
    """Of Attune and of the libraries that compute the picture."""
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        own = str(tomllib.load(file)["project"]["version"])
    return {"attune": own} | {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")}


@dataclass(frozen=True)
class Again:
    """What is needed to make a picture again. `base` has id, kind, fingerprint, device and dtype."""

    request: Request
    base: dict[str, str]
    concepts: tuple[dict[str, Any], ...]  # name, subjects, hash, strength
    attention: tuple[str, ...]

    def check(self, model: Model) -> None:
        """StudioError unless `model` has the weights the picture was made with."""
        if model.fingerprint != self.base["fingerprint"]:
            raise StudioError(
                f"This picture was made with the base '{self.base['id']}' ({self.base['fingerprint']}), and "
                f"'{model.id}' ({model.fingerprint}) is loaded. Load the one it was made with."
            )

    def find_concepts(self, library: Library) -> list[tuple[Trained, float]]:
        """The very concepts of the picture, by their content: the library may call them otherwise by now.

        They get their old names and tokens back, which is what the prompt says. StudioError when one is not there.
        """
        return [(_find(library, wanted), wanted["strength"]) for wanted in self.concepts]


def again(path: str | Path) -> Again:
    """The recipe in a PNG that Attune made. StudioError when there is none, or it is damaged."""
    recipe = read_picture(path)["attune"]
    if recipe is None:
        raise StudioError(
            f"'{Path(path).name}' carries no recipe of Attune, so it can't be made again. Choose a picture made here."
        )
    try:
        base = {key: str(recipe["base"][key]) for key in ("id", "kind", "fingerprint")}
        base |= {key: str(recipe[key]) for key in ("device", "dtype")}
        concepts = tuple(_checked(one) for one in recipe["concepts"])
        attention = tuple(str(word) for word in recipe["attention"])
    except (KeyError, TypeError, ValueError) as error:
        raise StudioError(f"The recipe in '{Path(path).name}' is damaged or from a newer Attune.") from error
    return Again(Request.from_json(recipe["request"]), base, concepts, attention)


def _checked(one: dict[str, Any]) -> dict[str, Any]:
    subjects = tuple(Subject(str(subject["token"]), str(subject["noun"])) for subject in one["subjects"])
    return {
        "name": str(one["name"]),
        "hash": str(one["hash"]),
        "strength": float(one["strength"]),
        "subjects": subjects,
    }


def _find(library: Library, wanted: dict[str, Any]) -> Trained:
    from pipelines.fingerprint import content_hash

    known = [concept.name for concept in library.concepts()]
    for name in sorted(known, key=lambda name: name != wanted["name"]):  # its own name first
        trained = library.load(name)
        if content_hash(trained) == wanted["hash"]:
            concept = replace(trained.concept, name=wanted["name"], subjects=wanted["subjects"])
            return replace(trained, concept=concept)
    changed = "has changed since" if wanted["name"] in known else "is not in the library"
    raise StudioError(f"The picture was made with the concept '{wanted['name']}', which {changed}. Import it first.")
