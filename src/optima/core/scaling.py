"""The linear in units in which H has a unit diagonal: ||X (V - W)^T|| is the same with H_ij / (n_i n_j) and W_ij n_j.

|W_ij n_j| is then Wanda's score, which is why ADMM methods project in these units (Boza 2024, section 3.3).

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from torch import Tensor

from optima.core.hessian import Hessian


def unit_diagonal(matrix_DD: Tensor, dead_D: Tensor) -> tuple[Tensor, Tensor]:
    """H / (n n^T) and n = sqrt(diag H), float64, of an H damped or not; a dead input is decoupled and has n = 1."""
    norm_D = matrix_DD.diagonal().sqrt().masked_fill(dead_D, 1.0)
    scaled_DD = (matrix_DD / norm_D[:, None]).div_(norm_D)
    scaled_DD.diagonal().fill_(1.0)
    return scaled_DD, norm_D


def saliency_unit(hessian: Hessian, theta: float = 0.75) -> Tensor:
    """u with u_i^2 = H_ii^(1-theta) K_ii^(-theta), float64, K the inverse of the damped H.

    Removing a weight v from a row that keeps the inputs S costs twice the error v^2 / a, a = (H_SS^-1)_ii, which lies
    between 1 / H_ii (no other input can make up for it) and K_ii (all others do): v^2 u_i^2 is between the two. Adding
    input j gains r_j^2 / d, d what S leaves unexplained of it, between 1 / K_jj and H_jj: r_j^2 / u_j^2 likewise.
    """
    own_D, left_D = hessian.damped_DD.diagonal(), 1.0 / hessian.inverse_diagonal_D
    return (own_D.pow(1.0 - theta) * left_D.pow(theta)).sqrt()


def scaled_weight(weight_OD: Tensor, hessian: Hessian, norm_D: Tensor) -> Tensor:
    """W n, in the weight's dtype; weights of dead inputs vanish."""
    return (weight_OD * norm_D.to(weight_OD.dtype)).masked_fill_(hessian.dead_D, 0.0)
