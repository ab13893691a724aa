"""Conjugate gradient on all rows at once, preconditioned by the factor model of H (docs/mathematics.md, sections 4, 8).

Row r solves H_SS step_S = residual_S on its own kept set S. An iteration of every row is one dense product with H and
two thin ones of the preconditioner. Rows that are done leave when that pays.

Nothing is known of the preconditioned spectrum. A row that seems done is measured by what the certificate uses,
1/2 ||L^-1 r||^2 with H = L L^T, and the ratio of that to 1/2 r^T z serves until the row seems done again.

Shapes: R rows that still iterate, D inputs, F factors, V vectors of the subspace iteration, Q = F (F + 1) / 2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.core.hessian import Hessian
from optima.core.problem import ENERGY_FLOOR, Correction, Residuals
from optima.core.products import ROUND_ROWS, fixed_directions, multiply, pack

# What a row's bound is taken for, in units of 1/2 r^T z, until it has been measured.
FIRST_RATIO = 2.0
# Aim a little below the gap that is asked, so that the certificate seldom asks for another round.
AIM = 0.9
# Rows that are done leave when at most this share of the rows is still open.
COMPACT = 0.8
# Iterations between two looks at who is done: asking a GPU for a count stalls it.
CHECK_EVERY_ON_GPU = 4


def unfinished(bound_R: Tensor, error_R: Tensor, gap: float) -> Tensor:
    """The one stopping rule: True where the bound on E - E* is not yet ``gap`` of what the optimum must lose.

    Args:
        bound_R: float64, relative to the row's energy.
        error_R: E likewise.
        gap: certified relative gap that the caller was asked for.
    """
    # A row's unit of energy is between half and twice that of the certificate's floor: at least as strict as that.
    going_R: Tensor = bound_R > AIM * gap * (error_R - bound_R).clamp_min(0.5 * ENERGY_FLOOR)
    return going_R


def conjugate_gradient(hessian: Hessian, residuals: Residuals, gap: float, max_iterations: int) -> Correction:
    """Steps that bring every row to ``gap``, or as far as ``max_iterations`` and the working precision do."""
    open_rows = _OpenRows(hessian, residuals)
    every = 1 if hessian.device.type == "cpu" else CHECK_EVERY_ON_GPU
    for iteration in range(max_iterations):
        if iteration % every == 0:
            going_R = open_rows.going(gap)
            count, total = int(going_R.sum()), len(going_R)
            if count == 0:
                break
            # oneDNN keeps what it compiles for each number of rows: of many rows, a round number stays.
            spare = -count % ROUND_ROWS if count > ROUND_ROWS else 0
            if count + spare <= COMPACT * total:
                open_rows.keep(going_R | ((~going_R).cumsum(dim=0) <= spare) if spare else going_R)
        open_rows.iterate()
    return open_rows.correction()


class _OpenRows:
    """The rows that still iterate. A slope that is not positive is a breakdown at the working precision."""

    TENSORS = (
        *("rows", "iterations", "error", "slope", "ratio", "accepted"),
        *("residual", "mask", "restricted", "step", "direction"),
    )

    def __init__(self, hessian: Hessian, residuals: Residuals) -> None:
        dtype = residuals.residual_RD.dtype
        self.operator, self.whitener = hessian.operator(dtype), hessian.whitener(dtype)
        self.preconditioner = FactorModel.of(hessian, dtype)
        self.residual, self.mask, self.error = residuals.residual_RD, residuals.mask_RD, residuals.error_R
        self.restricted = self.preconditioner.restrict(self.mask)
        self.step = torch.zeros_like(self.residual)
        self.direction = self.preconditioner.solve(self.residual, self.mask, self.restricted)
        self.slope = torch.linalg.vecdot(self.residual, self.direction)
        self.ratio = torch.full_like(self.error, FIRST_RATIO)
        self.accepted = torch.zeros_like(self.error, dtype=torch.bool)
        self.rows = torch.arange(len(self.error), device=self.error.device)
        self.iterations = torch.zeros_like(self.rows, dtype=torch.int32)
        self.left: list[tuple[Tensor, Tensor, Tensor]] = []

    def going(self, gap: float) -> Tensor:
        """True for rows whose measured bound is not yet a little below ``gap``."""
        open_: Tensor = unfinished(0.5 * self.ratio * self.slope.double(), self.error, gap) & (self.slope > 0)
        seeming = (~open_ & ~self.accepted).nonzero()[:, 0]
        # Measure when enough rows could leave.
        if len(seeming) and int(open_.sum()) <= COMPACT * len(open_):
            bound = 0.5 * self.whitener.squared_norm(self.residual[seeming])
            slope = self.slope[seeming].double()
            self.ratio[seeming] = torch.where(slope > 0, 2.0 * bound / slope, FIRST_RATIO)
            missed = unfinished(bound, self.error[seeming], gap) & (slope > 0)
            self.accepted[seeming[~missed]] = True
        return ~self.accepted

    def iterate(self) -> None:
        """One iteration of every row.

        Six buffers of the rows' size are live at most: residual, mask, step, direction and the two of a product.
        """
        image = multiply(self.direction, self.operator)
        curvature = torch.linalg.vecdot(self.direction, image)
        moving = (self.slope > 0) & (curvature > 0)
        alpha = torch.where(moving, self.slope / curvature, 0.0)
        self.step.addcmul_(self.direction, alpha[:, None])
        self.residual.addcmul_(image.mul_(self.mask), alpha[:, None], value=-1.0)
        self.error = self.error - 0.5 * (alpha * self.slope).double()
        del image
        preconditioned = self.preconditioner.solve(self.residual, self.mask, self.restricted)
        slope = torch.linalg.vecdot(self.residual, preconditioned)
        beta = torch.where(moving, slope / self.slope, 0.0)
        torch.addcmul(preconditioned, self.direction, beta[:, None], out=self.direction)
        self.slope = slope
        self.iterations += moving.to(torch.int32)

    def keep(self, going_R: Tensor) -> None:
        """Set the other rows aside."""
        self.left.append((self.rows[~going_R], self.step[~going_R], self.iterations[~going_R]))
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name)[going_R])

    def correction(self) -> Correction:
        """The steps of all rows in their original order."""
        if not self.left:
            return Correction(self.step, self.iterations)
        self.keep(torch.zeros_like(self.accepted))
        rows, step_RD, iterations_R = (torch.cat(parts) for parts in zip(*self.left, strict=True))
        back = rows.argsort()
        return Correction(step_RD[back], iterations_R[back])


# Factors: most of them, and fewer for few inputs, where the rows' systems weigh more than the iterations they save.
FACTORS, INPUTS_PER_FACTOR = 32, 26
# Of the fit: vectors beyond the factors, most iterations, and the mean relative change of the noise that ends it.
OVERSAMPLING = 8
ITERATIONS, SETTLED = 12, 0.004
# Rows whose systems are factorised together: bounds the temporaries.
BLOCK_ROWS = 512
# Least share of its variance that an input has to itself.
SMALLEST_NOISE = 0.01


class FactorModel:
    """H seen as a few factors that all inputs share, plus noise of each input's own.

        H ~ Psi + U U^T,    Psi diagonal,  U of D x F

    Activations of a transformer are like that, and unlike H itself the model restricts to any kept set S without a new
    factorisation: H_SS ~ Psi_S + U_S U_S^T, inverted by Woodbury's formula with one F x F system per row.

    Attributes:
        noise_D: the diagonal of Psi, in units of H's mean diagonal.
        factors_DF: U likewise.
    """

    def __init__(self, hessian: Hessian, dtype: torch.dtype) -> None:
        diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).to(dtype)
        count = min(FACTORS, -(-hessian.num_inputs // INPUTS_PER_FACTOR))
        noise_D, scaled_DF = _factor_analysis(hessian, diagonal_D.rsqrt(), count)
        self.noise_D = diagonal_D * noise_D
        self.factors_DF = scaled_DF * diagonal_D.sqrt()[:, None]
        weighted_DF = self.factors_DF / self.noise_D[:, None]
        self._weighted_FD, self._weighted_DF = pack(weighted_DF.mT.contiguous()), pack(weighted_DF)
        left_Q, right_Q = torch.triu_indices(count, count, device=diagonal_D.device)
        self._pairs_QD = pack((self.factors_DF[:, left_Q] * weighted_DF[:, right_Q]).mT.contiguous())
        position_FF = torch.zeros(count, count, dtype=torch.int64, device=diagonal_D.device)
        position_FF[left_Q, right_Q] = position_FF[right_Q, left_Q] = torch.arange(len(left_Q), device=left_Q.device)
        self._position = position_FF.flatten()

    @classmethod
    def of(cls, hessian: Hessian, dtype: torch.dtype) -> FactorModel:
        """The model of ``hessian``; made once."""
        return hessian.memo((cls, dtype), lambda: cls(hessian, dtype))

    def restrict(self, mask_RD: Tensor) -> Tensor:
        """(I + U_S^T Psi_S^-1 U_S)^-1 of each row's kept set, (R, F, F)."""
        count = self.factors_DF.shape[1]
        core_RFF = mask_RD.new_empty(len(mask_RD), count, count)
        for rows, core in zip(mask_RD.split(BLOCK_ROWS), core_RFF.split(BLOCK_ROWS), strict=True):
            gram = multiply(rows, self._pairs_QD)[:, self._position].view(len(rows), count, count)
            gram.diagonal(dim1=1, dim2=2).add_(1.0)
            core.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(gram)[0]))
        return core_RFF

    def solve(self, residual_RD: Tensor, mask_RD: Tensor, restricted_R: Tensor) -> Tensor:
        """(Psi_S + U_S U_S^T)^-1 residual_S, for a residual that is zero off the kept set.

        Woodbury's formula, Psi^-1 r - Psi^-1 U core U^T Psi^-1 r.
        """
        score_RF = multiply(residual_RD, self._weighted_FD)
        score_RF = (restricted_R * score_RF[:, None, :]).sum(dim=2)
        solution_RD = residual_RD / self.noise_D
        return solution_RD.addcmul_(multiply(score_RF, self._weighted_DF), mask_RD, value=-1.0)


def _factor_analysis(hessian: Hessian, scale_D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """psi_D and U, (D, F), with psi + U U^T close to C = diag(scale) H diag(scale), and of the same diagonal.

    The likelihood is largest where U spans the top eigenspace of S = psi^-1/2 C psi^-1/2, each eigenvector as long as
    its eigenvalue exceeds the mean of those that are left out, and psi is the rest of the diagonal (Lawley, Proc. R.
    Soc. Edinburgh 60, 1940; Joreskog, Psychometrika 32, 1967). The two conditions are met alternately, the
    eigenspace by one step of subspace iteration each time.
    """
    operator, size = hessian.operator(scale_D.dtype), len(scale_D)
    width = min(count + OVERSAMPLING, size)
    basis_VD = fixed_directions(width, scale_D)
    noise_D = torch.ones_like(scale_D)
    for iteration in range(ITERATIONS):
        whitening_D = scale_D * noise_D.rsqrt()
        basis_VD, value_V = _orthonormal(multiply(basis_VD * whitening_D, operator) * whitening_D)
        value_F = value_V[width - count :]
        rest = (noise_D.reciprocal().sum(dtype=torch.float64) - value_F.sum()) / max(size - count, 1)
        length_F = (value_F - rest).clamp_min(0.0).sqrt().to(basis_VD)
        # A dead input shares nothing, not even rounding.
        factors_DF = (basis_VD[width - count :] * length_F[:, None]).mT * (noise_D.sqrt() * ~hessian.dead_D)[:, None]
        if iteration:  # the first basis is random: its image has no eigenvalues
            last_D, noise_D = noise_D, (1.0 - factors_DF.square().sum(dim=1)).clamp_min(SMALLEST_NOISE)
            if float((noise_D / last_D).log().abs().mean()) <= SETTLED:
                break
    return noise_D, factors_DF


def _orthonormal(image_VD: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows' span, in the order of their principal axes, and the lengths along those.

    Applied to the image of an orthonormal basis, they estimate eigenvectors and eigenvalues.
    """
    square_VV = (image_VD.double() @ image_VD.double().mT).cpu()  # some dozens: a GPU takes longer, and is waited for
    square_V, rotation_VV = torch.linalg.eigh(square_VV)
    square_V = square_V.clamp_min(float(square_V[-1]) * 1e-14 if len(square_V) else 0.0)
    return (rotation_VV * square_V.rsqrt()).mT.to(image_VD) @ image_VD, square_V.sqrt().to(image_VD.device)
