"""Batched quadratic programs that share one Hessian, solved to a certified relative gap. Usable on its own.

``solve`` does it for one batch of rows; of many,

    hessian = Hessian(matrix)               # factorised once, when first needed
    solver = LowRankCG(gap=1e-4)
    for weight, keep in batches:
        solution = solver.solve(hessian, make_problem(hessian, weight, keep))
"""

from optima.core.certificate import Certificate as Certificate, certify as certify
from optima.core.hessian import Hessian as Hessian
from optima.core.problem import (
    Correction as Correction,
    Residuals as Residuals,
    RowProblem as RowProblem,
    RowSolution as RowSolution,
    Status as Status,
)
from optima.core.solvers import (
    SOLVERS as SOLVERS,
    Auto as Auto,
    BatchedCholesky as BatchedCholesky,
    LowRankCG as LowRankCG,
    RowSolver as RowSolver,
    make_problem as make_problem,
    make_solver as make_solver,
    solve as solve,
    solve_rows as solve_rows,
    solve_with_restarts as solve_with_restarts,
)
