"""Many swaps of a row at once, by estimated saliencies, accepted where the certificate proves that its error is lower.

``optima.swaps.search`` knows each swap exactly, from a factorisation of every row. Here a round costs a solve of all
rows by the engine. The saliency of a kept weight v_i is v_i^2 u_i^2, that of a pruned one r_j^2 / u_j^2, r = H (w - v),
with units u between the two extremes of either (see ``saliency_unit``). The lowest kept leave for the highest pruned,
pair by pair; of the pairs that promise a gain a row tries the better half, and a third as many when they do not pay:

    E(new weights) < E(old weights) - bound of their certificate <= the least error that the old mask allows.

Shapes: O outputs, A rows still active, D inputs, G groups of an exchange in a row, N inputs of a group, P pairs of a
row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.linalg.scaling import saliency_unit
from optima.patterns import Pattern, group_width
from optima.qp import Auto, Hessian, make_problem, solve_rows
from optima.qp.certificate import ENERGY_FLOOR
from optima.qp.problem import RowSolution

ROUNDS = 16
# Saliencies of a round need no more; what a looser bound leaves unproven is not accepted.
GAP = 1e-3
# Share of the promising pairs that a row tries first, and by what it is divided each time it fails.
FIRST_SHARE, RETREAT = 0.5, 3.0
MOST_PAIRS = 128


def exchange(hessian: Hessian, weight_OD: Tensor, keep_OD: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Improve the mask ``keep_OD`` of the dense weights.

    Returns:
        keep_OD, as many weights in each row (in each group); swaps_O, the swaps made, int64. No row's optimal error is
        higher than before.
    """
    unit_D = saliency_unit(hessian).to(weight_OD.dtype)
    operator = hessian.operator(weight_OD.dtype)
    width = group_width(pattern, weight_OD.shape[1])
    floor_O = ENERGY_FLOOR * 0.5 * (weight_OD.double().square() @ hessian.damped_DD.diagonal())
    rows = torch.arange(len(weight_OD), device=weight_OD.device)
    solved = _solve(hessian, weight_OD, keep_OD, None)
    keep_OD, kept_OD, least_O = keep_OD.clone(), solved.weight_RD, _least(solved, floor_O)
    share_O, swaps_O = torch.full_like(least_O, FIRST_SHARE), torch.zeros_like(rows)
    for _ in range(ROUNDS):
        keep_AD, kept_AD = keep_OD[rows], kept_OD[rows]
        residual_AD = operator(weight_OD[rows] - kept_AD).mul_(hessian.mean_diagonal)
        low_AD = (kept_AD * unit_D).square_().masked_fill_(~keep_AD, torch.inf)
        high_AD = (residual_AD / unit_D).square_().masked_fill_(keep_AD, -torch.inf)
        gain_AP, leaving_AP, entering_AP = best_pairs(low_AD, high_AD, width)
        promising_AP = gain_AP > 0
        count_A1 = (share_O[rows, None] * promising_AP.sum(dim=1, keepdim=True)).ceil()
        tried_AP = promising_AP & (torch.arange(gain_AP.shape[1], device=rows.device) < count_A1)
        tried_A = tried_AP.sum(dim=1)
        keep_AD = _exchanged(keep_AD, leaving_AP, entering_AP, tried_AP)
        solved = _solve(hessian, weight_OD[rows], keep_AD, kept_AD * keep_AD)
        paid_A = (solved.error_R < least_O[rows]) & (tried_A > 0)
        paying = rows[paid_A]
        keep_OD[paying], kept_OD[paying] = keep_AD[paid_A], solved.weight_RD[paid_A]
        least_O[paying] = _least(solved, floor_O[rows])[paid_A]
        swaps_O[paying] += tried_A[paid_A]
        share_O[rows[~paid_A]] /= RETREAT
        rows = rows[paid_A | (tried_A > 1)]
        if not len(rows):
            break
    return keep_OD, swaps_O


def _solve(hessian: Hessian, weight_AD: Tensor, keep_AD: Tensor, start_AD: Tensor | None) -> RowSolution:
    return solve_rows(Auto(gap=GAP), hessian, make_problem(hessian, weight_AD, keep_AD, start_AD))


def _least(solved: RowSolution, floor_A: Tensor) -> Tensor:
    """What any weights on the mask must lose, by the certificate: E(v) - bound, whichever the gap is relative to."""
    return torch.minimum(solved.error_R / (1.0 + solved.gap_R), solved.error_R - solved.gap_R * floor_A)


def best_pairs(kept_AD: Tensor, pruned_AD: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kept weight of a group with the k-th lowest saliency, and the pruned one with the k-th highest.

    Args:
        kept_AD: saliency of each kept weight, infinite for pruned ones.
        pruned_AD: of each pruned weight, negative infinity for kept ones.
        width: inputs of a group.

    Returns:
        What each pair promises to gain, from the best down, and its two inputs; (A, P) each. Pairs that are none have
        a gain of negative infinity and may name inputs beyond D.
    """
    missing = -kept_AD.shape[1] % width
    kept_AGN = torch.nn.functional.pad(kept_AD, (0, missing), value=torch.inf).unflatten(1, (-1, width))
    pruned_AGN = torch.nn.functional.pad(pruned_AD, (0, missing), value=-torch.inf).unflatten(1, (-1, width))
    pairs = min(max(width // 2, 1), MOST_PAIRS)
    lowest = kept_AGN.topk(pairs, dim=2, largest=False)
    highest = pruned_AGN.topk(pairs, dim=2)
    first_G1 = torch.arange(kept_AGN.shape[1], device=kept_AD.device)[:, None] * width
    gain_AP = (highest.values - lowest.values).flatten(1)
    best = gain_AP.topk(min(gain_AP.shape[1], MOST_PAIRS), dim=1)
    leaving_AP, entering_AP = (lowest.indices + first_G1).flatten(1), (highest.indices + first_G1).flatten(1)
    return best.values, leaving_AP.gather(1, best.indices), entering_AP.gather(1, best.indices)


def _exchanged(keep_AD: Tensor, leaving_AP: Tensor, entering_AP: Tensor, chosen_AP: Tensor) -> Tensor:
    size = keep_AD.shape[1]
    padded_AD = torch.nn.functional.pad(keep_AD, (0, 1))
    padded_AD.scatter_(1, leaving_AP.where(chosen_AP, size), False)
    padded_AD.scatter_(1, entering_AP.where(chosen_AP, size), True)
    return padded_AD[:, :size].contiguous()
