"""Orders of channels: what the search loses, against brute force and the definition."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optima.extras.channels import Channels, Site, move
from optima.extras.permute import TOGETHER, best_order, lost
from optima.models.blocks import Linear
from optima.patterns import NM

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(6, 8), NM(1, 2)]


def random_saliency(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, as squares of weights are."""
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)).pow(4)


def ordered(saliency_RC: Tensor, pattern: NM, seed: int = 0) -> Tensor:
    return best_order(saliency_RC, pattern, torch.Generator().manual_seed(seed))


@given(st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_an_order_is_a_permutation_that_loses_no_more(pattern: NM, rows: int, groups: int, seed: int) -> None:
    saliency_RC = random_saliency(rows, groups * pattern.m, seed)
    order_C = ordered(saliency_RC, pattern, seed)
    assert order_C.sort().values.tolist() == list(range(groups * pattern.m))
    assert lost(saliency_RC[:, order_C], pattern) <= lost(saliency_RC, pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_lost_is_what_the_pattern_prunes(pattern: NM) -> None:
    saliency_RC = random_saliency(3, 2 * pattern.m)
    expected = sum(
        sum(sorted(group)[: pattern.m - pattern.n])
        for row in saliency_RC.tolist()
        for group in (row[: pattern.m], row[pattern.m :])
    )
    assert lost(saliency_RC, pattern) == pytest.approx(expected, rel=1e-6)


def test_two_groups_of_four_are_split_about_as_well_as_can_be() -> None:
    splits = [[0, *first, *(set(range(8)) - {0, *first})] for first in combinations(range(1, 8), 3)]
    above = []
    for seed in range(20):
        saliency_RC = random_saliency(7, 8, seed)
        least = min(lost(saliency_RC[:, split], NM(2, 4)) for split in splits)
        above.append(lost(saliency_RC[:, ordered(saliency_RC, NM(2, 4))], NM(2, 4)) / least - 1.0)
    assert sum(above) / len(above) < 0.05, above
    assert min(above) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_channels_that_matter_are_spread_over_groups(pattern: NM) -> None:
    """As many channels matter as can be kept, and stand together: in a better order nothing is lost."""
    saliency_RC = torch.zeros(3, 4 * pattern.m)
    saliency_RC[:, : 4 * pattern.n] = random_saliency(3, 4 * pattern.n) + 1.0
    assert lost(saliency_RC, pattern) > 0.0
    assert lost(saliency_RC[:, ordered(saliency_RC, pattern)], pattern) == 0.0


def test_an_order_that_cannot_be_better_stays() -> None:
    saliency_RC = torch.ones(2, 16)
    assert ordered(saliency_RC, NM(2, 4)).tolist() == list(range(16))


def linear_of(weight_OD: Tensor) -> Linear:
    module = nn.Linear(*reversed(weight_OD.shape))
    module.weight.data, module.bias.data = weight_OD, weight_OD[:, 0].clone()
    return Linear("linear", module)


def test_each_head_keeps_its_channels_wherever_they_occur() -> None:
    """Two heads of two channels: twice among the outputs of a linear, in turns with gates, among inputs."""
    twice, steps, reader = (linear_of(torch.arange(16.0).view(shape)) for shape in ((8, 2), (8, 2), (4, 4)))
    writers = Site(twice, ((0, 4), (2, 6))), Site(steps, ((0, 1), (4, 5)), step=2)
    move(Channels("mlp", "x", 2, writers, Site(reader, ((0,), (2,)))), torch.tensor([[1, 0], [0, 1]]))
    for linear, rows in ((twice, [1, 0, 2, 3, 5, 4, 6, 7]), (steps, [2, 3, 0, 1, 4, 5, 6, 7])):
        expected = torch.arange(16.0).view(8, 2)[rows]
        assert torch.equal(linear.module.weight, expected)
        assert torch.equal(linear.module.bias, expected[:, 0])
    assert torch.equal(reader.module.weight, torch.arange(16.0).view(4, 4)[:, [1, 0, 2, 3]])
    assert reader.module.bias.tolist() == [0.0, 4.0, 8.0, 12.0]


def test_more_groups_than_are_assigned_together() -> None:
    saliency_RC = random_saliency(2, 4 * (2 * TOGETHER + 1))
    order_C = ordered(saliency_RC, NM(2, 4))
    assert order_C.sort().values.tolist() == list(range(saliency_RC.shape[1]))
    assert lost(saliency_RC[:, order_C], NM(2, 4)) < 0.8 * lost(saliency_RC, NM(2, 4))
