"""Thanos: prune a block of columns at once, with the update that is optimal for all weights it removes from a row.

Ilin & Richtarik, "Thanos: A Block-wise Pruning Algorithm for Efficient Large Language Model Compression", arXiv
2504.05346, algorithms 1 and 2. The score is Wanda's, |W_ij| ||X_j||, of the already updated weights. At a block that
begins at column j, with K the inverse of H restricted to the columns from j on, row i loses the weights w at its
indices q and its other weights from j on move by -lambda K_q: with lambda K_qq = w (eq. 10).

Unstructured sparsity follows a global residual mask: all columns from j on are ranked for what is still to be pruned
in the linear (or row), and the block takes its part of that mask.

Differs from the paper: no rows stay dense as outliers (its alpha is 0), for the counts of a pattern are exact.

Shapes: O outputs (rows), D inputs, B columns of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.cholesky import solve_selected
from optima.patterns import NM, Pattern, Scope
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import keep_all_but_lowest, pruned_in_rows, top_scores


@dataclass(frozen=True)
class Thanos:
    """Mask and update as published. Cost: one Cholesky a Hessian, and a system of what goes for each row and block.

    Args:
        blocksize: columns pruned together, for unstructured sparsity.
        nm_blocksize: the same for N:M patterns, rounded down to a multiple of m.
    """

    blocksize: int = 128
    nm_blocksize: int = 512
    published_scope: Scope = "layer"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        hessian = task.hessian
        upper_DD = hessian.inverse_factor_DD
        weight_OD = task.weight_OD.masked_fill(hessian.dead_D, 0.0)
        norm_D = hessian.diagonal_D.sqrt().to(weight_OD.dtype)
        keep_OD = torch.ones_like(weight_OD, dtype=torch.bool)
        num_inputs, width = weight_OD.shape[1], self._width(pattern)
        for begin in range(0, num_inputs, width):
            end = min(begin + width, num_inputs)
            score_OD = weight_OD[:, begin:].abs() * norm_D[begin:]
            keep_OB = _residual_mask(score_OD, end - begin, pattern, keep_OD[:, :begin])
            # K = U^T U, and the first B rows of K need only those of U.
            inverse_BD = upper_DD[begin:end, begin:end].mT @ upper_DD[begin:end, begin:]
            # Eq. 10: lambda_q K_qq = w_q, zero on the kept columns.
            multiplier_OB = solve_selected(inverse_BD[:, : end - begin], weight_OD[:, begin:end], ~keep_OB)
            weight_OD[:, begin:] -= multiplier_OB.to(weight_OD.dtype) @ inverse_BD.to(weight_OD.dtype)
            weight_OD[:, begin:end].masked_fill_(~keep_OB, 0.0)
            keep_OD[:, begin:end] = keep_OB
        return Selection(keep_OD, weight_OD)

    def _width(self, pattern: Pattern) -> int:
        if isinstance(pattern, NM):
            return max(self.nm_blocksize // pattern.m, 1) * pattern.m
        return pattern.group_size if pattern.scope == "group" else self.blocksize


def _residual_mask(score_OD: Tensor, width: int, pattern: Pattern, before_OD: Tensor) -> Tensor:
    """keep_OB of the first ``width`` of the columns that remain, from their scores and the mask of those before."""
    if isinstance(pattern, NM):
        return top_scores(score_OD[:, :width], pattern)
    num_rows, begin = before_OD.shape
    num_inputs = begin + score_OD.shape[1]
    if pattern.scope == "group":
        score_OD = score_OD[:, :width]
        left = pattern.pruned_in_columns(num_rows, begin, begin + width)
    elif pattern.scope == "row":
        left_O = pruned_in_rows(pattern, num_rows, num_inputs) - (~before_OD).sum(dim=1).cpu()
        return keep_all_but_lowest(score_OD, left_O)[:, :width]
    else:
        left = pattern.pruned_count(num_rows * num_inputs) - int((~before_OD).sum())
    return keep_all_but_lowest(score_OD.reshape(1, -1), left).reshape(score_OD.shape)[:, :width]
