"""Events of a run: the callback interface, the progress display, and experiment trackers."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from optima.console import OwnConsole, pace, printable, say
from optima.errors import RecipeError
from optima.names import kind
from optima.reporting.record import BlockRecord, LinearRecord, Report, geometric_mean, largest

PROGRESS_SECONDS = 30.0  # at least, between two lines of progress within a stage, outside a terminal
STAGES = {
    "generate": "generating calibration text",
    "gradients": "gradient pass",
    "sensitivity": "sensitivity pass",
    "permute": "permuting channels",
    "rotate": "rotating value heads",
    "prune": "pruning",
}
STEPS = {
    "hessian": "hessians",
    "tune": "tuning",
    "logits": "tuning on logits",
    "forward": "forward pass",
    "read": "reading",
    "write": "writing",
}


@dataclass(frozen=True)
class RunStart:
    """What a run is about to do, once its settings are checked and the text is read."""

    model: str  # the model's id or path, or the class of a model in memory
    output_dir: str | None  # where the checkpoint will be; None for a model that stays in memory
    device: str  # where blocks are pruned
    recipe: dict[str, Any]  # resolved, as plain values
    blocks: int  # with linears to prune, over all stacks
    linears: int  # to prune
    samples: int  # calibration sequences
    length: int  # tokens in each of them


@dataclass(frozen=True)
class BlockEvent:
    """A block is done."""

    stage: str  # a key of ``STAGES``
    name: str  # of the block
    done: int  # blocks of this stage that are done, this one included
    total: int  # blocks of this stage
    elapsed: float  # seconds since the stage began
    left: float  # estimated seconds of the others, tuning included; NaN until this run has done one block
    resumed: bool = False  # an earlier run did this block
    record: BlockRecord | None = None  # of a pruned block
    linears: tuple[LinearRecord, ...] = ()  # of a resumed block, for which ``on_linear`` is not called


class Callback:
    """Override the methods you need; they are called in this order.

    An exception raised by one ends the run; blocks on disk can be resumed.
    """

    def on_start(self, start: RunStart) -> None:
        """The settings are checked and the text is read."""

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        """A stage begins: a key of ``STAGES``; an earlier run did ``done`` of its ``blocks``."""

    def on_step(self, step: str) -> None:
        """Work inside a block changes: read, forward, hessian, select, solve, round, tune, logits, write."""

    def on_progress(self, fraction: float, elapsed: float, left: float) -> None:
        """``fraction`` (0 to 1) of a stage without blocks is done, after ``elapsed`` seconds; ``left`` is estimated."""

    def on_linear(self, linear: LinearRecord) -> None:
        """A linear is pruned; tuning may still change its weights."""

    def on_block(self, block: BlockEvent) -> None:
        """A block is done; a pruned block is on disk if the run writes a checkpoint."""

    def on_note(self, note: str) -> None:
        """Something was not done, or not as requested; the report has all notes too."""

    def on_end(self, report: Report) -> None:
        """The run has succeeded, and the output has its final name."""

    def close(self, error: BaseException | None) -> None:
        """The run is over; ``error`` is what ended it, or None."""


class Callbacks:
    """Calls all callbacks and estimates the time left. A context manager: leaving it closes them.

    Args:
        callbacks: in the order in which they are called.
        clock: seconds from any origin.
    """

    def __init__(self, callbacks: Sequence[Callback] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._callbacks, self._clock = tuple(callbacks), clock
        self._notes, self._step = 0, ""

    def _call(self, method: str, *event: object) -> None:
        for callback in self._callbacks:
            getattr(callback, method)(*event)

    def start(self, start: RunStart) -> None:
        """The run begins."""
        self._call("on_start", start)

    def stage(
        self, stage: str, num_blocks: int, linears_per_block: int = 1, done: int = 0, last_tuning: float = 1.0
    ) -> None:
        """A stage begins; tuning its last block takes ``last_tuning`` times as long as tuning another."""
        self._stage, self._total, self._done, self._own = stage, num_blocks, 0, 0
        self._extra, self._tuning = last_tuning - 1.0, 0.0
        self._began = self._own_began = self._clock()
        self._call("on_stage", stage, num_blocks, max(linears_per_block, 1), done)

    def step(self, step: str) -> None:
        """Work inside a block changes."""
        if step != self._step:
            self._step = step
            self._call("on_step", step)

    def progress(self, fraction: float) -> None:
        """A fraction of the stage is done, 0 to 1."""
        elapsed = self._clock() - self._began
        self._call("on_progress", fraction, elapsed, elapsed / fraction * (1.0 - fraction))

    def linear(self, record: LinearRecord) -> None:
        """A linear is pruned."""
        self._call("on_linear", record)

    def block(
        self, name: str, record: BlockRecord | None = None, resumed: Sequence[LinearRecord] | None = None
    ) -> None:
        """The next block is done; ``resumed``: its linears, if an earlier run did it."""
        now = self._clock()
        self._done += 1
        if resumed is not None:
            self._own_began = now  # replayed blocks are quick and say nothing about the others
        else:
            self._own += 1
            self._tuning += 0.0 if record is None else record.seconds.get("tune", 0.0)
        remaining, left = self._total - self._done, math.nan
        if self._own:
            last = self._extra * self._tuning / self._own if remaining else 0.0
            left = (now - self._own_began) / self._own * remaining + last
        known = resumed is not None, record, tuple(resumed or ())
        event = BlockEvent(self._stage, name, self._done, self._total, now - self._began, left, *known)
        self._call("on_block", event)

    def notes(self, notes: Sequence[str]) -> None:
        """All notes so far; callbacks get the new ones."""
        for note in notes[self._notes :]:
            self._call("on_note", note)
        self._notes = len(notes)

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
        what = f"{start.linears} linears in {start.blocks} blocks on {start.device}"
        say(self._console, f"pruning {what}, calibrating on {start.samples} x {start.length} tokens")

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        self.close(None)
        self._stage, self._step, self._shown = STAGES[stage], "", 0.0
        self._began, self._ends = time.monotonic(), math.nan
        self._done = f"{done}/{blocks}"
        if self._console is not None and self._console.is_interactive:
            self._live = Live(console=self._console, get_renderable=self._line)
            self._live.start()
        else:
            unit = "sequences" if stage == "generate" else "blocks"
            resumed = f", {done} of them done by an earlier run" if done else ""
            say(self._console, f"{self._stage}: {blocks} {unit}{resumed}")

    def _line(self) -> Text:
        now = time.monotonic()
        line = self._text(f"{self._stage} {self._done}", now - self._began, max(self._ends - now, 0.0), self._step)
        return Text(printable(line), no_wrap=True, overflow="ellipsis")

    def _text(self, done: str, elapsed: float, left: float, step: str = "") -> str:
        error = f"mean error {geometric_mean(self._errors):.4f}" if self._errors else ""
        return "  ".join(filter(None, [done, error, pace(elapsed, left), step]))

    def on_step(self, step: str) -> None:
        self._step = STEPS.get(step, step)
        if step == "logits" and self._live is None:
            say(self._console, "tuning the last block on the logits, which takes longer than another block")

    def on_progress(self, fraction: float, elapsed: float, left: float) -> None:
        self._done, self._ends = f"{fraction:.0%}", time.monotonic() + left
        if self._live is None and elapsed >= self._shown + PROGRESS_SECONDS:
            self._shown = elapsed
            say(self._console, f"{self._stage}: {self._done}  {pace(elapsed, left)}")

    def on_linear(self, linear: LinearRecord) -> None:
        self._errors.append(linear.error)
        self._step = f"{self._step.partition(' of ')[0]} of {linear.part}"

    def on_block(self, block: BlockEvent) -> None:
        self._errors.extend(linear.error for linear in block.linears)
        self._done, self._ends = f"{block.done}/{block.total}", time.monotonic() + block.left
        if self._live is None and not block.resumed:
            say(self._console, self._text(f"{self._stage}: block {self._done}", block.elapsed, block.left))

    def close(self, error: BaseException | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_progress() -> Progress:
    """Progress on stderr; no colour setting of the environment makes a file or a pipe draw."""
    return Progress(OwnConsole(stderr=True, force_interactive=None if sys.stderr.isatty() else False))


class Trackers(Callback):
    """Logs one point per block to experiment trackers of ``accelerate``: errors and gaps by kind of linear, tuning.

    The project is ``optima``; files of TensorBoard go to ``runs/optima``.

    Args:
        names: as ``accelerate`` has them: tensorboard, wandb, trackio ...

    Raises:
        RecipeError: if a name is unknown, or its package is not installed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        from accelerate.tracking import filter_trackers

        try:
            self._names = [str(name) for name in filter_trackers(list(names), "runs")]
        except ValueError as error:
            raise RecipeError(f"--report-to: {error}") from error
        if missing := set(names) - set(self._names):
            raise RecipeError(f"--report-to {' '.join(sorted(missing))}: the package is not installed: pip install it")
        self._trackers: list[Any] = []
        self._linears: list[LinearRecord] = []
        self._step = 0

    def on_start(self, start: RunStart) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # which its log messages need
        config = {"model": start.model, "device": start.device} | start.recipe
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
        for make in map(LOGGER_TYPE_TO_CLASS.__getitem__, self._names):
            tracker = make("optima", *(["runs"] if make.requires_logging_directory else []))
            tracker.start()
            tracker.store_init_configuration(plain)
            self._trackers.append(tracker)

    def on_linear(self, linear: LinearRecord) -> None:
        self._linears.append(linear)

    def on_block(self, block: BlockEvent) -> None:
        if block.record is None:
            return
        self._step += 1  # over all stacks: ``done`` begins anew with each
        if block.resumed:
            return
        values = {"block/seconds": sum(block.record.seconds.values())}
        kinds = defaultdict(list)
        for linear in self._linears:
            kinds[kind(linear.part)].append(linear)
        for name, linears in kinds.items():
            values[f"error/{name}"] = geometric_mean(linear.error for linear in linears)
            if (gap := largest(linear.gap_max for linear in linears)) is not None:
                values[f"gap/{name}"] = gap
        if block.record.tuning:
            values["tuning/before"] = block.record.tuning[0]
            values["tuning/kept"] = block.record.tuning[block.record.tuning_epoch]
        self._linears = []
        self._log(values)

    def on_end(self, report: Report) -> None:
        totals = {"sparsity": report.sparsity, "error": report.error_geomean, "seconds": report.run.seconds}
        self._log({f"run/{name}": value for name, value in totals.items()})

    def _log(self, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=self._step)

    def close(self, error: BaseException | None) -> None:
        for tracker in self._trackers:
            tracker.finish()
