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
from typing import NamedTuple

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.linalg.products import SharedMatrix
from optima.linalg.scaling import scaled_weight, unit_diagonal
from optima.linalg.shifted_inverse import Eigen, ShiftedInverse, eigendecomposition
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


class _System(NamedTuple):
    """The damped H scaled to a unit diagonal and its eigendecomposition (made in float64), in the weights' dtype."""

    norm_D: Tensor
    operator: SharedMatrix
    eigen: Eigen


def _system(hessian: Hessian, dtype: torch.dtype) -> _System:
    def make() -> _System:
        matrix_DD, norm_D = unit_diagonal(hessian.damped_DD, hessian.dead_D)
        return _System(norm_D.to(dtype), SharedMatrix(matrix_DD.to(dtype)), eigendecomposition(matrix_DD, dtype))

    return hessian.memo((_System, dtype), make)


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
        norm_D, operator, eigen = _system(task.hessian, task.weight_OD.dtype)
        dense_OD = scaled_weight(task.weight_OD, task.hessian, norm_D)
        target_OD = operator(dense_OD)
        inverse = ShiftedInverse(eigen, dense_OD, CHECK_EVERY)
        admm = _ADMM(inverse, target_OD, dense_OD, pattern, self.penalty)
        weight_OD = admm.run(self.max_iterations)
        keep_OD = top_scores(weight_OD.abs(), pattern)
        weight_OD = conjugate_gradient(operator, target_OD, weight_OD * keep_OD, keep_OD, self.cg_iterations)
        return Selection(keep_OD, weight_OD / norm_D)


class _ADMM:
    """The state of algorithm 1: the fit B, its projection D and the dual V, O x D each."""

    def __init__(
        self, inverse: ShiftedInverse, target_OD: Tensor, dense_OD: Tensor, pattern: Pattern, penalty: float
    ) -> None:
        self.inverse, self.target_OD, self.dense_OD, self.pattern = inverse, target_OD, dense_OD, pattern
        self.penalty, self.grown = penalty, False
        self._restart()
        self.keep_OD = self.checked_OD

    def _restart(self) -> None:
        self.checked_OD = top_scores(self.dense_OD.abs(), self.pattern)
        self.projection_OD = self.dense_OD * self.checked_OD
        self.dual_OD = torch.zeros_like(self.dense_OD)

    def run(self, max_iterations: int) -> Tensor:
        """Iterate until the support settles; returns the last B."""
        solve = self.inverse.at(self.penalty)
        for iteration in range(max_iterations):
            rho = self.penalty
            weight_OD = solve(torch.add(self.target_OD, self.projection_OD, alpha=rho).sub_(self.dual_OD))
            # B + V / rho, which the projection splits into D and the new V / rho
            sum_OD = torch.add(weight_OD, self.dual_OD, alpha=1.0 / rho)
            self.keep_OD = top_scores(sum_OD.abs(), self.pattern)
            torch.mul(sum_OD, self.keep_OD, out=self.projection_OD)
            torch.sub(sum_OD, self.projection_OD, out=self.dual_OD).mul_(rho)
            if (iteration + 1) % CHECK_EVERY:
                continue
            if self._settled(iteration):
                break
            solve = self.inverse.at(self.penalty)
        return weight_OD

    def _settled(self, iteration: int) -> bool:
        """Update rho by the change of the support since the last check; True if the loop should end."""
        changed = int((self.keep_OD != self.checked_OD).sum())
        fraction = changed / max(int(self.keep_OD.sum()), 1)
        checked_OD = self.keep_OD
        if changed and (self.grown or fraction > GROWTH[1][0]):
            self.grown = True
            self.penalty = min(self.penalty * next(rate for limit, rate in GROWTH if fraction > limit), LARGEST_PENALTY)
        elif self.grown:
            return True
        else:
            self.penalty /= SHRINK
            if changed:
                self._restart()
        self.checked_OD = checked_OD
        return iteration >= SETTLED_AFTER and fraction < SETTLED


def conjugate_gradient(
    operator: SharedMatrix, target_OD: Tensor, start_OD: Tensor, keep_OD: Tensor, iterations: int
) -> Tensor:
    """Each row's H_SS v_S = g_S from ``start_OD``, without preconditioner (algorithm 2)."""
    weight_OD = start_OD
    residual_OD = (target_OD - operator(weight_OD)).mul_(keep_OD)
    direction_OD = residual_OD.clone()
    energy_O = torch.linalg.vecdot(residual_OD, residual_OD)
    for _ in range(iterations):
        image_OD = operator(direction_OD)
        curvature_O = torch.linalg.vecdot(direction_OD, image_OD)
        step_O1 = torch.where(curvature_O > 0, energy_O / curvature_O, 0.0)[:, None]
        weight_OD = torch.addcmul(weight_OD, step_O1, direction_OD)
        residual_OD.addcmul_(step_O1, image_OD.mul_(keep_OD), value=-1.0)
        energy_O, before_O = torch.linalg.vecdot(residual_OD, residual_OD), energy_O
        direction_OD.mul_(torch.where(before_O > 0, energy_O / before_O, 0.0)[:, None]).add_(residual_OD)
    return weight_OD
