"""Magnitude pruning: keep the largest |W| (Han et al., NeurIPS 2015; layer-wise as in Wanda's comparison)."""

from __future__ import annotations

from dataclasses import dataclass

from optima.patterns import Pattern, Scope, top_scores
from optima.selectors.base import Layer, Selection


@dataclass(frozen=True)
class Magnitude:
    """Score |W_ij|; the Hessian is not used."""

    published_scope: Scope = "layer"

    def select(self, layer: Layer, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(top_scores(layer.weight_OD.abs(), pattern))
