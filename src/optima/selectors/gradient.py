"""Wanda with a regional gradient: score (alpha G_ij + ||X_j||) |W_ij|, compared within each output row.

Yang et al., "Wanda++: Pruning Large Language Models via Regional Gradients", arXiv 2503.04992, eq. 3-4, alpha = 100.
G_ij is the root mean square over calibration samples of the gradient of the block output's l2 norm. The paper's
regional optimizer, which trains the block between prunings, is not part of it.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optima.errors import RecipeError
from optima.patterns import Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores


@dataclass(frozen=True)
class Gradient:
    """Score (alpha G_ij + ||X_j||) |W_ij|.

    Cost: a backward pass of every block over the calibration text, about three times its forward pass, which the
    pipeline runs because ``needs`` says so.

    Args:
        alpha: weight of the gradient.
    """

    alpha: float = 100.0
    published_scope: Scope = "row"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``.

        Raises:
            RecipeError: if the linear comes without its gradient.
        """
        if task.gradient_OD is None:
            raise RecipeError(f"selector gradient needs the gradient of {task.name}: give LinearTask its gradient_OD")
        norm_D = task.hessian.diagonal_D.sqrt().to(task.weight_OD.dtype)
        factor_OD = self.alpha * task.gradient_OD.to(task.weight_OD.dtype) + norm_D
        return Selection(top_scores(factor_OD * task.weight_OD.abs(), pattern))
