"""Products of many rows with one shared matrix, at the speed that the device allows.

Measured on two cores of a Zen 5 server, D = 640..2048: a float32 product runs at 230 GFLOP/s through ``torch.mm`` (MKL)
and at 490 through oneDNN, to the same accuracy. Every float32 product on a CPU goes through oneDNN where torch has it:
``torch.ops.mkldnn`` is private to torch, and used in this file alone.

Shapes: R rows, D inputs, B inputs of one diagonal block of a triangular factor, T tokens.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

# Diagonal block of a triangular solve: small compared with D, wide enough for products at full speed.
BLOCK = 256
# Below this size oneDNN saves nothing.
SMALLEST_PACKED = 64
# oneDNN multiplies ordinary rows by a packed matrix through the operator that torch's own compiler uses.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# The packed layout depends on how many rows are expected.
TYPICAL_ROWS = 512
# Units of a CPU for bfloat16.
AMX: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
# Tokens whose products are added in float32 on a GPU: tensor cores cut sums off, where a CPU rounds them (Ootomo and
# Yokota, arXiv 2203.03341), and the more of them the more is lost.
SLICE = 4096
# Panels of a Gram matrix: 8 leave 9/16 of the products. Thinner ones than the second number are short of full speed.
PANELS, THINNEST = 8, 192 if AMX else 128
# oneDNN compiles a product for every number of rows: numbers should repeat.
ROUND_ROWS = 64


def all_finite(*tensors: Tensor) -> bool:
    """Whether float tensors of one device have neither NaN nor Inf: their extremes tell, for either would be one.

    On a CPU this takes a twentieth of the time of ``isfinite``, and a GPU is waited for once.
    """
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in tensor.detach().aminmax()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def fixed_directions(count: int, like: Tensor) -> Tensor:
    """The same normally distributed numbers in every run and on every device, (count, D), of the dtype of ``like``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, len(like), generator=generator, dtype=torch.float64, device="cpu").to(like)


def sampling_step(count: int, wanted: int) -> int:
    """The distance of about ``wanted`` of ``count`` things that reaches all places of a row, of any size.

    Things may be tokens in sequences and batches, or entries of a matrix.
    """
    step = max(count // wanted, 1)
    return next(candidate for candidate in itertools.count(step) if math.gcd(candidate, count) == 1)


def keep_freed_memory() -> None:
    """Let glibc keep what torch frees: page faults took an eighth of a forward pass, and a third of a small linear.

    Freeing one untouched block just below glibc's largest limit (32 MiB) raises its thresholds for mapping and trimming
    to it (mallopt(3), M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _packs(matrix: Tensor) -> bool:
    large = matrix.numel() >= SMALLEST_PACKED**2
    return ONEDNN and large and matrix.device.type == "cpu" and matrix.dtype == torch.float32


def pack(matrix: Tensor) -> Tensor:
    """``matrix`` in the layout in which ``multiply`` is fastest."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix, TYPICAL_ROWS) if _packs(matrix) else matrix


def multiply(rows_RD: Tensor, matrix: Tensor) -> Tensor:
    """``rows_RD @ matrix^T`` for a matrix of either layout and the dtype of the rows."""
    if not matrix.is_mkldnn:
        return rows_RD @ matrix.mT
    if not len(rows_RD):
        return rows_RD.new_empty(0, matrix.shape[0])
    return _onednn(rows_RD, matrix)


def _onednn(rows_RD: Tensor, matrix: Tensor) -> Tensor:
    product_RD: Tensor = torch.ops.mkldnn._linear_pointwise(rows_RD, matrix, None, "none", [], "")
    return product_RD


def scaled(matrix: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``factor * matrix`` in ``dtype``, contiguous, without a temporary of its size."""
    result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for source, destination in zip(matrix.split(BLOCK), result.split(BLOCK), strict=True):
        destination.copy_(source * factor)
    return result


class SharedFactor:
    """A lower triangular D x D factor L that measures rows: ||L^-1 r||.

    Triangular solves of MKL do not scale to two threads, oneDNN's products do: where those are used, substitution goes
    block by block, and diagonal blocks are inverted beforehand, in the precision of ``factor_DD``.

    Args:
        factor_DD: L.
        unit: multiplies it, once.
        dtype: precision of the products.
    """

    def __init__(self, factor_DD: Tensor, unit: float, dtype: torch.dtype) -> None:
        self._factor_DD: Tensor | None = None
        self._blocks: list[tuple[int, Tensor, Tensor]] = []
        if not _packs(torch.empty_like(factor_DD, dtype=dtype)):
            self._factor_DD = scaled(factor_DD, unit, dtype)
            return
        for begin in range(0, len(factor_DD), BLOCK):
            block = slice(begin, min(begin + BLOCK, len(factor_DD)))
            identity = torch.eye(block.stop - begin, dtype=factor_DD.dtype)
            inverse = torch.linalg.solve_triangular(factor_DD[block, block], identity, upper=False)
            below = scaled(factor_DD[block.stop :, block], unit, dtype)
            self._blocks.append((len(identity), pack(scaled(inverse, 1.0 / unit, dtype)), pack(below)))

    def squared_norm(self, rows_RD: Tensor) -> Tensor:
        """||L^-1 r||^2 of each row r, (R,); the sums over blocks of inputs are added up in float64."""
        if self._factor_DD is not None:
            solved_RD = torch.linalg.solve_triangular(self._factor_DD.mT, rows_RD, upper=True, left=False).double()
            norm_R: Tensor = torch.linalg.vecdot(solved_RD, solved_RD)
            return norm_R
        count = len(rows_RD)
        if missing := -count % ROUND_ROWS:
            rows_RD = nn.functional.pad(rows_RD, (0, 0, 0, missing))
        norm_R = rows_RD.new_zeros(len(rows_RD), dtype=torch.float64)
        for size, inverse, below in self._blocks:
            solved_RB = multiply(rows_RD[:, :size], inverse)
            norm_R += torch.linalg.vecdot(solved_RB, solved_RB)
            if rows_RD.shape[1] > size:
                product_RD = multiply(solved_RB, below)
                rows_RD = torch.sub(rows_RD[:, size:], product_RD, out=product_RD)
        return norm_R[:count]


def add_gram(sum_DD: Tensor, inputs_TD: Tensor) -> None:
    """Add X^T X, products in float32, to the lower triangle of a float64 sum; ``mirror`` makes it whole.

    On a CPU one triangle is multiplied, panel by panel. Units for bfloat16, see ``device.bfloat16_products``, read X as
    it lies; elsewhere oneDNN is fastest on the transpose.
    """
    if sum_DD.device.type != "cpu":
        for part_TD in inputs_TD.split(SLICE):
            part_TD = part_TD.float()
            sum_DD += part_TD.mT @ part_TD
        return
    by_units = AMX and inputs_TD.dtype == torch.bfloat16
    inputs_DT = inputs_TD.float().mT if by_units else inputs_TD.mT.contiguous().float()
    width = max(-(-len(inputs_DT) // PANELS), THINNEST)
    for begin in range(0, len(inputs_DT), width):
        panel, below = inputs_DT[begin : begin + width], inputs_DT[begin:]
        by_torch = by_units or not _packs(inputs_DT)
        sum_DD[begin:, begin : begin + width] += below @ panel.mT if by_torch else _onednn(below, panel)


def mirror(matrix_DD: Tensor) -> Tensor:
    """``matrix_DD`` with its upper triangle replaced by the lower one, in place, block by block."""
    for begin in range(0, len(matrix_DD), BLOCK):
        end = begin + BLOCK
        matrix_DD[begin:end, end:] = matrix_DD[end:, begin:end].mT
        own = matrix_DD[begin:end, begin:end]
        own.copy_(own.tril() + own.tril(-1).mT)
    return matrix_DD
