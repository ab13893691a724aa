"""The guarantee: how far each row can be from its optimum, recomputed from scratch in float64.

For rows without bounds (docs/mathematics.md has the proofs), with r the negative gradient on the kept set S and r' any
vector that agrees with r on S, whatever it is on the pruned set:

    E(v) - E(v*) = 1/2 r_S^T (H_SS)^-1 r_S = min over r' of 1/2 r'^T K r' <= 1/2 ||L^-1 r'||^2,     K = H^-1,  H = L L^T

r' = 0 on the pruned set always serves; a solver that knows a better extension hands it over, and the guarantee holds for
any. With bounds, split r = s + m where m carries the multipliers of the bounds; convexity gives
E(v) - E(v*) <= 1/2 s'^T K s' + |m|^T room, room the distance to the bound that m pushes against.

Shapes: R rows, D inputs, B rows certified together.
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
# The residual needs float64, the norm of it two digits: whitened in float32 it is off by 1e-6 or so, and raised by this.
WHITENING_MARGIN = 1.001
# A row of zeros has no scale of its own; this one and its reciprocal are float32 numbers.
SMALLEST_SCALE = 1e-36
# Entries (rows x inputs) certified together: bounds the float64 temporaries.
BLOCK_ENTRIES = {"cpu": 2**19}
DEVICE_BLOCK_ENTRIES = 2**23


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

    def rows(self, index: Tensor) -> Certificate:
        """The facts about the rows that ``index`` selects."""
        return Certificate(self.error_R[index], self.bound_R[index], self.gap_R[index], self.residual_RD[index])


def certify(
    hessian: Hessian, problem: RowProblem, weight_RD: Tensor, extension_RD: Tensor | None = None
) -> Certificate:
    """Certify feasible ``weight_RD`` against ``problem`` with one float64 product and one triangular solve.

    Args:
        hessian: the shared H.
        problem: the rows that ``weight_RD`` claims to solve.
        weight_RD: the candidate, zero off keep and within the bounds.
        extension_RD: what to assume for the residual off keep, zero on keep, in
            units of the row's ``weight_scale`` and of H's mean diagonal; zero if None.
    """
    entries = BLOCK_ENTRIES.get(weight_RD.device.type, DEVICE_BLOCK_ENTRIES)
    size = max(entries // max(hessian.num_inputs, 1), 1)
    parts = []
    for begin in range(0, max(len(weight_RD), 1), size):
        block = slice(begin, begin + size)
        extension_BD = None if extension_RD is None else extension_RD[block]
        parts.append(_certify_block(hessian, problem.rows(block), weight_RD[block], extension_BD))
    if len(parts) == 1:
        return parts[0]
    join = [torch.cat([getattr(part, name) for part in parts]) for name in ("error_R", "bound_R", "gap_R")]
    return Certificate(*join, torch.cat([part.residual_RD for part in parts]))


def energy(hessian: Hessian, problem: RowProblem) -> Tensor:
    """1/2 sum_i H_ii w_i^2 of each row in float64: its loss if inputs were uncorrelated and all weights pruned."""
    weight_D = hessian.damped_DD.diagonal().masked_fill(hessian.dead_D, 0.0)
    target_RD = problem.target_RD
    if problem.bounded:
        target_RD = torch.maximum(target_RD.abs(), problem.clamp(target_RD).abs())
    return 0.5 * (target_RD.double().square_() @ weight_D)


def weight_scale(hessian: Hessian, energy_R: Tensor) -> Tensor:
    """The size of a row's weights. In units of it, and of H's mean diagonal, float32 has room whatever the layer's."""
    return (energy_R / hessian.mean_diagonal).sqrt().clamp_min(SMALLEST_SCALE)


def relative_gap(bound_R: Tensor, error_R: Tensor, energy_R: Tensor) -> Tensor:
    """``bound_R`` relative to what the optimum must at least lose, or to the floor of what matters."""
    scale_R = torch.maximum(error_R - bound_R, ENERGY_FLOOR * energy_R)
    return torch.where(bound_R == 0, 0.0, bound_R / scale_R)


def _certify_block(
    hessian: Hessian, problem: RowProblem, weight_BD: Tensor, extension_BD: Tensor | None
) -> Certificate:
    difference_BD = problem.target_RD.to(torch.float64, copy=True).sub_(weight_BD)
    residual_BD = difference_BD @ hessian.damped_DD
    # A kept dead input stays at its target and a pruned one has target 0, so the decoupled diagonal adds nothing.
    error_B = 0.5 * torch.linalg.vecdot(difference_BD, residual_BD).clamp_min(0.0)
    energy_B = energy(hessian, problem)
    del difference_BD
    # On a CPU torch multiplies by floats an order of magnitude faster than it fills by boolean masks.
    residual_BD.mul_(problem.keep_RD.double())
    free_BD, slack_B = _split_multipliers(hessian, problem, weight_BD, residual_BD)
    bound_B = _half_norm(hessian, free_BD, extension_BD, weight_scale(hessian, energy_B)) + slack_B
    return Certificate(error_B, bound_B, relative_gap(bound_B, error_B, energy_B), residual_BD)


def _half_norm(hessian: Hessian, free_BD: Tensor, extension_BD: Tensor | None, scale_B: Tensor) -> Tensor:
    """1/2 r'^T K r', never below it by rounding."""
    dtype = hessian.working_dtype
    extended_BD = (free_BD / (hessian.mean_diagonal * scale_B)[:, None]).to(dtype)
    if extension_BD is not None:
        extended_BD += extension_BD
    whitened_BD = hessian.whitener(dtype)(extended_BD).double()
    half_norm_B = 0.5 * hessian.mean_diagonal * scale_B.square() * torch.linalg.vecdot(whitened_BD, whitened_BD)
    return half_norm_B if dtype == torch.float64 else WHITENING_MARGIN * half_norm_B


def _split_multipliers(
    hessian: Hessian, problem: RowProblem, weight_BD: Tensor, residual_BD: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual left after the bounds' multipliers, and the slack they leave (any split is valid)."""
    if not problem.bounded:
        return residual_BD, torch.zeros_like(residual_BD[:, 0])
    weight_BD = weight_BD.double()
    room_BD = torch.full_like(residual_BD, torch.inf)
    if problem.upper_RD is not None:
        room_BD = torch.where(residual_BD > 0, problem.upper_RD.double() - weight_BD, room_BD)
    if problem.lower_RD is not None:
        room_BD = torch.where(residual_BD < 0, weight_BD - problem.lower_RD.double(), room_BD)
    slack_BD = torch.where(residual_BD == 0, 0.0, residual_BD.abs() * room_BD.clamp_min(0.0))
    # Worth a multiplier where the slack costs less than the unconstrained bound would for this coordinate alone.
    blocked_BD = slack_BD <= 0.5 * residual_BD.square() / hessian.damped_DD.diagonal()
    slack_B = torch.where(blocked_BD, slack_BD, 0.0).sum(dim=1)
    return residual_BD.masked_fill(blocked_BD, 0.0), slack_B
