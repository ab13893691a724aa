"""Batched quadratic programs that share one Hessian, solved to a certified relative gap. Usable on its own."""

from __future__ import annotations

from torch import Tensor

from optima.qp.base import RowSolver, make_solver
from optima.qp.certificate import Certificate, certify
from optima.qp.cholesky import BatchedCholesky
from optima.qp.hessian import Hessian
from optima.qp.problem import RowProblem, RowSolution, Status, make_problem
from optima.qp.rows import DEFAULT_BUDGET_BYTES, solve_rows
from optima.qp.shared_inverse_cg import SharedInverseCG

__all__ = [
    "BatchedCholesky",
    "Certificate",
    "Hessian",
    "RowProblem",
    "RowSolution",
    "RowSolver",
    "SharedInverseCG",
    "Status",
    "certify",
    "make_problem",
    "make_solver",
    "solve",
    "solve_rows",
]


def solve(
    hessian: Hessian | Tensor,
    weight: Tensor,
    keep: Tensor,
    *,
    start: Tensor | None = None,
    solver: RowSolver | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> RowSolution:
    """Re-solve the kept weights of every row of ``weight``.

    For each row w: minimise 1/2 (v - w)^T H (v - w) with v = 0 off keep.

    Args:
        hessian: X^T X / T, shape (D, D), or a ``Hessian`` (which carries the damping; default 0.01).
        weight: dense rows, shape (R, D), float64, float32, bfloat16 or float16; any strides.
        keep: boolean, shape (R, D), True = the weight survives.
        start: a warm start, zero off keep; used row by row where it is better than the masked weight.
        solver: defaults to ``SharedInverseCG(gap=1e-4)``.
        budget_bytes: work space for one chunk of rows.

    Returns:
        The solution with its certificate. ``weight_RD`` is float32 (float64 for a float64 weight).

    Raises:
        RecipeError: on wrong shapes or dtypes.
        NumericalError: on NaN, Inf or an indefinite hessian.
    """
    hessian = hessian if isinstance(hessian, Hessian) else Hessian(hessian)
    problem = make_problem(hessian, weight, keep, start)
    return solve_rows(solver or SharedInverseCG(), hessian, problem, budget_bytes)
