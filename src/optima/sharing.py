"""What one process made of a block's weights, given to all; what a report says of a run that several share.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from optima.device import dtype_name
from optima.distributed import Ranks
from optima.models.blocks import Linear
from optima.models.save import Writer
from optima.reporting.record import LinearRecord

T = TypeVar("T")
SHARED = " shared the work"  # by which a note is known
# What the report tells of a linear (None if it was not pruned), and notes.
Done = tuple[LinearRecord | None, tuple[str, ...]]


@dataclass
class Pruned:
    """What became of a block's linears, by their names.

    Attributes:
        owners: which process prunes each; None: all together, so that all have it.
        done: what is told of those that this process has.
        keeps: keep_OD of those of them that were pruned; none if blocks are not tuned.
        solutions: what a solver found for them, before it was rounded; none if blocks are not tuned.
    """

    owners: dict[str, int | None] = field(default_factory=dict)
    done: dict[str, Done] = field(default_factory=dict)
    keeps: dict[str, Tensor] = field(default_factory=dict)
    solutions: dict[str, Tensor] = field(default_factory=dict)

    def share(self, linears: Sequence[Linear], ranks: Ranks) -> None:
        """Bring some linears to all processes: their weights, which are written, their masks, and what is told."""
        owners = {linear.name: self.owners[linear.name] for linear in linears}
        for theirs in ranks.gather({name: self.done[name] for name, owner in owners.items() if owner == ranks.rank}):
            self.done.update(theirs)
        pruned = [linear for linear in linears if self.done[linear.name][0] is not None]
        for owner in range(ranks.size):  # one after another: no process holds what it was given of all
            own = {linear.name: linear for linear in pruned if owners[linear.name] == owner}
            if own and owner == ranks.rank:
                ranks.broadcast({name: self._of(each) for name, each in own.items()}, owner)
            elif own:
                self._receive(own, ranks, owner)

    def _of(self, linear: Linear) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return linear.read(), self.keeps.get(linear.name), self.solutions.get(linear.name)

    def _receive(self, linears: Mapping[str, Linear], ranks: Ranks, owner: int) -> None:
        found: dict[str, tuple[Tensor, Tensor | None, Tensor | None]] = ranks.broadcast(None, owner)
        for name, (weight_OD, keep_OD, solution_OD) in found.items():
            linears[name].write(weight_OD)
            if keep_OD is not None:
                self.keeps[name] = keep_OD
            if solution_OD is not None:
                self.solutions[name] = solution_OD


def share_owned(values: Mapping[str, T], owners: Mapping[str, int | None], ranks: Ranks) -> dict[str, T]:
    """The values of all names in all processes, each its owner's; what has no owner is here already."""
    found = dict(values)
    for owner in range(ranks.size) if ranks.size > 1 else ():
        names = [name for name, own in owners.items() if own == owner]
        if names:
            found |= ranks.broadcast({name: values[name] for name in names} if owner == ranks.rank else None, owner)
    return found


def describe(
    ranks: Ranks, dtype: torch.dtype | None, tuned: bool, needs: Collection[str], writer: Writer | None
) -> str:
    """By how many processes a run goes on, and what that changes; empty if it has always been one.

    Args:
        ranks: the processes.
        dtype: of the activations, if these are computed in other batches than by one process; None if in the same.
        tuned: whether blocks are tuned.
        needs: of the selector.
        writer: of the run, which knows earlier notes.
    """
    done = [] if writer is None else list(writer.done)
    where = f"after {done[-1]}" if done else "from the first block on"
    if ranks.size == 1:
        before = writer is not None and any(SHARED in note for note in writer.notes)
        return f"{where} one process{SHARED}" if before else ""
    text = f"{where} {ranks.size} processes{SHARED}; "
    if dtype is None:
        text += "their sums are added in another order in float64 alone, which moves hessians by 1e-16 of their size"
        sums = {
            "the metric of tuning": tuned,
            "coupled rows": "coupling" in needs,
        }
        single = [name for name, there in sums.items() if there]
        text += f", and in float32 for {' and '.join(single)}" if single else ""
    else:
        name, size = dtype_name(dtype), torch.finfo(dtype).eps
        text += (
            f"their batches are not those of one process, which moves activations by roundings of {name}, {size:.0e}"
        )
    text += "; where saliencies are as near to each other, masks differ, and what follows from them"
    return text
