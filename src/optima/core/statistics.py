"""What calibration finds for one group of linears with one input.

Shapes: T tokens, D inputs, O outputs, N tokens that weigh more than one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optima.core.hessian import Hessian


def sampling_step(count: int, wanted: int) -> int:
    """The distance of about ``wanted`` of ``count`` things at which all places of a row, of any size, have their turn.

    Things may be tokens in sequences and batches, or entries of a matrix.
    """
    step = max(count // wanted, 1)
    return next(candidate for candidate in itertools.count(step) if math.gcd(candidate, count) == 1)


@dataclass(frozen=True)
class Statistics:
    """The hessian H = X^T S X / tr S, and what is needed to tell it from the plain X^T X / T.

    Attributes:
        hessian: H, with its damping.
        tokens: T, the tokens that reached the group.
        extra_ND: inputs of the tokens that weigh more than one, each times the root of what it weighs beyond one, so
            that X^T S X - X^T X is ``extra^T extra``; None if every token weighs one.
        extra_weight: tr S - T.
        sample_ND: inputs of some tokens, evenly spaced, where every token has a weight of its own.
    """

    hessian: Hessian
    tokens: int = 0
    extra_ND: Tensor | None = None
    extra_weight: float = 0.0
    sample_ND: Tensor | None = None

    def plain_loss(self, weighted_O: Tensor, change_OD: Tensor) -> Tensor:
        """Each row's mean square change of output with every token alike, from that with S or over the sample.

        Args:
            weighted_O: diag(change H change^T), H undamped.
            change_OD: the change of the weights.
        """
        if self.sample_ND is not None:
            sampled_ON = change_OD.to(self.sample_ND.dtype) @ self.sample_ND.mT
            return sampled_ON.square().mean(dim=1, dtype=torch.float64)
        if self.extra_ND is None or not self.tokens:
            return weighted_O
        extra_ON = change_OD.to(self.extra_ND.dtype) @ self.extra_ND.mT
        plain_O: Tensor = (
            (self.tokens + self.extra_weight) * weighted_O - torch.linalg.vecdot(extra_ON, extra_ON)
        ) / self.tokens
        return plain_O.clamp_min(0.0)
