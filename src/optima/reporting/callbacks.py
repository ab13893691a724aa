"""Events of a run: the callback interface and the progress display."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from optima.console import OwnConsole, pace, printable, say
from optima.reporting.record import BlockRecord, LinearRecord, Report, UnitRecord, geometric_mean

PROGRESS_SECONDS = 30.0  # at least, between two lines within a stage, outside a terminal
STAGES = {
    "generate": "generating calibration text",
    "gradients": "gradient pass",
    "sensitivity": "sensitivity pass",
    "permute": "permuting channels",
    "blocks": "measuring blocks",
    "shrink": "shrinking",
    "prune": "pruning",
}


@dataclass(frozen=True)
class RunStart:
    """What a run is about to do, once its settings are checked and the text is read."""

    model: str  # the model's id or path, or the class of a model in memory
    device: str  # where blocks are pruned
    recipe: dict[str, Any]  # resolved, as plain values
    blocks: int  # with linears to prune, over all stacks
    linears: int  # to prune
    samples: int  # calibration sequences
    length: int  # tokens in each of them
    task: str = ""  # what is done to how many linears or blocks


@dataclass(frozen=True)
class BlockEvent:
    """A block is done."""

    stage: str  # a key of ``STAGES``
    name: str  # of the block
    done: int  # blocks of this stage that are done, this one included
    total: int  # blocks of this stage
    elapsed: float  # seconds since the stage began
    left: float  # seconds of the others, each taking the mean time; NaN until this run has done one block
    resumed: bool = False  # an earlier run did this block
    record: BlockRecord | None = None  # of a pruned block
    linears: tuple[LinearRecord, ...] = ()  # of a pruned block
    units: tuple[UnitRecord, ...] = ()  # of a block that lost structures


class Callback:
    """Override the methods you need; they are called in this order.

    An exception raised by one ends the run; blocks on disk can be resumed.
    """

    def on_start(self, start: RunStart) -> None:
        """The settings are checked and the text is read."""

    def on_stage(self, stage: str, blocks: int, done: int) -> None:
        """A stage begins: a key of ``STAGES``; an earlier run did ``done`` of its ``blocks``."""

    def on_step(self, step: str) -> None:
        """Work inside a block changes: read, forward, hessian, select, solve, round, tune, logits, write."""

    def on_progress(self, fraction: float, elapsed: float, left: float) -> None:
        """``fraction`` (0 to 1) of a stage without blocks is done, after ``elapsed`` seconds; ``left`` is estimated."""

    def on_block(self, block: BlockEvent) -> None:
        """A block is done; a pruned block is on disk if the run writes a checkpoint."""

    def on_note(self, note: str) -> None:
        """Something was not done, or not as requested; the report has all notes too."""

    def on_end(self, report: Report) -> None:
        """The run has succeeded, and the output has its final name."""

    def close(self, error: BaseException | None) -> None:
        """The run is over; ``error`` is what ended it, or None."""


class Callbacks:
    """Calls all callbacks in their order. A context manager: leaving it closes them.

    Args:
        callbacks: those to call.
        clock: seconds from any origin.
    """

    def __init__(self, callbacks: Sequence[Callback] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._callbacks, self._clock, self._num_notes = tuple(callbacks), clock, 0

    def _call(self, method: str, *event: object) -> None:
        for callback in self._callbacks:
            getattr(callback, method)(*event)

    def start(self, start: RunStart) -> None:
        """The run begins."""
        self._call("on_start", start)

    def stage(self, stage: str, num_blocks: int, done: int = 0) -> None:
        """A stage begins."""
        self._stage, self._total, self._done, self._own = stage, num_blocks, 0, 0
        self._began = self._own_began = self._clock()
        self._call("on_stage", stage, num_blocks, done)

    def step(self, step: str) -> None:
        """Work inside a block changes."""
        self._call("on_step", step)

    def progress(self, fraction: float) -> None:
        """A fraction of the stage is done, 0 to 1."""
        elapsed = self._clock() - self._began
        self._call("on_progress", fraction, elapsed, elapsed / fraction * (1.0 - fraction))

    def block(
        self,
        name: str,
        record: BlockRecord | None = None,
        linears: Sequence[LinearRecord] = (),
        units: Sequence[UnitRecord] = (),
        resumed: bool = False,
    ) -> None:
        """The next block is done; ``resumed``: by an earlier run."""
        now, left = self._clock(), math.nan
        self._done += 1
        if resumed:
            self._own_began = now  # resumed blocks are quick and say nothing about the others
        else:
            self._own += 1
            left = (now - self._own_began) / self._own * (self._total - self._done)
        event = BlockEvent(
            stage=self._stage,
            name=name,
            done=self._done,
            total=self._total,
            elapsed=now - self._began,
            left=left,
            resumed=resumed,
            record=record,
            linears=tuple(linears),
            units=tuple(units),
        )
        self._call("on_block", event)

    def notes(self, notes: Sequence[str]) -> None:
        """All notes so far; callbacks get the new ones."""
        for note in notes[self._num_notes :]:
            self._call("on_note", note)
        self._num_notes = len(notes)

    def end(self, report: Report) -> None:
        """The run has succeeded."""
        self.notes(report.run.notes)
        self._call("on_end", report)

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with ExitStack() as everyone:
            for callback in reversed(self._callbacks):
                everyone.callback(callback.close, error)  # all of them, whatever one raises


class Progress(Callback):
    """One live line in a terminal, a line per block elsewhere; nothing without a console."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._live: Live | None = None
        self._errors: list[float] = []

    def reading(self, model: str | None) -> None:
        """The run reads the text, and the weights of ``model`` unless they are in memory."""
        say(self._console, f"reading {'' if model is None else f'{model} and '}the calibration text")

    def on_start(self, start: RunStart) -> None:
        say(self._console, f"{start.task} on {start.device}, calibrating on {start.samples} x {start.length} tokens")

    def on_stage(self, stage: str, blocks: int, done: int) -> None:
        self.close(None)
        self._stage, self._step, self._shown = STAGES[stage], "", 0.0
        self._line = f"{self._stage} {done}/{blocks}"
        if self._console is not None and self._console.is_interactive:
            self._live = Live(console=self._console)
            self._live.start()
            self._draw()
        else:
            unit = "sequences" if stage == "generate" else "blocks"
            resumed = f", {done} of them done by an earlier run" if done else ""
            say(self._console, f"{self._stage}: {blocks} {unit}{resumed}")

    def on_step(self, step: str) -> None:
        self._step = step
        self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(Text(printable(f"{self._line}  {self._step}"), no_wrap=True, overflow="ellipsis"))

    def on_progress(self, fraction: float, elapsed: float, left: float) -> None:
        self._line = f"{self._stage}: {fraction:.0%}  {pace(elapsed, left)}"
        self._draw()
        if self._live is None and elapsed >= self._shown + PROGRESS_SECONDS:
            self._shown = elapsed
            say(self._console, self._line)

    def on_block(self, block: BlockEvent) -> None:
        errors = [*(each.error for each in block.linears), *(each.error for each in block.units)]
        self._errors.extend(each for each in errors if each is not None)
        error = f"  mean error {geometric_mean(self._errors):.4f}" if self._errors else ""
        done = f"{self._stage}: block {block.done}/{block.total}"
        self._line = f"{done}{error}  {pace(block.elapsed, block.left)}"
        self._draw()
        if self._live is None and not block.resumed:
            say(self._console, self._line)

    def close(self, error: BaseException | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_progress() -> Progress:
    """Progress on stderr; no colour setting of the environment makes a file or a pipe draw."""
    return Progress(OwnConsole(stderr=True, force_interactive=None if sys.stderr.isatty() else False))
