"""Cones 2's residual.pt in and out."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines.concept import Concept, Subject, Trained
from pipelines.errors import StudioError
from pipelines.formats import cones, detect, read, write
from pipelines.methods import residual
from pipelines.model import Model
from tests.tiny import tiny_model

WIDTH = 1024


def released(path: Path, rows: int = 1, norm: float = 22.6) -> torch.Tensor:
    """A file as the released trainer writes it: a bare leaf that asks for gradients."""
    values = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3))
    values = (values / values.norm(dim=1, keepdim=True) * norm).requires_grad_(True)
    torch.save(values, path)
    return values.detach()


def wide_model() -> Model:
    """SD 2.1's text width on a tiny model: 1024 in text encoder and UNet, with random weights."""
    model = tiny_model("sd2v")
    tokenizer = model.tokenizers[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        unet = UNet2DConditionModel(**{**model.unet.config, "cross_attention_dim": WIDTH})
    model.text_encoders = (encoder.requires_grad_(False).eval(),)
    model.unet = unet.requires_grad_(False).eval()
    return model


def trained(rows: torch.Tensor) -> Trained:
    base = {"id": "", "fingerprint": ""}
    return Trained(Concept("my-cat", (Subject("<my-cat>", "cat"),), "residual", base), {"residual": rows})


def test_a_released_file_loads_and_shifts_the_noun_of_a_model_1024_wide(tmp_path: Path) -> None:
    values = released(tmp_path / "cat2_colabv2.pt")
    assert detect(tmp_path / "cat2_colabv2.pt") == "cones"
    found = read(tmp_path / "cat2_colabv2.pt")
    assert found["method"] == "residual" and found["name"] == "cat2_colabv2" and found["notes"] == []
    rows = found["tensors"]["residual"]
    assert torch.equal(rows, values) and rows.dtype == torch.float32 and not rows.requires_grad

    model = wide_model()
    plain = model.encode(["a cat on the sand"]).states
    with residual.attach(model, residual.Params(), (Subject("<cat2>", "cat"),)) as adapter:
        adapter.load(found["tensors"])
        shifted = model.encode(["a <cat2> on the sand"]).states
    assert (shifted != plain).any(-1)[0].nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(shifted[0, 2] - plain[0, 2], values[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_what_we_write_is_what_the_original_reads(tmp_path: Path, count: int) -> None:
    rows = torch.randn(count, WIDTH).requires_grad_(True)
    (file,) = write(trained(rows), tmp_path / "out")
    assert file == tmp_path / "out" / "residual.pt"
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is torch.Tensor and loaded.shape == (count, WIDTH) and loaded.dtype == torch.float32
    assert not loaded.requires_grad and loaded.device.type == "cpu"
    assert torch.equal(loaded, rows.detach())
    if count == 1:
        assert torch.equal(loaded.reshape(WIDTH), rows.detach()[0])
    with pytest.raises(StudioError, match="already there"):
        write(trained(rows), tmp_path / "out")


def test_an_output_folder_of_cones_is_read_by_its_residual(tmp_path: Path) -> None:
    values = released(tmp_path / "residual.pt", rows=2, norm=250.0)
    assert cones.detect(tmp_path)
    found = cones.read(tmp_path)
    assert torch.equal(found["tensors"]["residual"], values)
    assert "name" not in found  # all of them are called so
    assert len(found["notes"]) == 1


def test_a_single_vector_and_half_precision_become_fp32_rows() -> None:
    rows = cones.as_rows(torch.full((WIDTH,), 0.7, dtype=torch.float16), "'flat.pt'")
    assert rows.shape == (1, WIDTH) and rows.dtype == torch.float32


@pytest.mark.parametrize(("norm", "verdict"), [(0.0, "failed"), (250.0, "failed"), (60.0, "look at its pictures")])
def test_an_unusual_length_is_told(norm: float, verdict: str) -> None:
    row = torch.zeros(1, WIDTH)
    row[0, 0] = norm
    (note,) = cones.judged(row, "'odd.pt'")
    assert verdict in note and f"{norm:.1f} long" in note
    assert cones.judged(torch.ones(1, 32), "'other base'") == []


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_other_files_are_not_taken_for_residuals(tmp_path: Path) -> None:
    torch.save({"<cat>": torch.ones(1, WIDTH)}, tmp_path / "embedding.pt")
    torch.save([torch.ones(2), torch.ones(2)], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Evil()))
    with zipfile.ZipFile(tmp_path / "evil-zip.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(_Evil()))
    with zipfile.ZipFile(tmp_path / "broken.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    assert not any(cones.detect(path) for path in [*tmp_path.iterdir(), tmp_path / "missing.pt"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.ones(1, 3, 4), "1, 3, 4"),
        (torch.tensor(1.0), "tokens, width"),
        (torch.ones(1, WIDTH, dtype=torch.int64), "int64"),
        (torch.ones(500, WIDTH), "no noun has 500 tokens"),
        (torch.ones(1, 0), r"\(1, 0\) float32; a residual is"),
        (torch.ones(0), "tokens, width"),
        (torch.ones(0, WIDTH), "no noun has 0 tokens"),
        ({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, "2 named tensors"),
    ],
)
def test_what_is_no_residual_is_refused_in_words(content: Any, reason: str) -> None:
    with pytest.raises(StudioError, match=reason):
        cones.as_rows(content, "'file.pt'")
