"""What the user sees while a run goes on: a live line in a terminal, a plain line a block elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Display
from rich.table import Column

from optima.console import OwnConsole, pace, say
from optima.reporting.callbacks import BlockEvent, Callback, RunStart, ShareEvent
from optima.reporting.record import LinearRecord, geometric_mean, name_in_block

# Seconds between two lines of a walk that tells of shares, where no live line shows it.
SHARE_LINES = 60.0
# What a walk over so many blocks, or sequences, does, told where no live line shows it.
WALKS = {
    "write": "the model writes {} sequences of text",
    "sweep": "sweep over {} blocks: what the loss feels",
    "survey": "survey of {} blocks: how much of each can go",
    "order": "order of channels in {} blocks",
    "turn": "values of the heads of {} attentions: how they lose least when they are turned",
    "prune": "{} blocks, one after another; a line when each is done",
}


class Progress(Callback):
    """Blocks done, mean relative error so far, time used and time left.

    Args:
        console: where to draw: one live line where it can, else a plain line a block. Nothing is shown without one.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._display: Display | None = None
        self._errors: list[float] = []

    def reading(self, model: str | None) -> None:
        """The first long work begins: the text is read, and the weights of ``model`` unless they are in memory."""
        say(self._console, f"reading {'' if model is None else f'{model} and '}the calibration text")

    def on_start(self, start: RunStart) -> None:
        """All is read."""
        model = f"{start.linears} linears in {start.blocks} blocks"
        say(self._console, f"pruning {model} on {start.device}, by {start.samples} x {start.length} tokens")

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        """A walk begins."""
        self._stop()
        self._per_block, self._errors, self._told = linears_per_block, [], 0.0
        if self._console is None:
            return
        if self._console.is_interactive:
            self._display = _display(self._console, "sequence" if stage == "write" else "block")
            doing = "calibrating" if stage == "prune" else stage
            self._display.add_task("", total=blocks, completed=done, linear=doing, error="-")
            self._display.start()
        elif done:
            say(self._console, f"going on: {done} of {blocks} blocks are done")
        else:
            say(self._console, WALKS[stage].format(blocks))

    def on_share(self, share: ShareEvent) -> None:
        """The writing, or a sweep, has come further."""
        if self._display is not None:
            (task,) = self._display.tasks
            self._display.update(task.id, completed=share.share * (task.total or 0))
        elif share.elapsed >= self._told + SHARE_LINES:
            self._told = share.elapsed
            say(self._console, f"{share.stage}: {share.share:.0%}  {pace(share.elapsed, share.left)}")

    def on_linear(self, linear: LinearRecord) -> None:
        """A linear is pruned."""
        self._errors.append(linear.error)
        if self._display is not None:
            (task,) = self._display.task_ids
            name = name_in_block(linear)
            self._display.update(task, advance=1 / self._per_block, linear=name, error=self._error())

    def on_block(self, block: BlockEvent) -> None:
        """A block is done."""
        if block.resumed:  # the display began with it counted
            self._errors.extend(linear.error for linear in block.linears)
            return
        if self._display is not None:
            (task,) = self._display.task_ids
            linear = "done" if block.done == block.total else "calibrating" if block.stage == "prune" else block.stage
            self._display.update(task, completed=block.done, linear=linear)
        else:
            stage = "" if block.stage == "prune" else f"{block.stage}: "
            say(
                self._console,
                f"{stage}block {block.done}/{block.total}  error {self._error()}  {pace(block.elapsed, block.left)}",
            )

    def _error(self) -> str:
        return f"{geometric_mean(self._errors):.4f}" if self._errors else "-"

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def close(self, error: BaseException | None) -> None:
        """The run is over: the live line ends, also by Ctrl-C."""
        self._stop()


def _display(console: Console, unit: str) -> Display:
    def text(shown: str, **settings: Any) -> TextColumn:
        return TextColumn(shown, markup=False, table_column=Column(no_wrap=True, **settings))

    return Display(
        text(unit),
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
    return Progress(OwnConsole(stderr=True, force_interactive=None if sys.stderr.isatty() else False))
