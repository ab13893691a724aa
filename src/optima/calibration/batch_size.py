"""Automatic batch-size reduction: a batch that is out of device memory runs in halves, and so do all later ones.

Results change only by rounding: sums over fewer rows are added in another order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from optima.device import one_memory_error
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
        results, waiting = [], [slice(0, samples)]
        while waiting:
            rows = waiting.pop()
            count = rows.stop - rows.start
            limit = min(each for each in (count, self.most, most) if each is not None)
            if count > limit:
                middle = rows.start + limit
                waiting += [slice(middle, rows.stop), slice(rows.start, middle)]
                continue
            try:
                with one_memory_error():
                    results.append(work(rows))
                continue
            except torch.OutOfMemoryError as error:
                if count == 1:
                    raise DeviceMemoryError(
                        f"{self.device} has no memory for one sequence: lower --max-seq-length"
                    ) from error
            # Only after the exception and the frames that it holds are gone is their memory free.
            gc.collect()
            torch.cuda.empty_cache()
            self.most = (count + 1) // 2
            waiting.append(rows)
        return results

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
