"""A batch that the device has no memory for runs in halves, and so does every later one.

What comes out is the same but for rounding: products of fewer rows are added up in another order.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from optima.device import describe_memory, one_memory_error
from optima.errors import DeviceMemoryError

Result = TypeVar("Result")


def rows_of(tensor: Tensor, part: slice, samples: int) -> Tensor:
    """The rows of a tensor that belong to some samples of a batch, each of which has as many; to all: the tensor."""
    if part.stop - part.start == samples:
        return tensor
    each = len(tensor) // samples
    return tensor[part.start * each : part.stop * each]


class BatchSize:
    """How many sequences of a batch run together: all, until the device is out of memory.

    Args:
        device: where blocks run.

    Attributes:
        most: sequences that run together at most; None: as many as a batch has.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.most: int | None = None
        self._tried = 0
        self._told: int | None = None

    def map(
        self, samples: int, work: Callable[[slice], Result], whole: str = "", most: int | None = None
    ) -> list[Result]:
        """What ``work`` returns for the parts of a batch, in order; usually there is one.

        A part that fails is split, and no other part reaches over its ends.

        Args:
            samples: of the batch.
            work: given the samples of a part. Where it raises, nothing may be left that would count twice.
            whole: why the batch cannot be taken apart, if it cannot.
            most: sequences of a part, whatever memory the device has; None: as many as it has memory for.

        Raises:
            DeviceMemoryError: if there is no memory for one sequence, or for a batch that stays whole.
        """
        results, waiting = [], [slice(0, samples)]
        while waiting:
            part = waiting.pop()
            count = part.stop - part.start
            limit = min(each for each in (count, self.most, most) if each is not None)
            if count > limit and not whole:
                middle = part.start + limit
                waiting += [slice(middle, part.stop), slice(part.start, middle)]
                continue
            try:
                with one_memory_error():
                    results.append(work(part))
                continue
            except torch.OutOfMemoryError as error:
                if whole or count == 1:
                    raise self._error(count, whole) from error
            # Only here, after the exception and the frames it held are gone, is their memory free again.
            gc.collect()
            torch.cuda.empty_cache()
            self._tried, self.most = max(self._tried, count), (count + 1) // 2
            waiting.append(part)
        return results

    def resume(self, earlier: Sequence[int | None], rank: int) -> None:
        """As an earlier run did: sums over smaller batches are rounded differently. Its report has the note.

        Args:
            earlier: ``most`` of each of its processes.
            rank: of this process; one of other company takes the least.
        """
        least = min((most for most in (earlier[rank : rank + 1] or earlier) if most is not None), default=None)
        if least is not None and (self.most is None or least <= self.most):
            self.most = self._told = least

    def note(self) -> str:
        """For the report, once; may be empty."""
        if self.most == self._told:
            return ""
        self._told = self.most
        return (
            f"out of memory: {self._tried} sequences together were too many for the device, from here on {self.most} "
            "ran at a time at most; sums over smaller batches are rounded differently"
        )

    def _error(self, count: int, whole: str) -> DeviceMemoryError:
        memory = f"the memory of {describe_memory(self.device)}"
        if count == 1:
            return DeviceMemoryError(f"one sequence is too much for {memory}: lower --max-seq-length, or free some")
        return DeviceMemoryError(f"{count} sequences are too many for {memory}, and {whole}: use --batch-size 1")


class Once:
    """Lets what a pass sees count once, though the pass ran out of memory later and runs again in parts."""

    def __init__(self) -> None:
        self._batch = -1
        self._behind = 0  # the last sample of the pass
        self._calls = Counter[str]()
        self._seen: dict[tuple[str, int], int] = {}

    def start(self, batch: int, part: slice) -> None:
        """A pass over a part of a batch begins; parts of a batch follow each other."""
        if batch != self._batch:
            self._seen.clear()
        self._batch, self._behind = batch, part.stop
        self._calls.clear()

    @contextmanager
    def __call__(self, name: str) -> Iterator[bool]:
        """Whether this call of ``name`` is new; it has been seen if nothing is raised inside."""
        key = (name, self._calls[name])
        self._calls[name] += 1
        yield self._seen.get(key, 0) < self._behind
        self._seen[key] = max(self._seen.get(key, 0), self._behind)
