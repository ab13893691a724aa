"""Choose the solver row by row from what it costs.

Measured (float32, one core of a Zen 5 server, to a certified gap of 1e-4, Gemma 3 270M):

* Cholesky is faster than CG up to about 12, 13, 64, 100 and 200 weights on the smaller of a row's two sets for 64, 128,
  640, 1024 and 2048 inputs: a tenth of them. Where all rows are solved by their kept set it also saves the inverse.
Elsewhere than on a CPU nothing of this was timed. There a row is solved directly where that needs no timing: where its
system has no more entries than the row itself.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optima.core.cg import LowRankCG
from optima.core.cholesky import BatchedCholesky
from optima.core.hessian import Hessian
from optima.core.problem import RowProblem, RowSolution, RowSolver, Status, concatenate

# Costs on a CPU in operations of a dense float32 product, fitted to the above: small batched factorisations run at a
# tenth of its speed, and a gathered number costs as much as a thousand operations.
FACTOR, GATHER, INVERSE = 10.0 / 3.0, 1200.0, 2.0
# Iterations for every digit of the gap.
ITERATIONS_PER_DIGIT = 2.5


@dataclass(frozen=True)
class Auto:
    """Low-rank CG or Cholesky, whichever costs a row less.

    A row that iterations do not bring to the gap is solved by Cholesky in float64 as well.

    Args:
        gap: certified relative gap at which a row stops.
    """

    gap: float = 1e-4

    name = "auto"

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``; ``solver`` of the solution names the choice."""
        # A sum of floats: torch adds booleans an order of magnitude slower.
        kept_R = problem.keep_RD.to(torch.float32).sum(dim=1).double()
        direct_R = self._direct(hessian, kept_R)
        if not bool(direct_R.any()):
            return self._iterated(hessian, problem)
        direct = BatchedCholesky(self.gap, torch.float32)
        if bool(direct_R.all()):
            return _solve(direct, hessian, problem)
        rows = [(~direct_R).nonzero()[:, 0], direct_R.nonzero()[:, 0]]
        parts = [self._iterated(hessian, problem.rows(rows[0])), _solve(direct, hessian, problem.rows(rows[1]))]
        return _joined(parts, rows)

    def _iterated(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """Rows that iterations leave open are solved directly as well: damping is next to nothing, or none."""
        found = _solve(LowRankCG(self.gap), hessian, problem)
        open_R = found.status_R != Status.CONVERGED
        if not bool(open_R.any()):
            return found
        rows = [(~open_R).nonzero()[:, 0], open_R.nonzero()[:, 0]]
        begun = found.rows(rows[1])
        direct = _solve(BatchedCholesky(self.gap), hessian, replace(problem.rows(rows[1]), start_RD=begun.weight_RD))
        direct = replace(direct, iterations_R=begun.iterations_R, solver=f"{direct.solver}+{found.solver}")
        return _joined([found.rows(rows[0]), direct], rows)

    def _direct(self, hessian: Hessian, kept_R: Tensor) -> Tensor:
        """Which rows to solve directly."""
        num_inputs = float(hessian.num_inputs)
        size_R = torch.minimum(kept_R, num_inputs - kept_R)
        dual_R = 2 * kept_R > num_inputs
        if hessian.device.type != "cpu":
            return (size_R.square() <= num_inputs) & ~dual_R  # which alone would have K made
        direct_R = FACTOR * size_R**3 + GATHER * size_R**2 + torch.where(dual_R, 4 * num_inputs**2, 0.0)
        iterations = max(-ITERATIONS_PER_DIGIT * math.log10(self.gap), 1.0)
        cost = iterations * 2 * num_inputs**2
        found_R = direct_R <= cost
        # Iterations do without K, which rows that keep much must save first. Counted though K may be at hand: the
        # choice must not hang on what was solved before.
        saved = float((cost - direct_R)[found_R & dual_R].sum())
        return found_R & ~dual_R if saved <= INVERSE * num_inputs**3 else found_R


def _joined(parts: list[RowSolution], rows: list[Tensor]) -> RowSolution:
    """One solution of all rows, in order, of ``parts`` that have these each."""
    return concatenate(parts).rows(torch.cat(rows).argsort())


def _solve(solver: RowSolver, hessian: Hessian, problem: RowProblem) -> RowSolution:
    return replace(solver.solve(hessian, problem), solver=solver.name)
