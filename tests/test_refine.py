"""iSeg's refinement as formulas: what is cut, what sums to one, what a constant column becomes; losses on attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipelines.attention.losses import contrast, emd, mse, on_grid
from pipelines.attention.refine import boosted, normalised, refined, scaled, shares, smoothed, transition


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("entropy", "cut"), [(0.002, 0.0039), (0.015, 0.0192), (0.02, 0.0238), (0.1, 0.0713), (0.2, 0.1072)]
)
def test_links_below_the_published_points_are_cut(entropy: float, cut: float) -> None:
    for value, left in ((cut * 0.98, False), (cut * 1.02, True)):
        links = torch.eye(3, dtype=torch.float64)
        links[0, 1] = value
        sharp = transition(links, entropy)
        assert bool(sharp[0, 1] > 0) is left
        assert sharp[0, 2] == 0  # what was 0 stays 0
        torch.testing.assert_close(sharp.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_sharpened_matrix_is_the_formula() -> None:
    links = random(6, 6) ** 4
    links[:, 2] = 0
    sharp = transition(links, 0.1)
    peak = links.max(0).values
    expected = torch.zeros_like(links)
    for q in range(6):
        for k in range(6):
            a = float(links[q, k] / peak[k]) if peak[k] else 0.0
            expected[q, k] = max(0.0, a + 0.1 * math.log10(math.e * a)) if a else 0.0
    torch.testing.assert_close(sharp, expected / expected.sum(1, keepdim=True))
    lost = torch.full((3, 3), 0.01)
    lost[0, :] = 1
    assert torch.equal(transition(lost, 0.1)[1:], torch.eye(3)[1:])  # cells without a link keep themselves


def test_every_round_leaves_columns_that_sum_to_one() -> None:
    links, columns = transition(random(12, 12, seed=1) ** 6, 0.1), random(12, 3)
    columns[:, 2] = 0.25
    assert torch.equal(refined(columns, links, 0), normalised(columns))
    for steps in range(6):
        found = refined(columns, links, steps)
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum(0), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(found[:, 2], torch.full((12,), 1 / 12, dtype=torch.float64))  # 0 / 0 guarded
    again = normalised(links @ normalised(columns))
    torch.testing.assert_close(refined(columns, links, 2), normalised(links @ again))


def test_a_constant_column_stays_constant_in_half_the_digits() -> None:
    links = transition(random(400, 400).float() ** 8, 0.1)
    found = refined(torch.full((400, 1), 0.3), links, 10)
    assert torch.allclose(found, torch.full((400, 1), 1 / 400)) and not scaled(found.T).any()


def test_refinement_fills_a_block_from_one_cell_and_stays_there() -> None:
    links = torch.full((16, 16), 0.002)
    links[:8, :8], links[8:, 8:] = 0.12, 0.12
    start = torch.zeros(16, 1)
    start[3] = 1
    end = scaled(refined(start, transition(links, 0.1), 3).T)[0]
    assert (end[:8] > 0.9).all() and (end[8:] == 0).all()


def test_only_the_nouns_text_is_boosted() -> None:
    states = random(2, 5, 4)
    found = boosted(states, [1, 3], 1.6)
    assert torch.equal(found[:, [0, 2, 4]], states[:, [0, 2, 4]])
    assert torch.equal(found[:, [1, 3]], states[:, [1, 3]] * 1.6)


def test_smoothing_gives_cells_that_read_alike_one_value() -> None:
    columns = torch.zeros(36, 4, dtype=torch.float64)
    columns[:18, 0], columns[18:, 1] = 0.1, 0.1
    noisy = columns + 0.005 * random(36, 4)
    found = smoothed(noisy, (6, 6), 2)
    assert len(found.unique(dim=0)) <= 4
    torch.testing.assert_close(found.sum(0), noisy.sum(0))  # means of clusters keep the sum
    assert (found[:18, 0] > 0.09).all() and (found[18:, 0] < 0.01).all()


def test_nouns_compete_with_each_other_and_with_the_background() -> None:
    scores = torch.tensor([[0.37, 0.39, 0.9, 0.0], [0.0, 0.0, 0.95, 0.0]])
    found = shares(scores)
    torch.testing.assert_close(found.sum(0), torch.ones(4))
    assert found.argmax(0).tolist() == [2, 0, 1, 2]  # one noun wins above 0.382
    assert shares(scores, 0.45).argmax(0).tolist() == [2, 2, 1, 2]


# The losses


def maps(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Attention and two different masks on a grid that is not square, (1, 5, 4)."""
    left, right = torch.zeros(1, 5, 4, dtype=torch.float64), torch.zeros(1, 5, 4, dtype=torch.float64)
    left[0, 1:3, :2], right[0, 3:, 2:] = 1, 1
    return random(1, 5, 4, seed=seed) ** 4, left, right


@pytest.mark.parametrize("distance", [lambda a, m: emd(a, m, rounds=1000), mse], ids=["emd", "mse"])
def test_gradients_match_finite_differences_and_depend_on_the_mask(distance: Callable[..., Tensor]) -> None:
    attention, left, right = maps()
    steps = 1e-5 * torch.eye(20, dtype=torch.float64).view(20, 5, 4)
    found = []
    for mask in (left, right):
        variable = attention.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(variable, mask).sum(), variable)
        found.append(gradient)
        many = mask.expand(20, 5, 4)
        slopes = (distance(attention + steps, many) - distance(attention - steps, many)) / 2e-5
        torch.testing.assert_close(gradient.flatten(), slopes, rtol=1e-3, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.1 * found[0].abs().max()


def test_the_shipped_rounds_suffice_for_the_gradient_on_the_grid_of_training() -> None:
    """16 x 16 cells, along two dozen directions: within 4 % of finite differences; 20 rounds are farther off."""
    attention, mask = random(1, 16, 16) ** 4, torch.zeros(1, 16, 16, dtype=torch.float64)
    mask[0, 2:8, 3:9] = 1
    variable = attention.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(emd(variable, mask).sum(), variable)
    steps = attention * torch.randn(24, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    many, size = mask.expand(24, 16, 16), 1e-4
    slopes = (emd(attention + size * steps, many) - emd(attention - size * steps, many)) / (2 * size)
    assert (gradient * steps).sum((1, 2)).sub(slopes).norm() < 0.04 * slopes.norm()


def test_emd_is_the_distance_moved_and_zero_at_equality() -> None:
    _, left, _ = maps()
    equal = left.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(emd(equal * 7, left).sum(), equal)
    assert emd(left * 7, left).abs().max() < 1e-12 and gradient.abs().max() < 1e-9
    one, two, far = (torch.zeros(1, 5, 4, dtype=torch.float64) for _ in range(3))
    one[0, 0, 0], two[0, 0, 3], far[0, 4, 3] = 1, 1, 1
    diagonal = (4**2 + 3**2) ** 0.5
    torch.testing.assert_close(emd(two, one)[0].item(), 3 / diagonal, rtol=0, atol=1e-4)
    torch.testing.assert_close(emd(far, one)[0].item(), 1.0, rtol=0, atol=1e-4)
    assert emd(one, one.clone()) < emd(two, one) < emd(far, one)


def test_emd_pulls_attention_to_the_mask() -> None:
    attention, left, _ = maps()
    logits = attention.flatten(1).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    before = float((attention * left).sum() / attention.sum())
    for _ in range(60):
        optimizer.zero_grad()
        emd(logits.softmax(1).view(1, 5, 4), left).sum().backward()
        optimizer.step()
    after = logits.detach().softmax(1).view(1, 5, 4)
    assert before < 0.5 and float((after * left).sum()) > 0.95


def test_empty_and_peaked_maps_stay_finite() -> None:
    attention = torch.zeros(3, 8, 8)
    attention[1, 0, 0], attention[2] = 1, 0.01
    masks = torch.zeros(3, 8, 8)
    masks[:, 4:, 4:] = 1
    attention = attention.requires_grad_()
    for loss in (emd(attention, masks), mse(attention, masks)):
        (gradient,) = torch.autograd.grad(loss.sum(), attention)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_masks_are_averaged_onto_the_grid() -> None:
    masks = torch.zeros(2, 3, 8, 8)
    masks[0, 1, 0, 0] = 1  # a sixteenth of its cell: nearest neighbours would lose it
    found = on_grid(masks, (2, 2))
    assert found.shape == (2, 3, 2, 2) and found[0, 1, 0, 0] == 1 / 16 and found.sum() == 1 / 16


def test_the_contrastive_loss_is_the_formula() -> None:
    rows, groups = random(6, 5), torch.tensor([0, 0, 1, 1, 2, 2])
    unit = rows / rows.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(6):
        denominator = sum(math.exp(float(unit[i] @ unit[a]) / 0.07) for a in range(6) if a != i)
        pairs = [p for p in range(6) if p != i and groups[p] == groups[i]]
        expected -= sum(float(unit[i] @ unit[p]) / 0.07 - math.log(denominator) for p in pairs) / len(pairs) / 6
    assert float(contrast(rows, groups)) == pytest.approx(expected)
    assert contrast(rows, torch.zeros(6)) == 0  # one subject has nothing to be told from
