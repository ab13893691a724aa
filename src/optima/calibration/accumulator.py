"""The sums that calibration keeps for linears that share their input, and what it hands on of them.

Shapes: T tokens, D inputs, N tokens that weigh more than one, or whose inputs are kept.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from optima.device import bfloat16_products
from optima.linalg.finite import all_finite
from optima.linalg.hessian import Hessian
from optima.linalg.products import add_gram, mirror
from optima.linalg.statistics import Statistics
from optima.models.blocks import Linear

# Tokens whose inputs are kept, where tokens have weights, to say what is lost with every token alike.
SAMPLE = 512


@dataclass(frozen=True)
class Found:
    """What calibration found for linears that share their input.

    Attributes:
        statistics: of the input; None if no token reached the linears.
        linears: the linears.
        told: False if tokens could not be told from each other, as in the experts of a mixture: they weigh alike then.
        owner: number of the process that prunes them; None: all processes together. Others have no statistics.
    """

    statistics: Statistics | None
    linears: tuple[Linear, ...]
    told: bool = True
    owner: int | None = 0


class Accumulator:
    """X^T S X over the tokens seen so far, S their weights: float32 products of each batch, summed in float64.

    Where X is of bfloat16, so is S^1/2 X.
    """

    def __init__(self) -> None:
        self.sum_DD: Tensor | None = None
        self.tokens = 0
        self.extra: list[Tensor] = []
        self.sample: list[Tensor] = []
        self._extra_weight = 0.0
        self._waiting: Tensor | None = None  # more of it, on the device, which is not waited for until it is asked for

    @property
    def extra_weight(self) -> float:
        """Of all tokens, beyond one each."""
        if self._waiting is not None:
            self._extra_weight += float(self._waiting)
            self._waiting = None
        return self._extra_weight

    @extra_weight.setter
    def extra_weight(self, value: float) -> None:
        self._extra_weight, self._waiting = value, None

    @property
    def finite(self) -> bool:
        """False if the tokens, or their squares, have NaN or Inf: the sum is of no use then.

        They show on the diagonal, wherever in a column they are.
        """
        return self.sum_DD is None or all_finite(self.sum_DD.diagonal())

    def add(
        self,
        inputs_TD: Tensor,
        weight_T: Tensor | None = None,
        heavy_ND: Tensor | None = None,
        weight: float = 0.0,
        sample_ND: Tensor | None = None,
        padding: int = 0,
    ) -> None:
        """Add tokens that weigh 1 each, or ``weight_T``. Out of memory, it adds nothing at all.

        Args:
            inputs_TD: of the tokens.
            weight_T: of each.
            heavy_ND: those of them that weigh more, each by ``weight``.
            weight: see there.
            sample_ND: those of them to keep.
            padding: so many at the end are none; their inputs and weights are zeros.
        """
        tokens, waiting = len(inputs_TD) - padding, self._waiting
        extra = [] if heavy_ND is None else [heavy_ND.float() * weight**0.5]
        # A copy: as a view it would hold the whole batch.
        sample = [] if sample_ND is None else [sample_ND.to(torch.float32, copy=True)]
        if self.sum_DD is None:
            size = inputs_TD.shape[1]
            self.sum_DD = torch.zeros(size, size, dtype=torch.float64, device=inputs_TD.device)
        if weight_T is not None:
            more = weight_T.sum(dtype=torch.float64) - tokens
            waiting = more if waiting is None else waiting + more
            weighted_TD = inputs_TD.float() * weight_T.sqrt()[:, None]
            # Rounded as the model rounds its inputs, for bfloat16 multiplies faster.
            inputs_TD = weighted_TD.bfloat16() if inputs_TD.dtype == torch.bfloat16 else weighted_TD
        with bfloat16_products() if inputs_TD.dtype == torch.bfloat16 else nullcontext():
            add_gram(self.sum_DD, inputs_TD)
        self.tokens += tokens
        self._extra_weight += weight * sum(map(len, extra))
        self._waiting = waiting
        self.extra += extra
        self.sample += sample

    def finish(self, damping: float) -> Statistics | None:
        """H = X^T S X / tr S and what it is made of; None if there were no tokens. The accumulator is used up."""
        if self.sum_DD is None:
            return None
        extra_ND = torch.cat(self.extra) if self.extra else None
        mirror(self.sum_DD)
        if extra_ND is not None:
            self.sum_DD.addmm_(extra_ND.double().mT, extra_ND.double())
        hessian = Hessian(self.sum_DD.div_(self.tokens + self.extra_weight), damping)
        sample_ND = torch.cat(self.sample) if self.sample else None
        return Statistics(hessian, self.tokens, extra_ND, self.extra_weight, sample_ND)


def sampled(rows: Tensor, before: int, step: int) -> Tensor:
    """Every ``step``-th row, counted over all batches, of which there were ``before`` in earlier ones."""
    return rows[-before % step :: step]
