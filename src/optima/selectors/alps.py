"""ALPS: ADMM with a growing penalty finds the mask, conjugate gradient re-solves the weights.

Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS 2024
(arXiv 2406.07831), algorithms 1 and 2. In units in which the damped H has a unit diagonal, with G = H W^T:

    B = (H + rho I)^-1 (G - V + rho D),  D = P(B + V / rho),  V = V + rho (B - D)                        (eq. 5)

P keeps the largest magnitudes that the pattern allows. Every 3 iterations rho grows by 1.3, 1.2 or 1.1 as the support
of D changes by more than 10%, 0.5% or one weight of the k kept ones (eq. 26 in the appendix); the loop ends when it
does not change, or after 30 iterations by less than 0.03%. If it moves too little at the first check, rho was too
large: it is divided by 5. Then 10 iterations of conjugate gradient on the support; diagonal preconditioning is the
identity in these units.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.products import multiply, pack
from optima.core.shifted import Eigen, Shifted, eigen_inverse, eigendecomposition, scaled_weight, unit_diagonal
from optima.patterns import Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores

# Growth of rho for a change of the support beyond this fraction of the kept weights.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
SHRINK = 5.0
LARGEST_PENALTY = 1e6
CHECK_EVERY = 3
# From this iteration on, a change of the support below this fraction ends the loop.
SETTLED_AFTER, SETTLED = 30, 3e-4


def _system(hessian: Hessian, dtype: torch.dtype) -> tuple[Tensor, Tensor, Eigen]:
    """Units in which the damped H has a unit diagonal, H in them, and its eigendecomposition (made in float64)."""
    matrix_DD, norm_D = unit_diagonal(hessian.damped_DD, hessian.dead_D)
    return norm_D.to(dtype), pack(matrix_DD.to(dtype)), eigendecomposition(matrix_DD, dtype)


@dataclass(frozen=True)
class ALPS:
    """Mask and update as published. Cost: one eigendecomposition a Hessian, then one or two products an iteration.

    Args:
        penalty: rho at the start.
        max_iterations: of ADMM.
        cg_iterations: of conjugate gradient on the support.
    """

    penalty: float = 0.1
    max_iterations: int = 300
    cg_iterations: int = 10
    published_scope: Scope = "layer"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        hessian, dtype = task.hessian, task.weight_OD.dtype
        norm_D, operator, eigen = hessian.memo((ALPS, dtype), lambda: _system(hessian, dtype))
        dense_OD = scaled_weight(task.weight_OD, hessian, norm_D)
        target_OD = multiply(dense_OD, operator)
        weight_OD = self._admm(eigen_inverse(eigen, dense_OD, CHECK_EVERY), target_OD, dense_OD, pattern)
        keep_OD = top_scores(weight_OD.abs(), pattern)
        weight_OD = conjugate_gradient(operator, target_OD, weight_OD * keep_OD, keep_OD, self.cg_iterations)
        return Selection(keep_OD, weight_OD / norm_D)

    def _admm(self, inverse: Shifted, target_OD: Tensor, dense_OD: Tensor, pattern: Pattern) -> Tensor:
        """Algorithm 1 until the support settles; returns the last B."""
        rho, grown, solve = self.penalty, False, inverse(self.penalty)
        checked_OD = start_OD = top_scores(dense_OD.abs(), pattern)
        projection_OD, dual_OD = dense_OD * start_OD, torch.zeros_like(dense_OD)
        for iteration in range(self.max_iterations):
            weight_OD = solve(torch.add(target_OD, projection_OD, alpha=rho).sub_(dual_OD))
            # B + V / rho, which the projection splits into D and the new V / rho
            sum_OD = torch.add(weight_OD, dual_OD, alpha=1.0 / rho)
            keep_OD = top_scores(sum_OD.abs(), pattern)
            torch.mul(sum_OD, keep_OD, out=projection_OD)
            torch.sub(sum_OD, projection_OD, out=dual_OD).mul_(rho)
            if (iteration + 1) % CHECK_EVERY:
                continue
            changed = int((keep_OD != checked_OD).sum())
            fraction = changed / max(int(keep_OD.sum()), 1)
            checked_OD = keep_OD
            if changed and (grown or fraction > GROWTH[1][0]):
                grown = True
                rho = min(rho * next(rate for limit, rate in GROWTH if fraction > limit), LARGEST_PENALTY)
            elif grown:
                break
            else:
                rho /= SHRINK
                if changed:
                    torch.mul(dense_OD, start_OD, out=projection_OD)
                    dual_OD.zero_()
            if iteration >= SETTLED_AFTER and fraction < SETTLED:
                break
            solve = inverse(rho)
        return weight_OD


def conjugate_gradient(
    operator: Tensor, target_OD: Tensor, start_OD: Tensor, keep_OD: Tensor, iterations: int
) -> Tensor:
    """Each row's H_SS v_S = g_S from ``start_OD``, without preconditioner (algorithm 2)."""
    weight_OD = start_OD
    residual_OD = (target_OD - multiply(weight_OD, operator)).mul_(keep_OD)
    direction_OD = residual_OD.clone()
    energy_O = torch.linalg.vecdot(residual_OD, residual_OD)
    for _ in range(iterations):
        image_OD = multiply(direction_OD, operator)
        curvature_O = torch.linalg.vecdot(direction_OD, image_OD)
        step_O1 = torch.where(curvature_O > 0, energy_O / curvature_O, 0.0)[:, None]
        weight_OD = torch.addcmul(weight_OD, step_O1, direction_OD)
        residual_OD.addcmul_(step_O1, image_OD.mul_(keep_OD), value=-1.0)
        energy_O, before_O = torch.linalg.vecdot(residual_OD, residual_OD), energy_O
        direction_OD.mul_(torch.where(before_O > 0, energy_O / before_O, 0.0)[:, None]).add_(residual_OD)
    return weight_OD
