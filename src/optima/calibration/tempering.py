"""How squares of gradients become weights: at a root, and never so that too few tokens decide.

Gradients are heavy-tailed, so squares are used at a root. Where that leaves fewer than ``EFFECTIVE`` effective tokens
an input (Kish: (sum s)^2 / sum s^2), a hessian would be that of a few tokens. Weights are drawn towards their mean
then, as far as needed; where there are not as many tokens at all, all count alike. An input that all sequences start
with, as BOS, stays as heavy as it is and is not counted: it is one input, and known, however often it comes.

Shapes: T tokens, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Token weights are s^POWER, row weights r^POWER: the square is the second-order loss, too heavy-tailed to be trusted.
POWER = 0.5
# Effective tokens for each input of a linear, at least.
EFFECTIVE = 8
# Where rows are told by so many tokens, half of what they differ by is believed.
FEW_TOKENS = 16


class Moments(NamedTuple):
    """Of the tempered weights of a linear's tokens, without those of an input that all sequences start with.

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

    def weights(self, square_T: Tensor, start_T: Tensor) -> Tensor:
        """Of tokens of these squares, (T,), some of them of a shared start; of mean 1 over all others."""
        own_T = square_T.pow(POWER) * (self.tokens / self.total)
        return torch.where(start_T, own_T, torch.lerp(torch.ones_like(own_T), own_T, self.kept))


def tempering(square_T: Tensor) -> Tensor:
    """By what to multiply what is summed over tokens of these squares, (T,), so that few of them do not decide."""
    return square_T.pow(POWER - 1.0).masked_fill_(square_T == 0.0, 0.0)


def rows_of_sums(sum_2O: Tensor) -> Tensor:
    """Of a linear's rows, (O,): the second of these sums, of tempered squares, at the level of the first."""
    square, tempered = sum_2O.sum(dim=1).tolist()
    return sum_2O[1] * (square / tempered if tempered else 0.0)


def row_weights(square_O: Tensor, tokens: float = math.inf) -> Tensor:
    """Of a linear's rows, (O,), with the mean of their squares; drawn towards it where so few ``tokens`` tell them."""
    tempered_O = square_O.pow(POWER)
    weight_O = tempered_O * (square_O.mean() / tempered_O.mean())
    return weight_O if tokens == math.inf else torch.lerp(weight_O.mean(), weight_O, tokens / (tokens + FEW_TOKENS))


@dataclass
class LossWeights:
    """Squares of gradients at the outputs of linears and blocks, untempered.

    Attributes:
        loss: whose gradients they are, in words.
        told: what a report must tell of how they were found.
        tokens: by the name of a group's first linear, or of a block: for each batch (T,), summed over the outputs.
            Groups that are not given every token, as experts, have none.
        routed: by the name of an expert's linear: for each batch the tokens that were routed to it, and their squares.
        rows: by the name of a linear: the mean over tokens of g_to^2, tempered as tokens are, with the mean of what is
            not, (O,); during the sweep the sums of both, (2, O).
        reached: by the name of a linear that is not given every token: so many have known gradients, of all processes.
        residual: by the name of a block: the mean over tokens of g g^T at its outputs, (E, E).
        coupling: by the name of a linear: how its rows go together, (O, O); during the sweep the sums of both halves,
            see ``calibration.coupling.packed``.
        inputs: of each linear, by its name.
        lengths: of each batch's sequences, if all start with the same input; empty if they do not.
        shared: of the tokens of all processes, by the names of ``tokens`` and ``routed``, which are of this process's.
    """

    loss: str
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    routed: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    coupling: dict[str, Tensor] = field(default_factory=dict)
    told: str = ""
    inputs: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    shared: dict[str, Moments] = field(default_factory=dict)

    def forget(self, names: Collection[str]) -> None:
        """A block and its linears are done: let go of what is needed once."""
        for known in (self.tokens, self.routed, self.rows, self.residual, self.coupling):
            for name in names:
                known.pop(name, None)

    def part(self, batches: Sequence[int]) -> LossWeights:
        """The weights of some batches, as ``Streams.part``; what is known of all tokens stays."""
        tokens, routed = (
            {name: [own[batch] for batch in batches] for name, own in known.items()}
            for known in (self.tokens, self.routed)
        )
        lengths = [self.lengths[batch] for batch in batches] if self.lengths else []
        return replace(self, tokens=tokens, routed=routed, lengths=lengths)  # type: ignore[arg-type]

    def moments(self, name: str) -> Moments:
        """Of the tempered weights, for a name of ``tokens`` or ``routed``."""
        if name in self.shared:
            return self.shared[name]
        own = (
            self.routed[name]
            if name in self.routed
            else [(_places(all_T), all_T) for all_T in self.tokens.get(name, [])]
        )
        counted = [own_T[~self._starts(batch, at_T)] for batch, (at_T, own_T) in enumerate(own)]
        return Moments.of(counted, self.inputs.get(name, 0))

    def _starts(self, batch: int, at_T: Tensor) -> Tensor:
        """Which of a batch's tokens, at places ``at_T``, are the input that all sequences start with."""
        return at_T % self.lengths[batch] == 0 if self.lengths else torch.zeros_like(at_T, dtype=torch.bool)

    def of_tokens(self, name: str) -> list[Tensor] | None:
        """Weights of each batch's tokens, (T,), for a group's first linear or a block ``name``; see ``Moments``.

        None where they are not known, or no token matters.
        """
        moments = self.moments(name)
        if not moments.total or name not in self.tokens:
            return None
        own = enumerate(self.tokens[name])
        return [moments.weights(own_T, self._starts(batch, _places(own_T))) for batch, own_T in own]

    def of_routed(self, name: str, batch: int, size: int) -> Tensor | None:
        """As ``of_tokens`` at an expert's linear ``name``: of a batch's ``size`` tokens, wherever they were routed.

        A token that the dense model sent elsewhere has the mean of the expert's, which is 1.
        """
        moments = self.moments(name)
        if not moments.total or name not in self.routed:
            return None
        tokens_T, own_T = self.routed[name][batch]
        weight_T = torch.ones(size)
        weight_T[tokens_T.long()] = moments.weights(own_T, self._starts(batch, tokens_T))
        return weight_T

    def effective_tokens(self, name: str) -> float | None:
        """(sum s)^2 / sum s^2 of the weights: so many equal tokens would tell as much."""
        moments = self.moments(name)
        return moments.effective if moments.total else None

    def of_rows(self, name: str) -> Tensor | None:
        """Tempered weights of a linear's rows, (O,), with the mean of those that are not; None if none matters."""
        row_O = self.rows.get(name)
        known = self.reached.get(name, math.inf)
        return None if row_O is None or not bool(row_O.any()) else row_weights(row_O, known)

    def compared(self, name: str, outputs: int) -> Tensor:
        """As ``of_rows``, where linears compete: zeros if none matters, as for an expert that no token reached."""
        row_O = self.of_rows(name)
        return torch.zeros(outputs) if row_O is None else row_O


def _places(tokens: Tensor) -> Tensor:
    return torch.arange(len(tokens))
