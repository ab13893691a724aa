"""Selectors that rank weights by a score, and move none: magnitude, Wanda, RIA.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optima.core.hessian import Hessian
from optima.patterns import Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores


@dataclass(frozen=True)
class Magnitude:
    """|W_ij|, without the Hessian (Han et al., NeurIPS 2015; layer-wise as in Wanda's comparison)."""

    published_scope: Scope = "layer"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(top_scores(task.weight_OD.abs(), pattern))


@dataclass(frozen=True)
class Wanda:
    """|W_ij| ||X_j||, compared within each output row (Sun et al., ICLR 2024, eq. 1)."""

    published_scope: Scope = "row"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(top_scores(wanda_score(task.weight_OD, task.hessian), pattern))


def wanda_score(weight_OD: Tensor, hessian: Hessian) -> Tensor:
    """|W_ij| sqrt(H_jj): H_jj is the mean square of input j, so the root is ||X_j|| up to a common factor."""
    return weight_OD.abs() * hessian.diagonal_D.sqrt().to(weight_OD.dtype)


@dataclass(frozen=True)
class RIA:
    """Relative importance and activations: |W| as a share of its row plus its share of its column, times ||X_j||^power.

    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024, eq.
    3-4. The paper's channel permutation, which reorders the inputs before an N:M mask, is not part of it.

    Args:
        power: of the input's norm (a in the paper).
    """

    power: float = 0.5
    published_scope: Scope = "layer"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        size_OD = task.weight_OD.abs()
        row_O1, column_1D = size_OD.sum(dim=1, keepdim=True), size_OD.sum(dim=0, keepdim=True)
        # A row or column of zeros has no shares: its weights score zero.
        share_OD = (size_OD / row_O1 + size_OD / column_1D).nan_to_num_(nan=0.0)
        norm_D = task.hessian.diagonal_D.sqrt().to(size_OD.dtype)
        return Selection(top_scores(share_OD * norm_D**self.power, pattern))
