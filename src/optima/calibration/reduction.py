"""What processes found on their own sequences, brought together: statistics, and what a block is tuned on.

Shapes: D inputs, O outputs, N tokens whose inputs are kept, T tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from optima.calibration.accumulator import Accumulator
from optima.calibration.streams import Call, Streams
from optima.data.batches import Batch
from optima.distributed import ALONE, Ranks
from optima.errors import OptimaError
from optima.models.stacks import Block, Linear
from optima.qp.rows import chunk_rows

# A linear's products of O x D x D, forward and back, for select, solve and rounding; its hessian costs a few of D^3.
PRODUCTS = 10


class _Counts(NamedTuple):
    """What one process holds of a group: D, tokens, their weight beyond one, how many rows of inputs it has kept."""

    size: int
    tokens: int
    extra_weight: float
    extra: int
    sample: int


def reduce_statistics(
    accumulators: Mapping[str, Accumulator],
    untold: set[str],
    groups: Sequence[Sequence[Linear]],
    streams: Streams,
) -> dict[str, int | None]:
    """Bring the sums of all processes together: each group's at its owner, or at all if they solve it together.

    What is left elsewhere is empty. Sums are float64, so that only their last digits depend on the order.

    Args:
        accumulators: of each group, by its first linear; changed in place.
        untold: names of groups whose tokens could not be told apart here; those of other processes are added.
        groups: of linears that share their input.
        streams: of this process; the sums are on their device.

    Returns:
        The owner of each group, by its first linear; None: all processes.
    """
    names = [group[0].name for group in groups]
    if streams.ranks.size == 1:
        return dict.fromkeys(names, 0)
    divisible = [any(_chunks(linear, streams.device) > 1 for linear in group) for group in groups]
    owners = dict(zip(names, share_out([cost(group) for group in groups], streams.ranks.size, divisible), strict=True))
    reduce_to(owners, accumulators, untold, streams)
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
    untold: set[str],
    streams: Streams,
) -> None:
    """As ``reduce_statistics``, where the owners are known."""
    found = streams.ranks.gather(({name: _counts(accumulators[name]) for name in owners}, frozenset(untold)))
    untold.update(*(theirs for _, theirs in found))
    for name, owner in owners.items():
        _reduce(accumulators[name], [own[name] for own, _ in found], owner, streams)


def cost(group: Sequence[Linear]) -> float:
    """Of a group's linears and their hessian, in multiplications."""
    size = group[0].shape[1]
    return float(size**3 + PRODUCTS * sum(linear.shape[0] for linear in group) * size**2)


def _chunks(linear: Linear, device: torch.device) -> int:
    """Into which its rows fall apart, in one process as in many."""
    outputs, inputs = linear.shape
    return -(-outputs // chunk_rows(inputs, outputs, device))


def _counts(accumulator: Accumulator) -> _Counts:
    extra, sample = (sum(map(len, rows)) for rows in (accumulator.extra, accumulator.sample))
    size = 0 if accumulator.sum_DD is None else len(accumulator.sum_DD)
    return _Counts(size, accumulator.tokens, accumulator.extra_weight, extra, sample)


def _reduce(accumulator: Accumulator, counts: Sequence[_Counts], owner: int | None, streams: Streams) -> None:
    ranks = streams.ranks
    accumulator.tokens = sum(count.tokens for count in counts)
    accumulator.extra_weight = sum(count.extra_weight for count in counts)
    if not accumulator.tokens:
        return
    if accumulator.sum_DD is None:
        size = max(count.size for count in counts)
        accumulator.sum_DD = torch.zeros(size, size, dtype=torch.float64, device=streams.device)
    ranks.add_lower(accumulator.sum_DD, owner)
    extra_ND = _stacked(accumulator.extra, [count.extra for count in counts], accumulator.sum_DD, (ranks, owner))
    sample_ND = _stacked(accumulator.sample, [count.sample for count in counts], accumulator.sum_DD, (ranks, owner))
    if owner in (None, ranks.rank):
        accumulator.extra, accumulator.sample = extra_ND, sample_ND
    else:
        accumulator.sum_DD, accumulator.extra, accumulator.sample = None, [], []


def _stacked(
    rows: Sequence[Tensor], counts: Sequence[int], like_DD: Tensor, to: tuple[Ranks, int | None]
) -> list[Tensor]:
    """The rows of all processes, in the order of their sequences: added up, each process's in a place of its own."""
    ranks, owner = to
    if not sum(counts):
        return []
    all_ND = torch.zeros(sum(counts), len(like_DD), device=like_DD.device)
    begin = sum(counts[: ranks.rank])
    if rows:
        all_ND[begin : begin + counts[ranks.rank]] = torch.cat(list(rows))
    return [ranks.add(all_ND, owner)]


class Sequences(NamedTuple):
    """Activations, and what a block should make of them: a target for each batch, weights of its tokens or None."""

    streams: Streams
    targets: Sequence[Tensor]
    weights: Sequence[Tensor] | None


class _Part(NamedTuple):
    """What is small of one process's, ready to be sent: for each batch, see ``Streams``."""

    sizes: list[tuple[int, int]]
    calls: list[Call]
    weights: list[Tensor] | None
    given: list[Batch]


class _Batch(NamedTuple):
    """Of one batch, what may wait in files: never more than one of them is on its way."""

    hidden: Tensor
    carried: dict[tuple[int, int], Tensor]
    target: Tensor


def at_first(block: Block, own: Sequences, given: bool = False) -> Sequences | None:
    """The sequences of all processes in the first one, ready for ``block``, as if it had them all; None elsewhere.

    ``given``: with what the model is given for each batch.
    """
    streams = own.streams
    if streams.ranks.size == 1:
        return own
    weights = None if own.weights is None else list(own.weights)
    parts = streams.ranks.to_first(
        _Part(streams.sizes, streams.calls[block.index], weights, streams.batches if given else [])
    )
    batches = _batches_at_first(own)
    if not parts:
        return None
    calls: list[list[Call]] = [[] for _ in range(block.index)]
    whole = replace(
        streams,
        sizes=[size for part in parts for size in part.sizes],
        hidden=[batch.hidden for batch in batches],
        calls=[*calls, [call for part in parts for call in part.calls]],
        carried=[batch.carried for batch in batches],
        ranks=ALONE,
        parts=(),
        batches=[batch for part in parts for batch in part.given],
    )
    known = [part.weights for part in parts if part.weights is not None]
    all_weights = [weight_T for weights in known for weight_T in weights] if len(known) == len(parts) else None
    return Sequences(whole, [batch.target for batch in batches], all_weights)


def _batches_at_first(own: Sequences) -> list[_Batch]:
    """Those of all processes in the first one, by rank; none elsewhere."""
    streams, keep = own.streams, own.streams.store.keep
    ranks, problems = streams.ranks, list[OptimaError]()

    def received(batch: _Batch | None) -> _Batch | None:
        if batch is None or problems:
            return None
        try:
            carried = {at: keep(tensor) for at, tensor in batch.carried.items()}
            return _Batch(keep(batch.hidden), carried, keep(batch.target))
        except OptimaError as error:  # the others wait until theirs was received, too
            problems.append(error)
            return None

    found: list[list[_Batch]] = [[] for _ in range(ranks.size)]
    for number in range(max(ranks.gather(len(streams.sizes)))):
        mine = None
        if number < len(streams.sizes):
            mine = _Batch(streams.hidden[number], streams.carried[number], own.targets[number])
        for rank, batch in enumerate(ranks.to_first(mine, received)):
            found[rank] += [] if batch is None else [batch]
    if problems:
        raise problems[0]
    return [batch for batches in found for batch in batches]
