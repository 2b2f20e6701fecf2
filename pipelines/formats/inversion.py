"""Learned tokens in everybody's files: `learned_embeds*.bin` and `.safetensors`, and what A1111 writes and reads.

    {"<token>": (width,) or (tokens, width)}            diffusers; AttnDreamBooth has one key for each token, x_v0, x_v1
    {"emb_params": (tokens, width)}                     A1111, safetensors
    {"string_to_param": {"*": (tokens, width)}, ...}    A1111, .pt
    {"clip_l": (tokens, 768), "clip_g": (tokens, 1280)} SDXL, one entry for each text encoder

None of them says for which base or noun it was made; ours note it in their metadata. We write safetensors by default;
`.bin` where a tool wants it. In a folder the newest file counts, of AttnDreamBooth's that in its `learned_embeds/`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.concept import Trained
from pipelines.errors import StudioError
from pipelines.files import make_folder, printable, save_tensors, write_atomic
from pipelines.formats.jail import pickle_codes, read_tensors
from pipelines.formats.notes import concept_note, concept_noted
from pipelines.intake import load_tensors, read_header

if TYPE_CHECKING:
    from torch import Tensor

method = "textual_inversion"
title = "learned_embeds (Textual Inversion)"

FILE, _FOLDER = "learned_embeds.safetensors", "learned_embeds"
A1111, SDXL = "emb_params", ("clip_l", "clip_g")
KEYS = ("tokens.text_encoder", "tokens.text_encoder_2")  # ours
PICKLED = (".bin", ".pt")
_NUMBERED = re.compile(r"^(.*)_v(\d+)$")
_PARAM = "string_to_param/"
_WITH_NOUN = "attune_with_noun"
_MOST_TOKENS, _WIDTHS = 75, (8, 4096)
_PICKLE_LIMIT = 65_536  # bytes; a dictionary of a few tensors has some hundreds
_MESSAGE = "Choose a learned_embeds file, or an embedding for A1111."


def detect(path: Path) -> bool:
    """A file of few small matrices of one width, or a folder with a learned_embeds file. Nothing is unpickled."""
    file = newest(path)
    if file is None or not file.is_file():
        return False
    return _looks_pickled(file) if file.suffix.lower() in PICKLED else _looks_plain(file)


def read(path: Path) -> dict[str, Any]:
    """The rows under our names, and the settings they imply; "name" from the token or the file.

    StudioError when it holds tokens of several concepts (`read_embeds` gives them all), or something else.
    """
    file = newest(path)
    if file is None:
        raise StudioError(f"'{printable(path.name)}' holds no learned_embeds file. {_MESSAGE}")
    content = _content(file)
    embeds = _grouped(content)
    what = f"'{printable(file.name)}'"
    notes = noted(file)
    if set(embeds) == set(SDXL):
        rows = dict(zip(KEYS, (embeds[key] for key in SDXL), strict=True))
        return _found(rows, file.stem, with_noun_noted(notes)) | concept_noted(notes)
    if len(embeds) > 1:
        names = ", ".join(printable(name, 30) for name in list(embeds)[:5])
        raise StudioError(
            f"{what} holds {len(embeds)} concepts ({names}). Put the one you want into a file of its own."
        )
    ((token, values),) = embeds.items()
    plain = token.strip("<>*")
    released = _NUMBERED.match(next(iter(content)))  # AttnDreamBooth's words stand before their noun
    with_noun = released is not None or with_noun_noted(notes)
    return _found({KEYS[0]: values}, plain or file.stem, with_noun) | concept_noted(notes)


def write(path: Path, trained: Trained) -> list[Path]:
    """`learned_embeds.safetensors` in the folder `path`, as diffusers' `load_textual_inversion` takes it."""
    target = path / FILE
    if target.exists():
        raise StudioError(f"{target} is already there. Choose another folder.")
    make_folder(path)
    with_noun = {_WITH_NOUN: "1"} if trained.concept.params.get("with_noun") else {}
    write_embeds(target, embeds_of(trained), concept_note(trained.concept) | with_noun)
    return [target]


def noted(file: Path) -> dict[str, str]:
    """What our own metadata says; {} of pickles and of files without any."""
    if file.suffix.lower() in PICKLED:
        return {}
    metadata: dict[str, str] = read_header(file).get("__metadata__", {})
    return metadata


def with_noun_noted(notes: Mapping[str, str]) -> bool:
    """Whether the noun follows the tokens in a prompt."""
    return notes.get(_WITH_NOUN) == "1"


def embeds_of(trained: Trained) -> dict[str, Tensor]:
    """A concept's tokens as others name them: {"<my-cat>": (tokens, width)}, or SDXL's two. For several subjects one
    entry each. StudioError when the concept has no learned tokens."""
    rows = [trained.tensors[key] for key in KEYS if key in trained.tensors]
    if not rows:
        raise StudioError(f"'{trained.concept.name}' has no learned tokens. Export it as a zip.")
    subjects = trained.concept.subjects
    if len(rows) == len(SDXL):
        if len(subjects) > 1:
            raise StudioError("Files for SDXL hold one concept, and this one has several. Export it as a zip.")
        return dict(zip(SDXL, rows, strict=True))
    each = len(rows[0]) // max(1, len(subjects))
    return {subject.token: rows[0][at * each : (at + 1) * each] for at, subject in enumerate(subjects)}


def read_embeds(path: Path) -> dict[str, Tensor]:
    """Every token of a file with its rows, (tokens, width) fp32: {"<my-cat>": ...}; SDXL's under "clip_l" and "clip_g".

    Tokens named x_v0, x_v1 ... are one, "x". A1111's rows are called "*". StudioError when it holds anything else.
    """
    return _grouped(_content(path))


def write_embeds(path: Path, embeds: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """`embeds` (token -> (tokens, width)) as diffusers reads them; pickled where the name ends in .bin or .pt.

    A token of one row is written as (width,), which is what most tools expect. `notes` are a safetensors file's
    metadata.
    """
    content = {
        name: (rows[0] if rows.ndim == 2 and len(rows) == 1 and name not in SDXL else rows).detach().float().cpu()
        for name, rows in embeds.items()
    }
    _save(path, content, notes)


def write_numbered(path: Path, token: str, rows: Tensor) -> None:
    """One key for each token, `x_v0`, `x_v1` ..., as AttnDreamBooth writes and reads them."""
    _save(path, {f"{token}_v{number}": row.detach().float().cpu() for number, row in enumerate(rows)})


def write_a1111(path: Path, rows: Tensor, notes: Mapping[str, str] | None = None) -> None:
    """{"emb_params": (tokens, width)} as safetensors, which A1111 and its followers read by the file's name."""
    save_tensors(path, {A1111: rows.detach().float()}, notes)


def write_embedding(path: Path, trained: Trained) -> list[Path]:
    """A file for A1111 in the folder `path` for each subject, called as it is. StudioError for what has weights too."""
    concept, embeds = trained.concept, embeds_of(trained)
    if set(trained.tensors) - set(KEYS):
        raise StudioError(f"'{concept.name}' changes weights too, which an embedding can't hold. Export it as a zip.")
    targets = [path / f"{subject.token.strip('<>')}.safetensors" for subject in concept.subjects]
    for target in targets:
        if target.exists():
            raise StudioError(f"{target} is already there. Choose another folder.")
    make_folder(path)
    for subject, target in zip(concept.subjects, targets, strict=True):
        notes = concept_note(replace(concept, name=target.stem, subjects=(subject,)))
        if set(embeds) == set(SDXL):
            write_embeds(target, embeds, notes)
        else:
            write_a1111(target, embeds[subject.token], notes)
    return targets


forms = {"a1111": write_embedding}


def _content(path: Path) -> dict[str, Tensor]:
    """Every entry by the name it has in the file, as rows."""
    what = f"'{printable(path.name)}'"
    pickled = path.suffix.lower() in PICKLED
    content: Any = read_tensors(path) if pickled else load_tensors(path)[0]
    if not isinstance(content, dict):
        raise StudioError(f"{what} holds one bare tensor, which names no token. {_MESSAGE}")
    if any(key.startswith(_PARAM) for key in content):
        content = {key.removeprefix(_PARAM): value for key, value in content.items() if key.startswith(_PARAM)}
    if A1111 in content:
        content = {"*": content[A1111]}
    if not content:
        raise StudioError(f"{what} holds no tokens. {_MESSAGE}")
    return {key: _rows(value, key, what) for key, value in content.items()}


def _save(path: Path, content: dict[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    if path.suffix.lower() not in PICKLED:
        save_tensors(path, content, notes)
        return
    import torch

    data = io.BytesIO()
    torch.save({name: values.contiguous().clone() for name, values in content.items()}, data)
    write_atomic(path, data.getvalue())


def _found(rows: dict[str, Tensor], name: str, with_noun: bool) -> dict[str, Any]:
    counts = {len(values) for values in rows.values()}
    if len(counts) > 1:
        raise StudioError(f"'{printable(name)}' has another number of tokens for each text encoder. {_MESSAGE}")
    return {"tensors": rows, "params": {"tokens": counts.pop(), "with_noun": with_noun}, "name": name}


def _rows(value: Tensor, key: str, what: str) -> Tensor:
    low, high = _WIDTHS
    sound = value.is_floating_point() and value.ndim in (1, 2) and low <= value.shape[-1] <= high
    if not sound or not 0 < value.numel() // value.shape[-1] <= _MOST_TOKENS or not bool(value.isfinite().all()):
        raise StudioError(f"{what} holds '{printable(key)}', which is no learned token. {_MESSAGE}")
    return value.reshape(-1, value.shape[-1]).float().contiguous()


def _grouped(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """x_v0, x_v1 ... put together in their order; other names as they are."""
    import torch

    groups: dict[str, list[tuple[int, Tensor]]] = {}
    for key, values in rows.items():
        numbered = _NUMBERED.match(key)
        groups.setdefault(numbered[1] if numbered else key, []).append((int(numbered[2]) if numbered else 0, values))
    for name, group in groups.items():
        if len({values.shape[-1] for _, values in group}) > 1:
            raise StudioError(f"The rows of '{printable(name)}' are of different widths. {_MESSAGE}")
    return {
        name: torch.cat([values for _, values in sorted(group, key=lambda pair: pair[0])])
        for name, group in groups.items()
    }


def newest(path: Path) -> Path | None:
    """The file itself, or the newest learned_embeds file of a folder (the one of the most steps)."""
    if not path.is_dir():
        return path
    for folder in (path, path / _FOLDER):
        found = [file for end in (".safetensors", *PICKLED) for file in folder.glob(f"learned_embeds*{end}")]
        if found:
            return max(found, key=_steps)
    return None


def _steps(file: Path) -> tuple[int, bool]:
    """Without a number it is the last one, but for what ConceptExpress keeps of the step that merges split tokens."""
    numbers = re.findall(r"\d+", file.stem)
    steps = -1 if "merging" in file.stem else int(numbers[-1]) if numbers else 1 << 62
    return steps, file.suffix == ".safetensors"


def _looks_plain(file: Path) -> bool:
    try:
        header = read_header(file)
    except (StudioError, OSError):
        return False
    shapes = {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    low, high = _WIDTHS
    small = all(len(shape) in (1, 2) and low <= shape[-1] <= high for shape in shapes.values())
    count = sum(shape[0] if len(shape) == 2 else 1 for shape in shapes.values())
    known = set(shapes) in ({A1111}, set(SDXL))
    return small and 0 < count <= _MOST_TOKENS and (known or _named_so(file, shapes, every=True))


def _named_so(file: Path, names: Iterable[str], every: bool) -> bool:
    """Whether the file's name, or those inside, are such as learned tokens have."""
    tokens = [name.startswith("<") or _NUMBERED.match(name) is not None for name in names]
    return "embed" in file.name.lower() or (all(tokens) if every else any(tokens))


def pickled_texts(file: Path) -> list[str]:
    """All text in a torch.save file, its keys among it, without unpickling; [] for anything else."""
    return _texts(pickle_codes(file, _PICKLE_LIMIT))


def _texts(codes: Sequence[tuple[str, Any]]) -> list[str]:
    return [argument for name, argument in codes if name == "BINUNICODE" and isinstance(argument, str)]


def _looks_pickled(file: Path) -> bool:
    """Whether it is a torch.save file of a dictionary of few tensors. Its pickle is only read as a list of codes."""
    codes = pickle_codes(file, _PICKLE_LIMIT)
    names = [name for name, _ in codes]
    texts = _texts(codes)
    layers = any(text.endswith((".weight", ".bias")) for text in texts)
    rebuilt = any(argument == "torch._utils _rebuild_tensor_v2" for name, argument in codes if name == "GLOBAL")
    filled = "SETITEM" in names or "SETITEMS" in names
    if not rebuilt or not filled or layers or names.count("BINPERSID") > _MOST_TOKENS:
        return False
    return "string_to_param" in texts or _named_so(file, texts, every=False)
