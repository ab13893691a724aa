"""(H + rho I)^-1 for one penalty rho after another, from one eigendecomposition (as in ALPS, arXiv 2406.07831).

And the same where rows go together: Y with C Y H + rho Y = X, from one eigendecomposition more.

Shapes: O outputs (rows), D inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from optima.linalg.products import SharedMatrix, multiply, pack


class Eigen(NamedTuple):
    """Eigenvalues and eigenvectors (columns) of the damped H in units of the inputs, in the dtype of the rows."""

    value_D: Tensor
    vector_DD: Tensor


def eigendecomposition(matrix_DD: Tensor, dtype: torch.dtype) -> Eigen:
    """Made in the dtype of ``matrix_DD``, which is in its units already, and cast to that of the rows."""
    try:
        value_D, vector_DD = torch.linalg.eigh(matrix_DD)
    except LinAlgError:  # cuSOLVER has not converged where LAPACK did (pytorch issues 94772, 105359)
        value_D, vector_DD = (each.to(matrix_DD) for each in torch.linalg.eigh(matrix_DD.double().cpu()))
    return Eigen(value_D.to(dtype), vector_DD.to(dtype))


class ShiftedInverse:
    """(H + rho I)^-1 in the dtype of the rows that it will multiply.

    Forming the matrix takes 2 D^3 operations at each change of rho and spares 2 O D^2 in every product: which is
    cheaper depends on the shape of the linear.

    Args:
        eigen: of H, in the dtype of the rows.
        rows_OD: rows as they will be multiplied.
        products: with the same rho, before it changes.
    """

    def __init__(self, eigen: Eigen, rows_OD: Tensor, products: int) -> None:
        self._value_D, self._vector_DD = eigen
        self._to_rows = pack(self._vector_DD)
        self._forms = rows_OD.shape[1] <= products * rows_OD.shape[0]
        self._to_eigen = self._to_rows if self._forms else pack(self._vector_DD.mT.contiguous())

    def at(self, penalty: float) -> Callable[[Tensor], Tensor]:
        """Multiplies rows by (H + penalty I)^-1."""
        share_D = 1.0 / (self._value_D + penalty)
        if self._forms:
            return SharedMatrix(multiply(self._vector_DD * share_D, self._to_rows))
        return lambda rows_OD: multiply(multiply(rows_OD, self._to_eigen).mul_(share_D), self._to_rows)


class CoupledInverse:
    """X to Y with C Y H + rho Y = X, four products each.

    Args:
        rows: eigendecomposition of C, (O, O), in the dtype of the rows.
        inputs: that of H.
    """

    def __init__(self, rows: Eigen, inputs: Eigen) -> None:
        self._rows, self._value_D = rows, inputs.value_D
        self._to_rows, self._to_eigen = pack(inputs.vector_DD), pack(inputs.vector_DD.mT.contiguous())

    def at(self, penalty: float) -> Callable[[Tensor], Tensor]:
        """X to Y by this penalty."""
        value_O, vector_OO = self._rows
        divisor_OD = torch.outer(value_O, self._value_D).add_(penalty)

        def solve(rows_OD: Tensor) -> Tensor:
            eigen_OD = multiply(vector_OO.mT @ rows_OD, self._to_eigen).div_(divisor_OD)
            return vector_OO @ multiply(eigen_OD, self._to_rows)

        return solve
