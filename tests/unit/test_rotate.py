"""Turned values: their saliencies against the definition in float64, and what the search finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optima.core.hessian import Hessian
from optima.extras.channels import Channels, Site
from optima.extras.rotate import Part, best_turn, part_of
from optima.models.blocks import Linear
from optima.patterns import NM

HEADS, COPIES, WIDTH, INPUTS, OUTPUTS = 2, 3, 8, 24, 20
PATTERNS = [NM(2, 4), NM(1, 4), NM(6, 8)]
READ = tuple(tuple((head * COPIES + copy) * WIDTH for copy in range(COPIES)) for head in range(HEADS))
# Values come after four other outputs, as in a fused linear.
WRITTEN = tuple((4 + head * WIDTH,) for head in range(HEADS))
VALUE_LINEAR, OUT_LINEAR = Linear("value", nn.Identity()), Linear("out", nn.Identity())
CHANNELS = Channels("heads", "attention", WIDTH, (Site(VALUE_LINEAR, WRITTEN),), Site(OUT_LINEAR, READ))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(inputs: int, seed: int) -> Hessian:
    inputs_TD = random(4 * inputs, inputs, seed=seed) @ random(inputs, inputs, seed=seed + 1)
    return Hessian((inputs_TD.mT @ inputs_TD).double() / len(inputs_TD), damping=0.01)


VALUE, OUT = random(4 + HEADS * WIDTH, INPUTS, seed=1), random(OUTPUTS, HEADS * COPIES * WIDTH, seed=2)
IN_VALUE, IN_OUT = hessian_of(INPUTS, 3), hessian_of(HEADS * COPIES * WIDTH, 5)


def parts(pattern: NM, rows: bool = False) -> list[Part]:
    value_O, out_O = (random(len(each), seed=7).square() if rows else None for each in (VALUE, OUT))
    return [
        part_of(CHANNELS, "value", VALUE, IN_VALUE, value_O, pattern),
        part_of(CHANNELS, "out", OUT, IN_OUT, out_O, pattern),
    ]


def random_turn() -> Tensor:
    return torch.linalg.qr(random(HEADS, WIDTH, WIDTH, seed=9)).Q


@pytest.mark.parametrize("rows", [False, True])
def test_saliencies_are_those_of_the_turned_weights(rows: bool) -> None:
    """w^2 / K_ii times the weight of the row, K the inverse of the damped Hessian of the rotated inputs."""
    turn_HWW = random_turn()
    writer, reader = parts(NM(2, 4), rows)
    turned = writer.saliency(turn_HWW)
    row_O = random(len(VALUE), seed=7).square() if rows else torch.ones(len(VALUE))
    for head in range(HEADS):
        own = slice(4 + head * WIDTH, 4 + (head + 1) * WIDTH)
        expected = (turn_HWW[head] @ VALUE[own]).double().square() / IN_VALUE.inverse_diagonal_D * row_O[own].mean()
        torch.testing.assert_close(turned[head].double(), expected, rtol=1e-4, atol=1e-5)
    whole = torch.block_diag(*(turn_HWW[head] for head in range(HEADS) for _ in range(COPIES))).double()
    left_D = torch.linalg.inv(whole @ IN_OUT.damped_DD @ whole.mT).diagonal()
    expected_OD = (OUT.double() @ whole.mT).square() / left_D
    expected_OD *= random(OUTPUTS, seed=7).square()[:, None] if rows else 1.0
    found_HCOW = reader.saliency(turn_HWW)
    found_OD = found_HCOW.permute(2, 0, 1, 3).reshape(OUTPUTS, -1)
    torch.testing.assert_close(found_OD.double(), expected_OD, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_found_turns_and_is_pruned_of_less(pattern: NM) -> None:
    both = parts(pattern)
    turn_HWW, share = best_turn(both, random(HEADS, WIDTH, WIDTH, seed=11))
    torch.testing.assert_close(turn_HWW @ turn_HWW.mT, torch.eye(WIDTH).expand_as(turn_HWW), rtol=0.0, atol=1e-5)
    identity_HWW = torch.eye(WIDTH).expand_as(turn_HWW)
    ratios = [pruned(each.saliency(turn_HWW), pattern) / pruned(each.saliency(identity_HWW), pattern) for each in both]
    assert share == pytest.approx(sum(ratios) / 2, rel=1e-4)
    assert share < 0.9
    # One part alone can be had for less.
    for number in range(2):
        assert best_turn([both[number]], random(HEADS, WIDTH, WIDTH, seed=11))[1] < ratios[number]


def pruned(saliency: Tensor, pattern: NM) -> float:
    groups = saliency.reshape(-1, pattern.m).double()
    return float(groups.sort(dim=1).values[:, : pattern.m - pattern.n].sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nothing_is_turned_for_nothing(pattern: NM) -> None:
    """Weights of zero, of which no turn prunes less."""
    part = part_of(CHANNELS, "value", torch.zeros_like(VALUE), IN_VALUE, None, pattern)
    turn_HWW, share = best_turn([part], random(HEADS, WIDTH, WIDTH))
    assert torch.equal(turn_HWW, torch.eye(WIDTH).expand_as(turn_HWW))
    assert share == 1.0


def test_dead_values_cost_their_readers_no_more_than_the_ridge() -> None:
    inputs_TD = random(400, OUT.shape[1])
    inputs_TD[:, ::2] = 0.0
    hessian = Hessian(inputs_TD.mT @ inputs_TD / 400, 0.01)
    saliency = part_of(CHANNELS, "out", OUT, hessian, None, NM(2, 4)).saliency(torch.eye(WIDTH).expand(HEADS, -1, -1))
    of_dead = 0.01 * hessian.mean_diagonal * OUT[:, ::2].square().sum()
    assert float(saliency[..., ::2].sum()) == pytest.approx(float(of_dead), rel=1e-4)
    assert saliency[..., 1::2].mean() > 50 * saliency[..., ::2].mean()
