"""Solve all rows of a layer in chunks that fit the memory budget.

Shapes: R rows of the layer, D inputs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from optima.device import full_precision
from optima.errors import RecipeError
from optima.linalg.hessian import Hessian
from optima.linalg.products import keep_freed_memory
from optima.qp.problem import RowProblem, RowSolution, RowSolver, concatenate

# Work space per row and input while solving: six buffers, of float64 where the condition number demands it, and masks.
BYTES_PER_ENTRY = 6 * 8 + 8
DEFAULT_BUDGET_BYTES = 512 * 2**20
# On a CPU the buffers of a chunk stay in the last level of cache: 24 bytes an entry.
CACHE_ENTRIES = 2**22
# Fewer rows than this leave products short of their full speed.
SMALLEST_CACHED_CHUNK = 256


def rows_per_chunk(num_inputs: int, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> int:
    """How many rows of ``num_inputs`` fit ``budget_bytes`` of work space."""
    return max(budget_bytes // (BYTES_PER_ENTRY * max(num_inputs, 1)), 1)


def solve_rows(
    solver: RowSolver, hessian: Hessian, problem: RowProblem, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> RowSolution:
    """Solve every row, chunk by chunk; halve the chunk when the device runs out of memory.

    Raises:
        RecipeError: if the problem has bounds and the solver knows none.
    """
    if problem.bounded and not solver.supports_bounds:
        raise RecipeError(f"solver {solver.name} knows no bounds: choose auto, bounded or pdhg")
    keep_freed_memory()
    with full_precision(), torch.no_grad():
        _ = hessian.factorisation  # every certificate needs it, and fewer rows would not help where it does not fit
        total = len(problem.target_RD)
        chunk = _chunk(hessian, total, budget_bytes)
        parts: list[RowSolution] = []
        begin = halvings = 0
        while begin < total or not parts:
            try:
                parts.append(solver.solve(hessian, problem.rows(slice(begin, begin + chunk))))
                begin += chunk
                continue
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
            # Only here, after the exception and the frames it held are gone, is their memory free again.
            chunk = (chunk + 1) // 2
            halvings += 1
            torch.cuda.empty_cache()
    solution = concatenate(parts)
    note = f"out of memory: rows in chunks of {chunk} instead" if halvings else ""
    return replace(
        solution,
        solver=solution.solver or solver.name,
        note="; ".join(filter(None, [solution.note, note])),
        halvings=halvings,
    )


def _chunk(hessian: Hessian, total: int, budget_bytes: int) -> int:
    """Rows to solve together: what fits the budget and, on a CPU, its cache, in chunks of equal size."""
    chunk = rows_per_chunk(hessian.num_inputs, budget_bytes)
    if hessian.device.type == "cpu":
        chunk = min(chunk, max(CACHE_ENTRIES // max(hessian.num_inputs, 1), SMALLEST_CACHED_CHUNK))
    pieces = max(-(-total // chunk), 1)
    return max(-(-total // pieces), 1)
