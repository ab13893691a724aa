"""Conjugate gradient on all rows at once, preconditioned with the shared inverse (docs/mathematics.md).

Row r solves H_SS step_S = residual_S with preconditioner K_SS, K = H^-1. One iteration of every row is two dense
products, P H and R K; the mask makes them act on each row's own S. H's ill-conditioning cancels: the preconditioned
eigenvalues are 1 / (1 - s_i^2), s_i the canonical correlations of kept and pruned inputs.

The preconditioner's product may be rounded (bfloat16), which asks for the flexible form of CG's beta (Notay 2000).

Shapes: R rows in the batch, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optima.qp.hessian import Hessian
from optima.qp.problem import RowProblem, RowSolution
from optima.qp.refinement import Correction, refine

# float32 CG is safe up to about 1 / eps32; beyond it the products run in float64.
FLOAT32_CONDITION = 1e6
# Aim a little below the tolerance, so that the certificate seldom asks for another round.
AIM = 0.7
# Rows that are done leave the batch when at most this share of it is still open.
COMPACT = 0.8


@dataclass(frozen=True)
class State:
    """H and K in the precision of the iterations."""

    hessian: Hessian
    operator_DD: Tensor
    preconditioner_DD: Tensor


@dataclass(frozen=True)
class SharedInverseCG:
    """Solve rows to a certified relative gap.

    Args:
        gap: certified relative gap at which a row stops.
        max_iterations: per round of refinement.
    """

    gap: float = 1e-4
    max_iterations: int = 200

    def prepare(self, hessian: Hessian) -> State:
        """Factorise once and cast H and K for the iterations."""
        dtype = torch.float32 if hessian.condition <= FLOAT32_CONDITION else torch.float64
        inverse_DD = hessian.inverse_DD
        fast = dtype == torch.float32 and bfloat16_is_fast(hessian.device)
        return State(hessian, hessian.damped_DD.to(dtype), inverse_DD.to(torch.bfloat16 if fast else dtype))

    def solve(self, state: State, problem: RowProblem) -> RowSolution:
        """See ``RowSolver``. The problem must have no bounds."""
        assert not problem.bounded, "bounds need the bounded solver"

        def inner(residual_RD: Tensor, keep_RD: Tensor, error_R: Tensor) -> Correction:
            batch = _Batch(state, residual_RD, keep_RD, error_R)
            return batch.run(AIM * self.gap, self.max_iterations)

        return refine(state.hessian, problem, inner, self.gap)


def bfloat16_is_fast(device: torch.device) -> bool:
    """True if the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


@dataclass
class _Batch:
    """The rows still iterating, and where their steps go when they leave."""

    state: State
    residual_RD: Tensor
    keep_RD: Tensor
    error_R: Tensor
    scale_R: Tensor = field(init=False)

    def __post_init__(self) -> None:
        dtype = self.state.operator_DD.dtype
        # Normalised rows keep float32 clear of under- and overflow whatever the layer's units.
        self.scale_R = self.residual_RD.abs().amax(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        self.residual_RD = (self.residual_RD / self.scale_R[:, None]).to(dtype)
        self.error_R = self.error_R / self.scale_R.square()
        self.keep_RD = self.keep_RD.to(dtype)

    def run(self, tolerance: float, max_iterations: int) -> Correction:
        """Iterate until each row's own estimate of its gap is below ``tolerance``."""
        step_RD = torch.zeros_like(self.residual_RD)
        iterations_R = torch.zeros(step_RD.shape[0], dtype=torch.int32, device=step_RD.device)
        rows = torch.arange(step_RD.shape[0], device=step_RD.device)
        residual, keep, error, step = self.residual_RD, self.keep_RD, self.error_R, torch.zeros_like(step_RD)
        preconditioned = self._precondition(residual, keep)
        direction = preconditioned.clone()
        slope = torch.linalg.vecdot(residual, preconditioned)
        check_every = 1 if step.device.type == "cpu" else 4
        for iteration in range(max_iterations):
            if iteration % check_every == 0:
                bound = 0.5 * slope.double()
                # A slope that is not positive is a breakdown: the row has reached the working precision.
                going = (bound > tolerance * (error - bound).clamp_min(0.0)) & (slope > 0)
                count = int(going.sum())
                if count == 0:
                    break
                if count <= COMPACT * len(rows):
                    step_RD[rows[~going]] = step[~going]
                    rows, error, slope = rows[going], error[going], slope[going]
                    residual, keep, step, direction = residual[going], keep[going], step[going], direction[going]
            image = direction @ self.state.operator_DD
            curvature = torch.linalg.vecdot(direction, image)
            moving = (slope > 0) & (curvature > 0)
            alpha = torch.where(moving, slope / curvature, 0.0)
            step.addcmul_(direction, alpha[:, None])
            residual.addcmul_(image.mul_(keep), alpha[:, None], value=-1.0)
            error = error - 0.5 * (alpha * slope).double()
            iterations_R[rows] += moving.to(torch.int32)
            preconditioned = self._precondition(residual, keep)
            # Flexible beta: -z'(H p) / p'(H p) equals z'(r - r_old) / r_old'z_old without storing r_old.
            beta = torch.where(moving, -torch.linalg.vecdot(preconditioned, image) / curvature, 0.0)
            slope = torch.linalg.vecdot(residual, preconditioned)
            direction.mul_(beta[:, None]).add_(preconditioned)
        step_RD[rows] = step
        return Correction(step_RD.double() * self.scale_R[:, None], iterations_R)

    def _precondition(self, residual: Tensor, keep: Tensor) -> Tensor:
        preconditioner_DD = self.state.preconditioner_DD
        return (residual.to(preconditioner_DD.dtype) @ preconditioner_DD).to(residual.dtype).mul_(keep)
