"""Permutations and rotations: what the search loses, against brute force and the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from closeness import assert_close_in_norm
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from optima.core.hessian import Hessian
from optima.extras.channels import TOGETHER, Saliency, best_order, best_rotation, lost, reader_saliency, writer_saliency
from optima.models.blocks import Linear
from optima.models.channels import Channels, move
from optima.patterns import NM

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(6, 8), NM(1, 2)]
HEADS, COPIES, WIDTH, INPUTS, OUTPUTS = 2, 3, 8, 24, 20
# Values come after four other outputs, as in a fused linear.
WRITTEN = 4 + torch.arange(HEADS * WIDTH).view(HEADS, 1, WIDTH)
READ = torch.arange(HEADS * COPIES * WIDTH).view(HEADS, COPIES, WIDTH)
HEADS_OF = Channels("heads", "attention", {"value": WRITTEN}, "out", READ)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ordered(saliency_RC: Tensor, pattern: NM, seed: int = 0) -> Tensor:
    return best_order(saliency_RC, pattern, torch.Generator().manual_seed(seed))


@given(st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_an_order_is_a_permutation_that_loses_no_more(pattern: NM, rows: int, groups: int, seed: int) -> None:
    saliency_RC = random(rows, groups * pattern.m, seed=seed).pow(4)  # heavy-tailed, as squares of weights are
    order_C = ordered(saliency_RC, pattern, seed)
    assert order_C.sort().values.tolist() == list(range(groups * pattern.m))
    before, after = lost(saliency_RC, pattern), lost(saliency_RC[:, order_C], pattern)
    assert after <= before * (1 + 1e-5)  # sums in another order
    pruned = sum(
        sum(sorted(row[start : start + pattern.m])[: pattern.m - pattern.n])
        for row in saliency_RC.tolist()
        for start in range(0, len(row), pattern.m)
    )
    assert before == pytest.approx(pruned, rel=1e-5)


def test_two_groups_of_four_are_split_about_as_well_as_can_be() -> None:
    splits = [[0, *first, *(set(range(8)) - {0, *first})] for first in combinations(range(1, 8), 3)]
    above = []
    for seed in range(20):
        saliency_RC = random(7, 8, seed=seed).pow(4)
        least = min(lost(saliency_RC[:, split], NM(2, 4)) for split in splits)
        above.append(lost(saliency_RC[:, ordered(saliency_RC, NM(2, 4))], NM(2, 4)) / least - 1.0)
    assert sum(above) / len(above) < 0.05, above
    assert min(above) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)], ids=str)
def test_channels_that_matter_are_spread_over_groups(pattern: NM) -> None:
    """As many channels matter as can be kept, and stand together: in a better order nothing is lost."""
    saliency_RC = torch.zeros(3, 4 * pattern.m)
    saliency_RC[:, : 4 * pattern.n] = random(3, 4 * pattern.n).pow(4) + 1.0
    assert lost(saliency_RC, pattern) > 0.0
    assert lost(saliency_RC[:, ordered(saliency_RC, pattern)], pattern) == 0.0
    many_RC = random(2, pattern.m * (2 * TOGETHER + 1)).pow(4)  # more groups than are assigned together
    assert lost(many_RC[:, ordered(many_RC, pattern)], pattern) < 0.9 * lost(many_RC, pattern)


def test_each_head_keeps_its_channels_wherever_they_occur() -> None:
    """Two heads of two channels: twice among the outputs of a linear, alternating with gates, among inputs."""
    linears = {}
    for name, shape in ("twice", (8, 2)), ("steps", (8, 2)), ("reader", (4, 4)):
        module = nn.Linear(*reversed(shape))
        module.weight.data = torch.arange(16.0).view(shape)
        module.bias.data = module.weight.data[:, 0].clone()
        linears[name] = Linear(name, module)
    writers = {
        "twice": torch.tensor([[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        "steps": torch.tensor([[[0, 2], [1, 3]], [[4, 6], [5, 7]]]),
    }
    channels = Channels("mlp", "x", writers, "reader", torch.arange(4).view(2, 1, 2))
    move(channels, linears, torch.tensor([[1, 0], [0, 1]]))
    for name, rows in (("twice", [1, 0, 2, 3, 5, 4, 6, 7]), ("steps", [2, 3, 0, 1, 4, 5, 6, 7])):
        expected = torch.arange(16.0).view(8, 2)[rows]
        assert torch.equal(linears[name].module.weight, expected)
        assert torch.equal(linears[name].module.bias, expected[:, 0])
    assert torch.equal(linears["reader"].module.weight, torch.arange(16.0).view(4, 4)[:, [1, 0, 2, 3]])
    assert linears["reader"].module.bias.tolist() == [0.0, 4.0, 8.0, 12.0]


def hessian_of(inputs: int, seed: int) -> Hessian:
    inputs_TD = random(4 * inputs, inputs, seed=seed) @ random(inputs, inputs, seed=seed + 1)
    return Hessian((inputs_TD.mT @ inputs_TD).double() / len(inputs_TD), damping=0.01)


VALUE, OUT = random(4 + HEADS * WIDTH, INPUTS, seed=1), random(OUTPUTS, HEADS * COPIES * WIDTH, seed=2)
IN_VALUE, IN_OUT = hessian_of(INPUTS, 3), hessian_of(HEADS * COPIES * WIDTH, 5)


def saliencies(rows: bool = False) -> list[Saliency]:
    value_O, out_O = (random(len(each), seed=7).square() if rows else None for each in (VALUE, OUT))
    return [writer_saliency(HEADS_OF, VALUE, IN_VALUE, value_O), reader_saliency(HEADS_OF, OUT, IN_OUT, out_O)]


@pytest.mark.parametrize("rows", [False, True])
def test_saliencies_are_those_of_the_rotated_weights(rows: bool) -> None:
    """w^2 / K_ii times the weight of the row, K the inverse of the damped Hessian of the rotated inputs."""
    rotation_HWW = torch.linalg.qr(random(HEADS, WIDTH, WIDTH, seed=9)).Q
    writer, reader = saliencies(rows)
    rotated = writer(rotation_HWW)
    row_O = random(len(VALUE), seed=7).square() if rows else torch.ones(len(VALUE))
    for head in range(HEADS):
        own = slice(4 + head * WIDTH, 4 + (head + 1) * WIDTH)
        expected = (rotation_HWW[head] @ VALUE[own]).double().square() / IN_VALUE.inverse_diagonal_D
        assert_close_in_norm(rotated[head], expected * row_O[own].mean())
    whole = torch.block_diag(*(rotation_HWW[head] for head in range(HEADS) for _ in range(COPIES))).double()
    left_D = torch.linalg.inv(whole @ IN_OUT.damped_DD @ whole.mT).diagonal()
    expected_OD = (OUT.double() @ whole.mT).square() / left_D
    expected_OD *= random(OUTPUTS, seed=7).square()[:, None] if rows else 1.0
    found_OD = reader(rotation_HWW).permute(2, 0, 1, 3).reshape(OUTPUTS, -1)
    assert_close_in_norm(found_OD, expected_OD)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(6, 8)], ids=str)
def test_what_is_found_rotates_and_is_pruned_of_less(pattern: NM) -> None:
    def pruned(saliency: Callable[[Tensor], Tensor], rotation_HWW: Tensor) -> float:
        groups = saliency(rotation_HWW).reshape(-1, pattern.m).double()
        return float(groups.sort(dim=1).values[:, : pattern.m - pattern.n].sum())

    parts, begin_HWW = [(each, pattern) for each in saliencies()], random(HEADS, WIDTH, WIDTH, seed=11)
    rotation_HWW, share = best_rotation(parts, begin_HWW)
    identity_HWW = torch.eye(WIDTH).expand_as(rotation_HWW)
    assert_close_in_norm(rotation_HWW @ rotation_HWW.mT, identity_HWW)
    ratios = [pruned(each, rotation_HWW) / pruned(each, identity_HWW) for each, _ in parts]
    assert share == pytest.approx(sum(ratios) / 2, rel=1e-3)
    assert share < 0.9
    for part, ratio in zip(parts, ratios, strict=True):  # one part alone can be had for less
        assert best_rotation([part], begin_HWW)[1] < ratio
    zero = writer_saliency(HEADS_OF, torch.zeros_like(VALUE), IN_VALUE, None)
    rotation_HWW, share = best_rotation([(zero, pattern)], begin_HWW)
    assert torch.equal(rotation_HWW, identity_HWW)
    assert share == 1.0


def test_dead_values_cost_their_readers_no_more_than_the_ridge() -> None:
    inputs_TD = random(400, OUT.shape[1])
    inputs_TD[:, ::2] = 0.0
    hessian = Hessian(inputs_TD.mT @ inputs_TD / 400, 0.01)
    saliency = reader_saliency(HEADS_OF, OUT, hessian, None)(torch.eye(WIDTH).expand(HEADS, -1, -1))
    of_dead = 0.01 * hessian.mean_diagonal * OUT[:, ::2].square().sum()
    assert float(saliency[..., ::2].sum()) == pytest.approx(float(of_dead), rel=1e-3)
    assert saliency[..., 1::2].mean() > 50 * saliency[..., ::2].mean()
