"""The fastest dense product that torch has on a device, for peers and for the machine's own rate.

On a CPU, float32 may be faster through oneDNN than through torch.mm. ``Packed`` uses it where torch has it, through the
same functions as optima's own solver, so that no method wins by its BLAS.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optima.core.products import multiply, pack


class Packed:
    """``rows @ matrix`` for a symmetric matrix, computed in ``dtype``, returned in the dtype of the rows."""

    def __init__(self, matrix_DD: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.matrix_DD = pack(matrix_DD.to(dtype))

    def __call__(self, rows_RD: Tensor) -> Tensor:
        return multiply(rows_RD.to(self.dtype), self.matrix_DD).to(rows_RD.dtype)
