"""What the user sees while models are measured: a line a model, and one now and then while it takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console

from optima.console import pace, say
from optima.evaluation.record import ModelRecord

EVERY = 30.0  # seconds between two lines, so that a short evaluation stays short


def silent(done: int, total: int) -> None:
    """For whoever needs no telling."""


class Watch:
    """Says which model is measured, and how far that is.

    Args:
        console: where to; nothing is said without one.
        clock: seconds from any origin.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    def model(self, name: str, place: int, models: int, tasks: Sequence[str] = ()) -> None:
        """Model number ``place`` of ``models`` is read, and measured then; ``tasks`` tell of no progress."""
        more = f"; tasks: {', '.join(tasks)}" if tasks else ""
        say(self._console, f"measuring {name} ({place} of {models}){more}")

    def loaded(self) -> None:
        """Its weights are read: what takes long begins."""
        self._began = self._told = self._clock()

    def measured(self, record: ModelRecord) -> None:
        """What was found of a model: it must not be lost if a later one cannot be measured."""
        found = [] if record.perplexity is None else [f"perplexity {record.perplexity.perplexity:.3f}"]
        if (apart := record.divergence) is not None:
            found.append(f"KL {apart.kl.value:.4f}, top-1 same {apart.top1.value:.2%}")
        for task in record.tasks:
            found += [f"{task.task} {metric} {each.value:.2%}" for metric, each in task.metrics.items()]
        say(self._console, f"{record.model}: {', '.join(found)}")

    def windows(self, done: int, total: int) -> None:
        """So many windows of the text are done, of the model that was named last."""
        now = self._clock()
        if now - self._told >= EVERY or (done == total and self._told > self._began):
            used = now - self._began
            say(self._console, f"window {done}/{total}  {pace(used, used / done * (total - done))}")
            self._told = now
