"""What the user sees while a run goes on: a live line in a terminal, silence elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from optima.reporting.record import LinearRecord, geometric_mean, name_in_block

_logger = logging.getLogger("optima")


class Progress(Protocol):
    """Is told what a run does. A context manager; leaving it, also by Ctrl-C, restores the terminal."""

    def start(self, num_blocks: int, linears_per_block: int) -> None:
        """The run prunes ``num_blocks`` blocks of at most ``linears_per_block`` linears."""
        ...

    def block(self, index: int) -> None:
        """Block ``index`` (from 0) begins; those before it are done."""
        ...

    def linear(self, record: LinearRecord) -> None:
        """A linear is pruned."""
        ...

    def message(self, text: str) -> None:
        """Tell the user something that matters, such as a deviation from the recipe."""
        ...

    def close(self) -> None:
        """The run is over. Closing twice is allowed."""
        ...

    def __enter__(self) -> Progress:
        """Returns itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        ...


class QuietProgress:
    """Shows nothing. Messages go to the logger ``optima`` as warnings."""

    def start(self, num_blocks: int, linears_per_block: int) -> None:
        """See ``Progress``."""

    def block(self, index: int) -> None:
        """See ``Progress``."""

    def linear(self, record: LinearRecord) -> None:
        """See ``Progress``."""

    def message(self, text: str) -> None:
        """See ``Progress``."""
        _logger.warning(text)

    def close(self) -> None:
        """See ``Progress``."""

    def __enter__(self) -> QuietProgress:
        """See ``Progress``."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See ``Progress``."""
        self.close()


class RichProgress:
    """One live line on stderr: block, linear, bar, mean relative error so far, time used, time left.

    Args:
        console: where to draw, stderr by default.
        clock: seconds from any origin; tests replace it.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._display: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)
        self._errors: list[float] = []
        self._linears_per_block = 0
        self._estimate: TimeLeft | None = None

    def start(self, num_blocks: int, linears_per_block: int) -> None:
        """See ``Progress``."""
        self.close()
        self._errors = []
        self._linears_per_block = linears_per_block
        self._estimate = TimeLeft(num_blocks, self._clock)
        self._display = rich_progress.Progress(
            rich_progress.TextColumn("block {task.fields[block]}/{task.fields[blocks]}", markup=False),
            rich_progress.BarColumn(bar_width=20),
            rich_progress.TextColumn("error {task.fields[error]}", markup=False),
            rich_progress.TimeElapsedColumn(Column(no_wrap=True)),
            _TimeLeftColumn(self._estimate),
            _LinearColumn(),
            console=self._console,
        )
        total = num_blocks * linears_per_block
        self._task = self._display.add_task("", total=total, block=0, blocks=num_blocks, linear="", error="-")
        self._display.start()

    def block(self, index: int) -> None:
        """See ``Progress``."""
        assert self._display is not None, "start comes first"
        assert self._estimate is not None
        self._estimate.block(index)
        # A block may hold fewer linears than the most: the bar catches up here.
        completed = index * self._linears_per_block
        self._display.update(self._task, block=index + 1, completed=completed, linear="calibrating")

    def linear(self, record: LinearRecord) -> None:
        """See ``Progress``."""
        assert self._display is not None, "start comes first"
        self._errors.append(record.error)
        error = f"{geometric_mean(self._errors):.4f}"
        self._display.update(self._task, advance=1, linear=name_in_block(record), error=error)

    def message(self, text: str) -> None:
        """See ``Progress``."""
        self._console.print(Text(text))

    def close(self) -> None:
        """See ``Progress``."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def __enter__(self) -> RichProgress:
        """See ``Progress``."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See ``Progress``."""
        if self._display is not None and kind is None:
            task = self._display.tasks[0]
            self._display.update(self._task, completed=task.total, linear="done")
        self.close()


class TimeLeft:
    """Time left, from whole blocks: they cost much the same, while the linears inside one do not.

    Args:
        num_blocks: blocks of the run.
        clock: seconds from any origin.
    """

    def __init__(self, num_blocks: int, clock: Callable[[], float]) -> None:
        self._num_blocks = num_blocks
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._finish: float | None = None

    def block(self, index: int) -> None:
        """Block ``index`` begins; a resumed run begins past 0."""
        now = self._clock()
        if self._first is None:
            self._first = (index, now)
        elif index > self._first[0]:
            seconds_per_block = (now - self._first[1]) / (index - self._first[0])
            self._finish = now + seconds_per_block * (self._num_blocks - index)

    def seconds(self) -> float | None:
        """Seconds left; None until a block is done."""
        return None if self._finish is None else max(self._finish - self._clock(), 0.0)


class _TimeLeftColumn(rich_progress.ProgressColumn):
    max_refresh = 0.5

    def __init__(self, estimate: TimeLeft) -> None:
        super().__init__(Column(no_wrap=True))
        self._estimate = estimate

    def render(self, task: rich_progress.Task) -> Text:
        """The time left as h:mm:ss."""
        seconds = self._estimate.seconds()
        return Text("-:--:-- left" if seconds is None else f"{timedelta(seconds=round(seconds))} left")


class _LinearColumn(rich_progress.ProgressColumn):
    """On a narrow terminal the name is what gets cut: the one column that may shrink, without wrapping."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))

    def render(self, task: rich_progress.Task) -> Text:
        """The linear at work."""
        return Text(task.fields["linear"], no_wrap=True, overflow="ellipsis")


def make_progress(enabled: bool | None = None) -> Progress:
    """A live display if ``enabled``; by default only where stderr is a terminal that can draw one."""
    if enabled is None:
        enabled = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return RichProgress() if enabled else QuietProgress()
