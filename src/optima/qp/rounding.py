"""Solved weights in a checkpoint's dtype: rounded so that little of the optimum is lost, and certified as written.

With r the residual of the solved row v, rounding it to q = v + d changes its error by

    E(q) - E(v) = 1/2 d^T H d - r^T d.

The steps of a floating-point dtype are relative to the weights, so a row's small weights can be placed so finely that
they make up for the errors of its large ones. In stages with a falling threshold, weights below it move to where a few
iterations of CG find the least error, those above staying as they are written, and are rounded again. A row keeps the
result only where that lowers its error; rows that lose little leave. It is the idea of GPTQ (arXiv 2210.17323) and differs:

1. Compensation is solved on each row's own kept set; one shared factor of H knows nothing of masks.
2. Weights are fixed in the order of their steps, not of their columns, many at once.

Shapes: R rows, D inputs, A rows still active.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optima.device import full_precision
from optima.errors import RecipeError
from optima.linalg.hessian import Hessian
from optima.linalg.products import ROUND_ROWS
from optima.qp.certificate import ENERGY_FLOOR
from optima.qp.cg import ConjugateGradient
from optima.qp.preconditioners import FactorModel
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.restarts import Residuals

Method = Literal["hessian", "nearest"]

# A row is left as it is once rounding has cost this share of its least error: no more than the solve's own gap.
AIM = 2e-4
# Weights that move in a stage have |v_i| sqrt(H_ii) below this multiple of their row's mean.
PASSES = ((1.0, (0.7,)), (10.0, (1.2, 0.8, 0.5, 0.3, 0.15)))
TINY = 1e-30
ITERATIONS = 2
# Of float errors of the quadratic form, in units of eps sqrt(D): ten times what was measured.
MARGIN = 2.0
# Entries (rows x inputs) rounded together.
CHUNK_ENTRIES = {"cpu": 2**19}
DEVICE_CHUNK_ENTRIES = 2**24
ALL = slice(None)


@dataclass(frozen=True)
class Rounded:
    """Rows as they are written.

    Attributes:
        weight_RD: in the dtype asked for, zero off keep, within the bounds.
        error_R: E(q), float64, never below the truth by more than float64's rounding.
        gap_R: certified relative suboptimality of these weights, float64; see ``optima.qp.certificate``.
        excess_R: upper bound on E(q) - E(v), float64; negative where rounding lowered the error.
    """

    weight_RD: Tensor
    error_R: Tensor
    gap_R: Tensor
    excess_R: Tensor


def round_rows(
    hessian: Hessian,
    problem: RowProblem,
    solution: RowSolution,
    dtype: torch.dtype,
    method: Method = "hessian",
    aim: float = AIM,
) -> Rounded:
    """Round the kept weights of ``solution`` to ``dtype`` and certify what is written.

    Args:
        hessian: what the rows were solved with.
        problem: the rows.
        solution: what a solver returned for them.
        dtype: of the checkpoint.
        method: ``hessian`` makes up for rounding errors, and is in no row worse than ``nearest``.
        aim: rows whose rounding costs more than this share of their least error are worked on.

    Raises:
        RecipeError: if a weight's bounds leave it no number of ``dtype``.
    """
    weight_RD = solution.weight_RD
    if weight_RD.dtype == dtype:
        return Rounded(weight_RD, solution.error_R, solution.gap_R, torch.zeros_like(solution.error_R))
    size = max(CHUNK_ENTRIES.get(weight_RD.device.type, DEVICE_CHUNK_ENTRIES) // max(hessian.num_inputs, 1), 1)
    rounded_RD = torch.empty_like(weight_RD, dtype=dtype)
    facts = torch.empty(3, len(weight_RD), dtype=torch.float64, device=weight_RD.device)
    with full_precision(), torch.no_grad():
        for begin in range(0, len(weight_RD), size):
            chunk = slice(begin, begin + size)
            solved = (weight_RD[chunk], solution.error_R[chunk], solution.gap_R[chunk])
            rows = _Rows(hessian, problem.rows(chunk), *solved, dtype)
            if method == "hessian":
                rows.improve(aim)
            rounded_RD[chunk] = rows.written()
            facts[:, chunk] = rows.certified()
    return Rounded(rounded_RD, *facts)


class _Trial(NamedTuple):
    """Rounded weights, their change times H, and by how much they lose more than the solved ones."""

    written_AD: Tensor
    image_AD: Tensor
    rise_A: Tensor


class _Rows:
    """Rows in units of H's mean diagonal and of their largest weight, a power of two: float32 has room there."""

    def __init__(
        self,
        hessian: Hessian,
        problem: RowProblem,
        weight_RD: Tensor,
        error_R: Tensor,
        gap_R: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.hessian, self.dtype, self.error_R = hessian, dtype, error_R
        working = hessian.working_dtype
        self.operator = hessian.operator(working)
        diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).masked_fill(hessian.dead_D, 0.0)
        self.root_D = diagonal_D.sqrt().to(working)
        # A dead input's weight is rounded like others, at no loss.
        self.mask_RD = problem.keep_RD.to(working) * ~hessian.dead_D
        largest_R = torch.maximum(weight_RD.abs().amax(dim=1), problem.target_RD.abs().amax(dim=1)).double()
        self.scale_R = largest_R.clamp(2.0**-100, 2.0**100).log2().round().exp2()
        self.scale_R1 = self.scale_R.to(weight_RD.dtype)[:, None]
        self.box = _representable(problem, dtype)
        self.weight_RD = (weight_RD / self.scale_R1).to(working)
        difference_RD = ((problem.target_RD - weight_RD) / self.scale_R1).to(working)
        self.residual_RD = self.operator(difference_RD).mul_(self.mask_RD)
        self.written_RD = self._rounded(self.weight_RD)
        change_RD = (self.written_RD - self.weight_RD).mul_(self.mask_RD)
        self.image_RD = self.operator(change_RD)
        self.rise_R = torch.linalg.vecdot(change_RD, 0.5 * self.image_RD - self.residual_RD).double()
        self.reach_R = (difference_RD * self.root_D).norm(dim=1).double()
        self._relate(problem, gap_R)

    def _relate(self, problem: RowProblem, gap_R: Tensor) -> None:
        """What the certificate of the solution proved: E* is at least E(v) - bound."""
        target_RD = problem.target_RD
        if problem.bounded:
            target_RD = torch.maximum(target_RD.abs(), problem.clamp(target_RD).abs())
        energy_R = 0.5 * ((target_RD / self.scale_R1).to(self.root_D) * self.root_D).norm(dim=1).double().square()
        self.unit_R = self.hessian.mean_diagonal * self.scale_R.square()
        floor_R = ENERGY_FLOOR * energy_R * self.unit_R
        # The gap is relative to the larger of E - bound and the floor.
        self.bound_R = torch.maximum(self.error_R * gap_R / (1.0 + gap_R), gap_R * floor_R)
        self.least_R = torch.maximum(self.error_R - self.bound_R, floor_R)

    def improve(self, aim: float) -> None:
        """Lower the error of the rows that lose more than ``aim`` of their least one."""
        size_RD = (self.weight_RD * self.root_D).abs_().mul_(self.mask_RD)
        size_RD *= (self.mask_RD.sum(dim=1) / size_RD.sum(dim=1).clamp_min(TINY))[:, None]
        for factor, thresholds in PASSES:
            loss_R = self.rise_R * self.unit_R - factor * aim * self.least_R
            count = int((loss_R > 0).sum())
            if not count:
                return
            # oneDNN compiles a product for every number of rows: a round one is taken.
            rows = loss_R.topk(min(-(-count // ROUND_ROWS) * ROUND_ROWS, len(loss_R))).indices
            trial = _Trial(self.written_RD[rows], self.image_RD[rows], self.rise_R[rows])
            for threshold in thresholds:
                trial = self._moved(rows, trial, size_RD[rows] < threshold)
                paid_A = (trial.rise_A < self.rise_R[rows]).nonzero()[:, 0]
                self.written_RD[rows[paid_A]] = trial.written_AD[paid_A]
                self.image_RD[rows[paid_A]] = trial.image_AD[paid_A]
                self.rise_R[rows[paid_A]] = trial.rise_A[paid_A]

    def _moved(self, rows: Tensor, trial: _Trial, small_AD: Tensor) -> _Trial:
        """The weights of ``small_AD`` moved towards their optimum given the others, and rounded."""
        mask_AD = self.mask_RD[rows] * small_AD
        if isinstance(self.box[0], Tensor):
            value_AD, (lower_AD, upper_AD) = trial.written_AD * self.scale_R1[rows], (bound[rows] for bound in self.box)
            mask_AD *= (lower_AD < value_AD) & (value_AD < upper_AD)
        slope_AD = (self.residual_RD[rows] - trial.image_AD).mul_(mask_AD)
        model = FactorModel.of(self.hessian, mask_AD.dtype)
        descent = ConjugateGradient(self.hessian, model, Residuals(slope_AD.clone(), mask_AD, trial.rise_A))
        for _ in range(ITERATIONS):
            descent.iterate_once()
        written_AD = self._rounded(trial.written_AD + descent.step, rows)
        step_AD = (written_AD - trial.written_AD).mul_(mask_AD)
        change_AD = self.operator(step_AD)
        rise_A = trial.rise_A + torch.linalg.vecdot(step_AD, 0.5 * change_AD - slope_AD)
        return _Trial(written_AD, trial.image_AD + change_AD, rise_A)

    def _rounded(self, weight_AD: Tensor, rows: Tensor | slice = ALL) -> Tensor:
        """``weight_AD`` at the nearest numbers of the dtype within the bounds, in its own precision."""
        lower, upper = (bound if isinstance(bound, float) else bound[rows] for bound in self.box)
        value_AD = torch.clamp(weight_AD * self.scale_R1[rows], lower, upper).to(self.dtype)
        return value_AD.to(weight_AD.dtype) / self.scale_R1[rows]

    def written(self) -> Tensor:
        """The weights in the dtype of the checkpoint."""
        return (self.written_RD * self.scale_R1).to(self.dtype)

    def certified(self) -> Tensor:
        """Error, gap and excess of what is written, (3, R) float64."""
        change_R = ((self.written_RD - self.weight_RD) * self.mask_RD * self.root_D).norm(dim=1).double()
        weight_R = (self.weight_RD * self.root_D).norm(dim=1).double()
        scale_R = len(self.root_D) ** 0.5 * (change_R + self.reach_R) + weight_R
        margin_R = MARGIN * torch.finfo(self.root_D.dtype).eps * change_R * scale_R
        excess_R = (self.rise_R + margin_R) * self.unit_R
        gap_R = (self.bound_R + excess_R).clamp_min(0.0)
        gap_R = torch.where(gap_R == 0, 0.0, gap_R / self.least_R)
        return torch.stack([self.error_R + excess_R, gap_R, excess_R])


def _representable(problem: RowProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """The least and the largest number of ``dtype`` that each weight may be: a wider range would leave the bounds."""
    numbers = torch.finfo(dtype)
    if not problem.bounded:
        return -numbers.max, numbers.max
    largest_RD = torch.full_like(problem.target_RD, numbers.max)

    def below(bound_RD: Tensor | None) -> Tensor:
        if bound_RD is None:
            return largest_RD
        bound_RD = torch.minimum(bound_RD, largest_RD)
        nearest_RD = bound_RD.to(dtype).to(bound_RD.dtype)
        shift_RD = 0.5 * numbers.eps * bound_RD.abs().clamp_min(numbers.tiny)
        return torch.where(nearest_RD > bound_RD, (bound_RD - shift_RD).to(dtype).to(bound_RD.dtype), nearest_RD)

    lower_RD, upper_RD = (
        -below(None if problem.lower_RD is None else -problem.lower_RD),
        below(problem.upper_RD),
    )
    if bool((lower_RD > upper_RD).any()):
        raise RecipeError(f"a weight's bounds have no {dtype} between them: widen the bounds or write float32")
    return lower_RD, upper_RD
