"""Choose the solver row by row from what it costs.

Measured (float32, one core of a Zen 5 server, to a certified gap of 1e-4, Gemma 3 270M):

* Cholesky is faster than CG up to about 12, 13, 64, 100 and 200 weights on the smaller of a row's two sets for 64, 128,
  640, 1024 and 2048 inputs: a tenth of them. Where all rows are solved by their kept set it also saves the inverse.
* Low-rank CG takes half the products of shared-inverse CG per iteration, and at 50 % and more pruned no more iterations
  (in attention outputs a tenth more). At 30 % it takes 1.1 to 1.6 times as many. For few inputs its systems of factors
  cost more than it saves.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.qp.base import RowSolver
from optima.qp.bounded import Bounded
from optima.qp.cholesky import BatchedCholesky
from optima.qp.low_rank_cg import LowRankCG
from optima.qp.problem import RowProblem, RowSolution, concatenate
from optima.qp.shared_inverse_cg import SharedInverseCG

# Costs in operations of a dense float32 product, fitted to the measurements above: small batched factorisations run at
# a tenth of its speed, and a gathered number costs as much as a thousand operations.
FACTOR, GATHER, INVERSE = 10.0 / 3.0, 1200.0, 2.0
# Iterations for every digit of the gap.
ITERATIONS_PER_DIGIT = 2.5
# Low-rank CG from this many inputs and this share of pruned weights up.
LOW_RANK_INPUTS, LOW_RANK_PRUNED = 512, 0.25


@dataclass
class State:
    """The Hessian, and what the chosen solvers have prepared of it so far."""

    hessian: Hessian
    prepared: dict[str, Any] = field(default_factory=dict)

    def solve(self, solver: RowSolver, problem: RowProblem) -> RowSolution:
        """Solve ``problem`` by ``solver``, prepared once."""
        if solver.name not in self.prepared:
            self.prepared[solver.name] = solver.prepare(self.hessian)
        return replace(solver.solve(self.prepared[solver.name], problem), solver=solver.name)


@dataclass(frozen=True)
class Auto:
    """Low-rank CG, shared-inverse CG or Cholesky, whichever costs a row least; with bounds, the bounded solver.

    Args:
        gap: certified relative gap at which a row stops.
    """

    gap: float = 1e-4

    name = "auto"
    supports_bounds = True

    def prepare(self, hessian: Hessian) -> State:
        """Nothing yet: what is shared depends on the choice."""
        return State(hessian)

    def solve(self, state: State, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``; ``solver`` of the solution names the choice and ``reason`` why."""
        if problem.bounded:
            return replace(state.solve(Bounded(self.gap), problem), reason="the weights have bounds")
        # A sum of floats: torch adds booleans an order of magnitude slower.
        kept_R = problem.keep_RD.to(torch.float32).sum(dim=1).double()
        iterative = self._iterative(kept_R, state.hessian.num_inputs)
        direct_R, reason = self._choose(state.hessian, kept_R, iterative)
        solvers = (iterative, BatchedCholesky(self.gap, torch.float32))
        parts = []
        for solver, rows in zip(solvers, ((~direct_R).nonzero()[:, 0], direct_R.nonzero()[:, 0]), strict=True):
            if len(rows) == len(direct_R):
                return replace(state.solve(solver, problem), reason=reason)
            parts.append((rows, state.solve(solver, problem.rows(rows))))
        return _merge(parts, reason)

    def _iterative(self, kept_R: Tensor, num_inputs: int) -> LowRankCG | SharedInverseCG:
        """The better of the two for these rows."""
        pruned = 1.0 - float(kept_R.mean()) / num_inputs if len(kept_R) and num_inputs else 0.0
        low_rank = num_inputs >= LOW_RANK_INPUTS and pruned >= LOW_RANK_PRUNED
        return LowRankCG(self.gap) if low_rank else SharedInverseCG(self.gap)

    def _choose(self, hessian: Hessian, kept_R: Tensor, iterative: LowRankCG | SharedInverseCG) -> tuple[Tensor, str]:
        """Which rows to solve directly, and why."""
        num_inputs = float(hessian.num_inputs)
        size_R = torch.minimum(kept_R, num_inputs - kept_R)
        dual_R = 2 * kept_R > num_inputs
        direct_R = FACTOR * size_R**3 + GATHER * size_R**2 + torch.where(dual_R, 4 * num_inputs**2, 0.0)
        iterations = max(-ITERATIONS_PER_DIGIT * math.log10(self.gap), 1.0)
        shared = isinstance(iterative, SharedInverseCG)
        cost = iterations * (2 if shared else 1) * 2 * num_inputs**2
        inverse = INVERSE * num_inputs**3 if shared and not hessian.has_preconditioner else 0.0
        mixed = float(direct_R.clamp_max(cost).sum()) + inverse
        if not bool(dual_R.any()) and float(direct_R.sum()) <= mixed:
            return torch.ones_like(dual_R), "rows keep few weights or are few"
        chosen_R = direct_R <= cost
        count, total = int(chosen_R.sum()), len(chosen_R)
        if count == 0:
            return chosen_R, "rows keep and prune too many weights for a direct solve"
        if count == total:
            return chosen_R, "rows keep or prune few weights"
        return chosen_R, f"cholesky for {count} of {total} rows, which keep or prune few weights"


def _merge(parts: list[tuple[Tensor, RowSolution]], reason: str) -> RowSolution:
    back = torch.cat([rows for rows, _ in parts]).argsort()
    joined = concatenate([solution for _, solution in parts])
    return RowSolution(
        joined.weight_RD[back],
        joined.error_R[back],
        joined.gap_R[back],
        joined.status_R[back],
        joined.iterations_R[back],
        solver=joined.solver,
        reason=reason,
        note=joined.note,
    )
