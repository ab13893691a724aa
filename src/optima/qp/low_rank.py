"""H seen as a factor model: a few factors that all inputs share, plus noise of each input's own (docs/mathematics.md).

    H ~ Psi + U U^T,    Psi diagonal,  U of D x F

Activations of a transformer are like that, and unlike H itself the model restricts to any kept set S without a new
factorisation: H_SS ~ Psi_S + U_S U_S^T, inverted by Woodbury's formula with one F x F system per row.

Shapes: R rows, D inputs, F factors, V vectors of the subspace iteration, Q = F (F + 1) / 2 pairs of factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.qp.hessian import Hessian
from optima.qp.products import multiply, pack

# Factors: most of them, and fewer for few inputs, where the rows' systems weigh more than the iterations they save.
FACTORS, INPUTS_PER_FACTOR = 32, 26
# Vectors beyond the factors, and rounds, of the subspace iteration: the model need not be the best one.
OVERSAMPLING = 8
ROUNDS = 3
# Rows whose systems are factorised together: bounds the temporaries.
BLOCK_ROWS = 512
# Least share of its variance that an input has to itself.
SMALLEST_NOISE = 1e-4


class LowRankModel:
    """The factor model of one Hessian, in units of its mean diagonal.

    Attributes:
        noise_D: the diagonal of Psi.
        factors_DF: U.
    """

    def __init__(self, hessian: Hessian, dtype: torch.dtype) -> None:
        diagonal_D = (hessian.damped_DD.diagonal() / hessian.mean_diagonal).to(dtype)
        scaled_DF = _nystrom(hessian, diagonal_D.rsqrt(), min(FACTORS, -(-hessian.num_inputs // INPUTS_PER_FACTOR)))
        # A dead input shares nothing, not even rounding.
        scaled_DF = scaled_DF * ~hessian.dead_D[:, None]
        # What the factors leave of the unit diagonal. It is positive: the approximation is below H.
        self.noise_D = diagonal_D * (1.0 - scaled_DF.square().sum(dim=1)).clamp_min(SMALLEST_NOISE)
        self.factors_DF = scaled_DF * diagonal_D.sqrt()[:, None]
        weighted_DF = self.factors_DF / self.noise_D[:, None]
        self._weighted_FD, self._weighted_DF = pack(weighted_DF.mT.contiguous()), pack(weighted_DF)
        count = self.factors_DF.shape[1]
        left_Q, right_Q = torch.triu_indices(count, count, device=diagonal_D.device)
        self._pairs_QD = pack((self.factors_DF[:, left_Q] * weighted_DF[:, right_Q]).mT.contiguous())
        position_FF = torch.zeros(count, count, dtype=torch.int64, device=diagonal_D.device)
        position_FF[left_Q, right_Q] = position_FF[right_Q, left_Q] = torch.arange(len(left_Q), device=left_Q.device)
        self._position = position_FF.flatten()

    def restrict(self, mask_RD: Tensor) -> Tensor:
        """(I + U_S^T Psi_S^-1 U_S)^-1 of each row's kept set, (R, F, F)."""
        count = self.factors_DF.shape[1]
        core_RFF = mask_RD.new_empty(len(mask_RD), count, count)
        for rows, core in zip(mask_RD.split(BLOCK_ROWS), core_RFF.split(BLOCK_ROWS), strict=True):
            gram = multiply(rows, self._pairs_QD)[:, self._position].view(len(rows), count, count)
            gram.diagonal(dim1=1, dim2=2).add_(1.0)
            core.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(gram)[0]))
        return core_RFF

    def solve(self, residual_RD: Tensor, mask_RD: Tensor, core_RFF: Tensor) -> Tensor:
        """(Psi_S + U_S U_S^T)^-1 residual_S of each row, zero off the kept set, for a residual that is zero off it.

        Woodbury's formula, Psi^-1 r - Psi^-1 U core U^T Psi^-1 r.
        """
        score_RF = multiply(residual_RD, self._weighted_FD)
        score_RF = (core_RFF * score_RF[:, None, :]).sum(dim=2)
        solution_RD = residual_RD / self.noise_D
        return solution_RD.addcmul_(multiply(score_RF, self._weighted_DF), mask_RD, value=-1.0)


def _nystrom(hessian: Hessian, scale_D: Tensor, count: int) -> Tensor:
    """U with U U^T close to C = diag(scale) H diag(scale) and, up to rounding, below it; (D, F).

    Nystrom's approximation (C Q) (Q^T C Q)^-1 (C Q)^T on an approximate top eigenspace Q, found by subspace iteration
    (Halko, Martinsson and Tropp, SIAM Review 53, 2011, sec. 5.5).
    """
    operator = hessian.operator(scale_D.dtype)
    size = len(scale_D)
    generator = torch.Generator().manual_seed(0)
    width = min(count + OVERSAMPLING, size)
    image_VD = torch.randn(width, size, generator=generator, dtype=torch.float64).to(scale_D)
    basis_VD = image_VD
    for _ in range(ROUNDS + 1):
        basis_VD = torch.linalg.qr(image_VD.mT).Q.mT
        image_VD = operator(basis_VD * scale_D) * scale_D
    core_VV = basis_VD.double() @ image_VD.double().mT
    value_V, vector_VV = torch.linalg.eigh(0.5 * (core_VV + core_VV.mT))
    top_VF = vector_VV[:, width - count :] * value_V[width - count :].clamp_min(1e-30).rsqrt()
    factors_DF: Tensor = image_VD.mT @ top_VF.to(image_VD)
    return factors_DF
