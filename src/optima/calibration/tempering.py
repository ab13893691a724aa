"""How squares of gradients become weights: at a root, and never so that too few tokens decide.

Gradients are heavy-tailed, so squares are used at a root. Where that leaves fewer than ``EFFECTIVE`` effective tokens
an input (Kish: (sum s)^2 / sum s^2), a hessian would be that of a few tokens. Weights are drawn towards their mean
then, as far as needed; where there are not as many tokens at all, all count alike.

Shapes: T tokens, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Token weights are s^POWER, row weights r^POWER: the square is the second-order loss, too heavy-tailed to be trusted.
POWER = 0.5
# Effective tokens for each input of a linear, at least.
EFFECTIVE = 8


class Moments(NamedTuple):
    """Of the tempered weights of a linear's tokens.

    Attributes:
        tokens: so many.
        total: sum of their weights.
        squares: sum of the squares of their weights.
        inputs: of the linear; 0: any number of effective tokens will do.
    """

    tokens: float
    total: float
    squares: float
    inputs: int = 0

    @classmethod
    def of(cls, squares: Sequence[Tensor], inputs: int) -> Moments:
        """Of the tokens of several batches, untempered squares (T,)."""
        own = [square_T.pow(POWER) for square_T in squares]
        total, squared = sum(float(own_T.sum()) for own_T in own), sum(float(own_T @ own_T) for own_T in own)
        return cls(sum(map(len, own)), total, squared, inputs)

    @classmethod
    def over(cls, parts: Sequence[Moments]) -> Moments:
        """Of all tokens that ``parts`` have."""
        count, total, squares = (sum(part[number] for part in parts) for number in range(3))
        return cls(count, total, squares, parts[0].inputs)

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
        return (
            math.sqrt((self.tokens / wanted - 1.0) / (self.tokens / effective - 1.0)) if wanted < self.tokens else 0.0
        )

    @property
    def effective(self) -> float:
        """As so many tokens of equal weight tell, once the weights are drawn towards their mean."""
        return self.tokens / (1.0 + self.kept**2 * (self.tokens * self.squares / self.total**2 - 1.0))

    def weights(self, square_T: Tensor) -> Tensor:
        """Of some of the tokens, (T,), whose squares are ``square_T``; the mean of all is 1."""
        own_T = square_T.pow(POWER) * (self.tokens / self.total)
        return torch.lerp(torch.ones_like(own_T), own_T, self.kept)


def row_weights(square_O: Tensor) -> Tensor:
    """Of a linear's rows, (O,), with the mean of their squares."""
    tempered_O = square_O.pow(POWER)
    return tempered_O * (square_O.mean() / tempered_O.mean())
