"""Conjugate gradient with the diagonal preconditioner, as in ALPS (Meng et al., NeurIPS 2024, sec. 3.3), batched.

Everything but the preconditioner follows optima's own solver: the same float32 products over all rows at once, rows
that are done leave the batch, restarts from float64 residuals. Two stopping rules, both better than a fixed count:

* certified: now and then one more product r K gives the bound 1/2 r^T K r that ours with the shared inverse gets for
  free (K may be rounded, as in ours); the last word is ``optima.core.certify``. It begins with a float64 certificate of
  all rows and makes the inverse, of which low-rank CG needs neither: what that costs counts as the peer's.
* oracle: a trial run that knows the optimum counts the iterations each row needs, and the timed run does just those,
  with no check and no certificate. No real run can do this; it bounds what any stopping rule could achieve.

Shapes: R rows, D inputs, A rows still open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from harness.products import Packed
from torch import Tensor

from optima.core import Hessian, RowProblem, certify
from optima.core.cg import AIM

# As in optima's solver: rows leave when at most this share of the batch is open.
COMPACT = 0.8
MAX_ITERATIONS = 2000
MAX_ROUNDS = 6
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class PeerSolution:
    """Weight (zero off keep); iterations per row and certified gaps if the method has them."""

    weight_RD: Tensor
    iterations_R: Tensor | None = None
    gap_R: Tensor | None = None


def certified(hessian: Hessian, problem: RowProblem, gap: float, check_dtype: torch.dtype) -> PeerSolution:
    """Stop every row on its certified gap; factorising H for the certificate is part of the method."""
    check = Packed(hessian.inverse_DD, check_dtype)
    weight_RD = problem.target_RD.masked_fill(~problem.keep_RD, 0.0)
    iterations_R = torch.zeros(len(weight_RD), dtype=torch.int32, device=weight_RD.device)
    gap_R = torch.full_like(iterations_R, torch.inf, dtype=torch.float64)
    rows = torch.arange(len(weight_RD), device=weight_RD.device)
    for _ in range(MAX_ROUNDS + 1):
        part = problem.rows(rows)
        certificate = certify(hessian, part, weight_RD[rows])
        gap_R[rows] = certificate.gap_R
        open_ = certificate.gap_R > gap
        rows = rows[open_]
        if not len(rows):
            break
        rule = _CertifiedRule(check, AIM * gap)
        error_A, residual_AD = certificate.error_R[open_], certificate.residual_RD[open_]
        step_AD, count_A = _iterate(hessian, residual_AD, part.keep_RD[open_], error_A, rule)
        weight_RD[rows] += step_AD.to(weight_RD.dtype)
        iterations_R[rows] += count_A
    return PeerSolution(weight_RD, iterations_R, gap_R)


def trial_run(hessian: Hessian, problem: RowProblem, optimum_RD: Tensor, gaps: list[float]) -> dict[float, Tensor]:
    """Iterations that each row needs to come within each of ``gaps`` of its optimum (untimed)."""
    weight_RD, residual_RD, error_R = _start(hessian, problem)
    difference_RD = problem.target_RD.double() - optimum_RD.double()
    optimal_R = 0.5 * torch.linalg.vecdot(difference_RD @ hessian.damped_DD, difference_RD)
    rule = _RehearsalRule(optimum_RD.double() - weight_RD.double(), optimal_R, gaps, _magnitude(residual_RD))
    _iterate(hessian, residual_RD, problem.keep_RD, error_R, rule)
    return rule.needed


def oracle(hessian: Hessian, problem: RowProblem, needed_R: Tensor) -> PeerSolution:
    """Run each row for exactly ``needed_R`` iterations."""
    weight_RD, residual_RD, error_R = _start(hessian, problem)
    step_RD, count_R = _iterate(hessian, residual_RD, problem.keep_RD, error_R, _CountRule(needed_R))
    return PeerSolution(weight_RD + step_RD.to(weight_RD.dtype), count_R)


def _start(hessian: Hessian, problem: RowProblem) -> tuple[Tensor, Tensor, Tensor]:
    weight_RD = problem.target_RD.masked_fill(~problem.keep_RD, 0.0)
    difference_RD = problem.target_RD.double() - weight_RD.double()
    gradient_RD = difference_RD @ hessian.damped_DD
    error_R = 0.5 * torch.linalg.vecdot(difference_RD, gradient_RD)
    return weight_RD, gradient_RD.masked_fill_(~problem.keep_RD, 0.0), error_R


def _magnitude(residual_RD: Tensor) -> Tensor:
    return residual_RD.abs().amax(dim=1).clamp_min(torch.finfo(torch.float64).tiny)


class _Rule(Protocol):
    """Decides which rows of the batch go on; None where it has nothing to say in this iteration."""

    def open(self, iteration: int, rows: Tensor, residual: Tensor, step: Tensor, error: Tensor) -> Tensor | None: ...


class _CertifiedRule:
    """Checks at intervals of an eighth of the iterations so far: about 12 % for the checks, 6 % past the mark."""

    def __init__(self, check: Packed, tolerance: float) -> None:
        self.check, self.tolerance, self.next_check = check, tolerance, 4

    def open(self, iteration: int, rows: Tensor, residual: Tensor, step: Tensor, error: Tensor) -> Tensor | None:
        if iteration < self.next_check:
            return None
        self.next_check = iteration + max(4, iteration // 8)
        bound = 0.5 * torch.linalg.vecdot(residual, self.check(residual)).double()
        return bound > self.tolerance * (error - bound).clamp_min(0.0)


class _CountRule:
    """Knows each row's count beforehand."""

    def __init__(self, needed_R: Tensor) -> None:
        self.needed_R = needed_R

    def open(self, iteration: int, rows: Tensor, residual: Tensor, step: Tensor, error: Tensor) -> Tensor | None:
        return self.needed_R[rows] > iteration


class _RehearsalRule:
    """Counts: the excess of a row is 1/2 (optimum - v)^T r, accurate to the end, unlike a difference of errors."""

    def __init__(self, way_RD: Tensor, optimal_R: Tensor, gaps: list[float], magnitude_R: Tensor) -> None:
        self.way_RD = (way_RD / magnitude_R[:, None]).float()
        self.optimal_R = optimal_R / magnitude_R.square()
        self.needed = {gap: torch.full_like(optimal_R, MAX_ITERATIONS, dtype=torch.int64) for gap in gaps}

    def open(self, iteration: int, rows: Tensor, residual: Tensor, step: Tensor, error: Tensor) -> Tensor | None:
        excess = 0.5 * torch.linalg.vecdot(self.way_RD[rows] - step, residual).double()
        for gap, needed_R in self.needed.items():
            reached = rows[excess <= gap * self.optimal_R[rows]]
            needed_R[reached] = needed_R[reached].clamp_max(iteration)
        return excess > min(self.needed) * self.optimal_R[rows]


def _iterate(
    hessian: Hessian, residual_RD: Tensor, keep_RD: Tensor, error_R: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor]:
    """CG on all rows until ``rule`` has closed each; returns the steps (float64) and each row's iterations."""
    operator = Packed(hessian.damped_DD, torch.float32)
    inverse_diagonal_D = 1.0 / hessian.damped_DD.diagonal().float()
    magnitude_R = _magnitude(residual_RD)
    residual, error = (residual_RD / magnitude_R[:, None]).float(), error_R / magnitude_R.square()
    keep, rows = keep_RD.float(), torch.arange(len(residual), device=residual.device)
    step, all_steps = torch.zeros_like(residual), torch.zeros_like(residual)
    count_R = torch.zeros(len(residual), dtype=torch.int32, device=residual.device)
    preconditioned = residual * inverse_diagonal_D
    direction = preconditioned.clone()
    slope = torch.linalg.vecdot(residual, preconditioned)
    for iteration in range(MAX_ITERATIONS):
        open_ = rule.open(iteration, rows, residual, step, error)
        if open_ is not None:
            going = int(open_.sum())
            if going == 0:
                break
            if going <= COMPACT * len(rows):
                all_steps[rows[~open_]] = step[~open_]
                rows, error, slope = rows[open_], error[open_], slope[open_]
                residual, keep, step, direction = residual[open_], keep[open_], step[open_], direction[open_]
        image = operator(direction)
        alpha = slope / torch.linalg.vecdot(direction, image).clamp_min(TINY)
        step.addcmul_(direction, alpha[:, None])
        residual.addcmul_(image.mul_(keep), alpha[:, None], value=-1.0)
        error = error - 0.5 * (alpha * slope).double()
        count_R[rows] += 1
        preconditioned = torch.mul(residual, inverse_diagonal_D, out=image)
        new_slope = torch.linalg.vecdot(residual, preconditioned)
        direction.mul_((new_slope / slope.clamp_min(TINY))[:, None]).add_(preconditioned)
        slope = new_slope
    all_steps[rows] = step
    return all_steps.double() * magnitude_R[:, None], count_R
