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
from optima.patterns import Pattern, Scope, top_scores
from optima.selectors.base import Cost, Layer, Selection


@dataclass(frozen=True)
class Gradient:
    """Score (alpha G_ij + ||X_j||) |W_ij|.

    Cost: a backward pass of every block over the calibration text, about three times its forward pass, which the
    pipeline runs because ``needs_gradient`` says so.

    Args:
        alpha: weight of the gradient.
    """

    alpha: float = 100.0
    published_scope: Scope = "row"
    cost: ClassVar[Cost] = Cost(per_square=0, per_weight=16)
    needs_gradient: bool = True

    def select(self, layer: Layer, pattern: Pattern) -> Selection:
        """See ``Selector``.

        Raises:
            RecipeError: if the layer comes without its gradient.
        """
        if layer.gradient_OD is None:
            raise RecipeError(f"selector gradient needs the gradient of {layer.name}: give Layer its gradient_OD")
        norm_D = layer.hessian.diagonal_D.sqrt().to(layer.weight_OD.dtype)
        factor_OD = self.alpha * layer.gradient_OD.to(layer.weight_OD.dtype) + norm_D
        return Selection(top_scores(factor_OD * layer.weight_OD.abs(), pattern))
