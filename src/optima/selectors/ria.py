"""Relative importance and activations (RIA): |W| as a share of its row and of its column, times the input's norm.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024, eq. 3-4:
RIA_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||^a with a = 1/2. The paper's channel permutation, which
reorders the inputs before an N:M mask, is not part of it: it would have to reorder the linear before too.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from optima.patterns import Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores


@dataclass(frozen=True)
class RIA:
    """Relative importance (share of the row plus share of the column) times ||X_j||^power.

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
