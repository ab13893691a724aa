"""Solve all rows of a layer in chunks that fit the memory budget.

Shapes: R rows of the layer, D inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from optima.qp.base import RowSolver
from optima.qp.hessian import Hessian
from optima.qp.problem import RowProblem, RowSolution

# Work space per row and input while solving: six working-precision buffers and four float64 ones.
BYTES_PER_ENTRY = 6 * 4 + 4 * 8
DEFAULT_BUDGET_BYTES = 512 * 2**20


def rows_per_chunk(num_inputs: int, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> int:
    """How many rows of ``num_inputs`` fit ``budget_bytes`` of work space."""
    return max(budget_bytes // (BYTES_PER_ENTRY * max(num_inputs, 1)), 1)


def solve_rows(
    solver: RowSolver, hessian: Hessian, problem: RowProblem, budget_bytes: int = DEFAULT_BUDGET_BYTES
) -> RowSolution:
    """Prepare once, solve every row, chunk by chunk; halve the chunk when the device runs out of memory."""
    with full_precision():
        state = solver.prepare(hessian)
        total = problem.target_RD.shape[0]
        chunk = rows_per_chunk(hessian.num_inputs, budget_bytes)
        parts: list[RowSolution] = []
        begin = 0
        while begin < total or not parts:
            try:
                parts.append(solver.solve(state, problem.rows(slice(begin, begin + chunk))))
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
                chunk = max(min(chunk, total) // 2, 1)
                torch.cuda.empty_cache()
                continue
            begin += chunk
    return _concatenate(parts)


def _concatenate(parts: list[RowSolution]) -> RowSolution:
    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return RowSolution(
        join("weight_RD"), join("error_R"), join("gap_R"), join("status_R"), join("iterations_R")
    )


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are float32 inside: no TF32 or bfloat16 by a global switch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
