"""Automatic batch-size reduction: a batch that is out of device memory runs in halves, and so do all later ones.

Results change only by rounding: sums over fewer rows are added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch

from optima.device import in_halves
from optima.errors import DeviceMemoryError

Result = TypeVar("Result")


class BatchSize:
    """How many sequences of a batch run together.

    Args:
        device: where blocks run.

    Attributes:
        most: sequences that run together at most; None: as many as a batch has.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.most: int | None = None
        self._agreed: int | None = None

    def map(self, samples: int, work: Callable[[slice], Result], most: int | None = None) -> list[Result]:
        """What ``work`` returns for the microbatches of a batch, in order; usually there is one.

        A microbatch that is out of memory is split in two. Others do not reach over its ends.

        Args:
            samples: of the batch.
            work: called with the samples of a microbatch.
            most: sequences of a microbatch, whatever memory the device has.

        Raises:
            DeviceMemoryError: if there is no memory for one sequence.
        """
        limits = [each for each in (self.most, most) if each is not None]
        try:
            return in_halves(samples, work, min(limits, default=None), partial(setattr, self, "most"))
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(f"{self.device} has no memory for one sequence: lower --max-seq-length") from error

    def agree(self, found: Iterable[int | None]) -> str:
        """Take the least ``most`` of all ranks, or of an earlier run; returns a note for the report if that is new."""
        before, self._agreed = self._agreed, min((most for most in (*found, self.most) if most), default=None)
        self.most = self._agreed
        if self.most == before:
            return ""
        return (
            f"out of memory: from here on, at most {self.most} sequences ran together; sums over smaller batches are "
            "rounded differently"
        )
