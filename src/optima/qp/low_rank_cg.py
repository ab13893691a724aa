"""Conjugate gradient on all rows at once, preconditioned row by row with the factor model of H (docs/mathematics.md).

Row r solves H_SS step_S = residual_S with preconditioner (Psi_S + U_S U_S^T)^-1. An iteration of every row is *one*
dense product, P H, and two thin ones with U: half of what the shared inverse costs, and there is no inverse to make.
The more a row prunes the better the model holds; where little is pruned the shared inverse needs so many fewer
iterations that it wins.

Nothing bounds the eigenvalues here, so CG's own inner products bound nothing: a row that seems done is measured by what
the certificate uses, 1/2 ||L^-1 r||^2, and the ratio of the two is remembered until the row seems done again.

Shapes: R rows in the batch, D inputs, C rows that claim to be done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optima.linalg.hessian import Hessian
from optima.qp.batch import COMPACT, RowBatch
from optima.qp.certificate import ENERGY_FLOOR
from optima.qp.low_rank import LowRankModel
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.restarts import Correction, Residuals, refine

# Aim a little below the tolerance, so that the certificate seldom asks for another round.
AIM = 0.9
MAX_ITERATIONS = 150
# What a row's bound is taken for, in units of 1/2 r^T z, until it has been measured.
FIRST_RATIO = 2.0


@dataclass
class State:
    """The Hessian and its factor model, in the precisions asked for so far."""

    hessian: Hessian
    _models: dict[torch.dtype, LowRankModel] = field(default_factory=dict)

    def model(self, dtype: torch.dtype) -> LowRankModel:
        """The factor model in ``dtype``; made once."""
        if dtype not in self._models:
            self._models[dtype] = LowRankModel(self.hessian, dtype)
        return self._models[dtype]


@dataclass(frozen=True)
class LowRankCG:
    """Solve rows to a certified relative gap.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: per round of refinement.
    """

    gap: float = 1e-4
    max_iterations: int = MAX_ITERATIONS

    name = "low-rank-cg"
    supports_bounds = False

    def prepare(self, hessian: Hessian) -> State:
        """Factorise once and find the factors."""
        state = State(hessian)
        state.model(hessian.working_dtype)
        return state

    def solve(self, state: State, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``."""

        def inner(residuals: Residuals) -> Correction:
            return _Batch(state, residuals).run(AIM * self.gap, self.max_iterations)

        return refine(state.hessian, problem, inner, self.gap)


class _Batch(RowBatch):
    """``core`` is what the factor model needs of each row's kept set."""

    row_tensors = ("error", "slope", "ratio", "accepted", "residual", "mask", "core", "step", "direction")
    results = ("step",)

    def __init__(self, state: State, residuals: Residuals) -> None:
        super().__init__(len(residuals.residual_RD), residuals.residual_RD.device)
        dtype = residuals.residual_RD.dtype
        self.operator, self.whitener = state.hessian.operator(dtype), state.hessian.whitener(dtype)
        self.model = state.model(dtype)
        self.residual, self.mask, self.error = residuals.residual_RD, residuals.mask_RD, residuals.error_R
        self.core = self.model.restrict(self.mask)
        self.step = torch.zeros_like(self.residual)
        self.direction = self.model.solve(self.residual, self.mask, self.core)
        self.slope = torch.linalg.vecdot(self.residual, self.direction)
        self.ratio = torch.full_like(self.error, FIRST_RATIO)
        self.accepted = torch.zeros_like(self.error, dtype=torch.bool)

    def run(self, tolerance: float, max_iterations: int) -> Correction:
        """Iterate until each row's measured bound on its gap is below ``tolerance``."""
        self.iterate(lambda: self._going(tolerance), self._iterate, max_iterations)
        (step_RD,) = self.collect()
        return Correction(step_RD, self.iterations_R)

    def _going(self, tolerance: float) -> Tensor:
        # A slope that is not positive is a breakdown: the row has reached the working precision.
        open_ = self._exceeds(0.5 * self.ratio * self.slope.double(), self.error, tolerance) & (self.slope > 0)
        claims = (~open_ & ~self.accepted).nonzero()[:, 0]
        # Measure when enough rows could leave.
        if len(claims) and int(open_.sum()) <= COMPACT * len(open_):
            bound = 0.5 * self.whitener.squared_norm(self.residual[claims])
            slope = self.slope[claims].double()
            self.ratio[claims] = torch.where(slope > 0, 2.0 * bound / slope, FIRST_RATIO)
            missed = self._exceeds(bound, self.error[claims], tolerance) & (slope > 0)
            self.accepted[claims[~missed]] = True
        return ~self.accepted

    @staticmethod
    def _exceeds(bound: Tensor, error: Tensor, tolerance: float) -> Tensor:
        exceeds: Tensor = bound > tolerance * (error - bound).clamp_min(ENERGY_FLOOR)
        return exceeds

    def _iterate(self) -> Tensor:
        """One iteration of every row; returns True for rows that moved."""
        image = self.operator(self.direction)
        curvature = torch.linalg.vecdot(self.direction, image)
        moving: Tensor = (self.slope > 0) & (curvature > 0)
        alpha = torch.where(moving, self.slope / curvature, 0.0)
        self.step.addcmul_(self.direction, alpha[:, None])
        self.residual.addcmul_(image.mul_(self.mask), alpha[:, None], value=-1.0)
        del image
        self.error = self.error - 0.5 * (alpha * self.slope).double()
        preconditioned = self.model.solve(self.residual, self.mask, self.core)
        slope = torch.linalg.vecdot(self.residual, preconditioned)
        beta = torch.where(moving, slope / self.slope, 0.0)
        torch.addcmul(preconditioned, self.direction, beta[:, None], out=self.direction)
        self.slope = slope
        return moving
