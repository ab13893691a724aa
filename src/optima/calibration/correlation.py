"""Row correlations (K-FAC): the correlations of the gradients at the outputs of a linear.

To second order the loss grows by 1/2 tr(G D H D^T), D the change of the weight, H of its inputs and G = E g g^T of the
gradients g at its outputs (K-FAC: Martens and Grosse, arXiv 1503.05671). The diagonal of G holds the row weights. The
rest says how errors of two rows add up: masks are chosen by it (``selectors.optima``); rows are still solved one by
one, with certificates.

Shapes: B sequences in a batch, T tokens, O outputs.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from optima.core.shifted import MOST_EIGENVALUES
from optima.device import bfloat16_products
from optima.models.blocks import Linear, is_expert

# Correlations are scaled by this beyond their reliability, so that no eigenvalue falls below 0.1.
SHRINKAGE = 0.9
# Matrices of more rows, one for each linear, would take more memory than all else that waits.
MOST_ROWS = 4096


def couples(linear: Linear) -> bool:
    """Whether the correlations of a linear's rows are found.

    Not where outputs outnumber inputs, as in an MLP's first half: it costs more there, and gains less. Nor for experts,
    most of which get few tokens, nor for more inputs than an eigendecomposition can have.
    """
    outputs, inputs = linear.shape
    return outputs <= min(inputs, MOST_ROWS) and inputs <= MOST_EIGENVALUES and not is_expert(linear)


def products_of_halves(gradient_TO: Tensor, factor_T: Tensor, odd_B: Tensor) -> Tensor:
    """Sums of g g^T over the tokens of each half of the sequences, (2, O, O).

    Args:
        gradient_TO: of the tokens of whole sequences.
        factor_T: by what to multiply each token's product: see ``calibration.fisher``.
        odd_B: the half of each sequence, 0 or 1.
    """
    tempered_BTO = (gradient_TO.float() * factor_T.sqrt()[:, None]).unflatten(0, (len(odd_B), -1))
    products = torch.empty(2, *gradient_TO.shape[1:] * 2, device=gradient_TO.device)
    rounded = gradient_TO.dtype == torch.bfloat16
    if rounded:  # as the factors of such products must be, wherever they are made
        tempered_BTO = tempered_BTO.bfloat16().float()
    with bfloat16_products() if rounded else nullcontext():
        for half, product_OO in enumerate(products):
            half_TO = tempered_BTO[(odd_B == half).to(gradient_TO.device)].flatten(0, 1)
            torch.mm(half_TO.mT, half_TO, out=product_OO)
    return products


def correlated_rows(halves: Tensor) -> Tensor:
    """Correlations of rows over both ``halves``, (O, O), positive definite: shrunk to 0 by split-half reliability.

    A correlation of a between the halves is one of 2 a / (1 + a), squared, between the whole and the truth (Spearman
    and Brown, 1910).
    """
    first_OO, second_OO = map(_correlations, halves)
    size = float(first_OO.norm() * second_OO.norm())
    agreement = min(max(float(torch.sum(first_OO * second_OO)) / size, 0.0), 1.0) if size > 0.0 else 0.0
    found_OO = _correlations(halves.sum(dim=0)).mul_(SHRINKAGE * 2.0 * agreement / (1.0 + agreement))
    found_OO.diagonal().fill_(1.0)
    return found_OO


def _correlations(product_OO: Tensor) -> Tensor:
    """Those of different rows; 0 on the diagonal, and for rows without gradients."""
    square_O = product_OO.diagonal()
    unit_O = torch.where(square_O > 0.0, square_O.rsqrt(), 0.0)
    correlation_OO = (product_OO * unit_O).mul_(unit_O[:, None])
    correlation_OO.diagonal().zero_()
    return correlation_OO
