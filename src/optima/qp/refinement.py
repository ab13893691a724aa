"""Iterative refinement: a fast inner solve, restarted from float64 residuals until every row is certified.

The inner solver is given residuals and returns corrections; what decides convergence is the certificate, computed from
scratch (Wilkinson's scheme; see Higham, Accuracy and Stability of Numerical Algorithms, ch. 12). Only the first residual
is taken in the working precision: an error in it costs another round, never a wrong answer. Rows that stall in float32
go on in float64.

Shapes: R rows, D inputs, A rows still active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optima.qp.certificate import Certificate, certify, energy, weight_scale
from optima.qp.hessian import Hessian
from optima.qp.problem import RowProblem, RowSolution, Status

MAX_ROUNDS = 10
# A round that does not shrink the bound by this factor has hit its precision.
STAGNATION = 0.5
# A row that gained less than this over its start is compared with it in float64.
CLOSE = 0.99


@dataclass(frozen=True)
class Residuals:
    """Where an inner solver starts, in units of H's mean diagonal and of each row's own ``weight_scale``.

    Attributes:
        residual_RD: negative gradient on the kept weights, zero elsewhere, in the precision to work in.
        keep_RD: the mask, boolean.
        error_R: E at this point, float64, relative to the row's energy.
    """

    residual_RD: Tensor
    keep_RD: Tensor
    error_R: Tensor


@dataclass(frozen=True)
class Correction:
    """An inner solver's answer, in the same units.

    Attributes:
        step_RD: add it to the weight; zero off keep.
        iterations_R: iterations spent, int32.
        extension_RD: residual to assume off keep in the certificate, zero on keep; None for zero.
    """

    step_RD: Tensor
    iterations_R: Tensor
    extension_RD: Tensor | None = None


class Inner(Protocol):
    """Approximately solves H_SS step_S = residual_S for each row, in the residuals' dtype."""

    def __call__(self, residuals: Residuals) -> Correction:
        """One round of work."""
        ...


def refine(hessian: Hessian, problem: RowProblem, inner: Inner, gap: float) -> RowSolution:
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
        self.scale_R = weight_scale(hessian, energy(hessian, problem))
        self.energy_R = hessian.mean_diagonal * self.scale_R.square()
        self.dtype = hessian.working_dtype
        self.float64_rows = len(self.scale_R) if self.dtype == torch.float64 else 0

    def first(self, inner: Inner) -> None:
        """From the start, of which the residual is known to working precision only."""
        start_RD, residuals = best_start(self.hessian, self.problem, self.scale_R, self.dtype)
        error_R = residuals.error_R * self.energy_R
        correction = inner(residuals)
        del residuals
        self.iterations_R = correction.iterations_R
        self.weight_RD = _add(start_RD, correction.step_RD, self.scale_R)
        self.certificate = certify(self.hessian, self.problem, self.weight_RD, correction.extension_RD)
        self._keep_better_start(start_RD, error_R)
        self.status_R = torch.full_like(self.iterations_R, Status.CONVERGED, dtype=torch.int8)
        self.active = (self.certificate.gap_R > self.gap).nonzero()[:, 0]

    def _keep_better_start(self, start_RD: Tensor, error_R: Tensor) -> None:
        """Rows that hardly gained: compare with their start in float64, so that no row ever gets worse."""
        moved_R = self.iterations_R > 0
        doubtful = (moved_R & ~(self.certificate.error_R < CLOSE * error_R)).nonzero()[:, 0]
        if not len(doubtful):
            return
        start = certify(self.hessian, self.problem.rows(doubtful), start_RD[doubtful])
        worse = self.certificate.error_R[doubtful] > start.error_R
        self._replace(doubtful[worse], start_RD[doubtful[worse]], start.rows(worse))

    def _replace(self, rows: Tensor, weight_AD: Tensor, certificate: Certificate) -> None:
        self.weight_RD[rows] = weight_AD
        for name in ("error_R", "bound_R", "gap_R", "residual_RD"):
            getattr(self.certificate, name)[rows] = getattr(certificate, name)

    def next(self, inner: Inner) -> None:
        """Another round for the active rows, from their float64 residuals."""
        active, best = self.active, self.certificate
        rows, scale_A = self.problem.rows(active), self.scale_R[active]
        unit_A = self.hessian.mean_diagonal * scale_A
        residual_AD = (best.residual_RD[active] / unit_A[:, None]).to(self.dtype)
        correction = inner(Residuals(residual_AD, rows.keep_RD, best.error_R[active] / self.energy_R[active]))
        self.iterations_R[active] += correction.iterations_R
        candidate_AD = _add(self.weight_RD[active], correction.step_RD, scale_A)
        found = certify(self.hessian, rows, candidate_AD, correction.extension_RD)
        stalled_A = ~(found.bound_R <= STAGNATION * best.bound_R[active])
        better_A = (found.error_R <= best.error_R[active]) & (found.gap_R <= best.gap_R[active])
        self._replace(active[better_A], candidate_AD[better_A], found.rows(better_A))
        open_A = best.gap_R[active] > self.gap
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
        certificate = self.certificate
        note = f"float64 for {self.float64_rows} rows" if self.float64_rows else ""
        return RowSolution(
            self.weight_RD, certificate.error_R, certificate.gap_R, self.status_R, self.iterations_R, note=note
        )


def best_start(
    hessian: Hessian, problem: RowProblem, scale_R: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Residuals]:
    """Row by row, the better of the masked target and the given start, with its residual in precision ``dtype``."""
    masked_RD = problem.clamp(problem.target_RD)
    residuals = _residuals(hessian, problem, masked_RD, scale_R, dtype)
    if problem.start_RD is None:
        return masked_RD, residuals
    other = _residuals(hessian, problem, problem.start_RD, scale_R, dtype)
    warm_R = other.error_R < residuals.error_R
    start_RD = torch.where(warm_R[:, None], problem.start_RD, masked_RD)
    residual_RD = torch.where(warm_R[:, None], other.residual_RD, residuals.residual_RD)
    return start_RD, Residuals(residual_RD, problem.keep_RD, torch.minimum(other.error_R, residuals.error_R))


def _residuals(
    hessian: Hessian, problem: RowProblem, weight_RD: Tensor, scale_R: Tensor, dtype: torch.dtype
) -> Residuals:
    difference_RD = (problem.target_RD - weight_RD).to(dtype).div_(scale_R.to(dtype)[:, None])
    residual_RD = hessian.operator(dtype)(difference_RD)
    error_R = 0.5 * torch.linalg.vecdot(difference_RD, residual_RD).double().clamp_min(0.0)
    return Residuals(residual_RD.mul_(problem.keep_RD.to(dtype)), problem.keep_RD, error_R)


def _add(weight_RD: Tensor, step_RD: Tensor, scale_R: Tensor) -> Tensor:
    """weight + scale * step, rounded once to the weight's dtype; a step that is not finite is not taken."""
    sum_RD = step_RD.double().mul_(scale_R[:, None]).add_(weight_RD).to(weight_RD.dtype)
    finite_R = torch.linalg.vecdot(sum_RD, sum_RD).isfinite()
    return sum_RD if bool(finite_R.all()) else torch.where(finite_R[:, None], sum_RD, weight_RD)
