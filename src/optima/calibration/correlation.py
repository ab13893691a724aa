"""Which rows of a linear go together: the correlations of the gradients at its outputs.

To second order the loss grows by 1/2 tr(G D H D^T), D the change of the weight, H of its inputs and G = E g g^T of the
gradients g at its outputs (K-FAC: Martens and Grosse, arXiv 1503.05671). The diagonal of G holds the row weights. The
rest says how errors of two rows add up: masks are chosen by it (``selectors.optima``); rows are still solved one by
one, with certificates.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, O outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad

from optima.device import bfloat16_products
from optima.linalg.shifted_inverse import MOST_EIGENVALUES
from optima.models.blocks import Block, Linear, is_expert

# Correlations are scaled by this beyond their reliability, so that no eigenvalue falls below 0.1.
SHRINKAGE = 0.9
# Matrices of more rows, one for each linear, would take more memory than all else that waits.
MOST_ROWS = 4096


def couples(linear: Linear) -> bool:
    """Whether the coupling of a linear's rows is found.

    Not where outputs outnumber inputs, as in an MLP's first half: it costs more there, and gains less. Nor for experts,
    most of which are given few tokens, nor for more inputs than an eigendecomposition can have.
    """
    outputs, inputs = linear.shape
    return outputs <= min(inputs, MOST_ROWS) and inputs <= MOST_EIGENVALUES and not is_expert(linear)


def coupling_bytes(blocks: Sequence[Block], needs: Collection[str]) -> int:
    """Bytes of the row correlations: a float32 O x O matrix a linear, half of which stays until it is pruned."""
    if "coupling" not in needs:
        return 0
    return sum(4 * linear.shape[0] ** 2 for block in blocks for linear in block.linears if couples(linear))


class Halves:
    """Sums of g g^T at a block's linears, (2, O, O), over the tokens of each half of the sequences, on the device.

    Tempered as token weights are (``calibration.fisher``): few tokens have most of the squares.

    Args:
        block: whose linears they are.
        sizes: (B, L) of each batch.
        numbers: of each batch's first sequence, see ``fisher.fisher_numbers``; None: nothing is summed.
        before: sums over earlier batches, ``packed``: batches are added one after the other, however they are parted.
    """

    def __init__(
        self,
        block: Block,
        sizes: Sequence[tuple[int, int]],
        numbers: Sequence[int] | None,
        before: Mapping[str, Tensor],
    ) -> None:
        self._names = {linear.name for linear in block.linears if numbers is not None and couples(linear)}
        self._sizes, self._numbers, self._before = sizes, numbers, before
        self.sums: dict[str, Tensor] = {}

    def products(self, name: str, gradient_TO: Tensor, factor_T: Tensor, batch: int, part: slice) -> Tensor | None:
        """The sums over some samples of a batch; None where they are not found.

        ``factor_T``: ``tempering`` of each token's products.
        """
        count, (_, length) = part.stop - part.start, self._sizes[batch]
        if self._numbers is None or name not in self._names or len(factor_T) != count * length:
            return None
        first = self._numbers[batch] + part.start
        odd_B = torch.arange(first, first + count) % 2
        tempered_BTO = (gradient_TO.float() * factor_T.sqrt()[:, None]).unflatten(0, (count, length))
        products = torch.empty(2, *gradient_TO.shape[1:] * 2, device=gradient_TO.device)
        rounded = gradient_TO.dtype == torch.bfloat16
        if rounded:  # as the factors of such products must be, wherever they are made
            tempered_BTO = tempered_BTO.bfloat16().float()
        with bfloat16_products() if rounded else nullcontext():
            for half, product_OO in enumerate(products):
                half_TO = tempered_BTO[(odd_B == half).to(gradient_TO.device)].flatten(0, 1)
                torch.mm(half_TO.mT, half_TO, out=product_OO)
        return products

    def add(self, name: str, products: Tensor) -> None:
        """Add what ``products`` returned."""
        if name not in self.sums and name in self._before:
            self.sums[name] = unpacked(self._before[name].to(products))
        self.sums[name] = self.sums[name].add_(products) if name in self.sums else products


def packed(halves: Tensor) -> Tensor:
    """Both symmetric matrices in the memory of one, (O, O + 1): the first right of the diagonal, the second left of it.

    They wait so, and are added to such others.
    """
    return pad(halves[0].triu(), (1, 0)) + pad(halves[1].tril(), (0, 1))


def unpacked(packed_OP: Tensor) -> Tensor:
    """The two of ``packed``, (2, O, O)."""
    upper_OO, lower_OO = packed_OP[:, 1:], packed_OP[:, :-1]
    return torch.stack((upper_OO.triu() + upper_OO.triu(1).mT, lower_OO.tril() + lower_OO.tril(-1).mT))


def finished(packed_OP: Tensor) -> Tensor:
    """``coupling`` of two sums as they waited, in half the memory, rounded too little to have a negative eigenvalue."""
    return coupling(unpacked(packed_OP)).half()


def coupling(halves: Tensor) -> Tensor:
    """How rows go together, (O, O), positive definite: their correlations over both ``halves``, drawn towards none.

    What the halves agree on is signal. A correlation of a between them is one of 2 a / (1 + a), squared, between the
    whole and the truth (Spearman and Brown, 1910).
    """
    first_OO, second_OO = map(_correlations, halves)
    size = float(first_OO.norm() * second_OO.norm())
    agreement = min(max(float(torch.sum(first_OO * second_OO)) / size, 0.0), 1.0) if size > 0.0 else 0.0
    coupling_OO = _correlations(halves.sum(dim=0)).mul_(SHRINKAGE * 2.0 * agreement / (1.0 + agreement))
    coupling_OO.diagonal().fill_(1.0)
    return coupling_OO


def _correlations(product_OO: Tensor) -> Tensor:
    """Those of different rows; 0 on the diagonal, and for rows that the loss does not feel."""
    square_O = product_OO.diagonal()
    unit_O = torch.where(square_O > 0.0, square_O.rsqrt(), 0.0)
    correlation_OO = (product_OO * unit_O).mul_(unit_O[:, None])
    correlation_OO.diagonal().zero_()
    return correlation_OO
