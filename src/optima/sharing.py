"""Weights of a block's linears and their records, from the rank that pruned them to all ranks.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
SHARED = " shared the work"  # a phrase by which the note is found
# The record of a linear (None if it was not pruned), and notes.
Done = tuple[LinearRecord | None, tuple[str, ...]]


@dataclass
class Pruned:
    """The outcome for a block's linears, by their names.

    Attributes:
        owners: the rank that prunes each; None: all together, so that all have it.
        done: records of those that this rank has.
        keeps: keep_OD of those of them that were pruned; none if blocks are not tuned.
        solutions: their weights before rounding, where they were solved; none if blocks are not tuned.
    """

    owners: dict[str, int | None] = field(default_factory=dict)
    done: dict[str, Done] = field(default_factory=dict)
    keeps: dict[str, Tensor] = field(default_factory=dict)
    solutions: dict[str, Tensor] = field(default_factory=dict)

    def share(self, linears: Sequence[Linear], ranks: Ranks) -> None:
        """Bring all linears to all ranks: weights, which are written, masks, solutions and records."""
        own = {name: (done, self._dtypes(name)) for name, done in self.done.items() if self.owners[name] == ranks.rank}
        found = {name: theirs for each in ranks.gather(own) for name, theirs in each.items()}
        self.done.update({name: done for name, (done, _) in found.items()})
        for linear in linears:
            owner = self.owners[linear.name]
            if owner is not None and self.done[linear.name][0] is not None:
                weight_OD = ranks.broadcast_(linear.read().contiguous(), owner)
                linear.write(weight_OD)
                for tensors, dtype in zip((self.keeps, self.solutions), found[linear.name][1], strict=True):
                    if dtype is not None:
                        empty_OD = torch.empty(linear.shape, dtype=dtype, device=weight_OD.device)
                        known_OD = tensors.get(linear.name, empty_OD).contiguous()
                        tensors[linear.name] = ranks.broadcast_(known_OD, owner)

    def _dtypes(self, name: str) -> tuple[torch.dtype | None, ...]:
        known = (tensors.get(name) for tensors in (self.keeps, self.solutions))
        return tuple(None if each is None else each.dtype for each in known)


def share_owned(values: Mapping[str, T], owners: Mapping[str, int | None], ranks: Ranks) -> dict[str, T]:
    """The values of all names on all ranks, each its owner's; what has no owner is here already."""
    own = {name: value for name, value in values.items() if owners[name] in (None, ranks.rank)}
    return {name: value for each in ranks.gather(own) for name, value in each.items()}


def describe(ranks: Ranks, dtype: torch.dtype | None, writer: Writer | None) -> str:
    """A note: by how many processes a run goes on, and what that changes; empty if it has always been one.

    Args:
        ranks: the processes.
        dtype: of the activations, if these are computed in other batches than by one process; None if in the same.
        writer: of the run, which knows earlier notes.
    """
    done = [] if writer is None else list(writer.done)
    where = f"after {done[-1]}" if done else "from the first block on"
    if ranks.size == 1:
        before = writer is not None and any(SHARED in note for note in writer.notes)
        return f"{where} one process{SHARED}" if before else ""
    why = "their sums are added in another order, which moves hessians by 1e-16 of their size"
    if dtype is not None:
        rounding = f"roundings of {dtype_name(dtype)}, {torch.finfo(dtype).eps:.0e}"
        why = f"their batches differ from those of one process, which moves activations by {rounding}"
    return f"{where} {ranks.size} processes{SHARED}; {why}; where saliencies nearly tie, masks differ"
