"""Automatic batch-size reduction: a batch that is out of device memory runs in halves, and so do all later ones.

Results change only by rounding: sums over fewer rows are added in another order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from optima.device import describe_memory, one_memory_error
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
        self._tried = 0
        self._noted: int | None = None

    def map(
        self, samples: int, work: Callable[[slice], Result], divisible: bool = True, most: int | None = None
    ) -> list[Result]:
        """What ``work`` returns for the microbatches of a batch, in order; usually there is one.

        A microbatch that is out of memory is split in two. Others do not reach over its ends.

        Args:
            samples: of the batch.
            work: called with the samples of a microbatch.
            divisible: whether the batch can be split.
            most: sequences of a microbatch, whatever memory the device has.

        Raises:
            DeviceMemoryError: if there is no memory for one sequence, or for a batch that cannot be split.
        """
        results, waiting = [], [slice(0, samples)]
        while waiting:
            rows = waiting.pop()
            count = rows.stop - rows.start
            limit = min(each for each in (count, self.most, most) if each is not None)
            if count > limit and divisible:
                middle = rows.start + limit
                waiting += [slice(middle, rows.stop), slice(rows.start, middle)]
                continue
            try:
                with one_memory_error():
                    results.append(work(rows))
                continue
            except torch.OutOfMemoryError as error:
                if count == 1 or not divisible:
                    raise self._error(count) from error
            # Only after the exception and the frames that it holds are gone is their memory free.
            gc.collect()
            torch.cuda.empty_cache()
            self._tried, self.most = max(self._tried, count), (count + 1) // 2
            waiting.append(rows)
        return results

    def limit(self, found: Iterable[int | None], noted: bool = False) -> None:
        """Run no more sequences together than the least of ``found``: of all ranks, or of an earlier run.

        ``noted``: whoever found it has reported it.
        """
        least = min((most for most in found if most is not None), default=None)
        if least is not None and (self.most is None or least <= self.most):
            self.most = least
            self._noted = least if noted else self._noted

    def note(self) -> str:
        """For the report, once; may be empty."""
        if self.most == self._noted:
            return ""
        self._noted = self.most
        return (
            f"out of memory: {self._tried} sequences together were too many for the device, from here on {self.most} "
            "ran at a time at most; sums over smaller batches are rounded differently"
        )

    def _error(self, count: int) -> DeviceMemoryError:
        memory = f"the memory of {describe_memory(self.device)}"
        if count == 1:
            return DeviceMemoryError(f"one sequence is too much for {memory}: lower --max-seq-length, or free some")
        return DeviceMemoryError(
            f"{count} sequences are too many for {memory}, and cannot be split: use --batch-size 1"
        )
