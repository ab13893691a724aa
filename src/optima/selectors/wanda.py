"""Wanda: keep the largest |W_ij| * ||X_j||, compared within each output row (Sun et al., ICLR 2024, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optima.core.hessian import Hessian
from optima.patterns import Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores


@dataclass(frozen=True)
class Wanda:
    """Score |W_ij| sqrt(H_jj): H_jj is the mean square of input j, so the root is ||X_j|| up to a common factor."""

    published_scope: Scope = "row"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(top_scores(wanda_score(task.weight_OD, task.hessian), pattern))


def wanda_score(weight_OD: Tensor, hessian: Hessian) -> Tensor:
    """|W_ij| ||X_j|| of any rows of a linear, in their dtype."""
    return weight_OD.abs() * hessian.diagonal_D.sqrt().to(weight_OD.dtype)
