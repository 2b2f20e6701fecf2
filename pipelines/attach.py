"""Concepts on a model: any methods, any number, any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipelines.concept import Concept, Trained
from pipelines.errors import StudioError
from pipelines.library import check_base
from pipelines.methods import Adapter, get_method

if TYPE_CHECKING:
    from pipelines.model import Model
    from pipelines.params import TrainParams


@contextmanager
def attached(model: Model, concepts: Sequence[tuple[Trained, float]]) -> Iterator[list[Adapter]]:
    """Every (concept, strength) on and folded in while the context is open; exactly the base again afterwards.

    Concepts of the same method share what their method lets them share: SVDiff's shifts add up inside the ReLU, so
    [(a, 1), (b, 1)] is its eq. 4 and [(a, x), (b, 1 - x)] its eq. 5. Raises StudioError for a concept of another base,
    of an unknown method, or with tensors that don't fit.
    """
    with ExitStack() as stack:
        adapters: list[Adapter] = []
        for trained, strength in concepts:
            check_base(trained.concept, model)
            method = get_method(trained.concept.method)
            params = _params(method.Params, trained.concept)
            adapter = stack.enter_context(method.attach(model, params, trained.concept.subjects))
            adapter.load(trained.tensors)
            adapter.strength = strength
            adapters.append(adapter)
        for adapter in adapters:
            adapter.bake()
        yield adapters


def _params(settings: type[TrainParams], concept: Concept) -> TrainParams:
    try:
        return settings(**concept.params)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StudioError(
            f"'{concept.name}' has settings this version doesn't know ({where}: {first['msg']}). Update Attune, or "
            "import the concept again."
        ) from error
