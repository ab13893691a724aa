"""Wanda: keep the largest |W_ij| * ||X_j||, compared within each output row (Sun et al., ICLR 2024, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from optima.patterns import Pattern, Scope, top_scores
from optima.selectors.base import Layer, Selection


@dataclass(frozen=True)
class Wanda:
    """Score |W_ij| sqrt(H_jj): H_jj is the mean square of input j, so the root is ||X_j|| up to a common factor."""

    published_scope: Scope = "row"

    def select(self, layer: Layer, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        score_OD = layer.weight_OD.abs() * layer.hessian.diagonal_D.sqrt().to(layer.weight_OD.dtype)
        return Selection(top_scores(score_OD, pattern))
