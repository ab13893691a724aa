"""Wanda: keep the largest |W_ij| * ||X_j||, compared within each output row (Sun et al., ICLR 2024, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optima.patterns import Pattern, Scope, top_scores
from optima.qp.hessian import Hessian
from optima.selectors.base import Selection


@dataclass(frozen=True)
class Wanda:
    """Score |W_ij| sqrt(H_jj): H_jj is the mean square of input j, so the root is ||X_j|| up to a common factor."""

    published_scope: Scope = "row"

    def select(self, weight_OD: Tensor, hessian: Hessian, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        score_OD = weight_OD.abs() * hessian.diagonal_D.sqrt().to(weight_OD.dtype)
        return Selection(top_scores(score_OD, pattern))
