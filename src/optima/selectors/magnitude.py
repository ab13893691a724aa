"""Magnitude pruning: keep the largest |W| (Han et al., NeurIPS 2015; layer-wise as in Wanda's comparison)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optima.patterns import Pattern, Scope, top_scores
from optima.qp.hessian import Hessian
from optima.selectors.base import Selection


@dataclass(frozen=True)
class Magnitude:
    """Score |W_ij|; the Hessian is not used."""

    published_scope: Scope = "layer"

    def select(self, weight_OD: Tensor, hessian: Hessian, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(top_scores(weight_OD.abs(), pattern))
