"""Iterative refinement: a fast inner solve in low precision, restarted from float64 residuals until certified.

The inner solver is given a residual and returns a correction; what decides convergence is the certificate, computed
here from scratch (Wilkinson's scheme; see Higham, Accuracy and Stability of Numerical Algorithms, ch. 12).

Shapes: R rows, D inputs, A rows still active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optima.qp.certificate import Certificate, certify
from optima.qp.hessian import Hessian
from optima.qp.problem import RowProblem, RowSolution, Status

MAX_ROUNDS = 8
# A round that does not shrink the bound by this factor has hit the working precision.
STAGNATION = 0.5


@dataclass(frozen=True)
class Correction:
    """An inner solver's answer: add it to the weight."""

    step_RD: Tensor
    iterations_R: Tensor


class Inner(Protocol):
    """Approximately solves H_SS step_S = residual_S for each row."""

    def __call__(self, residual_RD: Tensor, keep_RD: Tensor, error_R: Tensor) -> Correction:
        """``error_R`` is E at the point of the residual, which turns a bound into a relative gap."""
        ...


def refine(hessian: Hessian, problem: RowProblem, inner: Inner, gap: float) -> RowSolution:
    """Alternate ``inner`` and the certificate until every row's certified gap is at most ``gap`` or stalls."""
    weight_RD, certificate = best_start(hessian, problem)
    best = certificate
    iterations_R = torch.zeros_like(best.error_R, dtype=torch.int32)
    status_R = torch.full_like(iterations_R, Status.CONVERGED, dtype=torch.int8)
    active = (best.gap_R > gap).nonzero()[:, 0]
    for _ in range(MAX_ROUNDS):
        if not active.numel():
            break
        rows = problem.rows(active)
        correction = inner(certificate.residual_RD, rows.keep_RD, certificate.error_R)
        iterations_R[active] += correction.iterations_R
        candidate_AD = weight_RD[active] + correction.step_RD.to(weight_RD.dtype)
        candidate_AD = torch.where(candidate_AD.isfinite(), candidate_AD, weight_RD[active])
        certificate = certify(hessian, rows, candidate_AD)
        better_A = certificate.error_R <= best.error_R[active]
        stalled_A = certificate.bound_R > STAGNATION * best.bound_R[active]
        improved = active[better_A]
        weight_RD[improved] = candidate_AD[better_A]
        best.error_R[improved] = certificate.error_R[better_A]
        best.bound_R[improved] = certificate.bound_R[better_A]
        best.gap_R[improved] = certificate.gap_R[better_A]
        open_A = best.gap_R[active] > gap
        status_R[active[open_A & stalled_A]] = Status.STAGNATED
        again_A = open_A & ~stalled_A
        active = active[again_A]
        certificate = _rows(certificate, again_A)
    status_R[active] = Status.ITERATION_LIMIT
    return RowSolution(weight_RD, best.error_R, best.gap_R, status_R, iterations_R)


def best_start(hessian: Hessian, problem: RowProblem) -> tuple[Tensor, Certificate]:
    """Row by row, the better of the masked target and the given start, with its certificate."""
    masked_RD = problem.clamp(problem.target_RD)
    certificate = certify(hessian, problem, masked_RD)
    if problem.start_RD is None:
        return masked_RD, certificate
    other = certify(hessian, problem, problem.start_RD)
    warm_R = other.error_R < certificate.error_R
    pairs = zip(_fields(other), _fields(certificate), strict=True)
    chosen = [torch.where(warm_R.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs]
    return torch.where(warm_R[:, None], problem.start_RD, masked_RD), Certificate(*chosen)


def _fields(certificate: Certificate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return certificate.error_R, certificate.bound_R, certificate.gap_R, certificate.residual_RD


def _rows(certificate: Certificate, index: Tensor) -> Certificate:
    return Certificate(*(tensor[index] for tensor in _fields(certificate)))
