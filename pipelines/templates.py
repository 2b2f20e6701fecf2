"""The 27 prompts over which Cones 2 averages (Liu et al. 2023), in the order of its released code."""

from __future__ import annotations

TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)


def filled(template: str, noun: str) -> tuple[str, tuple[int, int]]:
    """The template with the noun in its place, and the noun's characters there (end exclusive)."""
    before, _, after = template.partition("{}")
    return before + noun + after, (len(before), len(before) + len(noun))
