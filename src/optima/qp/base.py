"""The protocol of row solvers, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from optima.errors import RecipeError
from optima.linalg.hessian import Hessian
from optima.qp.problem import RowProblem, RowSolution


class RowSolver(Protocol):
    """Re-solves the kept weights of rows that share one Hessian: prepare once per layer, solve many chunks of rows.

    A solver never sees a model, a block or a file. The work space of ``solve`` grows with the rows it is given;
    ``optima.qp.rows.solve_rows`` chooses how many.
    """

    @property
    def name(self) -> str:
        """What recipes and reports call it."""
        ...

    @property
    def supports_bounds(self) -> bool:
        """True if it can hold weights between bounds."""
        ...

    def prepare(self, hessian: Hessian) -> Any:
        """Everything that depends on the Hessian alone."""
        ...

    def solve(self, state: Any, problem: RowProblem) -> RowSolution:
        """Solve every row of ``problem``; ``state`` is what ``prepare`` returned."""
        ...


SOLVER_NAMES = ("auto", "low-rank-cg", "shared-inverse-cg", "cholesky", "bounded", "pdhg", "none")


def make_solver(name: str, gap: float) -> RowSolver | None:
    """The solver called ``name`` that stops at certified relative gap ``gap``; None for ``none``.

    Raises:
        RecipeError: if the name is unknown or the gap is not positive.
    """
    from optima.qp.auto import Auto
    from optima.qp.bounded import Bounded
    from optima.qp.cholesky import BatchedCholesky
    from optima.qp.low_rank_cg import LowRankCG
    from optima.qp.pdhg import RestartedPDHG
    from optima.qp.shared_inverse_cg import SharedInverseCG

    if not gap > 0:
        raise RecipeError(f"gap must be positive, got {gap}: for example 1e-4")
    solvers: dict[str, Callable[[], RowSolver | None]] = {
        "auto": lambda: Auto(gap),
        "low-rank-cg": lambda: LowRankCG(gap),
        "shared-inverse-cg": lambda: SharedInverseCG(gap),
        "cholesky": lambda: BatchedCholesky(gap, torch.float32),
        "bounded": lambda: Bounded(gap),
        "pdhg": lambda: RestartedPDHG(gap),
        "none": lambda: None,
    }
    if name not in solvers:
        raise RecipeError(f"unknown solver {name!r}: known solvers are {', '.join(solvers)}")
    return solvers[name]()
