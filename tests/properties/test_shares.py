"""Allocations meet the global sparsity exactly, within their bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optima.allocate import DENSEST, SPARSEST, with_mean

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
