"""Iterative refinement: a fast inner solve, restarted from float64 residuals until every row is certified.

The inner solver is given residuals and returns corrections; what decides convergence is the certificate, computed from
scratch (Wilkinson's scheme; see Higham, Accuracy and Stability of Numerical Algorithms, ch. 12). Only the first
residual is taken in the working precision: an error in it costs another round, never a wrong answer. Rows that stall in
float32 go on in float64.

Shapes: R rows, D inputs, A rows still active.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.qp.certificate import Certificate, Verifier
from optima.qp.problem import RowProblem, RowSolution, Status

MAX_ROUNDS = 10
# A round that does not shrink the bound by this factor has hit its precision.
STAGNATION = 0.5
# A row that gained less than this over its start is compared with it in float64.
CLOSE = 0.99
# What float64 leaves of E, relative to the row's energy.
ROUNDING = 1e-13
ALL = slice(None)


@dataclass(frozen=True)
class Residuals:
    """Where an inner solver starts, in the units of ``certificate.Verifier``.

    Attributes:
        residual_RD: negative gradient on the kept weights, zero elsewhere, in the precision to work in.
        mask_RD: the mask as 0 and 1 of the same dtype.
        error_R: E at this point, float64, relative to the row's energy.
        weight_RD: this point; None if the problem has no bounds, and then it does not matter.
        lower_RD: lower bounds, 0 where pruned, -inf where there is none; None with ``weight_RD``.
        upper_RD: upper bounds likewise.
        repeated: True from the second round on, where what was fast has not been enough.
    """

    residual_RD: Tensor
    mask_RD: Tensor
    error_R: Tensor
    weight_RD: Tensor | None = None
    lower_RD: Tensor | None = None
    upper_RD: Tensor | None = None
    repeated: bool = False

    def box(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, lower and upper bounds. Without bounds, weights count from this point, which is then 0."""
        if self.weight_RD is not None and self.lower_RD is not None and self.upper_RD is not None:
            return self.weight_RD, self.lower_RD, self.upper_RD
        infinite_RD = torch.where(self.mask_RD > 0, torch.inf, 0.0).to(self.mask_RD)
        return torch.zeros_like(self.mask_RD), -infinite_RD, infinite_RD


@dataclass(frozen=True)
class Correction:
    """An inner solver's answer, in the same units.

    Attributes:
        step_RD: add it to the weight; zero off keep. Of a bounded problem, the new weight itself, so that weights on
            their bounds are there exactly.
        iterations_R: iterations spent, int32.
        extension_RD: residual to assume off keep in the certificate, zero on keep; None for zero.
    """

    step_RD: Tensor
    iterations_R: Tensor
    extension_RD: Tensor | None = None

    def usable_extension(self, dtype: torch.dtype) -> Tensor | None:
        """The extension in ``dtype``, zero in rows where it is not finite: any is valid, but not NaN."""
        if self.extension_RD is None:
            return None
        extension_RD = self.extension_RD.to(dtype)
        finite_R = extension_RD.sum(dim=1).isfinite()
        return extension_RD if bool(finite_R.all()) else torch.where(finite_R[:, None], extension_RD, 0.0)


class Inner(Protocol):
    """Approximately solves H_SS step_S = residual_S for each row, in the residuals' dtype."""

    def __call__(self, residuals: Residuals) -> Correction:
        """One round of work."""
        ...


def solve_with_restarts(hessian: Hessian, problem: RowProblem, inner: Inner, gap: float) -> RowSolution:
    """Alternate ``inner`` and the certificate until every row's certified gap is at most ``gap`` or stalls."""
    rounds = _Rounds(hessian, problem, gap)
    rounds.first(inner)
    for _ in range(MAX_ROUNDS):
        if not len(rounds.active):
            break
        rounds.next(inner)
    return rounds.solution()


class _Rounds:
    """The best weight of every row so far, its certificate, and which rows go on."""

    def __init__(self, hessian: Hessian, problem: RowProblem, gap: float) -> None:
        self.hessian, self.problem, self.gap = hessian, problem, gap
        self.verifier = Verifier(hessian, problem)
        self.dtype = hessian.working_dtype
        self.float64_rows = len(problem.keep_RD) if self.dtype == torch.float64 else 0

    def first(self, inner: Inner) -> None:
        """From the start, of which the residual is known to working precision only."""
        residuals = self._best_start()
        start_error_R = residuals.error_R * self.energy_unit
        correction = inner(self._with_bounds(residuals, self._start(), ALL))
        del residuals
        self.iterations_R = correction.iterations_R
        self.weight_RD = self._apply(correction, self._start(), ALL)
        extension_RD = correction.usable_extension(self.dtype)
        del correction
        self.best = self.verifier(self.weight_RD, extension_RD)
        del extension_RD
        self._keep_better_start(start_error_R)
        self.status_R = torch.full_like(self.iterations_R, Status.CONVERGED, dtype=torch.int8)
        self.active = (~(self.best.gap_R <= self.gap)).nonzero()[:, 0]

    @property
    def energy_unit(self) -> Tensor:
        """Errors in solvers' units times this are errors."""
        return self.hessian.mean_diagonal * self.verifier.scale_R.square()

    def _best_start(self) -> Residuals:
        """Decide row by row between the masked target and the given start; the residual of the better one."""
        self.warm_R: Tensor | None = None
        residuals = self._residuals(self._start())
        if self.problem.start_RD is None:
            return residuals
        other = self._residuals(self.problem.start_RD)
        self.warm_R = other.error_R < residuals.error_R
        residual_RD = torch.where(self.warm_R[:, None], other.residual_RD, residuals.residual_RD)
        error_R = torch.where(self.warm_R, other.error_R, residuals.error_R)
        return Residuals(residual_RD, self.verifier.mask_RD, error_R)

    def _start(self, rows: slice | Tensor = ALL) -> Tensor:
        """The weights that these rows start from: made again when needed, which costs less than to hold them."""
        masked_RD, *given = self._starts(rows)
        if not given or self.warm_R is None:
            return masked_RD
        return torch.where(self.warm_R[rows, None], given[0], masked_RD)

    def _starts(self, rows: slice | Tensor) -> list[Tensor]:
        """The masked target, and the start that was given if there is one."""
        problem = self.problem
        masked_RD = problem.target_RD[rows] * self.verifier.mask_RD[rows].to(problem.target_RD.dtype)
        if problem.bounded:
            masked_RD = problem.rows(rows).clamp(masked_RD)
        return [masked_RD] if problem.start_RD is None else [masked_RD, problem.start_RD[rows]]

    def _residuals(self, weight_RD: Tensor) -> Residuals:
        scale_R1 = self.verifier.scale_R.to(self.dtype)[:, None]
        difference_RD = (self.problem.target_RD - weight_RD).to(self.dtype).div_(scale_R1)
        residual_RD = self.hessian.operator(self.dtype)(difference_RD)
        error_R = 0.5 * torch.linalg.vecdot(difference_RD, residual_RD).double().clamp_min(0.0)
        return Residuals(residual_RD.mul_(self.verifier.mask_RD), self.verifier.mask_RD, error_R)

    def _keep_better_start(self, start_error_R: Tensor) -> None:
        """Rows that hardly gained: compare with both starts in float64, so that no row ever gets worse."""
        gained_R = self.best.error_R < CLOSE * start_error_R
        doubtful = (~gained_R).nonzero()[:, 0]
        for start_AD in self._starts(doubtful) if len(doubtful) else []:
            start = self.verifier(start_AD, rows=doubtful)
            worse = self.best.error_R[doubtful] > start.error_R
            self._replace(doubtful[worse], start_AD[worse], start.rows(worse))

    def _replace(self, rows: Tensor, weight_AD: Tensor, certificate: Certificate) -> None:
        self.weight_RD[rows] = weight_AD
        for name in ("error_R", "bound_R", "gap_R", "residual_RD"):
            getattr(self.best, name)[rows] = getattr(certificate, name)

    def next(self, inner: Inner) -> None:
        """Another round for the active rows, from residuals known to float64."""
        active, best = self.active, self.best
        error_A = best.error_R[active] / self.energy_unit[active]
        mask_AD = self.verifier.mask_RD[active].to(self.dtype)
        residuals = Residuals(best.residual_RD[active].to(self.dtype), mask_AD, error_A, repeated=True)
        correction = inner(self._with_bounds(residuals, self.weight_RD[active], active))
        self.iterations_R[active] += correction.iterations_R
        candidate_AD = self._apply(correction, self.weight_RD[active], active)
        found = self.verifier(candidate_AD, correction.usable_extension(self.dtype), active)
        stalled_A = ~(found.bound_R <= STAGNATION * best.bound_R[active])
        noise_A = ROUNDING * self.verifier.energy_R[active]
        better_A = (found.error_R <= best.error_R[active] + noise_A) & (found.gap_R <= best.gap_R[active])
        self._replace(active[better_A], candidate_AD[better_A], found.rows(better_A))
        open_A = ~(best.gap_R[active] <= self.gap)
        if self.dtype == torch.float64:
            self.status_R[active[open_A & stalled_A]] = Status.STAGNATED
            open_A &= ~stalled_A
        self.active = active[open_A]
        if self.dtype == torch.float32 and bool((open_A & stalled_A).any()):
            self.dtype = torch.float64
            self.float64_rows = len(self.active)

    def solution(self) -> RowSolution:
        """The best of every row, and what became of it."""
        self.status_R[self.active] = Status.ITERATION_LIMIT
        note = f"float64 for {self.float64_rows} rows" if self.float64_rows else ""
        return RowSolution(
            self.weight_RD, self.best.error_R, self.best.gap_R, self.status_R, self.iterations_R, note=note
        )

    def _with_bounds(self, residuals: Residuals, weight_AD: Tensor, rows: slice | Tensor) -> Residuals:
        """``residuals`` at ``weight_AD`` with what a solver needs to stay within the bounds, in its units."""
        if not self.problem.bounded:
            return residuals
        problem, scale_A1 = self.problem.rows(rows), self.verifier.scale_R[rows, None].to(weight_AD.dtype)
        infinite_AD = torch.where(problem.keep_RD, torch.inf, 0.0).to(weight_AD.dtype)
        lower_AD = -infinite_AD if problem.lower_RD is None else problem.lower_RD / scale_A1
        upper_AD = infinite_AD if problem.upper_RD is None else problem.upper_RD / scale_A1
        dtype = residuals.residual_RD.dtype
        return replace(
            residuals,
            weight_RD=(weight_AD / scale_A1).to(dtype),
            lower_RD=lower_AD.to(dtype),
            upper_RD=upper_AD.to(dtype),
        )

    def _apply(self, correction: Correction, weight_AD: Tensor, rows: slice | Tensor) -> Tensor:
        """The corrected weight in its own dtype; a correction that is not finite is not taken."""
        scale_A1 = self.verifier.scale_R[rows, None].to(weight_AD.dtype)
        change_AD = correction.step_RD.to(weight_AD.dtype)
        if self.problem.bounded:
            new_AD = self.problem.rows(rows).clamp(change_AD * scale_A1)
        else:
            new_AD = torch.addcmul(weight_AD, change_AD, scale_A1)
        finite_A = new_AD.sum(dim=1).isfinite()
        return new_AD if bool(finite_A.all()) else torch.where(finite_A[:, None], new_AD, weight_AD)
