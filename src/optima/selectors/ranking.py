"""The top-k that applies a pattern to scores, with exact counts and ties broken by position.

Shapes: O outputs (rows), D inputs, R rows of N scores, G groups of m consecutive inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import NM, Given, Pattern, Unstructured, group_width

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
    num_outputs, num_inputs = score_OD.shape
    if isinstance(pattern, NM):
        if num_inputs % pattern.m:
            raise RecipeError(f"pattern {pattern} does not divide {num_inputs} inputs: choose another for this linear")
        grouped = score_OD.reshape(-1, pattern.m)
        return keep_all_but_lowest(grouped, pattern.m - pattern.n).reshape(num_outputs, num_inputs)
    if pattern.scope == "row":
        return keep_all_but_lowest(score_OD, pruned_in_rows(pattern, num_outputs, num_inputs))
    keep_OD = torch.empty_like(score_OD, dtype=torch.bool)
    for columns, count in _groups(pattern, num_outputs, num_inputs):
        group = score_OD[:, columns]
        keep_OD[:, columns] = keep_all_but_lowest(group.reshape(1, -1), count).reshape(group.shape)
    return keep_OD


def _groups(pattern: Unstructured, num_outputs: int, num_inputs: int) -> Iterator[tuple[slice, int]]:
    """The columns that are ranked together over all rows, and the number of weights to prune in them."""
    width = group_width(pattern, num_inputs)
    for begin in range(0, num_inputs, width):
        end = min(begin + width, num_inputs)
        yield slice(begin, end), pattern.pruned_in_columns(num_outputs, begin, end)


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
    num_outputs, num_inputs = keep_OD.shape
    if isinstance(pattern, Given):
        return ""
    if isinstance(pattern, NM):
        if num_inputs % pattern.m:
            return f"groups of {pattern.m} do not divide {num_inputs} inputs"
        kept_G = keep_OD.reshape(-1, pattern.m).sum(dim=1)
        wrong = (kept_G != pattern.n).nonzero()[:, 0]
        if not len(wrong):
            return ""
        row, group = divmod(int(wrong[0]), num_inputs // pattern.m)
        return f"{len(wrong)} groups keep another number, first {int(kept_G[wrong[0]])} in row {row}, group {group}"
    pruned_OD = ~keep_OD
    if pattern.scope == "row":
        wanted_O, found_O = pruned_in_rows(pattern, num_outputs, num_inputs), pruned_OD.sum(dim=1).cpu()
        wrong = (wanted_O != found_O).nonzero()[:, 0]
        first = int(wrong[0]) if len(wrong) else 0
        return f"row {first} prunes {int(found_O[first])}, not {int(wanted_O[first])}" if len(wrong) else ""
    for columns, wanted in _groups(pattern, num_outputs, num_inputs):
        if wanted != (found := int(pruned_OD[:, columns].sum())):
            return f"columns {columns.start} to {columns.stop} prune {found} weights, not {wanted}"
    return ""
