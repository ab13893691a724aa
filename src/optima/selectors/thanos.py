"""Thanos: prune a block of columns at once, with the update that is optimal for all weights it removes from a row.

Ilin & Richtarik, "Thanos: A Block-wise Pruning Algorithm for Efficient Large Language Model Compression", arXiv
2504.05346, algorithms 1 and 2. The score is Wanda's, |W_ij| ||X_j||, of the already updated weights. At a block that
begins at column j, with K the inverse of H restricted to the columns from j on, row i loses the weights w at its
indices q and its other weights from j on move by -lambda K_q: with lambda K_qq = w (eq. 10).

Unstructured sparsity follows a global residual mask: all columns from j on are ranked for what is still to be pruned
in the layer (or row), and the block takes its part of that mask.

Shapes: O outputs (rows), D inputs, B columns of one block, R rows solved together, S weights removed from one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optima.patterns import NM, Pattern, Scope, Unstructured
from optima.selectors.base import Cost, LinearTask, Selection
from optima.selectors.ranking import across_rows, keep_all_but_lowest, pruned_in_rows, top_scores

# Work space of the batched systems; on a CPU they stay in the cache, which takes two thirds of the time away.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}


@dataclass(frozen=True)
class Thanos:
    """Mask and update as published. Cost: one Cholesky a Hessian, and a system of S unknowns for each row and block.

    Args:
        blocksize: columns pruned together, for unstructured sparsity.
        nm_blocksize: the same for N:M patterns, rounded down to a multiple of m.
        outlier_rows: fraction of rows (alpha in the paper) that an N:M pattern leaves dense: those with the largest
            output ||X w||. The paper's 0.1 spares them; 0 keeps the pattern's exact count in every row.
    """

    blocksize: int = 128
    nm_blocksize: int = 512
    outlier_rows: float = 0.0
    published_scope: Scope = "layer"
    cost: ClassVar[Cost] = Cost(per_square=45, per_weight=30, kept_per_square=8, products=1)

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        hessian = task.hessian
        upper_DD = torch.linalg.cholesky(hessian.inverse_DD, upper=True)
        weight_OD = task.weight_OD.masked_fill(hessian.dead_D, 0.0)
        norm_D = hessian.diagonal_D.sqrt().to(weight_OD.dtype)
        keep_OD = torch.ones_like(weight_OD, dtype=torch.bool)
        outlier_O = self._outliers(task) if isinstance(pattern, NM) else None
        num_inputs, width = weight_OD.shape[1], self._width(pattern)
        residual = _ResidualMask(weight_OD.shape, pattern)
        for begin in range(0, num_inputs, width):
            end = min(begin + width, num_inputs)
            keep_OB = residual.block(weight_OD[:, begin:].abs() * norm_D[begin:], end - begin)
            if outlier_O is not None:
                keep_OB[outlier_O] = True
            # K = U^T U, and the first B rows of K need only those of U.
            inverse_BD = upper_DD[begin:end, begin:end].mT @ upper_DD[begin:end, begin:]
            multiplier_OB = multipliers(weight_OD[:, begin:end], keep_OB, inverse_BD[:, : end - begin])
            weight_OD[:, begin:] -= multiplier_OB.to(weight_OD.dtype) @ inverse_BD.to(weight_OD.dtype)
            weight_OD[:, begin:end].masked_fill_(~keep_OB, 0.0)
            keep_OD[:, begin:end] = keep_OB
        return Selection(keep_OD, weight_OD)

    def _width(self, pattern: Pattern) -> int:
        if isinstance(pattern, NM):
            return max(self.nm_blocksize // pattern.m, 1) * pattern.m
        return pattern.group_size if pattern.scope == "group" else self.blocksize

    def _outliers(self, task: LinearTask) -> Tensor:
        """Indices of the rows with the largest loss if they were removed, w H w^T."""
        weight_OD = task.weight_OD.double()
        loss_O = torch.linalg.vecdot(weight_OD, weight_OD @ task.hessian.matrix_DD)
        outlier_O: Tensor = loss_O.topk(math.ceil(self.outlier_rows * len(loss_O))).indices
        return outlier_O


class _ResidualMask:
    """What is still to be pruned, block after block from the left."""

    def __init__(self, shape: torch.Size, pattern: Pattern) -> None:
        self._pattern = pattern
        self._num_rows, num_inputs = shape
        self._column = 0
        if isinstance(pattern, Unstructured):
            self._left = pattern.pruned_count(shape.numel())
            self._left_O = pruned_in_rows(pattern, self._num_rows, num_inputs)

    def block(self, score_OD: Tensor, width: int) -> Tensor:
        """keep_OB of the first ``width`` columns, given the scores of all that remain."""
        pattern, begin = self._pattern, self._column
        self._column += width
        if isinstance(pattern, NM):
            return top_scores(score_OD[:, :width], pattern)
        if pattern.scope == "group":
            score_1N = score_OD[:, :width].reshape(1, -1)
            count = pattern.pruned_in_columns(self._num_rows, begin, begin + width)
            return keep_all_but_lowest(score_1N, count).reshape(-1, width)
        if pattern.scope == "row":
            keep_OB = keep_all_but_lowest(score_OD, self._left_O)[:, :width]
            self._left_O = self._left_O - (~keep_OB).sum(dim=1).to(self._left_O)
            return keep_OB.clone()
        score_1N = across_rows(score_OD, pattern).reshape(1, -1)
        keep_OB = keep_all_but_lowest(score_1N, self._left).reshape(score_OD.shape)[:, :width]
        self._left -= int((~keep_OB).sum())
        return keep_OB.clone()


def multipliers(weight_OB: Tensor, keep_OB: Tensor, inverse_BB: Tensor) -> Tensor:
    """lambda of eq. 10 for every row, float64, zero on the kept columns: lambda_q K_qq = w_q."""
    result_OB = torch.zeros_like(weight_OB, dtype=torch.float64)
    count_O = (~keep_OB).sum(dim=1)
    # Rows that lose about the same number of weights are solved together, padded to the largest.
    order_O = count_O.argsort(descending=True, stable=True)
    budget, begin = CHUNK_BYTES[weight_OB.device.type], 0
    while begin < len(order_O) and (size := int(count_O[order_O[begin]])):
        rows_R = order_O[begin : begin + max(budget // (8 * size * size), 1)]
        begin += len(rows_R)
        removed_RS = keep_OB[rows_R].byte().argsort(dim=1, stable=True)[:, :size]
        real_RS = torch.arange(size, device=rows_R.device) < count_O[rows_R, None]
        matrix_RSS = inverse_BB[removed_RS[:, :, None], removed_RS[:, None, :]]
        padding_RSS = ~(real_RS[:, :, None] & real_RS[:, None, :])
        matrix_RSS.masked_fill_(padding_RSS, 0.0)
        matrix_RSS.diagonal(dim1=1, dim2=2).masked_fill_(~real_RS, 1.0)
        right_RS = weight_OB[rows_R].double().gather(1, removed_RS).masked_fill_(~real_RS, 0.0)
        solved_RS1 = torch.cholesky_solve(right_RS[:, :, None], torch.linalg.cholesky(matrix_RSS))
        result_OB[rows_R] = result_OB[rows_R].scatter_(1, removed_RS, solved_RS1[:, :, 0])
    return result_OB
