"""What a run reports while it works: the callback interface, the progress display, a JSON log and trackers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TextIO

from pydantic_core import to_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display
from rich.table import Column
from rich.text import Text

from optima import __version__
from optima.console import OwnConsole, pace, printable, say
from optima.errors import OptimaError, RecipeError
from optima.names import kind
from optima.reporting.record import BlockRecord, LinearRecord, Report, geometric_mean, largest, name_in_block

LOG_VERSION = 2
SHARE_SECONDS = 30.0  # between two lines of a stage that reports shares, outside a terminal
STAGES = {
    "write": "generating calibration text",
    "sweep": "gradient pass",
    "survey": "sensitivity pass",
    "order": "ordering channels",
    "turn": "rotating value heads",
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
class ShareEvent:
    """Progress of a stage that does not finish one block after the other."""

    stage: str  # write or sweep
    share: float  # of the work that is done, 0 to 1
    elapsed: float  # seconds since the stage began
    left: float  # seconds that the rest takes at this pace


@dataclass(frozen=True)
class BlockEvent:
    """A block is done."""

    stage: str  # survey, prune, order or turn
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
        """A stage begins: a key of ``STAGES``; ``done`` of its ``blocks`` were done by an earlier run."""

    def on_step(self, step: str) -> None:
        """Work inside a block changes: read, forward, hessian, select, solve, round, tune, logits, write."""

    def on_share(self, share: ShareEvent) -> None:
        """A stage that reports shares has progressed."""

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


class Listeners:
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

    def begin(self, start: RunStart) -> None:
        """The run begins."""
        self._call("on_start", start)

    def start(
        self, num_blocks: int, linears_per_block: int, done: int = 0, stage: str = "prune", last_tuning: float = 1.0
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

    def share(self, share: float) -> None:
        """This share of the stage is done, 0 to 1."""
        elapsed = self._clock() - self._began
        event = ShareEvent(self._stage, share, elapsed, elapsed / share * (1.0 - share))
        self._call("on_share", event)

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
        """All notes so far; the new ones are passed on."""
        new, self._notes = notes[self._notes :], len(notes)
        for note in new:
            self._call("on_note", note)

    def end(self, report: Report) -> None:
        """The run has succeeded."""
        self.notes(report.run.notes)
        self._call("on_end", report)

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with ExitStack() as everyone:
            for callback in reversed(self._callbacks):
                everyone.callback(callback.close, error)  # all of them, whatever one raises


class Progress(Callback):
    """One live line in a terminal, a line per block elsewhere; nothing without a console."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._display: Display | None = None
        self._errors: list[float] = []

    def reading(self, model: str | None) -> None:
        """The text is read, and the weights of ``model`` unless they are in memory."""
        say(self._console, f"reading {'' if model is None else f'{model} and '}the calibration text")

    def on_start(self, start: RunStart) -> None:
        """See ``Callback``."""
        what = f"{start.linears} linears in {start.blocks} blocks on {start.device}"
        say(self._console, f"pruning {what}, calibrating on {start.samples} x {start.length} tokens")

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        """See ``Callback``."""
        self.close(None)
        self._stage, self._per_block, self._shown, self._step = STAGES[stage], linears_per_block, 0.0, ""
        unit = "sequences" if stage == "write" else "blocks"
        if self._console is not None and self._console.is_interactive:
            self._display = _display(self._console)
            self._display.add_task(self._stage, total=blocks, completed=done, step="", error="", ends=math.nan)
            self._display.start()
        else:
            resumed = f", {done} of them done by an earlier run" if done else ""
            say(self._console, f"{self._stage}: {blocks} {unit}{resumed}")

    def on_step(self, step: str) -> None:
        """See ``Callback``."""
        self._step = STEPS.get(step, step)
        if step == "logits" and self._display is None:
            say(self._console, "tuning the last block on the logits, which takes longer than another block")
        self._update(step=self._step)

    def on_share(self, share: ShareEvent) -> None:
        """See ``Callback``."""
        if self._display is not None:
            total = self._display.tasks[0].total or 0
            self._update(completed=share.share * total, ends=time.monotonic() + share.left)
        elif share.elapsed >= self._shown + SHARE_SECONDS:
            self._shown = share.elapsed
            say(self._console, f"{self._stage}: {share.share:.0%}  {pace(share.elapsed, share.left)}")

    def on_linear(self, linear: LinearRecord) -> None:
        """See ``Callback``."""
        self._errors.append(linear.error)
        step = printable(f"{self._step} {name_in_block(linear)}")
        self._update(advance=1 / self._per_block, step=step, error=self._error())

    def on_block(self, block: BlockEvent) -> None:
        """See ``Callback``."""
        self._errors.extend(linear.error for linear in block.linears)
        if block.resumed:  # the display began with it counted
            return
        if self._display is not None:
            self._update(completed=block.done, ends=time.monotonic() + block.left)
        else:
            done = f"{self._stage}: block {block.done}/{block.total}"
            say(self._console, f"{done}  {self._error()}  {pace(block.elapsed, block.left)}".replace("    ", "  "))

    def _update(self, **fields: Any) -> None:
        if self._display is not None:
            self._display.update(self._display.task_ids[0], **fields)

    def _error(self) -> str:
        return f"mean error {geometric_mean(self._errors):.4f}" if self._errors else ""

    def close(self, error: BaseException | None) -> None:
        """The live line ends."""
        if self._display is not None:
            self._display.stop()
            self._display = None


class _Left(ProgressColumn):
    """The time until ``ends``, as estimated after the last block."""

    def render(self, task: Task) -> Text:
        left = task.fields["ends"] - time.monotonic()
        return Text("" if math.isnan(left) else f"{timedelta(seconds=max(0, round(left)))} left")


def _display(console: Console) -> Display:
    def text(shown: str, **settings: Any) -> TextColumn:
        return TextColumn(shown, markup=False, table_column=Column(no_wrap=True, **settings))

    columns = [BarColumn(bar_width=16), text("{task.fields[error]}"), TimeElapsedColumn(), _Left()]
    step = text("{task.fields[step]}", overflow="ellipsis")  # on a narrow terminal this is what gets cut
    return Display(text("{task.description}"), MofNCompleteColumn(), *columns, step, console=console)


def make_progress() -> Progress:
    """Progress on stderr; no colour setting of the environment makes a file or a pipe draw."""
    return Progress(OwnConsole(stderr=True, force_interactive=None if sys.stderr.isatty() else False))


class JsonLog(Callback):
    """Writes each event of a run to ``stream`` as one line of JSON, see ``docs/reference/log.md``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, event: str, **values: Any) -> None:
        """One line. Numbers that JSON cannot hold are the strings "Infinity", "-Infinity" and "NaN"."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            line = to_json({"event": event, "time": moment, **values}, inf_nan_mode="strings").decode()
            print(line, file=self._stream, flush=True)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise OptimaError(f"cannot write to standard error: {error.strerror}") from error

    def on_start(self, start: RunStart) -> None:
        """See ``Callback``."""
        self.write("start", log_version=LOG_VERSION, optima=__version__, **asdict(start))

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        """See ``Callback``."""
        self.write("stage", stage=stage, blocks=blocks, done=done)

    def on_share(self, share: ShareEvent) -> None:
        """See ``Callback``."""
        self.write("share", **asdict(share))

    def on_linear(self, linear: LinearRecord) -> None:
        """See ``Callback``."""
        self.write("linear", **asdict(linear))

    def on_block(self, block: BlockEvent) -> None:
        """See ``Callback``."""
        self.write("block", **{key: value for key, value in asdict(block).items() if key != "linears"})

    def on_note(self, note: str) -> None:
        """See ``Callback``."""
        self.write("note", note=note)

    def on_end(self, report: Report) -> None:
        """See ``Callback``."""
        names = ("sparsity", "sparsity_asked", "error_geomean", "gap_max", "gap_written_max", "rows_not_converged")
        run, totals = report.run, {name: getattr(report, name) for name in names}
        self.write("end", **totals, seconds=run.seconds, peak_memory_bytes=run.peak_memory_bytes, stages=run.stages)


class Trackers(Callback):
    """Logs one point per block to experiment trackers of ``accelerate``: errors and gaps by kind of linear, tuning.

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
        """The project is ``optima``; files of TensorBoard go to ``runs/optima``."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # which its log messages need
        config = {"model": start.model, "output_dir": start.output_dir, "device": start.device} | start.recipe
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
        for name in self._names:
            make = LOGGER_TYPE_TO_CLASS[name]
            tracker = make("optima", *(["runs"] if make.requires_logging_directory else []))
            tracker.start()
            tracker.store_init_configuration(plain)
            self._trackers.append(tracker)

    def on_linear(self, linear: LinearRecord) -> None:
        """See ``Callback``."""
        self._linears.append(linear)

    def on_block(self, block: BlockEvent) -> None:
        """See ``Callback``."""
        if block.record is None:
            return
        self._step += 1  # over all stacks: ``done`` begins anew with each
        if block.resumed:
            return
        kinds: dict[str, list[LinearRecord]] = {}
        for linear in self._linears:
            kinds.setdefault(kind(name_in_block(linear)), []).append(linear)
        values = {"block/seconds": sum(block.record.seconds.values())}
        for name, linears in kinds.items():
            values[f"error/{name}"] = geometric_mean(linear.error for linear in linears)
            gap = largest(linear.gap_max for linear in linears)
            values |= {} if gap is None else {f"gap/{name}": gap}
        if block.record.tuning:
            values["tuning/before"] = block.record.tuning[0]
            values["tuning/kept"] = block.record.tuning[block.record.tuning_epoch]
        self._linears = []
        self._log(values)

    def on_end(self, report: Report) -> None:
        """See ``Callback``."""
        totals = {"sparsity": report.sparsity, "error": report.error_geomean, "seconds": report.run.seconds}
        self._log({f"run/{name}": value for name, value in totals.items()})

    def _log(self, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=self._step)

    def close(self, error: BaseException | None) -> None:
        """See ``Callback``."""
        for tracker in self._trackers:
            tracker.finish()
