"""What a file's own form has no place for, in the metadata of a safetensors file of ours, as "attune_...": what the
concept is called, what it is, on which base it was learned, and the rare word it is asked for with."""

from __future__ import annotations

from typing import Any

from pipelines.concept import Concept
from pipelines.formats.several import subjects_note, subjects_noted


def concept_note(concept: Concept) -> dict[str, str]:
    """Metadata that describes a concept."""
    base = concept.base_model
    known = {"format": "pt", "attune_name": concept.name, "attune_method": concept.method}
    known |= {"attune_base": base.get("id", ""), "attune_fingerprint": base.get("fingerprint", "")}
    if concept.subjects:
        known["attune_noun"] = concept.subjects[0].noun
    if "rare_word" in concept.params:  # an empty one is a choice too
        known["attune_rare_word"] = str(concept.params["rare_word"])
    return known | subjects_note(concept)


def concept_noted(metadata: dict[str, str]) -> dict[str, Any]:
    """The inverse but for the method and the settings: "name", "noun", "base" and the subjects, as far as noted."""
    found: dict[str, Any] = {
        key: metadata[f"attune_{key}"] for key in ("name", "noun") if metadata.get(f"attune_{key}")
    }
    if metadata.get("attune_fingerprint"):
        found["base"] = {"id": metadata.get("attune_base", ""), "fingerprint": metadata["attune_fingerprint"]}
    return found | subjects_noted(metadata)


def params_noted(metadata: dict[str, str]) -> dict[str, Any]:
    """The settings among it."""
    return {"rare_word": metadata["attune_rare_word"]} if "attune_rare_word" in metadata else {}
