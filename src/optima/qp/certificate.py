"""The guarantee: how far each row can be from its optimum, recomputed from scratch in float64.

For rows without bounds (docs/mathematics.md has the proof), with r the negative gradient on the kept set S:

    E(v) - E(v*) = 1/2 r^T (H_SS)^-1 r <= 1/2 r^T K_SS r = 1/2 ||L^-1 r||^2,        K = H^-1,  H = L L^T

because K_SS is the inverse of a Schur complement of H_SS, hence at least (H_SS)^-1. With bounds, split r = s + m where
m carries the multipliers of the bounds; convexity gives E(v) - E(v*) <= 1/2 s^T K_SS s + m^T (bound - v).

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.qp.hessian import Hessian
from optima.qp.problem import RowProblem

# A row whose optimum loses less than this share of its energy is exact for every purpose; the gap is
# relative to the larger of the two so that float32 weights can reach it.
ENERGY_FLOOR = 1e-8


@dataclass(frozen=True)
class Certificate:
    """Float64 facts about one candidate weight.

    Attributes:
        error_R: E(v) = 1/2 (v - w)^T H (v - w).
        bound_R: guaranteed upper bound on E(v) - E(v*).
        gap_R: bound relative to max(E(v) - bound, ENERGY_FLOOR * 1/2 sum_i H_ii w_i^2), the certified
            relative suboptimality, since E(v*) >= E(v) - bound.
        residual_RD: negative gradient on the kept weights, zero elsewhere.
    """

    error_R: Tensor
    bound_R: Tensor
    gap_R: Tensor
    residual_RD: Tensor


def certify(hessian: Hessian, problem: RowProblem, weight_RD: Tensor) -> Certificate:
    """Certify feasible ``weight_RD`` against ``problem`` with one float64 product and one triangular solve."""
    target_RD = problem.target_RD.double()
    difference_RD = target_RD - weight_RD.double()
    gradient_RD = difference_RD @ hessian.damped_DD
    # A kept dead input stays at its target and a pruned one has target 0, so the decoupled diagonal adds nothing.
    error_R = 0.5 * torch.linalg.vecdot(difference_RD, gradient_RD).clamp_min(0.0)
    residual_RD = gradient_RD.masked_fill_(~problem.keep_RD, 0.0)
    free_RD, slack_R = _split_multipliers(hessian, problem, weight_RD, residual_RD)
    whitened_RD = torch.linalg.solve_triangular(hessian.factor_DD.mT, free_RD, upper=True, left=False)
    bound_R = 0.5 * torch.linalg.vecdot(whitened_RD, whitened_RD) + slack_R
    energy_R = 0.5 * (target_RD.square() @ hessian.damped_DD.diagonal())
    scale_R = torch.maximum(error_R - bound_R, ENERGY_FLOOR * energy_R)
    gap_R = torch.where(bound_R == 0, 0.0, bound_R / scale_R)
    return Certificate(error_R, bound_R, gap_R, residual_RD)


def _split_multipliers(
    hessian: Hessian, problem: RowProblem, weight_RD: Tensor, residual_RD: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual left after the bounds' multipliers, and the slack they leave (any split is valid)."""
    if not problem.bounded:
        return residual_RD, torch.zeros_like(residual_RD[:, 0])
    weight_RD = weight_RD.double()
    room_RD = torch.full_like(residual_RD, torch.inf)
    if problem.upper_RD is not None:
        room_RD = torch.where(residual_RD > 0, problem.upper_RD.double() - weight_RD, room_RD)
    if problem.lower_RD is not None:
        room_RD = torch.where(residual_RD < 0, weight_RD - problem.lower_RD.double(), room_RD)
    slack_RD = torch.where(residual_RD == 0, 0.0, residual_RD.abs() * room_RD.clamp_min(0.0))
    # Worth a multiplier where the slack costs less than the unconstrained bound would for this coordinate alone.
    blocked_RD = slack_RD <= 0.5 * residual_RD.square() / hessian.damped_DD.diagonal()
    slack_R = torch.where(blocked_RD, slack_RD, 0.0).sum(dim=1)
    return residual_RD.masked_fill(blocked_RD, 0.0), slack_R
