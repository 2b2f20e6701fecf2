"""Photos as they come: turned, transparent, grey, broken, enormous, with masks and captions that fit or don't."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import StudioError
from pipelines.photos import load_photos

SIZE = (40, 24)  # width, height


def _picture(size: tuple[int, int] = SIZE) -> Image.Image:
    """Red left, blue right, brighter towards the bottom, so that every turn shows."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 200
    pixels[:, width // 2 :, 2] = 200
    pixels[..., 1] = np.linspace(0, 120, height).astype(np.uint8)[:, None]
    return Image.fromarray(pixels)


def _mask(size: tuple[int, int] = SIZE) -> Image.Image:
    """White in the top left quarter."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[: size[1] // 2, : size[0] // 2] = 255
    return Image.fromarray(mask)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(StudioError) as error:
        load_photos(folder)
    for word in words:
        assert word in str(error.value)


def test_folder(tmp_path: Path) -> None:
    _picture().save(tmp_path / "b.png")
    _picture().save(tmp_path / "a.JPG", "JPEG")
    _picture().save(tmp_path / "c.webp")
    _mask().save(tmp_path / "b-masklabel.png")
    _mask().save(tmp_path / "b-masklabel-other-toy.png")
    (tmp_path / "b.txt").write_text("\ufeffa photo of\n a cat ", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(b"a cat\r\n\r\na cat\r\non sand\r\n \r\n\r\n")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "truth.json").write_text("{ not even json")
    for name in ("metadata.jsonl", "class_metadata.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    _mask().save(tmp_path / "lonely-masklabel.png")
    notes: list[str] = []
    photos = load_photos(tmp_path, notes=notes)
    assert [photo.path.name for photo in photos] == ["a.JPG", "b.png", "c.webp"]
    assert [photo.caption for photo in photos] == ["a cat\na cat on sand", "a photo of a cat", None]
    assert set(photos[1].masks) == {"", "other-toy"} and not photos[0].masks
    assert photos[1].image.shape == (24, 40, 3) and photos[1].size == SIZE
    assert np.array_equal(photos[1].image, np.asarray(_picture()))
    assert len(notes) == 2 and "notes.md" in notes[0] and "lonely-masklabel.png" in notes[1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_and_its_mask_stand_upright(tmp_path: Path, orientation: int) -> None:
    """What a camera stores: the upright scene turned the other way, and a tag that says so."""
    back = {2: 0, 3: 1, 4: 2, 5: 5, 6: 6, 7: 4, 8: 3}  # names of the inverse turns, by what the tag asks for
    inverse = {
        0: Image.Transpose.FLIP_LEFT_RIGHT,
        1: Image.Transpose.ROTATE_180,
        2: Image.Transpose.FLIP_TOP_BOTTOM,
        3: Image.Transpose.ROTATE_270,
        4: Image.Transpose.TRANSVERSE,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
    }
    stored, mask = _picture(), _mask()
    if orientation in back:
        stored, mask = stored.transpose(inverse[back[orientation]]), mask.transpose(inverse[back[orientation]])
    stored.save(tmp_path / "x.png", exif=_exif(orientation))
    mask.save(tmp_path / "x-masklabel.png")
    (photo,) = load_photos(tmp_path)
    assert np.array_equal(photo.image, np.asarray(_picture()))
    assert np.array_equal(photo.masks[""], np.asarray(_mask()))
    assert photo.size == SIZE


def test_a_mask_drawn_on_the_upright_photo_is_left_as_it_is(tmp_path: Path) -> None:
    _picture().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=_exif(6))
    _mask().save(tmp_path / "x-masklabel.png")
    (photo,) = load_photos(tmp_path)
    assert np.array_equal(photo.masks[""], np.asarray(_mask()))


def test_modes(tmp_path: Path) -> None:
    rgba = _picture().convert("RGBA")
    rgba.putalpha(_mask())
    rgba.save(tmp_path / "alpha.png")
    rgba.quantize(16).save(tmp_path / "palette.png")
    _picture().convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((24, 40), 40_000, np.uint16)).save(tmp_path / "deep.png")
    _picture().convert("1").save(tmp_path / "line.png")
    loaded = {photo.path.stem: photo.image for photo in load_photos(tmp_path)}
    assert all(image.shape == (24, 40, 3) and image.dtype == np.uint8 for image in loaded.values())
    assert (loaded["alpha"][12:] == 255).all() and np.array_equal(
        loaded["alpha"][:12, :20], np.asarray(_picture())[:12, :20]
    )
    assert (loaded["palette"][-1] > 240).all()
    assert (loaded["deep"] == 156).all()  # 40,000 of 65,535, not clipped to white
    assert loaded["cmyk"][0, 0, 0] > 150 > loaded["cmyk"][0, 0, 2]


def test_reduced_while_reading(tmp_path: Path) -> None:
    _picture((400, 240)).save(tmp_path / "x.png")
    _mask((400, 240)).save(tmp_path / "x-masklabel.png")
    (photo,) = load_photos(tmp_path, short_side=60)
    assert photo.image.shape == (60, 100, 3) and photo.masks[""].shape == (60, 100) and photo.size == (400, 240)
    (small,) = load_photos(tmp_path, short_side=1000)
    assert small.image.shape == (240, 400, 3)


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(12_001, 1), (1, 12_001), (6_400, 6_400), (30_000, 30_000), (1_000_000, 1)])
def test_enormous_pictures_are_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(_png(*size, zlib.compress(b"\0" * 1000)))
    begun = time.monotonic()
    _refused(tmp_path, "bomb.png", "Make it smaller")
    assert time.monotonic() - begun < 1


def test_a_picture_at_the_limit_is_read(tmp_path: Path) -> None:
    Image.new("L", (12_000, 16), 7).save(tmp_path / "wide.png")
    assert load_photos(tmp_path)[0].image.shape == (16, 12_000, 3)


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    sound.mkdir()
    for suffix in (".png", ".jpg", ".webp"):
        _picture((64, 64)).save(sound / f"x{suffix}")
    chance = np.random.default_rng(0)
    for source in sorted(sound.iterdir()):
        data = source.read_bytes()
        for number, broken in enumerate([data[: len(data) // 2], data[:20], b"", b"GIF89a" + data, bytes(len(data))]):
            folder = tmp_path / f"{source.suffix[1:]}-{number}"
            folder.mkdir()
            (folder / source.name).write_bytes(broken)
            _refused(folder, source.name, "broken")
        for number in range(60):  # a flipped byte is either read or named, never anything else
            folder = tmp_path / f"{source.suffix[1:]}-flip-{number}"
            folder.mkdir()
            flipped = bytearray(data)
            flipped[chance.integers(len(data))] ^= 1 << int(chance.integers(8))
            (folder / source.name).write_bytes(flipped)
            try:
                assert load_photos(folder)[0].image.dtype == np.uint8
            except StudioError as error:
                assert source.name in str(error)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _picture().save(tmp_path / "x.png")
    _mask((20, 20)).save(tmp_path / "x-masklabel.png")
    _refused(tmp_path, "x-masklabel.png", "20 x 20", "40 x 24")
    Image.new("L", SIZE, 100).save(tmp_path / "x-masklabel.png")
    _refused(tmp_path, "x-masklabel.png", "empty")
    clear = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    clear.save(tmp_path / "x-masklabel.png")
    _refused(tmp_path, "x-masklabel.png", "empty")
    (tmp_path / "x-masklabel.png").write_bytes(b"no picture")
    _refused(tmp_path, "x-masklabel.png", "broken")


def test_folders_without_photos(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "no folder")
    _refused(tmp_path, "no photos")
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    _refused(tmp_path, "no photos")


def test_captions_that_are_no_captions(tmp_path: Path) -> None:
    _picture().save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00c")
    _refused(tmp_path, "x.txt", "UTF-8")
    (tmp_path / "x.txt").write_text("cat " * 10_000)
    _refused(tmp_path, "x.txt", "longer than 10,000 bytes. Shorten its captions")
