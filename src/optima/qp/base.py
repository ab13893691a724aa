"""The protocol of row solvers, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from optima.errors import RecipeError
from optima.qp.hessian import Hessian
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

    def prepare(self, hessian: Hessian) -> Any:
        """Everything that depends on the Hessian alone."""
        ...

    def solve(self, state: Any, problem: RowProblem) -> RowSolution:
        """Solve every row of ``problem``; ``state`` is what ``prepare`` returned."""
        ...


def make_solver(name: str, gap: float) -> RowSolver | None:
    """The solver called ``name`` that stops at certified relative gap ``gap``; None for ``none``.

    Raises:
        RecipeError: if the name is unknown or the gap is not positive.
    """
    from optima.qp.cholesky import BatchedCholesky
    from optima.qp.shared_inverse_cg import SharedInverseCG

    solvers: dict[str, Callable[..., RowSolver]] = {"shared-inverse-cg": SharedInverseCG, "cholesky": BatchedCholesky}
    if not gap > 0:
        raise RecipeError(f"gap must be positive, got {gap}: for example 1e-4")
    if name == "none":
        return None
    if name not in solvers:
        raise RecipeError(f"unknown solver {name!r}: known solvers are {', '.join([*solvers, 'none'])}")
    return solvers[name](gap=gap)


SOLVER_NAMES = ("shared-inverse-cg", "cholesky", "none")
