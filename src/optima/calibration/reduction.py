"""Statistics of all ranks, brought together at the rank that owns a linear.

Shapes: D inputs, O outputs, N tokens whose inputs are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optima.calibration.accumulator import Accumulator
from optima.calibration.activations import Activations
from optima.core.solvers import chunk_rows
from optima.distributed import Ranks
from optima.models.blocks import Linear

# A linear's products of O x D x D, forward and back, for select, solve and rounding; its hessian costs a few of D^3.
PRODUCTS = 10


def reduce_statistics(
    accumulators: Mapping[str, Accumulator],
    unweighted: set[str],
    groups: Sequence[Sequence[Linear]],
    acts: Activations,
) -> dict[str, int | None]:
    """Bring the sums of all processes together: each group's at its owner, or at all if they solve it together.

    What is left elsewhere is empty. Sums are float64, so that only their last digits depend on the order.

    Args:
        accumulators: of each group, by its first linear; changed in place.
        unweighted: names of groups whose tokens are not known here; those of other ranks are added.
        groups: of linears that share their input.
        acts: of this process; the sums are on their device.

    Returns:
        The owner of each group, by its first linear; None: all processes.
    """
    names = [group[0].name for group in groups]
    if acts.ranks.size == 1:
        return dict.fromkeys(names, 0)
    divisible = [any(_chunks(linear, acts.device) > 1 for linear in group) for group in groups]
    owners = dict(zip(names, share_out([cost(group) for group in groups], acts.ranks.size, divisible), strict=True))
    reduce_to(owners, accumulators, unweighted, acts)
    return owners


def share_out(costs: Sequence[float], size: int, divisible: Sequence[bool] = ()) -> list[int | None]:
    """Who does what: the largest first, each to whoever has least.

    None, for what exceeds a fair share and is ``divisible`` (all, if it is empty): all do it together.
    """
    load, fair = [0.0] * size, sum(costs) / size
    owners: list[int | None] = [None] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        together = size > 1 and costs[index] > fair and (not divisible or divisible[index])
        if not together:
            least = min(range(size), key=load.__getitem__)
            owners[index] = least
            load[least] += costs[index]
    return owners


def reduce_to(
    owners: Mapping[str, int | None],
    accumulators: Mapping[str, Accumulator],
    unweighted: set[str],
    acts: Activations,
) -> None:
    """As ``reduce_statistics``, where the owners are known."""
    own = {name: _counts(accumulators[name]) for name in owners}
    found = acts.ranks.gather((own, frozenset(unweighted)))
    unweighted.update(*(theirs for _, theirs in found))
    for name, owner in owners.items():
        _reduce(accumulators[name], [counts[name] for counts, _ in found], owner, acts)


def cost(group: Sequence[Linear]) -> float:
    """Of a group's linears and their hessian, in multiplications."""
    size = group[0].shape[1]
    return float(size**3 + PRODUCTS * sum(linear.shape[0] for linear in group) * size**2)


def _chunks(linear: Linear, device: torch.device) -> int:
    """Into which its rows fall apart, in one process as in many."""
    outputs, inputs = linear.shape
    return -(-outputs // chunk_rows(inputs, outputs, device))


def _counts(accumulator: Accumulator) -> tuple[int, int, float, int, int]:
    """D, tokens, their weight beyond one, and the rows of inputs that are kept: of heavy tokens, and of a sample."""
    extra, sample = (sum(map(len, rows)) for rows in (accumulator.extra, accumulator.sample))
    size = 0 if accumulator.sum_DD is None else len(accumulator.sum_DD)
    return size, accumulator.tokens, accumulator.extra_weight, extra, sample


def _reduce(
    accumulator: Accumulator, counts: Sequence[tuple[int, int, float, int, int]], owner: int | None, acts: Activations
) -> None:
    ranks, (sizes, tokens, weights, extras, samples) = acts.ranks, zip(*counts, strict=True)
    accumulator.tokens, accumulator.extra_weight = sum(tokens), sum(weights)
    if not accumulator.tokens:
        return
    if accumulator.sum_DD is None:
        accumulator.sum_DD = torch.zeros(max(sizes), max(sizes), dtype=torch.float64, device=acts.device)
    ranks.all_reduce_lower_(accumulator.sum_DD, owner)
    extra_ND = _stacked(accumulator.extra, extras, accumulator.sum_DD, (ranks, owner))
    sample_ND = _stacked(accumulator.sample, samples, accumulator.sum_DD, (ranks, owner))
    if owner in (None, ranks.rank):
        accumulator.extra, accumulator.sample = extra_ND, sample_ND
    else:
        accumulator.sum_DD, accumulator.extra, accumulator.sample = None, [], []


def _stacked(
    rows: Sequence[Tensor], counts: Sequence[int], like_DD: Tensor, to: tuple[Ranks, int | None]
) -> list[Tensor]:
    """The rows of all ranks, in the order of their sequences: added up, each rank's in a place of its own."""
    ranks, owner = to
    if not sum(counts):
        return []
    all_ND = torch.zeros(sum(counts), len(like_DD), device=like_DD.device)
    begin = sum(counts[: ranks.rank])
    if rows:
        all_ND[begin : begin + counts[ranks.rank]] = torch.cat(list(rows))
    return [ranks.all_reduce_(all_ND, owner)]
