"""Rows that iterate together: those that are done leave when that pays, and everything comes back in order.

Shapes: R rows in the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optima.core.certificate import ENERGY_FLOOR
from optima.core.products import ROUND_ROWS

# Aim a little below the gap that is asked, so that the certificate seldom asks for another round.
AIM = 0.9
# Rows that are done leave the batch when at most this share of it is still open.
COMPACT = 0.8


def unfinished(bound_R: Tensor, error_R: Tensor, gap: float) -> Tensor:
    """The one stopping rule: True where the bound on E - E* is not yet ``gap`` of what the optimum must lose.

    Args:
        bound_R: float64, relative to the row's energy.
        error_R: E likewise.
        gap: certified relative gap that the caller was asked for.
    """
    # A row's unit of energy is between half and twice that of the certificate's floor: at least as strict as that.
    going_R: Tensor = bound_R > AIM * gap * (error_R - bound_R).clamp_min(0.5 * ENERGY_FLOOR)
    return going_R


class RowBatch:
    """Base of iterative solvers' working sets. A subclass names its tensors of one entry (or row) per row.

    Attributes:
        row_tensors: attributes to shrink when rows leave.
        results: those of them that are wanted back at the end.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ()
    results: ClassVar[tuple[str, ...]] = ()

    def __init__(self, count: int, device: torch.device) -> None:
        self.rows = torch.arange(count, device=device)
        self.iterations_R = torch.zeros(count, dtype=torch.int32, device=device)
        # Asking a GPU for a count stalls it.
        self.check_every = 1 if device.type == "cpu" else 4
        self._left: list[tuple[Tensor, ...]] = []

    def going(self, gap: float) -> Tensor:
        """True for rows that are not done."""
        raise NotImplementedError

    def iterate_once(self) -> Tensor:
        """One iteration of every row; returns True for rows that moved."""
        raise NotImplementedError

    def run(self, gap: float, max_iterations: int) -> tuple[Tensor, ...]:
        """Iterate until no row is going, or for ``max_iterations``; the results of all rows in their original order."""
        for iteration in range(max_iterations):
            if iteration % self.check_every == 0:
                going_R = self.going(gap)
                count = int(going_R.sum())
                if count == 0:
                    break
                # oneDNN keeps what it compiles for each number of rows: of many rows, a round number stays.
                spare = -count % ROUND_ROWS if count > ROUND_ROWS else 0
                if count + spare <= COMPACT * len(self.rows):
                    self._shrink(going_R | ((~going_R).cumsum(dim=0) <= spare) if spare else going_R)
            self.iterations_R[self.rows] += self.iterate_once().to(torch.int32)
        if not self._left:
            return tuple(getattr(self, name) for name in self.results)
        self._shrink(torch.zeros_like(self.rows, dtype=torch.bool))
        rows, *tensors = (torch.cat(parts) for parts in zip(*self._left, strict=True))
        back = rows.argsort()
        return tuple(tensor[back] for tensor in tensors)

    def _shrink(self, going_R: Tensor) -> None:
        self._left.append((self.rows[~going_R], *(getattr(self, name)[~going_R] for name in self.results)))
        self.rows = self.rows[going_R]
        for name in self.row_tensors:
            setattr(self, name, getattr(self, name)[going_R])
