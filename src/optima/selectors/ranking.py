"""The top-k that applies a pattern to scores, with exact counts and ties broken by position.

Shapes: O outputs (rows), D inputs, R rows of N scores, G groups of m consecutive inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.patterns import NM, Given, Pattern, Unstructured, group_width

# Scope ``balanced`` divides a row's scores by its threshold to this power: 0 would be scope layer, 1 nearly scope row.
BALANCE = 0.7
# Thresholds below this part of the largest count as this part of it: a row may have more zeros than it loses weights.
SMALLEST_THRESHOLD = 1e-6
# Up to this many columns, comparing all pairs is the fastest way to rank them.
SMALLEST_SELECTED = 16


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
    """
    num_outputs, num_inputs = score_OD.shape
    if isinstance(pattern, NM):
        grouped = score_OD.reshape(-1, pattern.m)
        return keep_all_but_lowest(grouped, pattern.m - pattern.n).reshape(num_outputs, num_inputs)
    if pattern.scope == "row":
        return keep_all_but_lowest(score_OD, pruned_in_rows(pattern, num_outputs, num_inputs))
    score_OD = across_rows(score_OD, pattern)
    width = pattern.group_size if pattern.scope == "group" else num_inputs
    keep_OD = torch.empty_like(score_OD, dtype=torch.bool)
    for begin in range(0, num_inputs, width or 1):
        end = min(begin + width, num_inputs)
        group = score_OD[:, begin:end]
        count = pattern.pruned_in_columns(num_outputs, begin, end)
        keep_OD[:, begin:end] = keep_all_but_lowest(group.reshape(1, -1), count).reshape(group.shape)
    return keep_OD


def across_rows(score_OD: Tensor, pattern: Unstructured) -> Tensor:
    """The scores as those of different rows are compared: in units of their rows if the scope is ``balanced``."""
    return score_OD / row_units(score_OD, pattern) if pattern.scope == "balanced" else score_OD


def row_units(score_OD: Tensor, pattern: Unstructured) -> Tensor:
    """What scope ``balanced`` divides the scores of each row by, positive, float32 or wider, of shape (O, 1)."""
    if not score_OD.numel():
        return torch.ones_like(score_OD[:, :1])
    score_OD = score_OD.to(torch.promote_types(score_OD.dtype, torch.float32))
    threshold_O1 = _kth_lowest(score_OD, max(pattern.pruned_count(score_OD.shape[1]), 1))
    finite = torch.finfo(score_OD.dtype)
    least = (threshold_O1.max() * SMALLEST_THRESHOLD).clamp(finite.tiny, finite.max)
    return threshold_O1.clamp(least, torch.full_like(least, finite.max)).pow_(BALANCE)


def keep_all_but_lowest(score_RN: Tensor, count: int | Tensor) -> Tensor:
    """True everywhere but at the ``count`` lowest scores of each row; a tensor gives each row its own count."""
    if isinstance(count, int):
        few = score_RN.shape[1] <= SMALLEST_SELECTED
        return _keep_by_rank(score_RN, count) if few else _keep_by_threshold(score_RN, count, count)
    count_R1 = count.to(score_RN.device, torch.int64)[:, None]
    least, most = map(int, count.aminmax()) if count.numel() else (0, 0)
    if most - least <= 1:
        return _keep_by_threshold(score_RN, count_R1, most)
    order_RN = score_RN.argsort(dim=1, stable=True)
    rank_N = torch.arange(score_RN.shape[1], device=score_RN.device)
    return torch.empty_like(score_RN, dtype=torch.bool).scatter_(1, order_RN, rank_N >= count_R1)


def _keep_by_rank(score_RN: Tensor, count: int) -> Tensor:
    """For a few columns: each element's rank is the number of comparisons that it wins, the later of equals winning."""
    columns = [column.contiguous() for column in score_RN.unbind(1)]
    ranks = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for later, ours in enumerate(columns):
        for earlier, theirs in enumerate(columns[:later]):
            wins = theirs <= ours
            ranks[later] += wins
            ranks[earlier] += ~wins
    return torch.stack([rank >= count for rank in ranks], dim=1) if ranks else torch.empty_like(score_RN).bool()


def _keep_by_threshold(score_RN: Tensor, count: int | Tensor, most: int) -> Tensor:
    """A selection is linear in the number of scores where a sort is not; ``count`` is ``most`` or one less."""
    num_rows, size = score_RN.shape
    if not most or not num_rows:
        return torch.ones_like(score_RN, dtype=torch.bool)
    threshold_R1 = _kth_lowest(score_RN, most)
    keep_RN = score_RN > threshold_R1
    spare_R1 = size - count - keep_RN.sum(dim=1, keepdim=True)
    tied = (spare_R1[:, 0] > 0).nonzero()[:, 0]
    if len(tied):
        equal = score_RN[tied] == threshold_R1[tied]
        from_the_end = equal.flip(1).cumsum(dim=1).flip(1)
        keep_RN[tied] |= equal & (from_the_end <= spare_R1[tied])
    return keep_RN


def _kth_lowest(score_RN: Tensor, k: int) -> Tensor:
    if score_RN.device.type == "cpu":
        return score_RN.kthvalue(k, dim=1, keepdim=True).values
    return score_RN.sort(dim=1).values[:, k - 1 : k]  # kthvalue gives a row to one block of threads


def count_error(keep_OD: Tensor, pattern: Pattern) -> str:
    """How a mask misses the exact counts of ``pattern``; empty if it does not."""
    num_outputs, num_inputs = keep_OD.shape
    if isinstance(pattern, Given):
        return ""
    if isinstance(pattern, NM):
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
    width = group_width(pattern, num_inputs)
    for begin in range(0, num_inputs, width):
        end = min(begin + width, num_inputs)
        wanted, found = pattern.pruned_in_columns(num_outputs, begin, end), int(pruned_OD[:, begin:end].sum())
        if wanted != found:
            return f"columns {begin} to {end} prune {found} weights, not {wanted}"
    return ""
