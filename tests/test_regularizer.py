"""The attention regulariser: the reference's numbers, the sum and the mean, and where its gradient goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pipelines.attention.probe import Step, find_sites, probe_attention
from pipelines.attention.regularizer import Form, Moments, TokenMoments, map_loss, moments, pooled, token_positions
from pipelines.concept import Subject
from pipelines.errors import StudioError
from pipelines.learned_tokens import learned_tokens
from pipelines.model import Model
from pipelines.tokens import Expansion, placeholder
from tests.tiny import tiny_model

NEW, CATEGORY = [0.1, 0.2, 0.3, 0.4], [0.4, 0.4, 0.4, 0.4]
EXPECTED = 0.0463889  # 2 * .0225 + 5 * 2.7778e-4
CAT = Subject("<my-cat>", "cat")


def layer(*rows: list[list[float]]) -> Moments:
    """One head: rows of tokens of positions."""
    return moments(torch.tensor(rows).transpose(1, 2).unsqueeze(1))


def test_the_reference_vector() -> None:
    one = layer([NEW, CATEGORY])
    assert map_loss([one], 2, 5, reduction="sum").item() == pytest.approx(EXPECTED, abs=1e-6)
    two = layer([NEW, CATEGORY], [NEW, CATEGORY])
    assert map_loss([two], 2, 5, reduction="sum").item() == pytest.approx(2 * EXPECTED, abs=1e-6)
    assert map_loss([one, one], 2, 5, reduction="sum").item() == pytest.approx(EXPECTED, abs=1e-6)
    assert map_loss([layer([NEW, NEW, CATEGORY])], 2, 5, reduction="sum").item() == pytest.approx(EXPECTED, abs=1e-6)
    mixed = layer([[0.3, 0.1, 0.4, 0.2], CATEGORY])
    assert map_loss([mixed], 2, 5, reduction="sum").item() == pytest.approx(EXPECTED, abs=1e-6)
    assert map_loss([layer([CATEGORY, CATEGORY])], 2, 5).item() == 0.0


def test_the_mean_is_the_released_sum_at_the_published_batch_and_the_same_at_any_other() -> None:
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(8, 3, 10, 2, generator=draw, requires_grad=True)

    def gradient(parts: int, reduction: str) -> Tensor:
        maps.grad = None
        for part in maps.chunk(parts):
            (map_loss([moments(part)], 2, 5, reduction=reduction) / parts).backward()  # type: ignore[arg-type]
        assert maps.grad is not None
        return maps.grad.clone()

    torch.testing.assert_close(gradient(1, "mean"), gradient(1, "sum"))
    torch.testing.assert_close(gradient(1, "mean"), gradient(8, "mean"))
    torch.testing.assert_close(gradient(1, "sum"), 8 * gradient(8, "sum"))  # what the released code does


def test_the_printed_form_pools_all_values() -> None:
    draw = torch.Generator().manual_seed(0)
    big, small = torch.rand(2, 2, 64, 2, generator=draw), torch.rand(2, 4, 16, 2, generator=draw)
    one = pooled([moments(big), moments(small)])
    every = torch.cat([big.flatten(1, 2), small.flatten(1, 2)], 1)
    torch.testing.assert_close(one.mean, every.mean(1))
    torch.testing.assert_close(one.variance, every.var(1))
    printed = map_loss([moments(big), moments(small)], 2, 5, form="printed", reduction="sum")
    difference = 2 * (one.mean[:, 0] - one.mean[:, 1]) ** 2 + 5 * (one.variance[:, 0] - one.variance[:, 1]) ** 2
    torch.testing.assert_close(printed, difference.sum())
    released = map_loss([moments(big), moments(small)], 2, 5, reduction="sum")
    assert not torch.isclose(printed, released, rtol=1e-3)
    with pytest.raises(StudioError, match="no cross-attention"):
        map_loss([], 2, 5)


def test_half_precision_maps_are_measured_in_fp32() -> None:
    tiny = torch.tensor([NEW, CATEGORY]).T.reshape(1, 1, 4, 2).bfloat16() * 1e-3
    seen = moments(tiny)
    assert seen.variance.dtype == torch.float32 and seen.variance[0, 0] > 0


@contextmanager
def forward(model: Model, probe: TokenMoments, rows: int = 2) -> Iterator[None]:
    """The UNet has run; the backward pass belongs inside."""
    text = model.encode(["a photo of a <my-cat>"] * rows)
    sizes = model.conditioning(text, [(32, 32)], [(0, 0)], [(32, 32)])
    noise = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with probe_attention(model.unet, probe) as tap:
        tap.at(Step(cond=slice(0, 2)))
        model.unet(noise, torch.tensor([300] * rows), text.states, **sizes)
        yield


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_cross_layer_is_seen_once_and_only_two_numbers_a_token_are_kept(kind: str) -> None:
    model = tiny_model(kind)
    with learned_tokens(model, [CAT], count=2):
        positions = token_positions(model.tokenize("a photo of a <my-cat>"), CAT.token)
        assert positions == [5, 6, 7]
        probe = TokenMoments([positions, positions])
        with forward(model, probe, rows=3):  # a third row, a class picture, isn't looked at
            pass
    layers = [name for name in dict(model.unet.named_modules()) if name.endswith("attn2")]
    assert set(probe.seen) == set(layers)
    assert all(one.mean.shape == one.variance.shape == (2, 3) for one in probe.seen.values())


@pytest.mark.parametrize(("form", "weights"), [("released", (2, 5)), ("released", (0, 5)), ("printed", (2, 5))])
def test_the_gradient_reaches_the_new_tokens_map_and_the_categorys(form: Form, weights: tuple[float, float]) -> None:
    """As finite differences say it: neither of the two is cut from the graph."""
    draw = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 2, size, 2, generator=draw, dtype=torch.float64, requires_grad=True) for size in (6, 3)]

    def regulariser(*columns: Tensor) -> Tensor:
        return map_loss([moments(one) for one in columns], *weights, form=form)

    assert torch.autograd.gradcheck(regulariser, maps)
    regulariser(*maps).backward()
    assert all(one.grad is not None and one.grad.all() for one in maps)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, again = gradients(checkpointing=False), gradients(checkpointing=True)
    assert len(plain) == 4 * 3 + 1 and plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient.any(), name
        torch.testing.assert_close(again[name], gradient)


def gradients(checkpointing: bool) -> dict[str, Tensor]:
    """Of each layer's own part of R by its queries' and keys' weights and by the new row; of the whole, by the row."""
    model = tiny_model("sd1")
    if checkpointing:
        model.unet.train().enable_gradient_checkpointing()
    layers = {site.name: attn for site, attn in find_sites(model.unet) if site.kind == "cross"}
    found: dict[str, Tensor] = {}
    with learned_tokens(model, [CAT]) as learned:
        (row,) = learned.parameters()
        with torch.no_grad():
            row.add_(torch.linspace(-1, 1, row.shape[1]))
        positions = token_positions(model.tokenize("a photo of a <my-cat>"), CAT.token)
        probe = TokenMoments([positions, positions])
        for attn in layers.values():
            attn.to_q.weight.requires_grad_(True)
            attn.to_k.weight.requires_grad_(True)
        with forward(model, probe):
            first = dict(probe.seen)
            for name, attn in layers.items():
                own = map_loss([probe.seen[name]], 2, 5)
                parts = torch.autograd.grad(own, [attn.to_q.weight, attn.to_k.weight, row], retain_graph=True)
                found |= {f"{name} {what}": part for what, part in zip(("to_q", "to_k", "row"), parts, strict=True)}
            map_loss(list(probe.seen.values()), 2, 5).backward()
        assert all(probe.seen[name] is one for name, one in first.items())  # and none of a layer that ran again
        assert row.grad is not None
        torch.testing.assert_close(row.grad, sum(found[f"{name} row"] for name in layers) / len(layers))
        return found | {"row": row.grad}


def test_where_the_gradient_goes() -> None:
    """To the new token and to queries and keys; of the last layer, not to values and output."""
    model = tiny_model("sd1")
    with learned_tokens(model, [CAT]) as learned:
        with torch.no_grad():
            learned.parameters()[0].add_(0.1)
        positions = token_positions(model.tokenize("a photo of a <my-cat>"), CAT.token)
        probe = TokenMoments([positions, positions])
        last = [module for site, module in find_sites(model.unet) if site.kind == "cross"][-1]
        for module in (last.to_q, last.to_k, last.to_v, last.to_out[0]):
            module.weight.requires_grad_(True)
        with forward(model, probe):
            map_loss(list(probe.seen.values()), 2, 5).backward()
        assert learned.parameters()[0].grad is not None and learned.parameters()[0].grad.any()
        assert last.to_q.weight.grad.any() and last.to_k.weight.grad.any()
        assert last.to_v.weight.grad is None and last.to_out[0].weight.grad is None
    assert all(parameter.grad is None for parameter in model.text_encoders[0].parameters())


def test_positions_come_from_the_prompt_itself() -> None:
    model = tiny_model("sd1")
    with placeholder(model, "<my-cat>", Expansion("sks mushroom", "mushroom")):
        prompt = model.tokenize("a photo of a <my-cat> and a <my-cat>")
        assert token_positions(prompt, "<my-cat>") == [5, 6]  # "mushroom" has several tokens: the first
        with pytest.raises(StudioError, match="does not name <my-dog>"):
            token_positions(prompt, "<my-dog>")
        with pytest.raises(StudioError, match="cut off"):
            token_positions(model.tokenize("a photo of a " * 30 + "<my-cat>"), "<my-cat>")
