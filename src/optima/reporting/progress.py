"""What the user sees while a run goes on: a live line in a terminal, a plain line a block elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Display
from rich.table import Column

from optima.reporting.record import LinearRecord, geometric_mean, name_in_block


class Progress:
    """Blocks done, mean relative error so far, time used and time left. Leaving it, also by Ctrl-C, ends the live line.

    Args:
        console: where to draw: one live line where it can, else a plain line a block. Nothing is shown without one.
        clock: seconds from any origin.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._display: Display | None = None

    def start(self, num_blocks: int, linears_per_block: int, done: int = 0) -> None:
        """A pass over ``num_blocks`` blocks of at most ``linears_per_block`` linears; ``done`` are so already."""
        self.close()
        self._num_blocks, self._per_block, self._first = num_blocks, max(linears_per_block, 1), done
        self._errors: list[float] = []
        self._started = self._clock()
        if self._console is not None and self._console.is_interactive:
            self._display = _display(self._console)
            self._display.add_task("", total=num_blocks, completed=done, linear="calibrating", error="-")
            self._display.start()

    def linear(self, record: LinearRecord) -> None:
        """A linear is pruned."""
        self._errors.append(record.error)
        if self._display is not None:
            (task,) = self._display.task_ids
            linear = name_in_block(record)
            self._display.update(task, advance=1 / self._per_block, linear=linear, error=self._error())

    def block(self, done: int) -> None:
        """A block is done, the ``done``-th."""
        if self._display is not None:
            (task,) = self._display.task_ids
            linear = "done" if done == self._num_blocks else "calibrating"
            self._display.update(task, completed=done, linear=linear)
        elif self._console is not None:
            elapsed = self._clock() - self._started
            left = elapsed / max(done - self._first, 1) * (self._num_blocks - done)
            used, more = (timedelta(seconds=round(seconds)) for seconds in (elapsed, left))
            line = f"block {done}/{self._num_blocks}  error {self._error()}  {used} elapsed  {more} left"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _error(self) -> str:
        return f"{geometric_mean(self._errors):.4f}" if self._errors else "-"

    def close(self) -> None:
        """The run is over."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _display(console: Console) -> Display:
    def text(shown: str, **settings: Any) -> TextColumn:
        return TextColumn(shown, markup=False, table_column=Column(no_wrap=True, **settings))

    return Display(
        text("block"),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        text("error {task.fields[error]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        text("{task.fields[linear]}", overflow="ellipsis"),  # on a narrow terminal the name is what gets cut
        console=console,
        speed_estimate_period=1e9,
    )


def make_progress() -> Progress:
    """Progress on stderr; no colour setting of the environment makes a file or a pipe draw."""
    return Progress(Console(stderr=True, force_interactive=None if sys.stderr.isatty() else False))
