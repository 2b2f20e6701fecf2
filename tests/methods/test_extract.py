"""Extraction: whom a row names, what its loss counts, where tokens start, split and merge, the second phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import formats
from pipelines.attach import attached
from pipelines.batch import Batch
from pipelines.concept import Subject, Trained
from pipelines.data import Data, prepare
from pipelines.errors import StudioError
from pipelines.events import Finished, Progress
from pipelines.formats.inversion import write_embeds
from pipelines.incoming import import_original
from pipelines.intake import load_tensors
from pipelines.losses import masked_mean, squared_error
from pipelines.methods import extract
from pipelines.model import Model
from pipelines.photos import Photo
from pipelines.train import train
from tests.tiny import tiny_model

CAT, DOG = Subject("<my-cat>", "cat"), Subject("<my-dog>", "mushroom")  # the second noun has several tokens
BOTH = (CAT, DOG)


def photo() -> Photo:
    """One picture with a cat on the left and a mushroom on the right."""
    left, right = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    left[16:48, 4:28], right[24:56, 36:60] = 255, 255
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Photo(Path("scene.png"), image, {"my-cat": left, "my-dog": right})


def settings(**changes: Any) -> extract.Params:
    return extract.Params.model_validate({"steps": 4, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 0} | changes)


def data(model: Model, params: extract.Params, subjects: tuple[Subject, ...] = BOTH) -> Data:
    prior = [(photo().image, "a photo of a cat")]
    return prepare(model, [photo()], params, subjects, seed=3, prior=prior if params.prior_weight else ())


def batches(model: Model, params: extract.Params, count: int) -> list[Batch]:
    (stage, *_) = extract.stages(params)
    return [data(model, params).batch(stage, step) for step in range(1, count + 1)]


def finished(model: Model, params: extract.Params, **options: Any) -> Trained:
    (*_, last) = train(model, extract, data(model, params), params, seed=5, **options)
    assert isinstance(last, Finished)
    made: Trained = last.value
    return made


def everything(model: Model) -> dict[str, torch.Tensor]:
    parts = {"unet": model.unet, "vae": model.vae} | {f"text{i}": part for i, part in enumerate(model.text_encoders)}
    return {f"{p}.{n}": v.clone() for p, module in parts.items() for n, v in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_tokens_start_at_their_nouns_in_the_encoder_that_trains(kind: str) -> None:
    model, params = tiny_model(kind), settings()
    with extract.attach(model, params, BOTH) as adapter:
        groups = adapter.param_groups(extract.stages(params)[0])
        tables = [encoder.get_input_embeddings() for encoder in model.text_encoders]
        for tokenizer, table, rows in zip(model.tokenizers, tables, groups[0]["params"], strict=True):
            assert any(part is rows for part in table.rows)  # the very rows that the encoder reads
            for row, subject in zip(rows, BOTH, strict=True):
                ids = tokenizer(subject.noun, add_special_tokens=False)["input_ids"]
                assert torch.equal(row, table.base.weight[ids].mean(0))
        assert len(ids) > 1


@pytest.mark.parametrize("params", [settings(), settings(shift_steps=2), settings(split=2, split_steps=3)])
def test_nothing_of_the_base_moves(params: extract.Params) -> None:
    model = tiny_model("sd1")
    before, placeholders = everything(model), dict(model.placeholders)
    finished(model, params)
    after = everything(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.placeholders == placeholders


def test_union_sampling_names_every_set_and_counts_only_their_masks() -> None:
    model, params = tiny_model("sd1"), settings(attention="off")
    seen = set()
    with extract.attach(model, params, BOTH) as adapter:
        stage = extract.stages(params)[0]
        for batch in batches(model, params, 6):
            named = adapter.named(batch, stage)
            assert named == adapter.named(batch, stage)  # a function of the batch alone
            assert batch.subject_masks is not None
            union = adapter.union(batch, named)
            for row, who in enumerate(named):
                seen.add(frozenset(word for _, word in who))
                expected = batch.subject_masks[row, [number for number, _ in who]].amax(0)
                assert union is not None and torch.equal(union[row, 0], expected)
    assert seen == {frozenset(["<my-cat>"]), frozenset(["<my-dog>"]), frozenset(["<my-cat>", "<my-dog>"])}


def test_the_published_passes_take_each_alone_and_then_all() -> None:
    model, params = tiny_model("sd1"), settings(schedule="passes", attention="off", batch_size=2)
    with extract.attach(model, params, BOTH) as adapter:
        stage, (batch, *_) = extract.stages(params)[0], batches(model, params, 1)
        prompts = [adapter.captions(batch, adapter.named(batch, stage)) for _ in range(4)]
    one, two, both = "a photo of <my-cat>", "a photo of <my-dog>", "a photo of <my-cat> and <my-dog>"
    assert prompts == [[one] * 2, [two] * 2, [both] * 2, [one] * 2]


def test_all_of_the_photo_are_named_where_no_mask_leaves_one_out() -> None:
    model, params = tiny_model("sd1"), settings(schedule="all", attention="off", batch_size=2)
    with extract.attach(model, params, BOTH) as adapter:
        stage, (batch, *_) = extract.stages(params)[0], batches(model, params, 1)
        seen = {caption for _ in range(4) for caption in adapter.captions(batch, adapter.named(batch, stage))}
        alone = replace(batch, shown=torch.tensor([[True, False], [True, True]]))
        only = adapter.captions(alone, adapter.named(alone, stage))
    assert seen == {"a photo of <my-cat> and <my-dog>"} and only == ["a photo of <my-cat>", *seen]


def test_the_loss_is_the_masked_error_of_the_named_and_the_prior_counts_whole() -> None:
    model, params = tiny_model("sd1"), settings(attention="off", prior_weight=0.5, batch_size=2)
    with extract.attach(model, params, BOTH) as adapter:
        stage, (batch, *_) = extract.stages(params)[0], batches(model, params, 1)
        named = adapter.named(batch, stage)
        losses = extract.loss(model, adapter, batch, stage)
        captions = adapter.captions(batch, named)
        assert captions[2:] == ["a photo of a cat"] * 2
        error = squared_error(model, replace(batch, captions=captions))
        each = masked_mean(error, adapter.union(batch, named), 0.0)
    torch.testing.assert_close(losses["denoising"], each[:2].mean())
    torch.testing.assert_close(losses["prior"], 0.5 * error[2:].mean())


@pytest.mark.parametrize("attention", ["emd", "mse"])
def test_the_pull_on_attention_depends_on_the_masks_and_reaches_the_tokens(attention: str) -> None:
    model, params = tiny_model("sd1"), settings(attention=attention, attention_weight=1.0, batch_size=2)
    gradients = []
    with extract.attach(model, params, BOTH) as adapter:
        stage, (batch, *_) = extract.stages(params)[0], batches(model, params, 1)
        assert batch.subject_masks is not None
        (rows,) = adapter.param_groups(stage)[0]["params"]
        for masks in (batch.subject_masks, batch.subject_masks.flip(3)):
            pull = extract.loss(model, adapter, replace(batch, subject_masks=masks), stage)["attention"]
            gradients.append(torch.autograd.grad(pull, rows)[0])
    assert gradients[0].norm() > 0 and not torch.allclose(gradients[0], gradients[1])


def test_the_attention_loss_moves_attention_into_the_masks() -> None:
    """With everything else off, forty steps bring both tokens' maps nearer to their masks."""
    model = tiny_model("sd1")
    params = settings(steps=40, lr=3e-2, schedule="passes", attention_weight=10.0, weight_decay=0.0)
    stage = extract.stages(params)[0]
    batch = batches(model, params, 1)[0]
    with extract.attach(model, params, BOTH) as adapter:
        (rows,) = adapter.param_groups(stage)[0]["params"]
        optimizer, seen = torch.optim.Adam([rows], lr=params.lr), []
        for _ in range(40):
            pull = extract.loss(model, adapter, batch, stage)["attention"]
            optimizer.zero_grad()
            pull.backward()
            optimizer.step()
            seen.append(pull.item())
    for turn in range(3):  # the cat, the mushroom, both
        assert seen[turn::3][-1] < 0.99 * seen[turn]


def test_split_tokens_are_merged_to_their_mean_and_go_on_alone(tmp_path: Path) -> None:
    model, params = tiny_model("sd1"), settings(split=3, split_steps=3, steps=2, init="random", checkpoint_every=1)
    split, merged = extract.stages(params)
    assert (split.name, split.steps, merged.name) == ("split", 3, "tokens")
    with extract.attach(model, params, BOTH) as adapter:
        (parts,) = adapter.param_groups(split)[0]["params"]
        (own,) = adapter.param_groups(merged)[0]["params"]
        assert parts.shape == (6, 32) and own.shape == (2, 32) and len(parts.unique(dim=0)) == 6
        batch = batches(model, params, 1)[0]
        named = adapter.named(batch, split)
        assert all(len(who) == 1 for who in named)
        assert {"denoising", "attention", "contrast"} == extract.loss(model, adapter, batch, split).keys()
        with torch.no_grad():
            parts += 1
        assert torch.equal(adapter.tensors()["tokens.text_encoder"], parts.unflatten(0, (2, 3)).mean(1))
        extract.loss(model, adapter, batch, merged)
        assert torch.equal(own, parts.unflatten(0, (2, 3)).mean(1))
        with torch.no_grad():
            parts += 1
        extract.loss(model, adapter, batch, merged)
        assert not torch.equal(own, parts.unflatten(0, (2, 3)).mean(1))  # merged once
    whole = finished(model, params).tensors
    for stop in (2, 4):  # in the first stage, and after the merge
        folder = tmp_path / str(stop)
        events = train(model, extract, data(model, params), params, seed=5, checkpoint=folder)
        for done in range(1, stop + 1):
            while not isinstance(next(events), Progress):
                pass
            assert done <= stop
        events.close()
        resumed = finished(model, params, checkpoint=folder, resume=True).tensors
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_second_phase_trains_shifts_alone() -> None:
    model, params = tiny_model("sd1"), settings(steps=2, shift_steps=2, layers="ca")
    first = finished(model, params.model_copy(update={"shift_steps": 0})).tensors
    both = finished(model, params)
    name = "tokens.text_encoder"
    assert torch.equal(first[name], both.tensors[name])  # the first phase is the same, the second leaves them alone
    moved = [value for key, value in both.tensors.items() if key.endswith(".delta")]
    assert len(moved) > 4 and all("attn2" in key for key in both.tensors if key != name)
    assert any(value.abs().max() > 0 for value in moved)
    with attached(model, [(both, 1.0)]):
        shifted = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight.clone()
    assert not torch.equal(shifted, model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight)


def test_tokens_go_into_learned_embeds_and_back(tmp_path: Path) -> None:
    model, params = tiny_model("sd1"), settings(steps=1)
    one = finished(model, params)
    (file,) = formats.write(one, tmp_path / "out")
    written, _ = load_tensors(file)
    assert written.keys() == {"<my-cat>", "<my-dog>"} and written["<my-cat>"].shape == (32,)
    assert formats.detect(file) == "extraction"
    back = import_original(file, name="both", noun="thing")
    assert [subject.token for subject in back.concept.subjects] == ["<my-cat>", "<my-dog>"]
    assert torch.equal(back.tensors["tokens.text_encoder"], one.tensors["tokens.text_encoder"])  # cat, then dog
    prompt = "a photo of a <my-cat> and a <my-dog>"
    states = []
    for trained in (one, back):
        with attached(model, [(trained, 1.0)]):
            states.append(model.encode([prompt]).states)
    assert torch.equal(*states)
    assert formats.detect(tmp_path / "out") == "extraction"  # the folder as well


def test_what_the_original_pickles_comes_in_with_all_its_tokens(tmp_path: Path) -> None:
    rows = {f"<asset{number}>": torch.randn(32) for number in (10, 2, 0)}
    write_embeds(tmp_path / "learned_embeds.bin", rows)
    for place in (tmp_path / "learned_embeds.bin", tmp_path):
        assert formats.detect(place) == "extraction"
        found = formats.read(place)
        assert found["subjects"] == ["<asset0>", "<asset2>", "<asset10>"]
        assert torch.equal(found["tensors"]["tokens.text_encoder"][2], rows["<asset10>"])
    (tmp_path / "one").mkdir()
    write_embeds(tmp_path / "one" / "learned_embeds.bin", {"<asset0>": torch.randn(32)})
    assert formats.detect(tmp_path / "one") == "inversion"
    write_embeds(tmp_path / "odd.safetensors", {"<a>": torch.randn(32), "<b>": torch.randn(16)})
    with pytest.raises(StudioError, match="different widths"):
        formats.read(tmp_path / "odd.safetensors")


def test_shifts_lie_beside_the_tokens_and_come_back(tmp_path: Path) -> None:
    model = tiny_model("sd1")
    one = finished(model, settings(steps=1, shift_steps=1, shift_lr=0.1))
    files = formats.write(one, tmp_path)
    assert [file.name for file in files] == ["learned_embeds.safetensors", "spectral_shifts.safetensors"]
    back = import_original(tmp_path, name="both", noun="thing")
    assert back.tensors.keys() == one.tensors.keys()
    assert all(torch.equal(value, back.tensors[key]) for key, value in one.tensors.items())
    states = []
    for trained in (one, back):
        with attached(model, [(trained, 1.0)]), torch.no_grad():
            states.append(model.unet(torch.ones(1, 4, 16, 16), 10, model.encode(["a <my-cat>"]).states).sample)
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_shifts_of_one_subject_come_back_too(kind: str, tmp_path: Path) -> None:
    model, params = tiny_model(kind), settings(steps=1, shift_steps=1, shift_lr=0.1)
    (*_, last) = train(model, extract, data(model, params, BOTH[:1]), params, seed=5)
    assert isinstance(last, Finished)
    one: Trained = last.value
    formats.write(one, tmp_path / "out")
    back = import_original(tmp_path / "out", name="", noun="")
    assert (back.concept.method, back.concept.subjects, back.concept.name) == ("extract", (CAT,), one.concept.name)
    assert back.tensors.keys() == one.tensors.keys()
    assert all(torch.equal(value, back.tensors[key]) for key, value in one.tensors.items())


def test_a_subject_that_nothing_points_at_is_refused(tmp_path: Path) -> None:
    """One mask for both, or none of one of them: it would train on nothing without a word."""
    mask = np.full((64, 64), 255, np.uint8)
    shown = Photo(tmp_path / "x.png", np.zeros((64, 64, 3), np.uint8), {"my-cat": mask})
    for photo in (shown, replace(shown, masks={"": mask})):
        with pytest.raises(StudioError, match=r"x.png has no mask.*x-masklabel-my-"):
            extract.check_photos(settings(), BOTH, [photo])
        extract.check_photos(settings(masked_loss=False, attention="off"), BOTH, [photo])
        extract.check_photos(settings(), BOTH[:1], [photo])
    assert extract.needs_masks(settings(masked_loss=False)) and extract.needs_masks(settings(attention="off"))
    extract.check_photos(settings(), BOTH, [replace(shown, masks={"my-cat": mask, "my-dog": mask.copy()})])


def test_a_random_start_is_a_word_of_the_table_and_the_same_every_time() -> None:
    model, params = tiny_model("sd1"), settings(init="random")
    starts = []
    for _ in range(2):
        with extract.attach(model, params, BOTH) as adapter:
            starts.append(adapter.tensors()["tokens.text_encoder"])
    table = model.text_encoders[0].get_input_embeddings().weight
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0][0], starts[0][1])
    assert all(bool((table == row).all(1).any()) for row in starts[0])
