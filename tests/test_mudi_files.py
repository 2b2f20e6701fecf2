"""MuDI's data folders: what is in them comes out, what is broken is told with its line, what is written is read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.formats import formats, mudi, mudi_folders
from pipelines.noise import generator
from pipelines.photos import Photo, load_photos
from pipelines.sources import photo_source
from pipelines.workspace import Workspace
from studio.datasets import Datasets

FIRST = {"id": {"a": "olis blue drink can", "b": "hta red monster plush"}}
ROWS = [
    {
        "id": "a",
        "file_name": "a00.jpg",
        "mask_path": "mask_a00.jpg",
        "text": "A photo of a olis blue drink can on ice.",
    },
    {"id": "a", "file_name": "a01.jpg", "mask_path": "mask_a01.jpg", "text": "A photo of a Olis blue  drink can."},
    {"id": "b", "file_name": "b00.jpg", "mask_path": "mask_b00.jpg", "text": "A photo of hta red monster plush."},
]
SIZES = {"a00": (40, 60), "a01": (50, 50), "b00": (30, 48)}  # height, width


def jpeg(array: np.ndarray, orientation: int = 0) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(array).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def folder(path: Path, lines: list[Any] | None = None, name: str = mudi.FILE) -> Path:
    """A data set of three photos; `lines` are JSON data or texts as they stand."""
    path.mkdir(exist_ok=True)
    for stem, size in SIZES.items():
        mask = np.zeros(size, np.uint8)
        mask[8:24, 10:30] = 255
        (path / f"{stem}.jpg").write_bytes(jpeg(np.full((*size, 3), 120, np.uint8)))
        (path / f"mask_{stem}.jpg").write_bytes(jpeg(mask))
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (lines or [FIRST, *ROWS])]
    (path / name).write_text("\n".join(texts), encoding="utf-8")
    return path


def test_it_is_read_whole_past_blank_lines(tmp_path: Path) -> None:
    plain = mudi.read_dataset(folder(tmp_path / "x"))
    odd = folder(tmp_path / "y", ["\ufeff" + json.dumps(FIRST), "", ROWS[0], "   \r", ROWS[1], "", ROWS[2], ""])
    for found in (plain, mudi.read_dataset(odd)):
        assert found.phrases == FIRST["id"] and [row.picture.stem for row in found.rows] == list(SIZES)
    assert [row.line for row in mudi.read_dataset(odd).rows] == [3, 5, 7]
    assert mudi.is_dataset(odd) and not mudi.is_dataset(tmp_path)
    assert mudi.subjects_of(plain) == (
        (Subject("<a>", "blue drink can"), Subject("<b>", "red monster plush")),
        "olis hta",
    )
    assert mudi.subjects_of(plain, {"a": "my-can"})[0][0] == Subject("<my-can>", "blue drink can")


def test_photos_come_with_mask_name_and_caption(tmp_path: Path) -> None:
    photos = mudi.photos_of(mudi.read_dataset(folder(tmp_path / "x")), names={"b": "plush"})
    assert [photo.shows for photo in photos] == [("a",), ("a",), ("plush",)]
    assert [photo.caption for photo in photos] == [
        "A photo of a <a> on ice.",
        "A photo of a <a>.",
        "A photo of <plush>.",
    ]
    assert photos[0].image.shape == (40, 60, 3) and photos[2].masks.keys() == {"plush"}
    mask = photos[0].masks["a"]
    assert mask.shape == (40, 60) and mask[12:20, 14:26].min() > 200 and mask[30:, 40:].max() < 60
    small = mudi.photos_of(mudi.read_dataset(tmp_path / "x"), short_side=20)
    assert small[0].image.shape == (20, 30, 3) and small[0].size == (60, 40)


def test_a_mask_turns_with_its_photo(tmp_path: Path) -> None:
    """Where only the photo's EXIF says that it lies on its side, upstream trains on a mask that doesn't fit."""
    path = folder(tmp_path / "x")
    (path / "a00.jpg").write_bytes(jpeg(np.full((40, 60, 3), 120, np.uint8), orientation=6))
    photo = mudi.photos_of(mudi.read_dataset(path))[0]
    assert photo.image.shape == (60, 40, 3) and photo.masks["a"].shape == (60, 40)
    assert photo.masks["a"][14:26, 20:28].min() > 200  # 8:24, 10:30 turned by a quarter


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{bad", ROWS[0]], "metadata.jsonl, line 1 is no JSON"),
        ([FIRST, ROWS[0], '{"id": "a", ', ROWS[2]], "metadata.jsonl, line 3 is no JSON"),
        ([FIRST, "", [1, 2]], r"line 3 is \[1, 2\], not"),
        ([ROWS[0], FIRST], "line 1 must name the subjects first"),
        ([{"id": {}}], "line 1 must name the subjects first"),
        ([{"id": {"a": 3}}], "line 1: 'a' needs a phrase"),
        (['{"id": {"a": "olis can", "a": "hta plush"}}'], "line 1 says 'a' twice"),
        ([{"id": {"a": "olis can", "b": "Olis  can"}}], "line 1 calls two subjects 'olis can'"),
        ([{"id": {"a": "olis can", "A": "hta toy"}}], "line 1: 'a' and 'A' are too much alike"),
        ([FIRST, ROWS[0], ROWS[2] | {"id": "c"}], "line 3 is about 'c', but the first line names a, b"),
        ([FIRST, ROWS[0] | {"id": ["a"]}], "line 2 is about"),
        ([FIRST, {k: v for k, v in ROWS[0].items() if k != "mask_path"}], "line 2 has no 'mask_path'. Every line"),
        (
            [FIRST, {("mask_file" if k == "mask_path" else k): v for k, v in ROWS[0].items()}],
            "has no 'mask_path'. It has 'mask_file': is that it",
        ),
        ([FIRST, ROWS[0] | {"mask_path": "mask_a09.jpg"}], "line 2: there is no mask 'mask_a09.jpg'"),
        ([FIRST, ROWS[0] | {"file_name": "nowhere.jpg"}], "line 2: there is no picture 'nowhere.jpg'"),
        ([FIRST, ROWS[0] | {"file_name": "../../etc/passwd"}], "line 2: '../../etc/passwd' lies outside"),
        ([FIRST, ROWS[0] | {"file_name": "/etc/passwd"}], "lies outside"),
        ([FIRST, ROWS[0] | {"file_name": 3}], "'file_name' must be the name of a file"),
        ([FIRST, ROWS[0] | {"text": []}], "line 2: 'text' must be"),
        ([FIRST, ROWS[0] | {"text": " "}], "line 2: 'text' must be"),
        ([FIRST, ROWS[0], ROWS[1]], "metadata.jsonl, line 1: no other line has a picture of 'b'"),
        (["", "  "], "metadata.jsonl is empty"),
        (["[" * 100_000], "line 1 is no JSON"),
        ([FIRST, '{"id": ' + "1" * 5000 + "}"], "line 2 is no JSON"),
        ([FIRST, ROWS[0] | {"file_name": "a" * 5000}], "line 2: 'file_name' must be the name"),
        ([FIRST, ROWS[0] | {"text": "\ud800"}], "line 2 has half a character"),
        ([{"id": {"a" * 400: "olis can"}}], "line 1: the name 'aaa.* is too long"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, lines: list[Any], said: str) -> None:
    with pytest.raises(StudioError, match=said):
        mudi.read_dataset(folder(tmp_path / "x", lines))


def test_wrong_pictures_are_told_with_their_line(tmp_path: Path) -> None:
    path = folder(tmp_path / "x")
    wrong = {
        "mask_a01.jpg": (jpeg(np.zeros((50, 50), np.uint8)), "metadata.jsonl, line 3: The mask mask_a01.jpg is empty"),
        "mask_b00.jpg": (jpeg(np.full((9, 9), 255, np.uint8)), "line 4: The mask mask_b00.jpg has 9 x 9 pixels"),
        "a00.jpg": (b"no picture", "line 2: a00.jpg is broken"),
    }
    for file, (content, said) in wrong.items():
        kept = (path / file).read_bytes()
        (path / file).write_bytes(content)
        with pytest.raises(StudioError, match=said):
            mudi.photos_of(mudi.read_dataset(path))
        (path / file).write_bytes(kept)
    silent = folder(tmp_path / "y", [FIRST, ROWS[0] | {"text": "A photo of a can."}, *ROWS[1:]])
    with pytest.raises(StudioError, match="line 2: the text 'A photo of a can.' doesn't say 'olis blue drink can'"):
        mudi.photos_of(mudi.read_dataset(silent))
    inside = folder(tmp_path / "w", [FIRST, ROWS[0] | {"text": "A photo of an oolis blue drink candle."}, *ROWS[1:]])
    with pytest.raises(StudioError, match="line 2: the text .* doesn't say"):
        mudi.photos_of(mudi.read_dataset(inside))
    named = folder(tmp_path / "z", [{"id": {"a b": "olis can", "b": "hta toy"}}, ROWS[0] | {"id": "a b"}, ROWS[2]])
    with pytest.raises(StudioError, match="metadata.jsonl, line 1: '<a b>' can't name a concept"):
        mudi.photos_of(mudi.read_dataset(named))
    with pytest.raises(StudioError, match="^'<x y>' can't name a concept"):  # said by a person, not by the file
        mudi.subjects_of(mudi.read_dataset(path), {"a": "x y"})
    with pytest.raises(StudioError, match=r"There is no class_metadata.jsonl in 'x'"):
        mudi.read_dataset(path, mudi.CLASS_FILE)
    (path / mudi.FILE).write_bytes(b'{"id": {"a": "\xff"}}')
    with pytest.raises(StudioError, match="not UTF-8"):
        mudi.read_dataset(path)


def test_class_pictures_may_share_a_class(tmp_path: Path) -> None:
    lines = [{"id": {"a": "dog", "b": "dog"}}, *(row | {"text": "A photo of a dog"} for row in ROWS)]
    classes = mudi.read_dataset(folder(tmp_path / "x", lines, mudi.CLASS_FILE), mudi.CLASS_FILE)
    pictures = mudi.class_pictures_of(classes)
    assert [one.words for one in pictures] == ["A photo of a dog"] * 3 and pictures[0].image.shape == (40, 60, 3)
    assert mudi.subjects_of(classes) == ((Subject("<a>", "dog"), Subject("<b>", "dog")), "")
    mudi_folders.check_classes(mudi.read_dataset(folder(tmp_path / "x")), classes)
    other = folder(tmp_path / "y", [{"id": {"a": "dog"}}, ROWS[0]], mudi.CLASS_FILE)
    with pytest.raises(
        StudioError, match="class_metadata.jsonl, line 1 is about a, but metadata.jsonl, line 1 about a, b"
    ):
        mudi_folders.check_classes(mudi.read_dataset(tmp_path / "x"), mudi.read_dataset(other, mudi.CLASS_FILE))


def test_of_a_list_of_texts_every_step_takes_one(tmp_path: Path) -> None:
    texts = ["A olis blue drink can.", "Another olis blue drink can."]
    found = mudi.read_dataset(folder(tmp_path / "x", [FIRST, ROWS[0] | {"text": texts}, ROWS[2]]))
    assert found.rows[0].texts == tuple(texts)
    photos = mudi.photos_of(found)
    assert photos[0].caption == "A <a>.\nAnother <a>."
    (one, other), _ = mudi.subjects_of(found)
    assert (one.token, other.token) == ("<a>", "<b>")
    source = photo_source(photos[0], [one], 64, masked=False)
    drawn = {source.told(generator("caption", number)).caption for number in range(20)}
    assert drawn == {"A <a>.", "Another <a>."} and source.told(generator("x")) == source.told(generator("x"))
    assert source.told(generator("x")).others == source.others
    written = mudi.write_dataset(tmp_path / "again", found.phrases, photos)
    assert [row.texts for row in mudi.read_dataset(written.parent).rows] == [row.texts for row in found.rows]
    folders = mudi_folders.unpack(found, tmp_path / "ours")
    assert [photo.caption for photo in load_photos(folders["a"])] == [photos[0].caption]
    silent = mudi.read_dataset(folder(tmp_path / "y", [FIRST, ROWS[0] | {"text": [*texts, "A can."]}, ROWS[2]]))
    with pytest.raises(StudioError, match="line 2: the text 'A can.' doesn't say"):
        mudi.photos_of(silent)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    photos = mudi.photos_of(mudi.read_dataset(folder(tmp_path / "x")))
    phrases = dict(FIRST["id"])
    written = mudi.write_dataset(tmp_path / "out", phrases, photos)
    assert written == tmp_path / "out" / "metadata.jsonl"
    again = mudi.photos_of(mudi.read_dataset(tmp_path / "out"))
    for one, other in zip(photos, again, strict=True):
        assert np.array_equal(one.image, other.image) and one.shows == other.shows and one.caption == other.caption
        name = one.shows[0]
        assert np.array_equal(one.masks[name], other.masks[name])
    first = json.loads(written.read_text().splitlines()[1])
    assert first["text"] == "A photo of a olis blue drink can on ice." and set(first) == set(mudi.KEYS)
    with pytest.raises(StudioError, match="already there"):
        mudi.write_dataset(tmp_path / "out", phrases, photos)
    mudi.write_dataset(tmp_path / "out", {"a": "can", "b": "plush"}, photos, mudi.CLASS_FILE)
    assert len(mudi.class_pictures_of(mudi.read_dataset(tmp_path / "out", mudi.CLASS_FILE))) == 3
    assert np.array_equal(mudi.photos_of(mudi.read_dataset(tmp_path / "out"))[0].image, photos[0].image)
    bare = Photo(Path("x.png"), photos[0].image, {}, None, shows=("a",))
    for wrong, said in ((bare, "no mask of a"), (photos[0].__class__(Path("y.png"), bare.image), "one subject alone")):
        with pytest.raises(StudioError, match=said):
            mudi.write_dataset(tmp_path / f"new{said[:2]}", phrases, [wrong])


def test_names_of_files_stay_inside_whatever_the_id(tmp_path: Path) -> None:
    photo = mudi.photos_of(mudi.read_dataset(folder(tmp_path / "x")))[0]
    photo.shows, photo.masks = ("../up",), {"": photo.masks["a"]}
    mudi.write_dataset(tmp_path / "out", {"../up": "olis can"}, [photo])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0_00.png", "mask_0_00.png", "metadata.jsonl"]


def test_it_unpacks_into_folders_of_our_own(tmp_path: Path) -> None:
    found = mudi.read_dataset(folder(tmp_path / "x"))
    folders = mudi_folders.unpack(found, tmp_path / "out", names={"a": "can"})
    assert folders == {"can": tmp_path / "out" / "can", "b": tmp_path / "out" / "b"}
    notes: list[str] = []
    cans = load_photos(folders["can"], notes=notes)
    assert [photo.caption for photo in cans] == ["A photo of a <can> on ice.", "A photo of a <can>."] and not notes
    assert np.array_equal(cans[0].masks[""], mudi.photos_of(found)[0].masks["a"])
    with pytest.raises(StudioError, match="already there"):
        mudi_folders.unpack(found, tmp_path / "out", names={"a": "can"})


def test_captions_that_could_not_be_read_again_are_told_with_their_line(tmp_path: Path) -> None:
    """Before anything is written: the folder used to be one that no training could read."""
    texts = [f"A photo of hta red monster plush, number {number}, in the garden" for number in range(300)]
    found = mudi.read_dataset(folder(tmp_path / "x", [FIRST, *ROWS[:2], ROWS[2] | {"text": texts}]))
    with pytest.raises(StudioError, match=r"metadata.jsonl, line 4: the captions are 1.* bytes long.*take some out"):
        mudi_folders.unpack(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StudioError, match="line 4"):
        Datasets(Workspace(tmp_path / "w")).add(sorted((tmp_path / "x").iterdir()), "x")
    assert not any((tmp_path / "w" / "datasets").iterdir())


def test_its_masks_are_no_photos_whoever_reads_the_folder(tmp_path: Path) -> None:
    assert [photo.path.stem for photo in load_photos(folder(tmp_path / "x"))] == list(SIZES)
    (tmp_path / "x" / mudi.FILE).write_text('{"mask_path": 3}\nnonsense\n[1]\n' + json.dumps(ROWS[0]))
    assert "mask_a00.jpg" not in [photo.path.name for photo in load_photos(tmp_path / "x")]


def test_two_with_one_rare_word_are_refused(tmp_path: Path) -> None:
    first = {"id": {"a": "olis blue drink can", "b": "Olis red monster plush"}}
    rows = [row | {"text": f"A photo of {first['id'][row['id']]}."} for row in ROWS]  # type: ignore[index]
    found = mudi.read_dataset(folder(tmp_path / "x", [first, *rows]))
    with pytest.raises(StudioError, match="metadata.jsonl, line 1: two subjects begin with 'olis'"):
        mudi.subjects_of(found)


def test_a_folder_in_the_place_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / mudi.CLASS_FILE).mkdir()
    with pytest.raises(StudioError, match="class_metadata.jsonl can't be read"):
        mudi.read_dataset(tmp_path, mudi.CLASS_FILE)


def test_pictures_are_packed_quickly() -> None:
    """A folder of large photos is unpacked while somebody waits: zlib's usual level takes five times as long."""
    packed = mudi.png(np.zeros((8, 8, 3), np.uint8))
    assert packed[packed.index(b"IDAT") + 4 :][:2] == b"\x78\x01"  # zlib's own mark of its fastest level
    assert not np.asarray(Image.open(io.BytesIO(packed))).any()


def test_it_is_no_concept_format() -> None:
    assert "mudi" not in formats()
