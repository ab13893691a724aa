"""Magnitude pruning: keep the largest |W| (Han et al., NeurIPS 2015; layer-wise as in Wanda's comparison)."""

from __future__ import annotations

from dataclasses import dataclass

from optima.patterns import Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores


@dataclass(frozen=True)
class Magnitude:
    """Score |W_ij|; the Hessian is not used."""

    published_scope: Scope = "layer"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        return Selection(top_scores(task.weight_OD.abs(), pattern))
