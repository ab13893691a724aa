"""Batched quadratic programs that share one Hessian, solved to a certified relative gap. Usable on its own.

``solve`` does it for one batch of rows; of many,

    hessian = Hessian(matrix)               # factorised once, when first needed
    solver = LowRankCG(gap=1e-4)
    for weight, keep in batches:
        solution = solver.solve(hessian, make_problem(hessian, weight, keep))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optima.core.auto import Auto
from optima.core.certificate import Certificate, certify
from optima.core.cg import LowRankCG
from optima.core.cholesky import BatchedCholesky
from optima.core.hessian import Hessian
from optima.core.problem import RowProblem, RowSolution, RowSolver, Status, make_problem, target_of
from optima.core.rows import DEFAULT_BUDGET_BYTES, solve_rows
from optima.device import full_precision
from optima.errors import RecipeError

__all__ = [
    "SOLVERS",
    "Auto",
    "BatchedCholesky",
    "Certificate",
    "Hessian",
    "LowRankCG",
    "RowProblem",
    "RowSolution",
    "RowSolver",
    "Status",
    "certify",
    "make_problem",
    "make_solver",
    "solve",
    "solve_rows",
    "target_of",
]


# Every row solver, made for a certified relative gap, by the name that recipes and reports call it.
SOLVERS: dict[str, Callable[[float], RowSolver]] = {
    "auto": Auto,
    "low-rank-cg": LowRankCG,
    "cholesky": lambda gap: BatchedCholesky(gap, torch.float32),
}


def make_solver(name: str, gap: float) -> RowSolver | None:
    """The solver called ``name`` that stops at certified relative gap ``gap``; None for ``none``.

    Raises:
        RecipeError: if the name is unknown or the gap is not positive.
    """
    if not gap > 0:
        raise RecipeError(f"gap must be positive, got {gap}: for example 1e-4")
    if name == "none":
        return None
    if name not in SOLVERS:
        raise RecipeError(f"unknown solver {name!r}: known solvers are {', '.join(SOLVERS)}, none")
    return SOLVERS[name](gap)


def solve(
    hessian: Hessian | Tensor,
    weight: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    linear_term: Tensor | None = None,
    start: Tensor | None = None,
    solver: RowSolver | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> RowSolution:
    """Re-solve the kept weights of every row.

    For each row: minimise 1/2 v^T H v - g^T v with v = 0 off keep, where g = H w for the dense row w in ``weight``,
    which makes it 1/2 (v - w)^T H (v - w), or g is given as ``linear_term``.

    Args:
        hessian: X^T X / T, shape (D, D), float32 or float64, or a ``Hessian``, which carries the damping (else 0.01).
        weight: dense rows, shape (R, D), float64, float32, bfloat16 or float16; any strides.
        keep: boolean, shape (R, D), True = the weight survives. Required.
        linear_term: g, shape (R, D), instead of ``weight``, float64 or float32. Gaps are then relative to the distance
            from the unconstrained optimum, f(v*) - min f. Damping changes H but not a linear term that is given.
        start: a warm start, zero off keep; used row by row where it is better than the masked weight.
        solver: defaults to ``Auto(gap=1e-4)``.
        budget_bytes: work space for one chunk of rows.

    Returns:
        The solution with its certificate. ``weight_RD`` is float32 (float64 for a float64 weight or a linear term).

    Raises:
        RecipeError: on wrong shapes or dtypes.
        NumericalError: on NaN, Inf or an indefinite hessian.
    """
    if keep is None or (weight is None) == (linear_term is None):
        raise RecipeError("solve needs keep and one of weight and linear_term")
    with full_precision():  # rounded by a caller's autocast, a symmetric matrix may not look like one
        hessian = hessian if isinstance(hessian, Hessian) else Hessian(hessian)
    if linear_term is not None:
        weight = target_of(hessian, linear_term)
    assert weight is not None
    problem = make_problem(hessian, weight, keep, start)
    return solve_rows(solver or Auto(), hessian, problem, budget_bytes)
