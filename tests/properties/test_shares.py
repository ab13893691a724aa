"""Allocations meet the global sparsity exactly, within their bounds, and are the best there is for the curves given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from optima.allocation import DENSEST, SPARSEST, least_sum, with_mean
from optima.patterns import SCOPES, Unstructured
from optima.selectors.ranking import top_scores

SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=8)
SPARSITIES = st.floats(0.001, 0.999)


def random(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of(sparsity_N: Tensor, sizes: list[int]) -> float:
    size_N = torch.tensor(sizes, dtype=torch.float64)
    return float(sparsity_N @ size_N / size_N.sum())


@given(sizes=SIZES, mean=SPARSITIES, spread=st.floats(0.0, 2.0), seed=st.integers(0, 99))
def test_with_mean(sizes: list[int], mean: float, spread: float, seed: int) -> None:
    value_N = spread * random(seed, len(sizes))
    size_N = torch.tensor(sizes, dtype=torch.float64)
    sparsity_N = with_mean(value_N, size_N, mean)
    assert mean_of(sparsity_N, sizes) == pytest.approx(mean, abs=1e-12)
    assert min(DENSEST, mean) <= sparsity_N.min()
    assert sparsity_N.max() <= max(SPARSEST, mean)
    assert (sparsity_N[value_N.argsort()].diff() >= 0).all()
    plain_N = value_N - mean_of(value_N, sizes) + mean
    if plain_N.min() > DENSEST and plain_N.max() < SPARSEST:
        torch.testing.assert_close(sparsity_N, plain_N, rtol=0, atol=1e-12)


def curves(seed: int, linears: int, grid_P: Tensor, convex: bool) -> Tensor:
    """Rising curves on ``grid_P``: exponentials of random height and steepness, or steps of any size."""
    if convex:
        height_N1, steepness_N1 = random(seed, 2, linears, 1)
        return height_N1 * (8 * steepness_N1 * grid_P).exp()
    return random(seed, linears, len(grid_P)).cumsum(1)


@given(
    sizes=SIZES,
    share=st.floats(0.0, 1.0),
    points=st.integers(2, 12),
    seed=st.integers(0, 99),
    convex=st.booleans(),
)
def test_least_sum_meets_the_mean_within_the_grid(
    sizes: list[int], share: float, points: int, seed: int, convex: bool
) -> None:
    grid_P = torch.linspace(0.3, 0.8, points, dtype=torch.float64)
    curve_NP = curves(seed, len(sizes), grid_P, convex)
    mean = 0.3 + 0.5 * share
    sparsities = torch.tensor(least_sum(grid_P, curve_NP, sizes, mean), dtype=torch.float64)
    assert mean_of(sparsities, sizes) == pytest.approx(mean, abs=1e-9)
    assert sparsities.min() >= 0.3 - 1e-12
    assert sparsities.max() <= 0.8 + 1e-12
    more = torch.tensor(least_sum(grid_P, curve_NP, sizes, 0.3 + 0.5 * min(share + 0.1, 1.0)), dtype=torch.float64)
    # What rounding leaves of all the weights falls on one linear.
    rounding = 1e-12 * sum(sizes) / torch.tensor(sizes, dtype=torch.float64)
    assert (more >= sparsities - rounding).all(), "a higher global sparsity makes no linear denser"


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=6), share=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_least_sum_is_the_optimum_of_the_linear_program(sizes: list[int], share: float, seed: int) -> None:
    """Minimise the sum of t_l, t_l above every segment of its linear's convex curve, at the asked mean."""
    grid_P = torch.linspace(0.3, 0.8, 7, dtype=torch.float64)
    curve_NP = curves(seed, len(sizes), grid_P, convex=True)
    mean = 0.3 + 0.5 * share
    found = least_sum(grid_P, curve_NP, sizes, mean)

    count = len(sizes)
    above, limits = [], []
    for linear, curve_P in enumerate(curve_NP):
        slope_S = curve_P.diff() / grid_P.diff()
        for slope, x, y in zip(slope_S.tolist(), grid_P.tolist(), curve_P.tolist(), strict=False):
            row = [0.0] * (2 * count)
            row[linear], row[count + linear] = slope, -1.0
            above.append(row)
            limits.append(slope * x - y)
    program = linprog(
        [0.0] * count + [1.0] * count,
        A_ub=above,
        b_ub=limits,
        A_eq=[[size / sum(sizes) for size in sizes] + [0.0] * count],
        b_eq=[mean],
        bounds=[(0.3, 0.8)] * count + [(None, None)] * count,
    )
    reached = sum(interpolate(grid_P, curve_P, s) for curve_P, s in zip(curve_NP, found, strict=True))
    assert reached == pytest.approx(program.fun, rel=1e-7)


def interpolate(grid_P: Tensor, curve_P: Tensor, x: float) -> float:
    place = min(max(int(torch.searchsorted(grid_P, x)) - 1, 0), len(grid_P) - 2)
    share = (x - float(grid_P[place])) / float(grid_P[place + 1] - grid_P[place])
    return float(curve_P[place] + share * (curve_P[place + 1] - curve_P[place]))


@settings(max_examples=30)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6),
    mean=st.floats(0.05, 0.95),
    scope=st.sampled_from(SCOPES),
    seed=st.integers(0, 99),
)
def test_masks_meet_the_global_count_to_a_weight_a_linear(
    shapes: list[tuple[int, int]], mean: float, scope: str, seed: int
) -> None:
    sizes = [outputs * inputs for outputs, inputs in shapes]
    sparsity_N = with_mean(0.3 * random(seed, len(shapes)), torch.tensor(sizes, dtype=torch.float64), mean)
    pruned = 0
    for (outputs, inputs), sparsity in zip(shapes, sparsity_N.tolist(), strict=True):
        keep_OD = top_scores(random(seed, outputs, inputs), Unstructured(sparsity, scope, 7))  # type: ignore[arg-type]
        assert abs(int((~keep_OD).sum()) - sparsity * keep_OD.numel()) <= 0.5 + 1e-6
        pruned += int((~keep_OD).sum())
    assert abs(pruned - mean * sum(sizes)) <= 0.5 * len(shapes) + 1e-6
