"""A fast inner solve, restarted from float64 residuals until every row is certified.

The inner solver is given residuals and returns corrections; what decides convergence is the certificate, computed from
scratch (Wilkinson's iterative refinement; Higham, Accuracy and Stability of Numerical Algorithms, ch. 12). Only the
first residual is taken in the working precision: an error in it costs another round, never a wrong answer. Rows that
stall in float32 go on in float64.

Shapes: R rows, D inputs, A rows still active.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.certificate import ALL, Certificate, Verifier
from optima.core.hessian import Hessian
from optima.core.problem import RowProblem, RowSolution, Status
from optima.device import full_precision

MAX_ROUNDS = 10
# A round that does not shrink the bound by this factor has hit its precision.
STAGNATION = 0.5
# A row that gained less than this over its start is compared with it in float64.
CLOSE = 0.99
# What float64 leaves of E, relative to the row's energy.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Residuals:
    """Where an inner solver starts, in the units of ``certificate.Verifier``.

    Attributes:
        residual_RD: negative gradient on the kept weights, zero elsewhere, in the precision to work in.
        mask_RD: the mask as 0 and 1 of the same dtype.
        error_R: E at this point, float64, relative to the row's energy.
        repeated: True from the second round on, where what was fast has not been enough.
    """

    residual_RD: Tensor
    mask_RD: Tensor
    error_R: Tensor
    repeated: bool = False

    def aim(self, gap: float) -> float:
        """What to iterate to: where the certificate asked for another round, more than it would at first."""
        return 0.5 * gap if self.repeated else gap


@dataclass(frozen=True)
class Correction:
    """An inner solver's answer, in the same units.

    Attributes:
        step_RD: add it to the weight; zero off keep.
        iterations_R: iterations spent, int32.
    """

    step_RD: Tensor
    iterations_R: Tensor


# Approximately solves H_SS step_S = residual_S for each row, in the residuals' dtype.
Inner = Callable[[Residuals], Correction]


def solve_with_restarts(hessian: Hessian, problem: RowProblem, inner: Inner, gap: float) -> RowSolution:
    """Alternate ``inner`` and the certificate until every row's certified gap is at most ``gap`` or stalls."""
    with full_precision(), torch.no_grad():
        rounds = _Rounds(hessian, problem, inner, gap)
        for _ in range(MAX_ROUNDS):
            if not len(rounds.active):
                break
            rounds.next()
        return rounds.solution()


class _Rounds:
    """The best weight of every row so far, its certificate, and which rows go on."""

    def __init__(self, hessian: Hessian, problem: RowProblem, inner: Inner, gap: float) -> None:
        """The first round, from a start of which the residual is known to working precision only."""
        self.hessian, self.problem, self.inner, self.gap = hessian, problem, inner, gap
        self.verifier = Verifier(hessian, problem)
        # Errors in solvers' units times this are errors.
        self.unit_R = hessian.mean_diagonal * self.verifier.scale_R.square()
        self.dtype = hessian.working_dtype
        # Without a count, so that those of several chunks are one.
        self.note = "float64 for all rows" if self.dtype == torch.float64 else ""
        self.start_error_R, residuals = self._best_start()
        self.weight_RD, self.best, self.iterations_R = self._corrected(residuals, self._start, ALL)
        self._keep_better_start()
        self.status_R = torch.full_like(self.iterations_R, Status.CONVERGED, dtype=torch.int8)
        self.active = (~(self.best.gap_R <= gap)).nonzero()[:, 0]

    def _best_start(self) -> tuple[Tensor, Residuals]:
        """Decide row by row between the masked target and the given start; the error and residual of the better one."""
        self.warm_R1: Tensor | None = None
        residual_RD, error_R = self._residual(self._start())
        self.mask_error_R = error_R * self.unit_R
        if self.problem.start_RD is not None:
            given_RD, given_R = self._residual(self.problem.start_RD)
            self.warm_R1 = (given_R < error_R)[:, None]
            residual_RD = torch.where(self.warm_R1, given_RD, residual_RD)
            error_R = torch.minimum(given_R, error_R)
        return error_R * self.unit_R, Residuals(residual_RD, self.verifier.mask_RD, error_R)

    def _start(self) -> Tensor:
        """The weights to start from: made again when needed, which costs less than to hold them."""
        masked_RD, *given = self._starts(ALL)
        return masked_RD if self.warm_R1 is None else torch.where(self.warm_R1, given[0], masked_RD)

    def _starts(self, rows: slice | Tensor) -> list[Tensor]:
        """The masked target, and the start that was given if there is one."""
        problem = self.problem
        masked_RD = problem.target_RD[rows] * self.verifier.mask_RD[rows].to(problem.target_RD.dtype)
        return [masked_RD] if problem.start_RD is None else [masked_RD, problem.start_RD[rows]]

    def _residual(self, weight_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The residual on keep and the error of these weights, in solvers' units and the working precision."""
        scale_R1 = self.verifier.scale_R.to(self.dtype)[:, None]
        difference_RD = (self.problem.target_RD - weight_RD).to(self.dtype).div_(scale_R1)
        residual_RD = self.hessian.operator(self.dtype)(difference_RD)
        error_R = 0.5 * torch.linalg.vecdot(difference_RD, residual_RD).double().clamp_min(0.0)
        return residual_RD.mul_(self.verifier.mask_RD), error_R

    def _keep_better_start(self) -> None:
        """Rows that hardly gained: compare with both starts in float64, so that no row ever gets worse."""
        doubtful = (~(self.best.error_R < CLOSE * self.start_error_R)).nonzero()[:, 0]
        for start_AD in self._starts(doubtful) if len(doubtful) else []:
            start = self.verifier(start_AD, doubtful)
            worse = self.best.error_R[doubtful] > start.error_R
            self._replace(doubtful[worse], start_AD[worse], start.rows(worse))

    def _replace(self, rows: Tensor, weight_AD: Tensor, certificate: Certificate) -> None:
        self.weight_RD[rows] = weight_AD
        for ours, theirs in zip(self.best, certificate, strict=True):
            ours[rows] = theirs

    def next(self) -> None:
        """Another round for the active rows, from residuals known to float64."""
        active, before = self.active, self.best.rows(self.active)
        mask_AD = self.verifier.mask_RD[active].to(self.dtype)
        error_A = before.error_R / self.unit_R[active]
        residuals = Residuals(before.residual_RD.to(self.dtype), mask_AD, error_A, repeated=True)
        candidate_AD, found, iterations_A = self._corrected(residuals, lambda: self.weight_RD[active], active)
        self.iterations_R[active] += iterations_A
        stalled_A = ~(found.bound_R <= STAGNATION * before.bound_R)
        noise_A = ROUNDING * self.verifier.energy_R[active]
        better_A = (found.error_R <= before.error_R + noise_A) & (found.gap_R <= before.gap_R)
        self._replace(active[better_A], candidate_AD[better_A], found.rows(better_A))
        open_A = ~(self.best.gap_R[active] <= self.gap)
        if self.dtype == torch.float64:
            self.status_R[active[open_A & stalled_A]] = Status.STAGNATED
            open_A &= ~stalled_A
        self.active = active[open_A]
        if self.dtype == torch.float32 and bool((open_A & stalled_A).any()):
            self.dtype, self.note = torch.float64, "float64 for some rows"

    def solution(self) -> RowSolution:
        """The best of every row, and what became of it."""
        self.status_R[self.active] = Status.ITERATION_LIMIT
        best = self.best
        facts = best.error_R, best.gap_R, self.status_R, self.iterations_R, self.mask_error_R
        return RowSolution(self.weight_RD, *facts, note=self.note)

    def _corrected(
        self, residuals: Residuals, weight: Callable[[], Tensor], rows: slice | Tensor
    ) -> tuple[Tensor, Certificate, Tensor]:
        """One round from ``weight()``: the new weights, their certificate, and the iterations that they took."""
        correction = self.inner(residuals)
        del residuals
        new_AD = self._apply(correction.step_RD, weight(), rows)
        iterations_A = correction.iterations_R
        del correction
        return new_AD, self.verifier(new_AD, rows), iterations_A

    def _apply(self, step_AD: Tensor, weight_AD: Tensor, rows: slice | Tensor) -> Tensor:
        """The corrected weight in its own dtype, zero off the mask; a correction that is not finite is not taken."""
        scale_A1 = self.verifier.scale_R[rows, None].to(weight_AD.dtype)
        step_AD = step_AD.to(weight_AD.dtype)
        # Whatever a solver returns: the certificate speaks of weights on the mask.
        new_AD = torch.addcmul(weight_AD, step_AD, scale_A1).mul_(self.verifier.mask_RD[rows])
        finite_A = new_AD.sum(dim=1).isfinite()
        return new_AD if bool(finite_A.all()) else torch.where(finite_A[:, None], new_AD, weight_AD)
