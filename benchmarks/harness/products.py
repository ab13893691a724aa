"""The fastest dense product that torch has on a device, for peers and for the machine's own rate.

On a CPU, float32 may be faster through oneDNN than through torch.mm, conversions of the rows included. ``Packed`` uses
it where torch has it, as optima's own solver does, so that no method wins by its BLAS.

Shapes: R rows, D inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Below this size converting the rows costs more than it saves.
SMALLEST_PACKED = 64


class Packed:
    """``rows @ matrix`` for a symmetric matrix, computed in ``dtype``, returned in the dtype of the rows."""

    def __init__(self, matrix_DD: Tensor, dtype: torch.dtype, onednn: bool = True) -> None:
        self.dtype = dtype
        matrix_DD = matrix_DD.to(dtype)
        fits = matrix_DD.device.type == "cpu" and dtype == torch.float32 and len(matrix_DD) >= SMALLEST_PACKED
        available = torch.backends.mkldnn.is_available()
        self.matrix_DD = matrix_DD.to_mkldnn() if onednn and fits and available else matrix_DD

    def __call__(self, rows_RD: Tensor) -> Tensor:
        low_RD = rows_RD.to(self.dtype)
        if self.matrix_DD.is_mkldnn:
            return functional.linear(low_RD.to_mkldnn(), self.matrix_DD).to_dense().to(rows_RD.dtype)
        return (low_RD @ self.matrix_DD).to(rows_RD.dtype)
