"""The sum X^T S X of linears that share their input.

Shapes: T tokens, D inputs, N tokens that weigh more than one, or whose inputs are kept.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from optima.core.hessian import Hessian
from optima.core.products import ROUND_ROWS, add_gram, all_finite, mirror
from optima.core.statistics import Statistics
from optima.device import bfloat16_products


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
    ) -> None:
        """Add tokens that weigh 1 each, or ``weight_T``. Out of memory, it adds nothing at all.

        Args:
            inputs_TD: of the tokens.
            weight_T: of each.
            heavy_ND: those of them that weigh more, each by ``weight``.
            weight: see there.
            sample_ND: those of them to keep.
        """
        tokens, waiting = len(inputs_TD), self._waiting
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
        # oneDNN compiles a product for each number of tokens: zeros make the numbers at experts repeat.
        if missing := -tokens % ROUND_ROWS:
            inputs_TD = nn.functional.pad(inputs_TD, (0, 0, 0, missing))
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
        hessian = Hessian(self.mean(), damping)
        sample_ND = torch.cat(self.sample) if self.sample else None
        return Statistics(hessian, self.tokens, extra_ND, self.extra_weight, sample_ND)

    def mean(self) -> Tensor:
        """X^T S X / tr S, (D, D), float64. The sum is used up."""
        assert self.sum_DD is not None
        sum_DD, self.sum_DD = mirror(self.sum_DD), None
        if self.extra:
            extra_ND = torch.cat(self.extra).double()
            sum_DD.addmm_(extra_ND.mT, extra_ND)
        return sum_DD.div_(self.tokens + self.extra_weight)
