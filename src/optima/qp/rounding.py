"""Solved weights in a checkpoint's dtype: rounded so that little of the optimum is lost, and certified as written.

With r the residual of the solved row v, rounding it to q = v + d changes its error by

    E(q) - E(v) = 1/2 d^T H d - r^T d.

Steps of a floating-point dtype are relative to the weights: a row's small weights can be placed so finely that they
make up for the errors of its large ones. Weights below a threshold move to where CG finds the least error, the others
staying as they are written, and are rounded again. A row takes what lowers its error. Differs from GPTQ (arXiv
2210.17323), which has the idea, in:

1. Each row compensates on its own kept set; a factor of H that rows share knows nothing of masks.
2. Weights are fixed in the order of their steps, not of their columns, and many at once.

Shapes: R rows, D inputs, A rows still active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optima.device import full_precision
from optima.linalg.hessian import Hessian
from optima.linalg.products import ROUND_ROWS
from optima.qp.certificate import ENERGY_FLOOR, Verifier
from optima.qp.cg import ConjugateGradient
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.restarts import Residuals

# Rows are left alone where rounding costs at most this share of their least error, or of what their solver left.
AIM, OF_GAP = 2e-4, 0.5
# For rows that lose more than the first number times that: thresholds, in means of a row's |v_i| sqrt(H_ii). One stage
# takes most of what there is; several come near to one weight at a time, and few rows need them.
PASSES = ((1.0, (0.7,)), (10.0, (1.2, 0.8, 0.5, 0.3, 0.15)))
# Of CG in each stage: more changed nothing.
ITERATIONS = 2
# Rounding errors of the quadratic form in units of eps sqrt(D): ten times what was measured.
MARGIN = 2.0
# Entries (rows x inputs) rounded together: nine buffers of them live at once.
CHUNK_ENTRIES = 2**19
DEVICE_CHUNK_ENTRIES = 2**24
# Weights are scaled where a row's largest lies between this and its reciprocal.
SMALLEST_SCALE = 2.0**-100
ALL = slice(None)


@dataclass(frozen=True)
class Rounded:
    """Rows as they are written.

    Attributes:
        weight_RD: in the dtype asked for, zero off keep.
        error_R: upper bound on E(q), float64, above it by rounding errors only.
        gap_R: certified relative suboptimality of these weights, float64; see ``optima.qp.certificate``.
        least_R: what the gap is relative to, float64: E(v) - bound, which no weights on the mask fall below, or the
            certificate's floor where that is more.
    """

    weight_RD: Tensor
    error_R: Tensor
    gap_R: Tensor
    least_R: Tensor


def round_rows(
    hessian: Hessian,
    problem: RowProblem,
    solution: RowSolution,
    dtype: torch.dtype,
    method: Literal["hessian", "nearest"] = "hessian",
) -> Rounded:
    """Round the kept weights of ``solution``, which solves ``problem``, to ``dtype``; certify what is written.

    Args:
        hessian: what the rows were solved with.
        problem: the rows.
        solution: what a solver returned for them. Where ``dtype`` holds all of its numbers, it stays as it is.
        dtype: of the checkpoint.
        method: ``hessian`` makes up for rounding errors, and is in no row worse than ``nearest``.
    """
    weight_RD = solution.weight_RD
    if not weight_RD.numel():
        return Rounded(weight_RD.to(dtype), solution.error_R, solution.gap_R, torch.zeros_like(solution.error_R))
    if torch.promote_types(weight_RD.dtype, dtype) == dtype:
        floor_R = ENERGY_FLOOR * Verifier(hessian, problem).energy_R
        _, least_R = _proven(solution.error_R, solution.gap_R, floor_R)
        return Rounded(weight_RD.to(dtype), solution.error_R, solution.gap_R, least_R)
    entries = CHUNK_ENTRIES if weight_RD.device.type == "cpu" else DEVICE_CHUNK_ENTRIES
    size = max(entries // hessian.num_inputs, 1)
    rounded_RD = torch.empty_like(weight_RD, dtype=dtype)
    facts = torch.empty(3, len(weight_RD), dtype=torch.float64, device=weight_RD.device)
    with full_precision(), torch.no_grad():
        for begin in range(0, len(weight_RD), size):
            chunk = slice(begin, begin + size)
            rows = _Rows(hessian, problem.rows(chunk), solution.rows(chunk), dtype)
            if method == "hessian":
                rows.improve()
            rounded_RD[chunk], facts[:, chunk] = rows.written(), rows.certified()
    return Rounded(rounded_RD, facts[0], facts[1], facts[2])


class _Trial(NamedTuple):
    """Rounded weights, their change from the solved ones times H, and how much more they lose."""

    written_AD: Tensor
    image_AD: Tensor
    rise_A: Tensor


class _Rows:
    """Rows in units of H's mean diagonal and of their largest weight, a power of two: float32 has room there."""

    def __init__(self, hessian: Hessian, problem: RowProblem, solution: RowSolution, dtype: torch.dtype) -> None:
        self.hessian, self.dtype, self.error_R = hessian, dtype, solution.error_R
        weight_RD = solution.weight_RD
        self.lower_RD, self.upper_RD = _range(problem, dtype)
        working = torch.promote_types(hessian.working_dtype, weight_RD.dtype)
        self.operator = hessian.operator(working)
        diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).masked_fill(hessian.dead_D, 0.0)
        self.root_D = diagonal_D.sqrt().to(working)
        # The weight of a dead input is rounded like others, at no loss.
        self.mask_RD = problem.keep_RD.to(working) * ~hessian.dead_D
        live_D = ~hessian.dead_D  # a dead weight may be of any size
        largest_R = (torch.maximum(weight_RD.abs(), problem.target_RD.abs()) * live_D).amax(dim=1).double()
        self.scale_R = largest_R.clamp(SMALLEST_SCALE, 1.0 / SMALLEST_SCALE).log2().round().exp2()
        self.scale_R1 = self.scale_R.to(working)[:, None]
        self.weight_RD = weight_RD.to(working) / self.scale_R1
        difference_RD = problem.target_RD.to(working) / self.scale_R1 - self.weight_RD
        self.reach_R = self._norm(difference_RD)
        if solution.residual_RD is None or solution.scale_R is None:
            self.residual_RD = self.operator(difference_RD).mul_(self.mask_RD)
        else:
            ratio_R1 = (solution.scale_R / self.scale_R).to(working)[:, None]
            self.residual_RD = (solution.residual_RD.to(working) * ratio_R1).mul_(self.mask_RD)
        self.written_RD = self._rounded(self.weight_RD)
        change_RD = (self.written_RD - self.weight_RD).mul_(self.mask_RD)
        self.image_RD = self.operator(change_RD)
        self.rise_R = torch.linalg.vecdot(change_RD, 0.5 * self.image_RD - self.residual_RD).double()
        self._relate(problem, solution)

    def _relate(self, problem: RowProblem, solution: RowSolution) -> None:
        """What the solution's certificate proved: E* is at least E(v) - bound."""
        target_RD, error_R, gap_R = problem.target_RD, solution.error_R, solution.gap_R
        self.unit_R = self.hessian.mean_diagonal * self.scale_R.square()
        energy_R = 0.5 * self._norm(target_RD.to(self.root_D) / self.scale_R1).square()
        self.bound_R, self.least_R = _proven(error_R, gap_R, ENERGY_FLOOR * energy_R * self.unit_R)

    def improve(self) -> None:
        """Lower the error of the rows that lose too much."""
        size_RD = (self.weight_RD * self.root_D).abs_().mul_(self.mask_RD)
        size_RD *= (self.mask_RD.sum(dim=1) / size_RD.sum(dim=1).clamp_min(SMALLEST_SCALE))[:, None]
        aim_R = torch.maximum(AIM * self.least_R, OF_GAP * self.bound_R)
        for factor, thresholds in PASSES:
            loss_R = self.rise_R * self.unit_R - factor * aim_R
            count = int((loss_R > 0).sum())
            if not count:
                return
            # oneDNN compiles a product for every number of rows: a round one is taken.
            rows = loss_R.topk(min(-(-count // ROUND_ROWS) * ROUND_ROWS, len(loss_R))).indices
            trial = _Trial(self.written_RD[rows], self.image_RD[rows], self.rise_R[rows])
            for threshold in thresholds:
                trial = self._moved(rows, trial, size_RD[rows] < threshold)
                paid_A = trial.rise_A < self.rise_R[rows]
                self.written_RD[rows[paid_A]] = trial.written_AD[paid_A]
                self.image_RD[rows[paid_A]] = trial.image_AD[paid_A]
                self.rise_R[rows[paid_A]] = trial.rise_A[paid_A]

    def _moved(self, rows: Tensor, trial: _Trial, small_AD: Tensor) -> _Trial:
        """The weights of ``small_AD`` moved towards their optimum given the others, and rounded."""
        mask_AD = self.mask_RD[rows] * small_AD
        value_AD = trial.written_AD * self.scale_R1[rows]
        mask_AD *= (self.lower_RD[rows] < value_AD) & (value_AD < self.upper_RD[rows])
        slope_AD = (self.residual_RD[rows] - trial.image_AD).mul_(mask_AD)
        descent = ConjugateGradient(self.hessian, Residuals(slope_AD.clone(), mask_AD, trial.rise_A))
        for _ in range(ITERATIONS):
            descent.iterate_once()
        written_AD = self._rounded(trial.written_AD + descent.step, rows)
        step_AD = (written_AD - trial.written_AD).mul_(mask_AD)
        change_AD = self.operator(step_AD)
        rise_A = trial.rise_A + torch.linalg.vecdot(step_AD, 0.5 * change_AD - slope_AD)
        return _Trial(written_AD, trial.image_AD + change_AD, rise_A)

    def _rounded(self, weight_AD: Tensor, rows: Tensor | slice = ALL) -> Tensor:
        """``weight_AD`` at the nearest numbers of the dtype within the bounds, in its own precision and units."""
        value_AD = torch.clamp(weight_AD * self.scale_R1[rows], self.lower_RD[rows], self.upper_RD[rows])
        return value_AD.to(self.dtype).to(weight_AD.dtype) / self.scale_R1[rows]

    def _norm(self, rows_RD: Tensor) -> Tensor:
        """The root of sum_i H_ii x_i^2, (R,) float64."""
        norm_R: Tensor = torch.linalg.vector_norm(rows_RD * self.root_D, dim=1)
        return norm_R.double()

    def written(self) -> Tensor:
        """The weights in the dtype of the checkpoint."""
        return (self.written_RD * self.scale_R1).to(self.dtype)

    def certified(self) -> Tensor:
        """Error and gap of what is written, and what that is relative to, (3, R) float64."""
        change_R, weight_R = self._norm((self.written_RD - self.weight_RD) * self.mask_RD), self._norm(self.weight_RD)
        reach_R = len(self.root_D) ** 0.5 * (change_R + self.reach_R) + weight_R
        margin_R = MARGIN * torch.finfo(self.root_D.dtype).eps * change_R * reach_R
        excess_R = (self.rise_R + margin_R) * self.unit_R
        loss_R = (self.bound_R + excess_R).clamp_min(0.0)
        gap_R = torch.where(loss_R == 0, 0.0, loss_R / self.least_R)
        return torch.stack([self.error_R + excess_R, gap_R, self.least_R])


def _proven(error_R: Tensor, gap_R: Tensor, floor_R: Tensor) -> tuple[Tensor, Tensor]:
    """A certificate's bound again, and what its gap is relative to: the larger of E - bound and the floor."""
    share_R = torch.where(gap_R.isinf(), 1.0, gap_R / (1.0 + gap_R))
    bound_R = torch.maximum(error_R * share_R, gap_R * floor_R)
    return bound_R, torch.maximum(error_R - bound_R, floor_R)


def _range(problem: RowProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The least and the largest number of ``dtype``, (R, 1)."""
    largest_R1 = problem.target_RD.new_full((len(problem.target_RD), 1), torch.finfo(dtype).max)
    return -largest_R1, largest_R1
