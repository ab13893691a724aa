"""Fisher weights of tokens and rows, tempered and shrunk.

Gradients are heavy-tailed, so their squares are tempered: used at a root. Where that leaves fewer than ``EFFECTIVE``
effective tokens an input (Kish: (sum s)^2 / sum s^2), weights are shrunk towards their mean, as far as needed. An input
that all sequences start with, such as BOS, keeps its weight and is not counted: it is one input.

Shapes: T tokens, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Token weights are s^POWER, row weights r^POWER: the square is the second-order loss, too heavy-tailed to be trusted.
POWER = 0.5
# Effective tokens for each input of a linear, at least.
EFFECTIVE = 8
# Row weights estimated from so many tokens are shrunk halfway to their mean.
FEW_TOKENS = 16


class Moments(NamedTuple):
    """Of the tempered weights of a linear's tokens: how many, the sums of the weights and of their squares.

    ``inputs``: of the linear; 0: any number of effective tokens will do.
    """

    tokens: float
    total: float
    squares: float
    inputs: int = 0

    @classmethod
    def of(cls, squares: Sequence[Tensor], inputs: int = 0) -> Moments:
        """Of the tokens of several batches, untempered squares (T,)."""
        own = [square_T.pow(POWER) for square_T in squares]
        total, squared = sum(float(own_T.sum()) for own_T in own), sum(float(own_T @ own_T) for own_T in own)
        return cls(sum(map(len, own)), total, squared, inputs)

    def among(self, count: float) -> Moments:
        """Of ``count`` tokens, of which all others have the mean."""
        if not self.total:
            return self._replace(tokens=count)
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

    @property
    def effective(self) -> float:
        """Effective sample size (Kish) once the weights are shrunk towards their mean."""
        return self.tokens / (1.0 + self.kept**2 * (self.tokens * self.squares / self.total**2 - 1.0))

    def weights(self, square_T: Tensor, start_T: Tensor) -> Tensor:
        """Of tokens of these squares, (T,); of mean 1 over all but those of a shared start, which are not shrunk."""
        own_T = square_T.pow(POWER) * (self.tokens / self.total)
        return torch.where(start_T, own_T, torch.lerp(torch.ones_like(own_T), own_T, self.kept))


def row_weights(square_O: Tensor, tokens: float = math.inf) -> Tensor:
    """Of a linear's rows, (O,), with the mean of their squares; shrunk towards it where ``tokens`` are few."""
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
        effective: by the names of both: effective sample size (Kish), over all ranks.
        rows: by linear: (O,), with the mean over tokens of g_to^2.
        residual: by block: the mean over tokens of g g^T at its outputs, (E, E).
        coupling: by linear: correlations of its rows, (O, O), see ``calibration.correlation``.
    """

    loss: str
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    routed: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    effective: dict[str, float] = field(default_factory=dict)
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
