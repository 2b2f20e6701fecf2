"""Concepts on a model, each in its region: what `generate` needs beside the model itself.

A concept is bound to a region by its token: a region of the layout whose words are "<my-cat>" is the place of that
concept. Learned states and tokens act at their own tokens anyway, and attention is led there by the layout. Concepts
that change weights act, in the UNet, only in their region (`pipelines.routed`), and in the text encoder only on the
states of their own tokens. A concept without a region (a style, say) acts everywhere, and so does one whose region is
the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.attach import attached
from pipelines.files import printable
from pipelines.layout import Area, Layout, bind, contested, labels
from pipelines.routed import Router, routed
from pipelines.variants import Made, Variant, difference, layers_of, variant, worn

if TYPE_CHECKING:
    from pipelines.attention.probe import Probe
    from pipelines.concept import Trained
    from pipelines.model import Model, TextStates
    from pipelines.request import Request
    from pipelines.scene import Scene

Cast = Sequence[tuple["Trained", float]]


class Stage:
    """A model with its concepts on. This one has no concept that is kept to a region."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.everywhere: list[str] = []  # sentences about concepts that don't keep to a region of their noun
        self.searching = False  # whether regions have to be found by a first pass
        self.own: Mapping[int, frozenset[str]] = {}

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """The states of the prompt."""
        return self.model.encode(prompts)

    def notes(self, scene: Scene) -> list[str]:
        """What the person should know about the layout."""
        shared = [] if scene.request.layout is None else contested(scene.request.layout, scene.prompt)
        return [*self.everywhere, *shared]

    def probes(self, scene: Scene) -> list[Probe]:
        """What leads attention to the layout's regions. StudioError for words that aren't in the prompt."""
        request = scene.request
        if request.layout is None:
            return []
        bound = bind(request.layout, scene.prompt)
        if request.layout.strength == 0 or request.layout.steps == 0:
            return []
        from pipelines.attention.guidance import LayoutGuidance
        from pipelines.noise import alphas

        return [LayoutGuidance(request.layout, bound, alphas(self.model), request.steps)]

    def place(self, scene: Scene, count: int, cells: Tensor | None = None) -> None:
        """Called before each batch of `count` pictures."""


class RoutedStage(Stage):
    """Some of its concepts change weights and are kept to regions: `own` are their tokens, by variant number."""

    def __init__(
        self,
        model: Model,
        base: Mapping[nn.Module, Made],
        router: Router,
        own: Mapping[int, frozenset[str]],
        drawn: Tensor | None,
    ) -> None:
        super().__init__(model)
        self.router, self.own, self.searching = router, own, drawn is None
        self._base, self._drawn = base, drawn  # variant numbers (1, h, w)

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """The states of each concept's own tokens as its text encoder gives them, of all others as the base's does."""
        text = self.model.encode(prompts)
        states = text.states.clone()
        for number, tokens in self.own.items():
            change = self.router.variants[number]
            if not any(module in change for module in _text_layers(self.model)):
                continue
            with wearing(self.model, self._base, self.router.variants[0], change):
                theirs = self.model.encode(prompts).states
            for row, prompt in enumerate(text.prompts):
                where = _positions(prompt, tokens)
                states[row, where] = theirs[row, where]
        return replace(text, states=states)

    def place(self, scene: Scene, count: int, cells: Tensor | None = None) -> None:
        """The regions of the next batch: as drawn, or as found, (pictures, h, w) numbers of variants."""
        if cells is None and self._drawn is not None:
            cells = self._drawn.expand(count, -1, -1)
        words = torch.zeros(len(scene.prompt.ids), dtype=torch.long)
        for number, tokens in self.own.items():
            words[_positions(scene.prompt, tokens)] = number
        device = self.model.device
        self.router.place(None if cells is None else cells.to(device), words.to(device), scene.size)


@contextmanager
def staged(model: Model, request: Request, concepts: Cast = ()) -> Iterator[Stage]:
    """`concepts` at their strengths on, each where the request's layout has it; exactly the base again afterwards.

    Raises StudioError as `attached` does.
    """
    bound = _bound(request, concepts)
    with ExitStack() as stack:
        everywhere = _everywhere(model, request, concepts, bound)
        plan = _plan(model, request, concepts, bound) if bound else None
        if concepts:
            stack.enter_context(attached(model, concepts))
        if plan is None:
            stage = Stage(model)
            stage.everywhere = everywhere
            yield stage
            return
        base, router, own, drawn = plan
        on = difference(base)
        stack.enter_context(wearing(model, base, on, router.variants[0]))
        stack.enter_context(routed(model, base, on, router))
        routing = RoutedStage(model, base, router, own, drawn)
        routing.everywhere = everywhere
        yield routing


@contextmanager
def wearing(model: Model, base: Mapping[nn.Module, Made], old: Variant, new: Variant) -> Iterator[None]:
    """The text encoders with a variant's weights instead of another's."""
    layers = [module for module in _text_layers(model) if module in base]
    with worn(base, old, new, layers):
        model.text_version += 1
        try:
            yield
        finally:
            model.text_version += 1


def _text_layers(model: Model) -> list[nn.Module]:
    return [module for encoder in model.text_encoders for module in encoder.modules()]


def _positions(prompt: Any, tokens: frozenset[str]) -> list[int]:
    """Where the tokens' words stand in a prompt that was read."""
    from pipelines.text import covered

    return [at for span in prompt.spans if span.token in tokens for at in covered(prompt, span.start, span.end)]


def _bound(request: Request, concepts: Cast) -> dict[int, Area | None]:
    """Concepts that have a region: as drawn, or None where it has to be found."""
    found: dict[int, Area | None] = {}
    for place, (trained, strength) in enumerate(concepts):
        tokens = [subject.token for subject in trained.concept.subjects]
        if request.layout is not None:
            drawn = [one.area for one in request.layout.regions if one.words.strip() in tokens]
            if drawn and strength:
                found[place] = joined(drawn)
        elif request.apart is not False and strength and any(token in request.prompt for token in tokens):
            found[place] = None
    return {} if request.layout is None and request.apart is None and len(found) < 2 else found


def _everywhere(model: Model, request: Request, concepts: Cast, bound: Mapping[int, Area | None]) -> list[str]:
    """A sentence for each concept whose noun has a region that its weights don't keep to."""
    if request.layout is None:
        return []
    named = {" ".join(region.words.casefold().split()): region.words for region in request.layout.regions}
    notes = []
    for place, (trained, strength) in enumerate(concepts):
        for subject in trained.concept.subjects if strength and place not in bound else ():
            words = named.get(" ".join(subject.noun.casefold().split()))
            if words and variant(model, layers_of(model), [(trained, strength)]):
                notes.append(
                    f"{subject.token} acts everywhere: the region is of '{printable(words, 40)}', not of the concept. "
                    f"Name the region {subject.token} to keep it there."
                )
    return notes


def joined(areas: Sequence[Area]) -> Area:
    """One area of all, as fine as the finest."""
    size = max(area.height for area in areas), max(area.width for area in areas)
    numbers, meaning = labels({str(place): area for place, area in enumerate(areas)}, size)
    return Area.of(np.array([bool(one) for one in meaning])[numbers])


Plan = tuple[dict[nn.Module, Made], Router, dict[int, frozenset[str]], Tensor | None]


def _plan(model: Model, request: Request, concepts: Cast, bound: Mapping[int, Area | None]) -> Plan | None:
    """What the concepts with regions make of the model, set by set; None when none of them needs routing."""
    base = layers_of(model)
    alone = {place: variant(model, base, [concepts[place]]) for place in bound}
    changing = [place for place in bound if alone[place]]
    everywhere = [one for place, one in enumerate(concepts) if place not in bound]
    drawn, sets = _cells(request.layout, {place: bound[place] for place in changing})
    alike = request.layout is None and request.apart is None and len(changing) < 2  # nothing to keep it apart from
    if not changing or alike or sets == [frozenset(changing)]:
        return None
    order = [frozenset(), *(frozenset([place]) for place in changing)]
    order += [one for one in sets if one not in order]
    known = {} if everywhere else {frozenset([place]): alone[place] for place in changing}
    variants = [
        known[one] if one in known else variant(model, base, [*everywhere, *(concepts[place] for place in sorted(one))])
        for one in order
    ]
    own = {
        order.index(frozenset([place])): frozenset(subject.token for subject in concepts[place][0].concept.subjects)
        for place in changing
    }
    if drawn is not None:
        drawn = torch.tensor([order.index(one) for one in sets])[drawn][None]
    return base, Router(variants), own, drawn


def _cells(layout: Layout | None, areas: Mapping[int, Area | None]) -> tuple[Tensor | None, list[frozenset[int]]]:
    """The drawing as numbers (h, w) of sets of concepts, and the sets."""
    known = {str(place): area for place, area in areas.items() if area is not None}
    if layout is None or not known:
        return None, []
    size = max(area.height for area in known.values()), max(area.width for area in known.values())
    numbers, meaning = labels(known, size)
    return torch.from_numpy(numbers), [frozenset(int(name) for name in one) for one in meaning]
