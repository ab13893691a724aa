"""Solve all rows of a linear in chunks that fit the memory budget.

Shapes: R rows of the linear, D inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from optima.core.hessian import Hessian
from optima.core.problem import RowProblem, RowSolution, RowSolver, concatenate
from optima.core.products import keep_freed_memory
from optima.device import full_precision, one_memory_error
from optima.errors import RecipeError

# Work space per row and input while solving: six buffers, of float64 where the condition number demands it, and masks.
BYTES_PER_ENTRY = 6 * 8 + 8
DEFAULT_BUDGET_BYTES = 512 * 2**20
# On a CPU the buffers of a chunk stay in the last level of cache: 24 bytes an entry.
CACHE_ENTRIES = 2**22
# Fewer rows than this leave products short of their full speed.
SMALLEST_CACHED_CHUNK = 256


def solve_rows(
    solver: RowSolver, hessian: Hessian, problem: RowProblem, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> RowSolution:
    """Solve every row, chunk by chunk; halve the chunk when the device runs out of memory.

    Raises:
        RecipeError: if the solver is none, or its gap is not positive.
    """
    if isinstance(solver, str) or not callable(getattr(solver, "solve", None)):
        raise RecipeError(f"solver must be an object such as Auto(gap=1e-4), got {solver!r}")
    if not getattr(solver, "gap", 1.0) > 0:
        raise RecipeError(f"gap must be positive, got {solver}: for example 1e-4")
    keep_freed_memory()
    with full_precision(), torch.no_grad():
        _ = hessian.factorisation  # every certificate needs it, and fewer rows would not help where it does not fit
        total = len(problem.target_RD)
        chunk = planned = chunk_rows(hessian.num_inputs, total, hessian.device, budget_bytes)
        parts: list[RowSolution] = []
        begin = 0
        while begin < total or not parts:
            try:
                with one_memory_error():
                    parts.append(solver.solve(hessian, problem.rows(slice(begin, begin + chunk))))
                begin += chunk
                continue
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
            # Only here, after the exception and the frames it held are gone, is their memory free again.
            chunk = (chunk + 1) // 2
            torch.cuda.empty_cache()
    solution = concatenate(parts)
    note = f"out of memory: rows in chunks of {chunk} instead" if chunk < planned else ""
    notes = filter(None, [solution.note, note])
    return replace(solution, solver=solution.solver or solver.name, note="; ".join(notes))


def chunk_rows(num_inputs: int, total: int, device: torch.device, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> int:
    """Rows to solve together: what fits the budget and, on a CPU, its cache, in chunks of equal size.

    The last digits of a row depend on the other rows of its chunk, and on no others.
    """
    num_inputs = max(num_inputs, 1)
    chunk = max(budget_bytes // (BYTES_PER_ENTRY * num_inputs), 1)
    if device.type == "cpu":
        chunk = min(chunk, max(CACHE_ENTRIES // num_inputs, SMALLEST_CACHED_CHUNK))
    pieces = max(-(-total // chunk), 1)
    return max(-(-total // pieces), 1)
