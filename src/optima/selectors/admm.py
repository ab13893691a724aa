"""ADMM with a gradual mask: alternate between the least-squares fit and the projection onto the pattern.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938, algorithms 1 and 2. In
units in which H has a unit diagonal, with G = H W^T and a penalty rho = 1:

    Z = keep * (W + U),  U = U + W - Z,  W = (H + rho I)^-1 (G + rho (Z - U))

In the first 15 of 20 iterations the mask keeps the largest |W + U| at sparsity_t = sparsity (1 - (1 - t/15)^3); then
it is fixed, and the remaining iterations only update the weights. Public copies of the method pass the final sparsity
in every iteration of the unstructured case, so that their schedule does nothing; here it is active.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.products import multiply, pack
from optima.core.shifted import scaled_weight, unit_diagonal
from optima.patterns import Pattern, Scope, Unstructured
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores


@dataclass(frozen=True)
class ADMM:
    """Mask and update as published. Cost: one inverse a Hessian, then a product with D x D an iteration.

    Args:
        iterations: of the alternation.
        gradual_iterations: the first of them, in which the mask follows the schedule.
        penalty: rho.
        ridge: added to the unit diagonal of H, in the place of the recipe's damping (0.1 in the published code).
    """

    iterations: int = 20
    gradual_iterations: int = 15
    penalty: float = 1.0
    ridge: float = 0.1
    published_scope: Scope = "layer"

    def _prepare(self, hessian: Hessian, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Units in which H has a unit diagonal, H and its shifted inverse in them, in the weights' dtype."""
        matrix_DD, norm_D = unit_diagonal(hessian.damped(0.0), hessian.dead_D)
        matrix_DD.diagonal().add_(self.ridge)
        matrix = pack(matrix_DD.to(dtype, copy=True))
        matrix_DD.diagonal().add_(self.penalty)
        inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(matrix_DD))
        return norm_D.to(dtype), matrix, pack(inverse_DD.to(dtype))

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        hessian, dtype = task.hessian, task.weight_OD.dtype
        norm_D, matrix, inverse = hessian.memo((self, dtype), lambda: self._prepare(hessian, dtype))
        # W + U; the dual U starts at zero, and after the projection it is what was cut off.
        sum_OD = scaled_weight(task.weight_OD, task.hessian, norm_D)
        target_OD = multiply(sum_OD, matrix)
        for iteration in range(self.iterations):
            if iteration < self.gradual_iterations:
                keep_OD = self._mask(sum_OD.abs(), pattern, iteration + 1)
            kept_OD = sum_OD * keep_OD
            # Z - U = 2 Z - (Z + U)
            right_OD = torch.add(target_OD, kept_OD, alpha=2.0 * self.penalty).sub_(sum_OD, alpha=self.penalty)
            sum_OD = multiply(right_OD, inverse).add_(sum_OD.sub_(kept_OD))
        return Selection(keep_OD, sum_OD * keep_OD / norm_D)

    def _mask(self, score_OD: Tensor, pattern: Pattern, step: int) -> Tensor:
        """The mask of the schedule's ``step``: fewer weights are pruned than in the end, the same way."""
        if step >= self.gradual_iterations:
            return top_scores(score_OD, pattern)
        sparsity = pattern.sparsity * (1.0 - (1.0 - step / self.gradual_iterations) ** 3)
        if isinstance(pattern, Unstructured):
            return top_scores(score_OD, replace(pattern, sparsity=sparsity))
        # Of the weights that the N:M pattern would prune now, the lowest in the linear go first.
        final_OD = top_scores(score_OD, pattern)
        return top_scores(score_OD.masked_fill(final_OD, torch.inf), Unstructured(sparsity, "layer"))
