"""Allocations meet the global sparsity exactly, within their bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optima.allocate import DENSEST, SPARSEST, with_mean
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
