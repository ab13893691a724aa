"""What calibration finds for one group of linears with one input."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from optima.core.hessian import Hessian


def sampling_step(count: int, wanted: int) -> int:
    """The distance of about ``wanted`` of ``count`` things at which all places of a row, of any size, have their turn.

    Things may be tokens in sequences and batches, or entries of a matrix.
    """
    step = max(count // wanted, 1)
    return next(candidate for candidate in itertools.count(step) if math.gcd(candidate, count) == 1)


@dataclass(frozen=True)
class Statistics:
    """What calibration finds for one group of linears with one input.

    Attributes:
        hessian: H = X^T S X / tr S, S the token weights, with its damping.
        tokens: T, the tokens that reached the group.
    """

    hessian: Hessian
    tokens: int = 0
