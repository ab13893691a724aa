"""The top-k that applies a pattern to scores, with exact counts and ties broken by position.

Shapes: O outputs (rows), D inputs, R rows of N scores, G groups of m consecutive inputs.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import NM, MaskPattern, Pattern, Unstructured

# Up to this many columns, comparators on whole columns find a threshold faster than a selection in every row.
MOST_COMPARED = 8


def pruned_in_rows(pattern: Unstructured, num_rows: int, num_inputs: int) -> Tensor:
    """Number of weights to prune in each row, int64 of shape (num_rows,), which sum to that of the linear."""
    sizes = torch.arange(num_rows + 1, dtype=torch.float64) * num_inputs
    return (pattern.sparsity * sizes).round().long().diff()


def top_scores(score_OD: Tensor, pattern: Pattern) -> Tensor:
    """Keep the highest scores that ``pattern`` allows.

    Counts are exact and ties are broken by position (the first of equals is pruned first), so the result is
    the same on every device.

    Args:
        score_OD: importance of each weight, any float dtype; higher is kept.
        pattern: what to keep.

    Returns:
        keep_OD: boolean, True = the weight survives.

    Raises:
        RecipeError: if groups of n:m do not divide the inputs.
    """
    masks = [keep_all_but_lowest(*pool).reshape(len(score_OD), -1) for pool in pools(score_OD, pattern)]
    return torch.cat(masks, dim=1)


def pools(value_OD: Tensor, pattern: Pattern) -> list[tuple[Tensor, int | Tensor]]:
    """What is ranked together: each row of each (P, N) tensor, with the number of weights to prune in it."""
    num_outputs, num_inputs = value_OD.shape
    if isinstance(pattern, NM):
        if num_inputs % pattern.m:
            raise RecipeError(f"pattern {pattern} does not divide {num_inputs} inputs: choose another for this linear")
        return [(value_OD.reshape(-1, pattern.m), pattern.m - pattern.n)]
    if pattern.scope == "row":
        return [(value_OD, pruned_in_rows(pattern, num_outputs, num_inputs))]
    edges = [*range(0, num_inputs, pattern.group_size if pattern.scope == "group" else num_inputs), num_inputs]
    return [
        (value_OD[:, begin:end].reshape(1, -1), pattern.pruned_in_columns(num_outputs, begin, end))
        for begin, end in pairwise(edges)
    ]


def keep_all_but_lowest(score_RN: Tensor, count: int | Tensor) -> Tensor:
    """True everywhere but at the ``count`` lowest scores of each row; a tensor gives each row its own count."""
    size = score_RN.shape[1]
    if not score_RN.numel():
        return torch.ones_like(score_RN, dtype=torch.bool)
    count_R1 = torch.as_tensor(count, device=score_RN.device).long().reshape(-1, 1)
    least, most = (count, count) if isinstance(count, int) else map(int, count_R1.aminmax())
    if not most:
        return torch.ones_like(score_RN, dtype=torch.bool)
    if most - least <= 1:  # what a row with one less loses too much is among its ties
        threshold_R1 = kth_lowest(score_RN, most)
    else:
        threshold_R1 = score_RN.sort(dim=1).values.gather(1, (count_R1 - 1).clamp_min(0))
    keep_RN = score_RN > threshold_R1
    if len(score_RN) * (size - most) == int(keep_RN.sum()) and most == least:
        return keep_RN  # no ties
    spare_R1 = size - count_R1 - keep_RN.sum(dim=1, keepdim=True)
    tied = (spare_R1[:, 0] > 0).nonzero()[:, 0]
    if len(tied):
        equal = score_RN[tied] == threshold_R1[tied]
        from_the_end = equal.flip(1).cumsum(dim=1).flip(1)
        keep_RN[tied] |= equal & (from_the_end <= spare_R1[tied])
    return keep_RN


def kth_lowest(score_RN: Tensor, k: int) -> Tensor:
    """The ``k``-th lowest score of each row, (R, 1); linear in the number of scores where a sort is not."""
    if score_RN.shape[1] <= MOST_COMPARED:
        columns = list(score_RN.mT.contiguous().unbind())
        for done in range(k):  # each pass sinks the next lowest
            for i in range(len(columns) - 1, done, -1):
                low, high = torch.minimum(columns[i - 1], columns[i]), torch.maximum(columns[i - 1], columns[i])
                columns[i - 1], columns[i] = low, high
        return columns[k - 1][:, None]
    if score_RN.device.type == "cpu":  # NumPy's selection is several times as fast as torch's
        scores_RN = score_RN.float() if score_RN.dtype == torch.bfloat16 else score_RN
        lowest_R1 = np.partition(scores_RN.detach().numpy(), k - 1, axis=1)[:, k - 1 : k]
        return torch.from_numpy(lowest_R1.copy()).to(score_RN)
    return score_RN.sort(dim=1).values[:, k - 1 : k]  # kthvalue gives a row to one block of threads


def count_error(keep_OD: Tensor, pattern: Pattern) -> str:
    """How a mask misses the exact counts of ``pattern``; empty if it does not."""
    if isinstance(pattern, MaskPattern):
        return ""
    begin = 0
    for pruned_RN, count in pools(~keep_OD, pattern):
        found_R = pruned_RN.sum(dim=1).cpu()
        wanted_R = torch.as_tensor(count).expand(len(found_R))
        for pool in (found_R != wanted_R).nonzero()[:1, 0].tolist():
            row, column = divmod(begin + pool * pruned_RN.shape[1], keep_OD.shape[1])
            size, found, wanted = pruned_RN.shape[1], int(found_R[pool]), int(wanted_R[pool])
            return f"of the {size} weights from row {row}, column {column}, it prunes {found}, not {wanted}"
        begin += pruned_RN.numel() // len(keep_OD)
    return ""
