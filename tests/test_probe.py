"""Looking at attention changes nothing; editing changes exactly what was edited; both leave no trace."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, IPAdapterAttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.attention import seat
from pipelines.attention.probe import Columns, Edit, Site, Step, find_sites, probe_attention
from pipelines.attention.seat import Seat
from pipelines.errors import StudioError
from tests.tiny import tiny_pipeline

KINDS = ("sd1", "sd2", "sdxl")
Wish = Callable[[Site], None | Columns | Edit]


class Watcher:
    """Does as it is told and keeps what it saw."""

    def __init__(self, wish: Wish, change: Callable[[Tensor, Step], Tensor] = lambda logits, step: logits) -> None:
        self.wish, self.change = wish, change
        self.seen: dict[str, Tensor] = {}
        self.sites: dict[str, Site] = {}
        self.steps: list[Step] = []

    def wants(self, site: Site) -> None | Columns | Edit:
        return self.wish(site)

    def edit(self, site: Site, logits: Tensor, step: Step) -> Tensor:
        return self.change(logits, step)

    def look(self, site: Site, columns: Tensor, step: Step) -> None:
        self.seen[site.name], self.sites[site.name] = columns, site
        self.steps.append(step)


def cross(*tokens: int) -> Wish:
    return lambda site: Columns(tokens) if site.kind == "cross" else None


def everything(site: Site) -> Columns:
    return Columns(None)


def edits(kind: str) -> Wish:
    return lambda site: Edit() if site.kind == kind else None


@pytest.fixture(scope="module")
def _unets() -> dict[str, Any]:
    return {kind: tiny_pipeline(kind).unet for kind in KINDS}


@pytest.fixture(params=KINDS)
def unet(request: pytest.FixtureRequest, _unets: dict[str, Any]) -> Iterator[Any]:
    model = _unets[request.param]
    before = Trace(model)
    yield model
    before.check()


@pytest.fixture
def sd1(_unets: dict[str, Any]) -> Iterator[Any]:
    before = Trace(_unets["sd1"])
    yield _unets["sd1"]
    before.check()


class Trace:
    """A UNet's processors and hooks, to compare afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.processors = self._processors()
        self.hooks = self._hooks()

    def _processors(self) -> dict[str, Any]:
        return {name: m.processor for name, m in self.model.named_modules() if isinstance(m, Attention)}

    def _hooks(self) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules())

    def check(self) -> None:
        now = self._processors()
        assert now.keys() == self.processors.keys()
        assert all(now[name] is processor for name, processor in self.processors.items())
        assert self._hooks() == self.hooks
        assert not Seat.taken


def call(unet: Any, rows: int = 2, size: tuple[int, int] = (16, 16), tokens: int = 77, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = unet.dtype
    sample = torch.randn(rows, 4, *size, generator=generator).to(dtype)
    states = torch.randn(rows, tokens, unet.config.cross_attention_dim, generator=generator).to(dtype)
    if unet.config.addition_embed_type == "text_time":
        more["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 24, generator=generator).to(dtype),
            "time_ids": torch.ones(rows, 6).to(dtype),
        }
    result: Tensor = unet(sample, 500, states, **more).sample
    return result


class Reference:
    """diffusers' own eager attention, which writes its probabilities down."""

    def __init__(self) -> None:
        self.probs: dict[int, Tensor] = {}

    def install(self, unet: nn.Module) -> dict[str, Attention]:
        layers = {name: m for name, m in unet.named_modules() if isinstance(m, Attention)}
        for attn in layers.values():
            attn.set_processor(AttnProcessor())
            inner = attn.get_attention_scores
            attn.get_attention_scores = self._noting(attn, inner)
        return layers

    def _noting(self, attn: Attention, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def scores(*args: Any) -> Tensor:
            probs = inner(*args)
            self.probs[id(attn)] = probs.unflatten(0, (-1, attn.heads))
            return probs

        return scores


@torch.no_grad()
def test_columns_are_the_eager_softmax_and_the_output_is_untouched(unet: Any) -> None:
    plain = call(unet, 3, (12, 20))
    watcher = Watcher(everything)
    with probe_attention(unet, watcher) as tap:
        tap.at(Step(3, 10, 500, slice(1, 3)))
        assert torch.equal(call(unet, 3, (12, 20)), plain)
    reference = Reference()
    layers = reference.install(copied := copy.deepcopy(unet))
    call(copied, 3, (12, 20))
    assert watcher.seen.keys() == layers.keys()
    for name, attn in layers.items():
        torch.testing.assert_close(watcher.seen[name], reference.probs[id(attn)][1:3], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 1000, 10**9])
def test_layers_looked_at_together_and_in_blocks_are_the_same(
    unet: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wish(site: Site) -> Columns:
        return Columns([[4, 2], [9, 2]] if site.kind == "cross" and site.place == "mid" else [7, 1], grad=False)

    now, later = Watcher(lambda site: replace(wish(site), grad=True)), Watcher(wish)
    mask = torch.ones(3, 77, dtype=torch.bool)
    mask[1, 5:] = False
    with probe_attention(unet, now, later) as tap:
        monkeypatch.setattr(seat, "AT_ONCE", set())
        monkeypatch.setattr(seat, "GATHER", block)
        monkeypatch.setitem(seat.BLOCK, "cpu", block)
        tap.at(Step(cond=slice(1, 3)))
        call(unet, 3, (12, 20), encoder_attention_mask=mask)
        assert not tap.waiting and not tap.running
    assert now.seen.keys() == later.seen.keys() == now.sites.keys() and now.sites == later.sites
    for name, columns in now.seen.items():
        torch.testing.assert_close(later.seen[name], columns, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_kernels_own_normaliser_gives_the_same_columns(unet: Any) -> None:
    """With another kernel nothing is overheard, and the columns come out the same."""
    told, computed = Watcher(cross(5, 2)), Watcher(everything)
    plain = call(unet, 3, (12, 20))
    with probe_attention(unet, told) as tap:
        tap.at(Step(cond=slice(1, 3)))
        assert torch.equal(call(unet, 3, (12, 20)), plain)
        assert all(place.attn.processor.lse is not None for place in Seat.taken.values())
    with probe_attention(unet, computed, second := Watcher(cross(5, 2))) as tap, sdpa_kernel(SDPBackend.MATH):
        tap.at(Step(cond=slice(1, 3)))
        call(unet, 3, (12, 20))
        assert all(place.attn.processor.lse is None for place in Seat.taken.values())
    for name, columns in told.seen.items():
        for other in (computed.seen[name][..., [5, 2]], second.seen[name]):
            torch.testing.assert_close(columns, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_waits_is_bounded(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat, "HOLD", 1)
    monkeypatch.setattr(seat, "AT_ONCE", set())
    order: list[str] = []
    watcher = Watcher(lambda site: Columns([1], grad=False) if site.kind == "cross" else None)
    with probe_attention(sd1, watcher) as tap:
        tap_sites = [site.name for site in tap.sites]
        layers = dict(sd1.named_modules())
        hooks = [
            layers[name].register_forward_hook(lambda *_, name=name: order.append(f"{name} {name in watcher.seen}"))
            for name in tap_sites
        ]
        call(sd1)
    for hook in hooks:
        hook.remove()
    assert order == [f"{name} True" for name in tap_sites]


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_waiting(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat, "AT_ONCE", set())
    watcher = Watcher(lambda site: Columns([1], grad=False) if site.kind == "cross" else None)
    with probe_attention(sd1, watcher) as tap:
        with pytest.raises(RuntimeError):
            sd1(torch.randn(2, 4, 16, 16), 10, torch.randn(2, 77, 33))
        call(sd1)
        assert len(watcher.seen) == len(tap.sites) and not tap.waiting


@torch.no_grad()
def test_sites_know_place_kind_heads_and_grid(unet: Any) -> None:
    watcher = Watcher(everything)
    with probe_attention(unet, watcher) as tap:
        call(unet, 1, (10, 22))
        assert tap.sites == tuple(site for site, _ in find_sites(unet))
    deep = unet.config.down_block_types[0] == "DownBlock2D"
    for name, site in watcher.sites.items():
        assert site.place == name.split("_")[0]
        assert site.kind == ("self" if name.endswith("attn1") else "cross")
        halved = deep or site.place == "mid"
        assert (site.height, site.width) == ((5, 11) if halved else (10, 22))
        assert watcher.seen[name].shape[:3] == (1, site.heads, site.height * site.width)
        assert watcher.seen[name].shape[3] == (77 if site.kind == "cross" else site.height * site.width)


@torch.no_grad()
def test_grids_round_up_like_the_unet(sd1: Any) -> None:
    watcher = Watcher(everything)
    with probe_attention(sd1, watcher):
        call(sd1, 1, (9, 14))
    assert {(site.height, site.width) for site in watcher.sites.values()} == {(9, 14), (5, 7)}


@torch.no_grad()
def test_the_grid_is_height_by_width(sd1: Any) -> None:
    """A query's neighbours in the flat order are its neighbours in a row of the picture, also when it isn't square."""
    watcher = Watcher(cross(1))
    sample, states = torch.zeros(1, 4, 8, 24), torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    with probe_attention(sd1, watcher):
        sd1(sample, 10, states)
        still = dict(watcher.seen)
        sample[:, :, 5, 17] = 30
        sd1(sample, 10, states)
    site = next(s for s in watcher.sites.values() if s.place == "down")
    change = (watcher.seen[site.name] - still[site.name]).abs().sum((1, 3)).view(site.height, site.width)
    assert divmod(int(change.argmax()), site.width) == (5, 17)


@torch.no_grad()
def test_single_columns_and_positions_per_row(sd1: Any) -> None:
    whole, some, own = Watcher(everything), Watcher(cross(5, 2)), Watcher(lambda s: Columns([[4], [9]]))
    with probe_attention(sd1, whole, some):
        call(sd1)
    with probe_attention(sd1, Watcher(lambda s: own.wants(s) if s.kind == "cross" else None), own):
        call(sd1)
    for name, columns in some.seen.items():
        torch.testing.assert_close(columns, whole.seen[name][..., [5, 2]], atol=1e-6, rtol=1e-5)
        assert torch.equal(own.seen[name][0, ..., 0], whole.seen[name][0, ..., 4])
        assert torch.equal(own.seen[name][1, ..., 0], whole.seen[name][1, ..., 9])


@torch.no_grad()
def test_a_training_probe_may_move_its_tokens(sd1: Any) -> None:
    columns = Columns([3])
    watcher = Watcher(lambda site: columns if site.kind == "cross" else None)
    with probe_attention(sd1, watcher):
        call(sd1)
        first = dict(watcher.seen)
        columns.tokens = [8]
        call(sd1)
    assert all(not torch.equal(first[name], watcher.seen[name]) for name in first)


@pytest.mark.parametrize("tokens", [(77,), (-1,), ()])
def test_positions_outside_the_prompt_are_refused(sd1: Any, tokens: tuple[int, ...]) -> None:
    with pytest.raises(StudioError, match="0 to 76"), probe_attention(sd1, Watcher(cross(*tokens))):
        call(sd1)


def test_positions_for_other_rows_are_refused(sd1: Any) -> None:
    watcher = Watcher(lambda site: Columns([[1], [2], [3]]) if site.kind == "cross" else None)
    with pytest.raises(StudioError, match="3 rows"), probe_attention(sd1, watcher):
        call(sd1)


@torch.no_grad()
def test_steps_are_told_or_counted(sd1: Any) -> None:
    watcher = Watcher(lambda site: Columns([1]) if site.kind == "cross" and site.place == "mid" else None)
    with probe_attention(sd1, watcher) as tap:
        call(sd1)
        call(sd1)
        told = Step(7, 9, 1.0, slice(0, 1))
        tap.at(told)
        call(sd1, size=(16, 8))
        tap.at(told)
        call(sd1)
    assert [(step.index, step.total, step.size) for step in watcher.steps] == [
        (0, 0, (16, 16)),
        (1, 0, (16, 16)),
        (7, 9, (16, 8)),
        (7, 9, (16, 16)),
    ]
    assert len({id(step) for step in watcher.steps}) == 4


@torch.no_grad()
def test_no_rows_of_the_prompt_means_no_look(sd1: Any) -> None:
    watcher = Watcher(cross(1))
    with probe_attention(sd1, watcher) as tap:
        tap.at(Step(cond=slice(0, 0)))
        call(sd1)
    assert not watcher.seen


@torch.no_grad()
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_an_edit_of_nothing_is_the_fused_result(unet: Any, kind: str) -> None:
    plain = call(unet, size=(12, 20))
    with probe_attention(unet, Watcher(edits(kind))):
        torch.testing.assert_close(call(unet, size=(12, 20)), plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_edit_is_seen_by_those_who_look_and_by_the_picture(sd1: Any) -> None:
    def forbid(logits: Tensor, step: Step) -> Tensor:
        assert logits.dtype == torch.float32 and logits.shape[:2] == (2, 4)
        logits = logits.clone()
        logits[step.cond, ..., 5] = -1e8
        return logits

    plain, watcher = call(sd1), Watcher(cross(5, 6))
    with probe_attention(sd1, Watcher(edits("cross"), forbid), watcher) as tap:
        tap.at(Step(cond=slice(1, 2)))
        edited = call(sd1)
    assert torch.allclose(edited[0], plain[0], atol=1e-5)
    assert not torch.allclose(edited[1], plain[1], atol=1e-4)
    for columns in watcher.seen.values():
        assert float(columns[..., 0].abs().max()) == 0 < float(columns[..., 1].min())


@torch.no_grad()
def test_edits_of_several_probes_add_up(sd1: Any) -> None:
    def more(logits: Tensor, step: Step) -> Tensor:
        return logits + torch.arange(77) / 9

    watcher = Watcher(cross(70))
    with probe_attention(sd1, Watcher(edits("cross"), lambda logits, step: more(more(logits, step), step))):
        once = call(sd1)
    with (
        probe_attention(sd1, Watcher(edits("cross"), more)),
        probe_attention(sd1, Watcher(edits("cross"), more), watcher),
    ):
        assert torch.allclose(call(sd1), once, atol=1e-6)
    assert watcher.seen


@torch.no_grad()
def test_nested_probes_close_in_any_order(sd1: Any) -> None:
    plain, trace = call(sd1), Trace(sd1)
    first, second = ExitStack(), ExitStack()
    first.enter_context(probe_attention(sd1, Watcher(edits("cross"), lambda logits, step: logits * 2)))
    watcher = Watcher(cross(1))
    second.enter_context(probe_attention(sd1, Watcher(edits("cross")), watcher))
    assert not torch.allclose(call(sd1), plain, atol=1e-4)
    first.close()
    torch.testing.assert_close(call(sd1), plain, atol=1e-5, rtol=1e-4)
    second.close()
    trace.check()
    assert torch.equal(call(sd1), plain) and watcher.seen


@torch.no_grad()
def test_a_look_stays_while_an_edit_comes_and_goes(sd1: Any) -> None:
    plain, watcher = call(sd1), Watcher(cross(1))
    with probe_attention(sd1, watcher):
        call(sd1)
        quiet = dict(watcher.seen)
        with probe_attention(sd1, Watcher(edits("cross"), lambda logits, step: logits * 3)):
            call(sd1)
            assert all(not torch.allclose(quiet[name], seen) for name, seen in watcher.seen.items())
        assert torch.equal(call(sd1), plain)
        assert all(torch.equal(quiet[name], seen) for name, seen in watcher.seen.items())


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_everything_is_restored_after_an_exception(sd1: Any, kind: str) -> None:
    def fail(logits: Tensor, step: Step) -> Tensor:
        raise RuntimeError("stop here")

    trace = Trace(sd1)
    with pytest.raises(RuntimeError, match="stop here"), probe_attention(sd1, Watcher(edits(kind), fail)):
        call(sd1)
    trace.check()
    with pytest.raises(ZeroDivisionError), probe_attention(sd1, Watcher(cross(1))):
        _ = 1 / 0
    trace.check()


def test_everything_is_restored_when_a_generator_is_closed(sd1: Any) -> None:
    def run() -> Iterator[Tensor]:
        with probe_attention(sd1, Watcher(cross(1)), Watcher(edits("self"))):
            while True:
                with torch.no_grad():
                    picture = call(sd1)
                yield picture

    trace, running = Trace(sd1), run()
    next(running)
    running.close()
    trace.check()


def test_everything_is_restored_when_opening_fails(sd1: Any) -> None:
    layers = [attn for site, attn in find_sites(sd1) if site.kind == "cross"]
    own = layers[-1].processor
    layers[-1].set_processor(IPAdapterAttnProcessor2_0(32, 32))
    trace = Trace(sd1)
    with pytest.raises(StudioError, match="IPAdapterAttnProcessor2_0"), probe_attention(sd1, Watcher(edits("cross"))):
        pass
    trace.check()
    layers[-1].set_processor(own)


def test_a_wrong_wish_is_a_type_error(sd1: Any) -> None:
    wish: Any = lambda site: (1, 2)  # noqa: E731
    with pytest.raises(TypeError, match="tuple"), probe_attention(sd1, Watcher(wish)):
        pass


def test_an_edit_keeps_the_shape(sd1: Any) -> None:
    cutting = Watcher(edits("cross"), lambda logits, step: logits[..., :5])
    with pytest.raises(ValueError, match="edit"), probe_attention(sd1, cutting):
        call(sd1)


def test_only_unets_can_be_probed() -> None:
    with pytest.raises(StudioError, match="UNet"), probe_attention(nn.Linear(2, 2), Watcher(everything)):
        pass


@torch.no_grad()
def test_nothing_wanted_touches_nothing(sd1: Any) -> None:
    trace = Trace(sd1)
    with probe_attention(sd1, Watcher(lambda site: None)) as tap:
        trace.check()
        assert tap.sites == ()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    unet = tiny_pipeline("sd2").unet.to(dtype)
    plain, watcher = call(unet), Watcher(everything)
    with probe_attention(unet, watcher):
        assert torch.equal(call(unet), plain)
    assert all(columns.dtype == torch.float32 for columns in watcher.seen.values())
    assert all(torch.allclose(c.sum(-1), torch.ones(()), atol=1e-5) for c in watcher.seen.values())
    with probe_attention(unet, Watcher(edits("cross"))):
        edited = call(unet)
    assert edited.dtype == dtype
    torch.testing.assert_close(edited, plain, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_autocast_still_means_full_precision(sd1: Any) -> None:
    watcher = Watcher(everything)
    with torch.autocast("cpu", torch.bfloat16):
        plain = call(sd1)
        with probe_attention(sd1, watcher):
            assert torch.equal(call(sd1), plain)
    assert all(columns.dtype == torch.float32 for columns in watcher.seen.values())
    assert all(torch.allclose(c.sum(-1), torch.ones(()), atol=1e-5) for c in watcher.seen.values())


@torch.no_grad()
def test_masked_tokens_get_nothing(sd1: Any) -> None:
    mask = torch.ones(2, 77, dtype=torch.bool)
    mask[1, 20:] = False
    plain, watcher = call(sd1, encoder_attention_mask=mask), Watcher(cross(3, 40))
    with probe_attention(sd1, watcher):
        assert torch.equal(call(sd1, encoder_attention_mask=mask), plain)
    for columns in watcher.seen.values():
        assert float(columns[1, ..., 1].max()) < 1e-6 < float(columns[0, ..., 1].min())
    with probe_attention(sd1, Watcher(edits("cross"))):
        torch.testing.assert_close(call(sd1, encoder_attention_mask=mask), plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fused_projections(_unets: dict[str, Any]) -> None:
    unet = copy.deepcopy(_unets["sd1"])
    apart = Watcher(everything)
    with probe_attention(unet, apart):
        call(unet)
    unet.fuse_qkv_projections()
    plain, fused = call(unet), Watcher(everything)
    with probe_attention(unet, fused):
        assert torch.equal(call(unet), plain)
    for name, columns in apart.seen.items():
        torch.testing.assert_close(fused.seen[name], columns, atol=1e-5, rtol=1e-4)
    with probe_attention(unet, Watcher(lambda site: Edit())):
        torch.testing.assert_close(call(unet), plain, atol=1e-5, rtol=1e-4)
    unet.unfuse_qkv_projections()
    with probe_attention(unet, fused):
        call(unet)
    assert all(torch.equal(fused.seen[name], columns) for name, columns in apart.seen.items())


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_layers_with_every_extra(norm: str) -> None:
    """Norms of queries, keys and text, a group norm, a residual, 4-D input: the layer's own modules are used."""
    torch.manual_seed(0)
    attn = Attention(
        32, 24, heads=2, dim_head=16, qk_norm=norm, cross_attention_norm="layer_norm", norm_num_groups=4,
        residual_connection=True, rescale_output_factor=1.5, bias=True,
    )  # fmt: skip
    for weight in attn.parameters():
        nn.init.normal_(weight, std=0.3)
    unet = Block(attn)
    states, text = torch.randn(2, 32, 6, 4), torch.randn(2, 9, 24)
    plain, watcher = unet(states, text), Watcher(everything)
    with probe_attention(unet, watcher):
        assert torch.equal(unet(states, text), plain)
    with probe_attention(unet, second := Watcher(everything), Watcher(edits("cross"))):
        torch.testing.assert_close(unet(states, text), plain, atol=1e-5, rtol=1e-4)
    seen = watcher.seen["down_blocks.0.0"]
    assert seen.shape == (2, 2, 24, 9) and torch.allclose(seen.sum(-1), torch.ones(()))
    torch.testing.assert_close(second.seen["down_blocks.0.0"], seen)
    value = attn.to_v(attn.norm_encoder_hidden_states(text)).view(2, 9, 2, 16).transpose(1, 2)
    out = attn.to_out[0]((seen @ value).transpose(1, 2).flatten(2)).transpose(1, 2).view(2, 32, 6, 4)
    torch.testing.assert_close((out + states) / 1.5, plain, atol=1e-5, rtol=1e-4)


class Block(nn.Module):
    """The least that has the shape of a UNet."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.ModuleList([attn])])
        self.mid_block = None
        self.up_blocks = nn.ModuleList()

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        result: Tensor = self.down_blocks[0][0](sample, encoder_hidden_states=text)
        return result


@torch.no_grad()
def test_lora_is_part_of_what_is_seen(_unets: dict[str, Any]) -> None:
    unet = copy.deepcopy(_unets["sd1"])
    before, after = Watcher(everything), Watcher(everything)
    with probe_attention(unet, before):
        call(unet)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), unet)
    reference = Reference()
    plain = call(unet)
    with probe_attention(unet, after):
        assert torch.equal(call(unet), plain)
    layers = reference.install(copied := copy.deepcopy(unet))
    call(copied)
    for name, attn in layers.items():
        torch.testing.assert_close(after.seen[name], reference.probs[id(attn)], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(after.seen[name], before.seen[name], atol=1e-4)


@torch.no_grad()
def test_a_layer_rebuilt_meanwhile_is_reported(_unets: dict[str, Any]) -> None:
    unet = copy.deepcopy(_unets["sd1"])
    with pytest.raises(StudioError, match="first"), probe_attention(unet, Watcher(cross(1))):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), unet)
        call(unet)


def test_gradients_reach_the_text_through_looked_at_columns(sd1: Any) -> None:
    states = torch.randn(2, 77, 32, requires_grad=True)
    watcher = Watcher(cross(4))
    with probe_attention(sd1, watcher):
        sd1(torch.randn(2, 4, 16, 16), 10, states)
    sum(columns.mean() for columns in watcher.seen.values()).backward()
    assert states.grad is not None and float(states.grad[:, 4].abs().sum()) > 0
    cut = Watcher(lambda site: Columns([4], grad=False) if site.kind == "cross" else None)
    with probe_attention(sd1, cut):
        sd1(torch.randn(2, 4, 16, 16), 10, states)
    assert not any(columns.requires_grad for columns in cut.seen.values())


@pytest.mark.parametrize("edited", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(_unets: dict[str, Any], edited: bool) -> None:
    gradients, looks = [], []
    for checkpointing in (False, True):
        unet = copy.deepcopy(_unets["sd1"]).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        watcher = Watcher(cross(4))
        with probe_attention(unet, watcher, *([Watcher(edits("cross"))] if edited else [])):
            loss = call(unet).square().mean()
            loss = loss + sum(columns.square().mean() for columns in watcher.seen.values())
            loss.backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters() if "attn2.to_k" in name})
        looks.append(len(watcher.steps))
    assert looks[1] > looks[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_looking_costs_next_to_nothing_in_operations() -> None:
    """Stable Diffusion's proportions with a quarter of its channels; two tokens, rows of the prompt only."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=16
        )
        sample, states, time = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 192), torch.ones(())
    with FlopCounterMode(display=False) as plain:
        unet(sample, time, states)
    watcher = Watcher(
        lambda site: Columns(None, grad=False) if site.kind == "cross" else None
    )  # choosing is no arithmetic
    with probe_attention(unet, watcher) as tap, FlopCounterMode(display=False) as watched:
        tap.at(Step(cond=slice(1, 2)))
        unet(sample, time, states)
    assert len(watcher.seen) == 16
    assert plain.get_total_flops() < watched.get_total_flops() <= 1.01 * plain.get_total_flops()


@torch.no_grad()
def test_nothing_is_held_after_a_look(sd1: Any) -> None:
    with probe_attention(sd1, Watcher(lambda site: Columns([1]) if site.kind == "cross" else None)):
        call(sd1)
        assert all(place._query is None and place._key is None for place in Seat.taken.values())
    gc.collect()
    assert not Seat.taken
