"""Swaps against brute force: every single swap of every row, re-solved in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import PATTERNS, check_counts, hessian_of, make_layer
from torch import Tensor

from optima.patterns import NM, Pattern, Unstructured
from optima.qp import Hessian
from optima.selectors.ranking import top_scores
from optima.swaps import search as swaps
from optima.swaps.exchange import best_pairs, exchange, group_width
from optima.swaps.pivots import LEAST_GAIN
from optima.swaps.search import SwapSearch


def optimal_error(hessian_DD: Tensor, weight_D: Tensor, keep_D: Tensor) -> float:
    """1/2 (v - w)^T H (v - w) for the best v on ``keep_D``."""
    kept = keep_D.nonzero()[:, 0]
    solved_D = torch.zeros_like(weight_D)
    solved_D[kept] = torch.linalg.solve(hessian_DD[kept][:, kept], (hessian_DD @ weight_D)[kept])
    difference_D = solved_D - weight_D
    return 0.5 * float(difference_D @ hessian_DD @ difference_D)


def partners(keep_D: Tensor, pattern: Pattern) -> Iterator[Tensor]:
    """Every mask that differs from ``keep_D`` by one swap that the pattern allows."""
    width = len(keep_D)
    if isinstance(pattern, NM):
        width = pattern.m
    elif pattern.scope == "group":
        width = pattern.group_size
    for leaving in keep_D.nonzero()[:, 0].tolist():
        for entering in (~keep_D).nonzero()[:, 0].tolist():
            if leaving // width == entering // width:
                other_D = keep_D.clone()
                other_D[leaving], other_D[entering] = False, True
                yield other_D


def best_neighbour(hessian: Hessian, weight_D: Tensor, keep_D: Tensor, pattern: Pattern) -> float:
    errors = [optimal_error(hessian.damped_DD, weight_D, other_D) for other_D in partners(keep_D, pattern)]
    return min(errors, default=float("inf"))


def test_a_weight_that_is_sparse_already() -> None:
    """Nothing is lost, so rounding makes a loss of every swap."""
    weight_OD, inputs_TD = make_layer(16, 32, dtype=torch.float32)
    weight_OD = weight_OD * (torch.arange(32) % 2)
    pattern = Unstructured(0.3, "row")
    keep_OD = top_scores(weight_OD.abs(), pattern)
    swapped = SwapSearch(candidates=16, most_candidates=16).search(hessian_of(inputs_TD), weight_OD, keep_OD, pattern)
    check_counts(swapped.keep_OD, pattern)
    assert float(swapped.error_O.max()) < 1e-12


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("candidates", [4, 16, 1000])
def test_proven_rows_have_no_better_swap(pattern: Pattern, candidates: int) -> None:
    weight_OD, inputs_TD = make_layer(5, 40, dead=(3,))
    hessian = hessian_of(inputs_TD)
    keep_OD = top_scores(weight_OD.abs(), pattern)
    swapped = SwapSearch(rounds=200, candidates=candidates).search(hessian, weight_OD, keep_OD, pattern)
    assert swapped.optimal_O.all(), "with all inputs as candidates every row can be proven"
    check_counts(swapped.keep_OD, pattern)
    weight_OD = weight_OD.masked_fill(hessian.dead_D, 0.0)
    for row in range(5):
        error = optimal_error(hessian.damped_DD, weight_OD[row], swapped.keep_OD[row])
        assert float(swapped.error_O[row]) == pytest.approx(error, rel=1e-9)
        neighbour = best_neighbour(hessian, weight_OD[row], swapped.keep_OD[row], pattern)
        assert neighbour >= error * (1.0 - 2.0 * LEAST_GAIN[torch.float64])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_priced_in_parts_take_the_same_swaps(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OD, inputs_TD = make_layer(12, 40)
    hessian = hessian_of(inputs_TD)
    keep_OD = top_scores(weight_OD.abs(), pattern)
    whole = SwapSearch(rounds=200).search(hessian, weight_OD, keep_OD, pattern)
    monkeypatch.setattr(swaps, "TABLEAU_ENTRIES", 3 * 80 * 80)
    parts = SwapSearch(rounds=200).search(hessian, weight_OD, keep_OD, pattern)
    assert torch.equal(parts.keep_OD, whole.keep_OD)
    assert torch.equal(parts.swaps_O, whole.swaps_O)


def test_chunks_hold_rows_alike_that_fit() -> None:
    assert swaps.chunk_sizes([0, 3, 5, 64, 64, 70, 100, 3000, 3100, 3200, 3300]) == [3, 3, 1, 3, 1]
    assert swaps.chunk_sizes([10] * 600) == [swaps.LARGEST_CHUNK, 600 - swaps.LARGEST_CHUNK]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_budget_never_raises_a_row(pattern: Pattern) -> None:
    weight_OD, inputs_TD = make_layer(12, 40, dtype=torch.float32)
    hessian = hessian_of(inputs_TD)
    keep_OD = top_scores(weight_OD.abs(), pattern)
    before = torch.tensor(
        [optimal_error(hessian.damped_DD, w, k) for w, k in zip(weight_OD.double(), keep_OD, strict=True)]
    )
    last_O = before.double()
    for rounds in range(4):
        swapped = SwapSearch(rounds, candidates=8, most_candidates=8).search(hessian, weight_OD, keep_OD, pattern)
        assert torch.equal(swapped.keep_OD.sum(1), keep_OD.sum(1))
        assert (swapped.error_O <= last_O * (1 + 1e-6)).all()
        assert swapped.weight_OD.dtype == torch.float32
        assert not swapped.weight_OD[~swapped.keep_OD].any()
        last_O = swapped.error_O
    assert int(swapped.swaps_O.sum()) > 0
    assert (last_O < before).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exchange_lowers_errors_and_keeps_counts(pattern: Pattern, dtype: torch.dtype) -> None:
    weight_OD, inputs_TD = make_layer(24, 80, dead=(3,), dtype=dtype)
    weight_OD[:, 3] = 0.0
    hessian = hessian_of(inputs_TD)
    keep_OD = top_scores(weight_OD.abs(), pattern)
    given_OD = keep_OD.clone()
    better_OD, swaps_O = exchange(hessian, weight_OD, keep_OD, pattern)
    assert torch.equal(keep_OD, given_OD), "the mask is the caller's"
    check_counts(better_OD, pattern)
    width = group_width(pattern, 80)
    for before, after in zip(keep_OD.split(width, dim=1), better_OD.split(width, dim=1), strict=True):
        assert torch.equal(before.sum(1), after.sum(1))
    moved_O = (keep_OD != better_OD).any(dim=1)
    assert torch.equal(moved_O, swaps_O > 0)
    assert moved_O.sum() > 12
    for row in range(24):
        before, after = (
            optimal_error(hessian.damped_DD, weight_OD[row].double(), mask_OD[row]) for mask_OD in (keep_OD, better_OD)
        )
        assert after < before if moved_O[row] else after == before


def test_pairs_go_from_the_best_down_within_their_groups() -> None:
    keep_AD = torch.tensor([[True, False, True, False, True, False, False], [True] * 7])
    price_AD = torch.tensor([[3.0, 9.0, 1.0, 2.0, 0.5, 4.0, 8.0], [1.0] * 7])
    cost_AD, worth_AD = price_AD.masked_fill(~keep_AD, torch.inf), price_AD.masked_fill(keep_AD, -torch.inf)
    gain_AP, leaving_AP, entering_AP = best_pairs(cost_AD, worth_AD, 4)
    assert gain_AP[0, :3].tolist() == [9.0 - 1.0, 8.0 - 0.5, 2.0 - 3.0]
    assert leaving_AP[0, :3].tolist() == [2, 4, 0]
    assert entering_AP[0, :3].tolist() == [1, 6, 3]
    assert not (gain_AP[0, 3:] > 0).any()
    assert not (gain_AP[1] > 0).any(), "a row that keeps everything has no pairs"


def test_no_round_leaves_the_mask_and_finds_its_optimum() -> None:
    weight_OD, inputs_TD = make_layer(6, 32)
    hessian = hessian_of(inputs_TD)
    keep_OD = top_scores(weight_OD.abs(), Unstructured(0.5, "layer"))
    swapped = SwapSearch(rounds=0).search(hessian, weight_OD, keep_OD, Unstructured(0.5, "layer"))
    assert torch.equal(swapped.keep_OD, keep_OD)
    assert not swapped.optimal_O.any()
    errors = [optimal_error(hessian.damped_DD, w, k) for w, k in zip(weight_OD, keep_OD, strict=True)]
    assert swapped.error_O.tolist() == pytest.approx(errors, rel=1e-9)


def test_rows_that_keep_nothing_or_everything() -> None:
    weight_OD, inputs_TD = make_layer(3, 16)
    keep_OD = torch.zeros_like(weight_OD, dtype=torch.bool)
    keep_OD[1] = True
    keep_OD[2, :5] = True
    swapped = SwapSearch().search(hessian_of(inputs_TD), weight_OD, keep_OD, Unstructured(0.5, "layer"))
    assert torch.equal(swapped.keep_OD[:2], keep_OD[:2])
    assert swapped.optimal_O.all()
    assert torch.allclose(swapped.weight_OD[1], weight_OD[1])


def test_an_empty_layer() -> None:
    swapped = SwapSearch().search(Hessian(torch.eye(4)), torch.zeros(0, 4), torch.zeros(0, 4).bool(), NM(2, 4))
    assert swapped.keep_OD.shape == (0, 4)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), inputs=st.sampled_from([4, 8, 12]), rank=st.integers(1, 12), log=st.integers(-3, 3))
def test_any_layer_is_proven_and_never_worse(seed: int, inputs: int, rank: int, log: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs_TD = torch.randn(rank, inputs, generator=generator, dtype=torch.float64) * 10.0**log
    inputs_TD[:, 0] = inputs_TD[:, -1]
    weight_OD = torch.randn(3, inputs, generator=generator, dtype=torch.float64)
    hessian = hessian_of(inputs_TD)
    keep_OD = torch.rand(3, inputs, generator=generator) < 0.5
    swapped = SwapSearch(rounds=100).search(hessian, weight_OD, keep_OD, Unstructured(0.5, "layer"))
    assert swapped.optimal_O.all()
    for row in range(3):
        before = optimal_error(hessian.damped_DD, weight_OD[row], keep_OD[row])
        assert float(swapped.error_O[row]) <= before * (1 + 1e-9) + 1e-15
        neighbour = best_neighbour(hessian, weight_OD[row], swapped.keep_OD[row], Unstructured(0.5, "layer"))
        assert neighbour >= float(swapped.error_O[row]) * (1.0 - 1e-6) - 1e-15


@pytest.mark.parametrize("seed", [9, 11, 19, 33, 63, 67])
def test_rows_of_correlated_inputs_are_proven_by_few_candidates_only_if_they_are(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = (60, 3), (3, 16), (60, 16), (4, 16)
    left_TF, right_FD, noise_TD, weight_OD = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes
    )
    inputs_TD = left_TF @ right_FD + (0.05, 0.2, 0.5)[seed % 3] * noise_TD
    hessian, pattern = hessian_of(inputs_TD, 1e-4), Unstructured(0.5, "row")
    keep_OD = top_scores(weight_OD.abs(), pattern)
    for candidates in (2, 4):
        swapped = SwapSearch(rounds=200, candidates=candidates).search(hessian, weight_OD, keep_OD, pattern)
        for row in swapped.optimal_O.nonzero()[:, 0].tolist():
            neighbour = best_neighbour(hessian, weight_OD[row], swapped.keep_OD[row], pattern)
            assert neighbour >= float(swapped.error_O[row]) * (1.0 - 1e-4)
