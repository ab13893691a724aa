"""Fisher weights of tokens and rows, tempered and shrunk, and correlations of rows.

Gradients are heavy-tailed, so their squares are tempered: used at a root. Where that leaves fewer than ``EFFECTIVE``
effective tokens an input (Kish: (sum s)^2 / sum s^2), weights are shrunk towards their mean, as far as needed. An input
that all sequences start with, such as BOS, keeps its weight and is not counted: it is one input.

*Row correlations* (K-FAC: Martens and Grosse, arXiv 1503.05671). To second order the loss grows by 1/2 tr(G D H D^T), D
the change of the weight, H of its inputs and G = E g g^T of the gradients g at its outputs. The diagonal of G holds the
row weights. The rest says how errors of two rows add up: masks are chosen by it (``selectors.optima``); rows are still
solved one by one, with certificates.

Shapes: B sequences in a batch, T tokens, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optima.core.shifted import MOST_EIGENVALUES
from optima.device import bfloat16_products
from optima.models.blocks import Linear, is_expert

# Token weights are s^POWER, row weights r^POWER: the square is the second-order loss, too heavy-tailed to be trusted.
POWER = 0.5
EFFECTIVE = 8  # effective tokens for each input of a linear, at least
SHRINKAGE = 0.9  # of correlations, beyond their reliability, so that no eigenvalue falls below 0.1
MOST_ROWS = 4096  # matrices of more rows, one for each linear, would take more memory than all else that waits
FEW_TOKENS = 16  # row weights estimated from so many tokens are shrunk halfway to their mean


class Moments(NamedTuple):
    """Moments of the tempered weights of a linear's tokens: how many, their sum and the sum of their squares.

    ``inputs``: of the linear; 0: any number of effective tokens will do.
    """

    tokens: float
    total: float
    squares: float
    inputs: int = 0

    @classmethod
    def of(cls, squares: Sequence[Tensor], inputs: int = 0) -> Moments:
        """Moments of the tokens of several batches, untempered squares (T,)."""
        own = [square_T.pow(POWER) for square_T in squares]
        total, squared = sum(float(own_T.sum()) for own_T in own), sum(float(own_T @ own_T) for own_T in own)
        return cls(sum(map(len, own)), total, squared, inputs)

    def among(self, count: float) -> Moments:
        """Moments of ``count`` tokens, of which all others have the mean."""
        mean, others = self.total / self.tokens, count - self.tokens
        return self._replace(tokens=count, total=mean * count, squares=self.squares + others * mean**2)

    @property
    def kept(self) -> float:
        """What is left of the deviations from the mean, 0 to 1."""
        wanted = EFFECTIVE * self.inputs
        effective = self.total**2 / self.squares
        if effective >= wanted:
            return 1.0
        if wanted >= self.tokens:
            return 0.0
        return math.sqrt((self.tokens / wanted - 1.0) / (self.tokens / effective - 1.0))

    def weights(self, square_T: Tensor, start_T: Tensor) -> Tensor:
        """Weights of tokens, (T,), of mean 1 over all but those of a shared start, which are not shrunk."""
        own_T = square_T.pow(POWER) * (self.tokens / self.total)
        return torch.where(start_T, own_T, torch.lerp(torch.ones_like(own_T), own_T, self.kept))


def row_weights(square_O: Tensor, tokens: float = math.inf) -> Tensor:
    """Weights of a linear's rows, (O,), with the mean of their squares; shrunk towards it where ``tokens`` are few."""
    tempered_O = square_O.pow(POWER)
    weight_O = tempered_O * (square_O.mean() / tempered_O.mean())
    return weight_O if tokens == math.inf else torch.lerp(weight_O.mean(), weight_O, tokens / (tokens + FEW_TOKENS))


@dataclass
class FisherWeights:
    """Weights of tokens and rows, tempered and shrunk, by the names of linears and blocks. All on the CPU.

    Attributes:
        loss: whose gradients they are, for the report.
        tokens: by the first linear of a group, or by block: for each batch (T,), of mean 1. Not where tokens do not
            matter, nor for groups that do not get every token.
        routed: by an expert's linear: for each batch the tokens that were routed to it, and their weights.
        rows: by linear: (O,), with the mean over tokens of g_to^2.
        residual: by block: the mean over tokens of g g^T at its outputs, (E, E).
        coupling: by linear: correlations of its rows, (O, O), see ``correlated_rows``.
    """

    loss: str
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    routed: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    coupling: dict[str, Tensor] = field(default_factory=dict)

    def forget(self, names: Collection[str]) -> None:
        """Free what is known of a block and its linears, which are done."""
        known: Any
        for known in (self.tokens, self.routed, self.rows, self.residual, self.coupling):
            for name in names:
                known.pop(name, None)

    def part(self, batches: Sequence[int]) -> FisherWeights:
        """The weights of some batches, as ``Activations.part``."""
        tokens = {name: [own[batch] for batch in batches] for name, own in self.tokens.items()}
        routed = {name: [own[batch] for batch in batches] for name, own in self.routed.items()}
        return replace(self, tokens=tokens, routed=routed)

    def of(self, name: str, batch: int, size: int) -> Tensor | None:
        """Weights of a batch's ``size`` tokens at a linear or block, (T,); None if they are not known.

        Of an expert: a token that the dense model sent elsewhere has the mean, which is 1.
        """
        if name in self.tokens:
            return self.tokens[name][batch]
        if name not in self.routed:
            return None
        tokens_T, own_T = self.routed[name][batch]
        weight_T = torch.ones(size)
        weight_T[tokens_T.long()] = own_T
        return weight_T


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
