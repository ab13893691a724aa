"""Bounds on the kept weights: conjugate gradients on faces, joined by projected gradients, for all rows at once.

After GPCG (More and Toraldo, SIAM J. Optim. 1, 1991) and MPRGP with preconditioning in face (Dostal, Domoradova and
Sadowska, Comput. Optim. Appl. 48, 2011). The free set F of a row holds its kept weights strictly between their bounds.
An iteration moves a row along one direction, to the minimum of E on the feasible part of the ray:

* on a face: conjugate gradient on F, preconditioned by K_FF. The shared inverse preconditions *every* face (K_FF is at
  least H_FF^-1, whatever F), so nothing is factorised again when F changes, and a face takes a handful of iterations.
* projection: where that ran into a bound, the rest of it, projected on the feasible set: binds many weights at once.
* gradient: P(v + step D^-1 r) - v with D = diag(H) and step at most 1 / lambda_max(D^-1/2 H D^-1/2): releases bound
  weights whose multiplier has the wrong sign, when those outweigh the free gradient.

No step raises E, and a gradient step contracts E - E* by 1 - lambda_min / lambda_max of the scaled H. It is taken at
the latest after ``LONGEST_RUN`` changes of face, and a run on one face is conjugate gradient, which converges to the
face's minimum, where a gradient step is due unless that is the solution. So every row converges (docs/mathematics.md).

Shapes: R rows in the batch, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optima.linalg.directions import fixed_directions
from optima.linalg.hessian import Hessian
from optima.linalg.products import SharedMatrix
from optima.qp.batch import RowBatch, unfinished
from optima.qp.problem import RowProblem, RowSolution, concatenate
from optima.qp.restarts import Correction, Residuals, solve_with_restarts

MAX_ITERATIONS = 300
# Changes of face between two gradient steps.
LONGEST_RUN = 4
# Bounds take buffers (weight, lower, upper, slack ...): rows are solved in so many pieces that all of them fit what the
# other solvers need for all rows at once. Smaller pieces than this many entries (rows x inputs) would save nothing.
PIECES, SMALLEST_PIECE = 3, 2**15
# Of the extreme eigenvalues. Power iteration approaches the largest one from below.
POWER_ITERATIONS, MARGIN = 30, 1.2


@dataclass(frozen=True)
class Bounded:
    """Solve rows with bounds to a certified relative gap; rows without bounds are a special case.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: between two restarts.
    """

    gap: float = 1e-4
    max_iterations: int = MAX_ITERATIONS

    name = "bounded"
    supports_bounds = True

    def solve(self, hessian: Hessian, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            batch = _Batch(hessian, residuals)
            (weight_RD,) = batch.run(residuals.aim(self.gap), self.max_iterations)
            return Correction(weight_RD, batch.iterations_R)

        lower_RD, upper_RD = problem.box()
        problem = replace(problem, lower_RD=lower_RD, upper_RD=upper_RD)
        rows, num_inputs = problem.keep_RD.shape
        size = max(-(-rows // PIECES), SMALLEST_PIECE // max(num_inputs, 1), 1)
        pieces = [slice(begin, begin + size) for begin in range(0, max(rows, 1), size)]
        return concatenate([solve_with_restarts(hessian, problem.rows(piece), inner, self.gap) for piece in pieces])


def split(weight: Tensor, lower: Tensor, upper: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The mask (0 and 1) of weights strictly inside their bounds, and the residual of the others that pushes inside."""
    at_lower, at_upper = weight <= lower, weight >= upper
    inward = (at_lower & ~at_upper & (residual > 0)) | (at_upper & ~at_lower & (residual < 0))
    return (~(at_lower | at_upper)).to(residual.dtype), residual * inward


class _Batch(RowBatch):
    """``residual`` is the negative gradient on kept weights; ``direction`` stays feasible for a while."""

    row_tensors = ("weight", "residual", "mask", "lower", "upper", "direction", "on_face", "changes", "error", "bound")
    results = ("weight",)

    def __init__(self, hessian: Hessian, residuals: Residuals) -> None:
        super().__init__(len(residuals.residual_RD), residuals.residual_RD.device)
        dtype = residuals.residual_RD.dtype
        self.operator, self.preconditioner = hessian.operator(dtype), hessian.preconditioner(dtype)
        diagonal_D, self.largest, self.smallest = unit_spectrum(hessian)
        self.diagonal_D = diagonal_D.to(dtype)
        assert residuals.box is not None
        self.weight, self.lower, self.upper = residuals.box
        self.residual, self.mask, self.error = residuals.residual_RD, residuals.mask_RD, residuals.error_R
        self.direction = torch.zeros_like(self.residual)
        self.changes = torch.zeros_like(self.rows)
        self.on_face = torch.zeros_like(self.rows, dtype=torch.bool)
        nothing = self.residual.new_zeros(len(self.residual))
        self._redirect(nothing, torch.zeros_like(self.on_face), None, nothing)

    def going(self, gap: float) -> Tensor:
        """See ``RowBatch``: the row's own bound on its gap is not yet below ``gap``."""
        return unfinished(self.bound.double(), self.error, gap)

    def iterate_once(self) -> Tensor:
        """Move every row along its direction, then choose the next; returns True for rows that moved."""
        image = self.operator(self.direction)
        descent = torch.linalg.vecdot(self.residual, self.direction)
        curvature = torch.linalg.vecdot(self.direction, image)
        full = torch.where((descent > 0) & (curvature > 0), descent / curvature, 0.0)
        limit = self._move(full)
        alpha = torch.minimum(full, limit)
        self.residual.addcmul_(image * self.mask, alpha[:, None], value=-1.0)
        self.error = self.error - (alpha * (descent - 0.5 * alpha * curvature)).double()
        self._redirect(full - alpha, self.on_face & (full > limit), image, curvature)
        return alpha > 0

    def _move(self, full: Tensor) -> Tensor:
        """Step by ``full`` or to the first bound on the way, and return how far that is."""
        ahead = torch.where(self.direction > 0, self.upper, self.lower)
        slack = torch.where(self.direction == 0, torch.inf, (ahead - self.weight) / self.direction)
        limit = slack.amin(dim=1) if slack.shape[1] else torch.full_like(full, torch.inf)
        limit = limit.clamp_min(0.0)
        moved = torch.addcmul(self.weight, self.direction, torch.minimum(full, limit)[:, None])
        arrived = slack <= torch.minimum(full, limit)[:, None] * (1 + 4 * torch.finfo(slack.dtype).eps)
        self.weight = torch.where(arrived, ahead, self._project(moved))
        return limit

    def _project(self, weight: Tensor) -> Tensor:
        return torch.clamp(weight, self.lower, self.upper)

    def _redirect(self, rest: Tensor, hit: Tensor, image: Tensor | None, curvature: Tensor) -> None:
        """Measure each row's state and choose its next direction."""
        free, wrong = split(self.weight, self.lower, self.upper, self.residual)
        inner_residual = self.residual * free
        face = self.preconditioner(inner_residual).mul_(free)
        slope = torch.linalg.vecdot(inner_residual, face).clamp_min(0.0)
        free_norm = torch.linalg.vecdot(inner_residual, inner_residual / self.diagonal_D)
        wrong_norm = torch.linalg.vecdot(wrong, wrong / self.diagonal_D)
        # |free + wrong|_K at most the sum of the two norms, the second by the smallest eigenvalue of the scaled H.
        self.bound = 0.5 * (slope.sqrt() + (wrong_norm / self.smallest).sqrt()).square()
        self.changes += hit
        remainder = self._project(torch.addcmul(self.weight, self.direction, rest[:, None])) - self.weight
        project = hit & (torch.linalg.vecdot(self.residual, remainder) > 0) & (self.changes < LONGEST_RUN)
        gradient = ~project & ((wrong_norm > free_norm) | (self.changes >= LONGEST_RUN))
        if image is not None:
            # Conjugate only where the face is the same as before.
            beta = -torch.linalg.vecdot(face, image) / curvature
            same = self.on_face & ~hit & (curvature > 0)
            face.addcmul_(self.direction, torch.where(same, beta, 0.0)[:, None])
        self.direction = torch.where(project[:, None], remainder, face)
        if bool(gradient.any()):
            self.direction = torch.where(gradient[:, None], self._gradient_step(), self.direction)
        self.changes.masked_fill_(gradient, 0)
        self.on_face = ~(project | gradient)

    def _gradient_step(self) -> Tensor:
        step = self.residual / (self.largest * self.diagonal_D)
        return self._project(self.weight + step) - self.weight


def unit_spectrum(hessian: Hessian) -> tuple[Tensor, float, float]:
    """Of D^-1/2 H D^-1/2 with D = diag(H), found once, in H's working precision.

    Returns:
        D in units of H's mean diagonal; the largest eigenvalue, estimated from above; the smallest, from below.
    """

    def find() -> tuple[Tensor, float, float]:
        dtype = hessian.working_dtype
        diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).to(dtype)
        largest = _largest(hessian.operator(dtype), diagonal_D.rsqrt())
        return diagonal_D, largest, 1.0 / _largest(hessian.preconditioner(dtype), diagonal_D.sqrt())

    return hessian.memo(unit_spectrum, find)


def _largest(matrix: SharedMatrix, scale_D: Tensor) -> float:
    """Of diag(scale) M diag(scale), by power iteration from a fixed random vector."""
    vector_1D = fixed_directions(1, scale_D)
    norm = torch.linalg.vector_norm(vector_1D)
    for _ in range(POWER_ITERATIONS):
        vector_1D = matrix(vector_1D / norm * scale_D) * scale_D
        norm = torch.linalg.vector_norm(vector_1D)
    return MARGIN * float(norm) if len(scale_D) else 1.0
