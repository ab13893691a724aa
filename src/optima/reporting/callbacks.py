"""What a run tells of itself while it goes on: what to listen to, and who tells all that listen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from optima.reporting.record import BlockRecord, LinearRecord, Report


@dataclass(frozen=True)
class RunStart:
    """What a run is about to do; the checks are behind it, but those of weights and of what an earlier run left."""

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
    """How far a walk is that does not finish one thing after the other."""

    stage: str  # write, or sweep
    share: float  # of the work that is done, 0 to 1
    elapsed: float  # seconds since the walk began
    left: float  # seconds that the rest will take at this pace


@dataclass(frozen=True)
class BlockEvent:
    """A block is done in a walk over all blocks of a stack."""

    stage: str  # survey, prune, order or turn
    name: str  # of the block; of turn: of the attention
    done: int  # blocks of this walk that are done, this one included
    total: int  # blocks of this walk
    elapsed: float  # seconds since the walk began
    left: float  # seconds that the others will take if they are like those that this run did; NaN until it has done one
    resumed: bool = False  # an earlier run had done it
    record: BlockRecord | None = None  # what it took; None in a survey
    linears: tuple[LinearRecord, ...] = ()  # of a resumed block, of which ``on_linear`` is not told


class Callback:
    """Told what a run does, in the order of these methods. Override those that matter; the others do nothing.

    An exception that one raises ends the run: blocks that are on the disk can be resumed.
    """

    def on_start(self, start: RunStart) -> None:
        """The text is read, and what needs no weights is checked."""

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        """A walk begins: write, sweep, survey, prune, order or turn.

        Args:
            stage: write (the model's own text; tells of shares), sweep (over blocks: what the loss feels; tells of
                shares), survey (of the dense model, for an allocation), prune, order (its channels), or turn (the
                values of its heads).
            blocks: of the walk; of write: sequences; of turn: attentions.
            linears_per_block: to prune, at most; 1 in a survey.
            done: blocks that an earlier run has done.
        """

    def on_share(self, share: ShareEvent) -> None:
        """The writing of text, or a sweep, has come further."""

    def on_linear(self, linear: LinearRecord) -> None:
        """A linear is pruned; tuning may still move its weights."""

    def on_block(self, block: BlockEvent) -> None:
        """A block of a walk is done; one that is pruned is on the disk, if the run writes there."""

    def on_note(self, note: str) -> None:
        """Something was not done, or not as asked; the report has all notes too."""

    def on_end(self, report: Report) -> None:
        """The run has succeeded, and the output has its name."""

    def close(self, error: BaseException | None) -> None:
        """The run is over, also when it failed or was interrupted; called once.

        Args:
            error: what ended the run, or None.
        """


class Listeners:
    """Tells several callbacks, and keeps the time. Leaving it, also by Ctrl-C, closes them.

    Args:
        callbacks: in the order in which they are told.
        clock: seconds from any origin.
    """

    def __init__(self, callbacks: Sequence[Callback] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._callbacks = tuple(callbacks)
        self._clock = clock
        self._notes = 0

    def begin(self, start: RunStart) -> None:
        """The run begins."""
        for callback in self._callbacks:
            callback.on_start(start)

    def start(self, num_blocks: int, linears_per_block: int, done: int = 0, stage: str = "prune") -> None:
        """A walk over ``num_blocks``, see ``Callback.on_stage``; ``done`` are so already."""
        self._stage, self._total, self._done, self._own = stage, num_blocks, 0, 0
        self._began = self._own_began = self._clock()
        for callback in self._callbacks:
            callback.on_stage(stage, num_blocks, max(linears_per_block, 1), done)

    def share(self, share: float) -> None:
        """So much of a walk is done, 0 to 1, that does not finish one block after the other."""
        elapsed = self._clock() - self._began
        event = ShareEvent(self._stage, share, elapsed, elapsed / share * (1.0 - share))
        for callback in self._callbacks:
            callback.on_share(event)

    def linear(self, record: LinearRecord) -> None:
        """A linear is pruned."""
        for callback in self._callbacks:
            callback.on_linear(record)

    def block(
        self, name: str, record: BlockRecord | None = None, resumed: Sequence[LinearRecord] | None = None
    ) -> None:
        """The next block is done; ``resumed``: its linears, if an earlier run did it."""
        now = self._clock()
        self._done += 1
        if resumed is not None:
            self._own_began = now  # replayed blocks are quick: they say nothing of the others
        else:
            self._own += 1
        left = (now - self._own_began) / self._own * (self._total - self._done) if self._own else math.nan
        known = resumed is not None, record, tuple(resumed or ())
        event = BlockEvent(self._stage, name, self._done, self._total, now - self._began, left, *known)
        for callback in self._callbacks:
            callback.on_block(event)

    def notes(self, notes: Sequence[str]) -> None:
        """All notes so far; those that are new are told."""
        new, self._notes = notes[self._notes :], len(notes)
        for note in new:
            for callback in self._callbacks:
                callback.on_note(note)

    def end(self, report: Report) -> None:
        """The run has succeeded."""
        self.notes(report.run.notes)
        for callback in self._callbacks:
            callback.on_end(report)

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with ExitStack() as everyone:
            for callback in reversed(self._callbacks):
                everyone.callback(callback.close, error)  # all of them, whatever one raises
