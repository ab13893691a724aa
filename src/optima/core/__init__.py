"""Batched quadratic programs that share one Hessian, solved to a certified relative gap. Usable on its own.

``solve`` does it for one batch of rows; of many,

    hessian = Hessian(matrix)               # factorised once, when first needed
    solver = LowRankCG(gap=1e-4)
    for weight, keep in batches:
        solution = solver.solve(hessian, make_problem(hessian, weight, keep))
"""

from optima.core.certificate import Certificate, certify
from optima.core.hessian import Hessian
from optima.core.problem import Correction, Residuals, RowProblem, RowSolution, Status
from optima.core.solvers import (
    SOLVERS,
    Auto,
    BatchedCholesky,
    LowRankCG,
    RowSolver,
    make_problem,
    make_solver,
    solve,
    solve_rows,
    solve_with_restarts,
)

__all__ = [
    "SOLVERS",
    "Auto",
    "BatchedCholesky",
    "Certificate",
    "Correction",
    "Hessian",
    "LowRankCG",
    "Residuals",
    "RowProblem",
    "RowSolution",
    "RowSolver",
    "Status",
    "certify",
    "make_problem",
    "make_solver",
    "solve",
    "solve_rows",
    "solve_with_restarts",
]
