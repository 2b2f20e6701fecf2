"""PNG files that know how they were made: for other tools as A1111's `parameters`, for us as complete JSON."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from pipelines.errors import StudioError
from pipelines.events import Picture
from pipelines.files import printable, write_atomic
from pipelines.schedulers import SCHEDULERS, scheduler_title

OURS, A1111 = "attune", "parameters"
_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def save_picture(path: str | Path, image: Picture, info: dict[str, Any]) -> None:
    """`image` (height, width, 3) as a PNG, atomically, with `info` (a recipe, see recipe.py) written into it twice.

    StudioError when the disk is full or the folder can't be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text(A1111, a1111_text(info))
    texts.add_text(OURS, json.dumps(info, ensure_ascii=True, sort_keys=True, allow_nan=False))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=texts)
    write_atomic(path, buffer.getvalue())


def read_picture(path: str | Path) -> dict[str, Any]:
    """What a PNG says about its making: {"attune": our recipe or None, "parameters": A1111's text or "", "request"}.

    "request" holds the fields of a Request that could be understood, from ours or else from A1111's text.
    StudioError when the file is no PNG.
    """
    from PIL import Image

    name = printable(Path(path).name)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts = {key: value for key, value in image.info.items() if isinstance(value, str)}
    except FileNotFoundError as error:
        raise StudioError(f"There is no file '{name}'. Check the path.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise StudioError(f"'{name}' is not a readable PNG. Choose a picture that was saved as PNG.") from error
    recipe = _json(texts[OURS], name) if OURS in texts else None
    parameters = texts.get(A1111, "")
    request = dict(recipe.get("request", {})) if recipe else read_a1111(parameters)
    return {"attune": recipe, "parameters": parameters, "request": request}


def _json(text: str, name: str) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
        if isinstance(recipe, dict) and isinstance(recipe.get("request"), dict):
            return recipe
    except (ValueError, RecursionError) as error:
        raise StudioError(f"The recipe in '{name}' is damaged. Choose another picture.") from error
    raise StudioError(f"The recipe in '{name}' is damaged. Choose another picture.")


def a1111_text(info: dict[str, Any]) -> str:
    """The three parts other tools read: prompt, negative prompt, one line of settings."""
    request, base = info["request"], info["base"]
    concepts = ", ".join(f"{concept['name']}:{concept['strength']:g}" for concept in info["concepts"])
    fields = {
        "Steps": request["steps"],
        "Sampler": scheduler_title(request["scheduler"]),
        "CFG scale": f"{request['guidance']:g}",
        "Seed": info["seed"],
        "Size": f"{request['width']}x{request['height']}",
        "Model hash": base["fingerprint"][:10],
        "Model": base["id"],
        **({"Attune concepts": concepts} if concepts else {}),
        "Version": f"Attune {info['versions']['attune']}",
    }
    settings = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in fields.items())
    negative = [f"Negative prompt: {request['negative']}"] if request["negative"] else []
    return "\n".join([request["prompt"], *negative, settings])


def _quoted(value: str) -> str:
    """Values with a comma, colon, quote or line break are JSON strings, as A1111 writes them."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value


def read_a1111(text: str) -> dict[str, Any]:
    """The fields of a Request in an A1111 text; what is missing or foreign is left out. Never raises."""
    *lines, last = text.strip().split("\n")
    fields = {key: value.strip() for key, value in _FIELD.findall(last)}
    if len(fields) < 3:
        lines, fields = [*lines, last], {}
    start = next((at for at, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    found: dict[str, Any] = {"prompt": "\n".join(lines[:start]).strip()}
    if negative:
        found["negative"] = negative
    titles = {title.lower(): name for name, (title, _) in SCHEDULERS.items()}
    sampler = fields.get("Sampler", "").lower().removesuffix(" karras")
    if sampler in titles:
        found["scheduler"] = titles[sampler]
    return found | _numbers(fields)


def _numbers(fields: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, name in (("Steps", "steps"), ("Seed", "seeds")):
        if re.fullmatch(r"\d{1,19}", fields.get(key, ""), re.ASCII):
            found[name] = int(fields[key]) if name == "steps" else (int(fields[key]),)
    if re.fullmatch(r"\d{1,3}(\.\d{1,6})?", fields.get("CFG scale", ""), re.ASCII):
        found["guidance"] = float(fields["CFG scale"])
    size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", fields.get("Size", ""), re.ASCII)
    if size:
        found |= {"width": int(size[1]), "height": int(size[2])}
    return found
