"""SparseGPT: prune column by column, compensating each removal in the columns to come.

Frantar & Alistarh, ICML 2023, algorithm 1. With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), row j of U is
the j-th row of the inverse of the Hessian restricted to the columns j.. that are not yet fixed, scaled by its root.

Shapes: O outputs (rows), D inputs, B columns of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optima.patterns import GROUP_SIZE, NM, Pattern, Scope, Unstructured
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import keep_all_but_lowest, pruned_in_rows, top_scores


@dataclass(frozen=True)
class SparseGPT:
    """Mask and update as published: the mask of a block of columns is chosen from the already updated weights.

    Unstructured sparsity is reached in every block of columns: over all its rows (scope ``group``, as published) or
    within each row (scope ``row``). A pass that never looks back cannot rank the columns of different blocks, so that
    scope ``layer`` ranks groups of ``blocksize``. N:M masks are chosen every m columns.

    Args:
        blocksize: columns whose mask is chosen together and whose updates are applied lazily; scope ``group`` brings
            its own.
    """

    blocksize: int = GROUP_SIZE
    published_scope: Scope = "group"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        upper_DD = task.hessian.inverse_factor_DD.to(task.weight_OD.dtype)
        weight_OD = task.weight_OD.masked_fill(task.hessian.dead_D, 0.0)
        keep_OD = torch.ones_like(weight_OD, dtype=torch.bool)
        num_inputs = weight_OD.shape[1]
        blocksize = self.blocksize
        if isinstance(pattern, NM):
            blocksize = max(blocksize // pattern.m, 1) * pattern.m
        elif pattern.scope == "group":
            blocksize = pattern.group_size
        for begin in range(0, num_inputs, blocksize):
            end = min(begin + blocksize, num_inputs)
            upper_BB = upper_DD[begin:end, begin:end]
            block_OB, keep_OB = weight_OD[:, begin:end], keep_OD[:, begin:end]
            if isinstance(pattern, Unstructured):
                keep_OB.copy_(_block_mask(_saliency(block_OB, upper_BB), pattern, begin, num_inputs))
            error_OB = _prune_block(block_OB, keep_OB, upper_BB, pattern)
            weight_OD[:, end:] -= error_OB @ upper_DD[begin:end, end:]
        return Selection(keep_OD, weight_OD)


def _saliency(weight_OB: Tensor, upper_BB: Tensor) -> Tensor:
    """OBS saliency w_j^2 / U_jj^2 (eq. 4)."""
    return (weight_OB / upper_BB.diagonal()).square()


def _block_mask(score_OB: Tensor, pattern: Unstructured, begin: int, num_inputs: int) -> Tensor:
    """Mask of columns begin..; counts are differences of cumulative counts, so that the whole comes out exact."""
    rows, width = score_OB.shape
    end = begin + width
    if pattern.scope == "row":
        total_O = pruned_in_rows(pattern, rows, num_inputs).double()
        count_O = (total_O * end / num_inputs).round() - (total_O * begin / num_inputs).round()
        return keep_all_but_lowest(score_OB, count_O)
    count = pattern.pruned_in_columns(rows, begin, end)
    return keep_all_but_lowest(score_OB.reshape(1, -1), count).reshape(rows, width)


def _prune_block(weight_OB: Tensor, keep_OB: Tensor, upper_BB: Tensor, pattern: Pattern) -> Tensor:
    """Prune a block column by column, in place; returns each column's scaled error for the columns beyond."""
    error_OB = torch.zeros_like(weight_OB)
    for column in range(weight_OB.shape[1]):
        if isinstance(pattern, NM) and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            scores = _saliency(weight_OB[:, group], upper_BB[group, group])
            keep_OB[:, group] = top_scores(scores, pattern)
        pruned_O = weight_OB[:, column].masked_fill(keep_OB[:, column], 0.0)
        error_OB[:, column] = pruned_O / upper_BB[column, column]
        weight_OB[:, column:] -= error_OB[:, column, None] * upper_BB[column, column:]
        weight_OB[:, column].masked_fill_(~keep_OB[:, column], 0.0)
    return error_OB
