"""The rows to solve, many small quadratic programs that share one Hessian, and what a solver returns of them.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor

# A row whose optimum loses less than this share of its energy is exact for every purpose; the gap is
# relative to the larger of the two so that float32 weights can reach it.
ENERGY_FLOOR = 1e-8
# Work space for the rows that are solved together, and what a row takes of it per input: six buffers, of float64 where
# the condition number demands it, and masks.
BUDGET_BYTES, BYTES_PER_ENTRY = 512 * 2**20, 6 * 8 + 8
# On a CPU the buffers of a chunk stay in the last level of cache (24 bytes an entry), but fewer rows than the second
# number leave products short of their full speed.
CACHE_ENTRIES, SMALLEST_CACHED_CHUNK = 2**22, 256

Rows = TypeVar("Rows", bound="PerRow")


class Status(IntEnum):
    """How a row ended. Data, not an exception: the caller counts and reports."""

    CONVERGED = 0
    ITERATION_LIMIT = 1
    STAGNATED = 2


@dataclass(frozen=True)
class RowProblem:
    """minimise 1/2 (v - w)^T H (v - w) over v with v = 0 off keep.

    This is the program of OPTIMA (arXiv 2512.13886) with the linear term written as g = H w: w is the
    unconstrained optimum, the dense row when the linear's outputs are to be reproduced.

    Attributes:
        target_RD: w, float32 or float64.
        keep_RD: boolean, True = the weight survives.
        start_RD: where to start, zero off keep; the better of this and ``keep * target`` is used.
    """

    target_RD: Tensor
    keep_RD: Tensor
    start_RD: Tensor | None = None

    def rows(self, index: slice | Tensor) -> RowProblem:
        """The sub-problem of the rows that ``index`` selects."""
        start_RD = None if self.start_RD is None else self.start_RD[index]
        return RowProblem(self.target_RD[index], self.keep_RD[index], start_RD)

    def masked(self, weight_RD: Tensor) -> Tensor:
        """``weight_RD`` on keep, zero elsewhere."""
        # On a CPU torch multiplies by floats an order of magnitude faster than it fills by boolean masks.
        return weight_RD * self.keep_RD.to(weight_RD.dtype)


@dataclass(frozen=True)
class PerRow:
    """A base of results whose tensors have an entry (or a row) per row."""

    def rows(self: Rows, index: slice | Tensor) -> Rows:
        """The results of the rows that ``index`` selects."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        chosen: dict[str, Any] = {name: value[index] for name, value in values if isinstance(value, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class RowSolution(PerRow):
    """What a solver returns, with the certificate computed independently in float64.

    Attributes:
        weight_RD: the solution, zero off keep, in the target's dtype.
        error_R: 1/2 (v - w)^T H (v - w), float64.
        gap_R: certified bound on the relative suboptimality, float64; see ``optima.core.certificate``.
        status_R: ``Status`` values, int8.
        iterations_R: iterations spent on each row, int32 (0 for a direct solve).
        mask_error_R: the error of the target on keep, float64; None if that was not looked at.
        solver: name of the solver that ran; of several, in alphabetical order, joined by a plus.
        note: where the precision was raised or the number of rows reduced, for the report; empty if nowhere.
    """

    weight_RD: Tensor
    error_R: Tensor
    gap_R: Tensor
    status_R: Tensor
    iterations_R: Tensor
    mask_error_R: Tensor | None = None
    _: KW_ONLY
    solver: str = ""
    note: str = ""


@dataclass(frozen=True)
class Residuals:
    """Where an inner solver starts, in the units of ``optima.core.certificate.Verifier``.

    Attributes:
        residual_RD: negative gradient on the kept weights, zero elsewhere, in the precision to work in.
        mask_RD: the mask as 0 and 1 of the same dtype.
        error_R: E at this point, float64, relative to the row's energy.
        repeated: True from the second round on, where a solve to the gap itself was not enough.
    """

    residual_RD: Tensor
    mask_RD: Tensor
    error_R: Tensor
    repeated: bool = False


@dataclass(frozen=True)
class Correction:
    """An inner solver's answer, in the same units.

    Attributes:
        step_RD: add it to the weight; zero off keep.
        iterations_R: iterations spent, int32.
    """

    step_RD: Tensor
    iterations_R: Tensor


def concatenate(parts: Sequence[Rows]) -> Rows:
    """One result of the rows of all ``parts``, in order; at least one part. Names and notes of all are joined."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if all(isinstance(value, Tensor) for value in values):
            joined[field.name] = torch.cat(values)
        elif field.name == "solver":
            joined["solver"] = "+".join(sorted({name for value in values for name in value.split("+")}))
        elif field.name == "note":
            joined["note"] = "; ".join(dict.fromkeys(filter(None, values)))
        else:
            joined[field.name] = None
    return replace(parts[0], **joined)


def row_chunks(num_inputs: int, total: int, device: torch.device) -> list[slice]:
    """The rows of each chunk, see ``chunk_rows``; at least one chunk."""
    size = chunk_rows(num_inputs, total, device)
    return [slice(begin, begin + size) for begin in range(0, max(total, 1), size)]


def chunk_rows(num_inputs: int, total: int, device: torch.device) -> int:
    """Rows to solve together: what fits the budget and, on a CPU, its cache, in chunks of equal size.

    The last digits of a row depend on the other rows of its chunk, and on no others.
    """
    num_inputs = max(num_inputs, 1)
    chunk = max(BUDGET_BYTES // (BYTES_PER_ENTRY * num_inputs), 1)
    if device.type == "cpu":
        chunk = min(chunk, max(CACHE_ENTRIES // num_inputs, SMALLEST_CACHED_CHUNK))
    pieces = max(-(-total // chunk), 1)
    return max(-(-total // pieces), 1)
