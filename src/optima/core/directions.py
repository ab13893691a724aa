"""Random directions that are the same for ever: in every run, on every device, whatever the caller seeds."""

from __future__ import annotations

import torch
from torch import Tensor


def fixed_directions(count: int, like: Tensor) -> Tensor:
    """Normally distributed numbers, (count, D), of the dtype and device of ``like``, which has D rows or numbers.

    Drawn on the CPU, of which a caller's default device says nothing.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, len(like), generator=generator, dtype=torch.float64, device="cpu").to(like)
