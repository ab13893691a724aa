"""What the user sees while a run goes on: a live line in a terminal, a plain line a block elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Display
from rich.table import Column

from optima.reporting.record import LinearRecord, geometric_mean, name_in_block


class Progress:
    """Is told what a run does, and shows nothing of it. Leaving it, also by Ctrl-C, restores the terminal."""

    def start(self, num_blocks: int, linears_per_block: int, done: int = 0) -> None:
        """A pass over ``num_blocks`` blocks of at most ``linears_per_block`` linears; ``done`` are so already."""

    def linear(self, record: LinearRecord) -> None:
        """A linear is pruned."""

    def block(self, done: int) -> None:
        """A block is done, the ``done``-th."""

    def close(self) -> None:
        """The run is over."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class LiveProgress(Progress):
    """One live line on stderr: blocks done, bar, mean relative error so far, time used, time left, the last linear.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display: Display | None = None
        self._per_block = 1
        self._errors: list[float] = []

    def start(self, num_blocks: int, linears_per_block: int, done: int = 0) -> None:
        """See ``Progress``."""
        self.close()
        self._per_block, self._errors = max(linears_per_block, 1), []
        self._display = Display(
            TextColumn("block", table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            TextColumn("error {task.fields[error]}", markup=False, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            # On a narrow terminal the name is what gets cut.
            TextColumn("{task.fields[linear]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            speed_estimate_period=1e9,
        )
        self._display.add_task("", total=num_blocks, completed=done, linear="calibrating", error="-")
        self._display.start()

    def linear(self, record: LinearRecord) -> None:
        """See ``Progress``."""
        if self._display is not None:
            self._errors.append(record.error)
            error = f"{geometric_mean(self._errors):.4f}"
            task = self._display.tasks[0]
            self._display.update(task.id, advance=1 / self._per_block, linear=name_in_block(record), error=error)

    def block(self, done: int) -> None:
        """See ``Progress``."""
        if self._display is not None:
            task = self._display.tasks[0]
            linear = "done" if done == task.total else "calibrating"
            self._display.update(task.id, completed=done, linear=linear)

    def close(self) -> None:
        """See ``Progress``."""
        if self._display is not None:
            self._display.stop()
            self._display = None


class LineProgress(Progress):
    """One plain line a block, written at once: for logs, pipes and terminals that cannot draw.

    Args:
        stream: where to write.
        clock: seconds from any origin.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._num_blocks = 0
        self._first = 0
        self._started = 0.0
        self._errors: list[float] = []

    def start(self, num_blocks: int, linears_per_block: int, done: int = 0) -> None:
        """See ``Progress``."""
        self._num_blocks, self._first, self._started, self._errors = num_blocks, done, self._clock(), []

    def linear(self, record: LinearRecord) -> None:
        """See ``Progress``."""
        self._errors.append(record.error)

    def block(self, done: int) -> None:
        """See ``Progress``."""
        elapsed = self._clock() - self._started
        left = elapsed / max(done - self._first, 1) * (self._num_blocks - done)
        times = [timedelta(seconds=round(seconds)) for seconds in (elapsed, left)]
        error = f"{geometric_mean(self._errors):.4f}" if self._errors else "-"
        line = f"block {done}/{self._num_blocks}  error {error}  {times[0]} elapsed  {times[1]} left"
        print(line, file=self._stream, flush=True)


def make_progress() -> Progress:
    """A live line where stderr is a terminal that can draw one, else a plain line a block."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return LiveProgress(Console(stderr=True))
    return LineProgress(sys.stderr)
