"""The state of a run: settings, device and records. Pruned blocks are committed to disk and replayed from there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optima.calibration.batch_size import BatchSize
from optima.calibration.store import Store
from optima.device import PeakMemory, Stopwatch
from optima.distributed import ALONE, Ranks
from optima.models.blocks import Block
from optima.models.offload import Read, Streamed, Weights, replace_tensors
from optima.models.save import Writer
from optima.recipe import RunOptions
from optima.reporting.callbacks import Callbacks
from optima.reporting.record import BlockDone, BlockRecord, LinearRecord, UnitRecord


@dataclass
class RunState:
    """What the functions of a run share.

    Attributes:
        options: resolved, see ``optima.plan``.
        device: where blocks run.
        first_block: number in the model of the first block of the stack that is pruned.
        weights: brings blocks to the device.
        ranks: the processes that share the work.
        progress: callbacks.
        store: keeps activations.
        writer: commits blocks to disk, and has those of an earlier run; None for a model that stays in memory.
        memory: of this process, from the start of the run.
        linears, units, blocks: the records so far.
        notes: what was not done, or deviated from the recipe.
        resumed_seconds: what an earlier run spent on the blocks that it committed.
        resumed_peak: the most memory that it took, in bytes.
        batch_size: automatic batch-size reduction.
        clock: of what happens outside the blocks.
    """

    options: RunOptions
    device: torch.device
    first_block: int = 0
    weights: Weights = field(default_factory=Weights)
    ranks: Ranks = ALONE
    progress: Callbacks = field(default_factory=Callbacks)
    store: Store = field(default_factory=Store)
    writer: Writer | None = None
    memory: PeakMemory | None = None
    linears: list[LinearRecord] = field(default_factory=list)
    units: list[UnitRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumed_seconds: float = 0.0
    resumed_peak: int = 0

    def __post_init__(self) -> None:
        self.batch_size = BatchSize(self.device)
        self.clock = Stopwatch(self.device)

    def note(self, *notes: str | None) -> None:
        """Add notes to the report; empty and known ones are left out."""
        self.notes += [note for note in dict.fromkeys(notes) if note and note not in self.notes]

    def committed(self) -> dict[str, BlockDone]:
        """The records of the blocks that an earlier run committed, by name, on all ranks."""
        done = self.ranks.on_rank0(lambda: {} if self.writer is None else self.writer.done)
        return {name: BlockDone.from_dict(values) for name, values in done.items()}

    def decided(self, name: str, decide: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
        """What ``decide`` returns on all ranks, or what an earlier run decided, if it committed blocks after that."""
        known = self.ranks.on_rank0(lambda: None if self.writer is None else self.writer.journal.decided(name))
        found = decide() if known is None else known
        if known is None and self.writer is not None:
            self.writer.journal.append({"decided": name, "value": found})
        return found

    def drop(self, names: Mapping[str, str]) -> None:
        """Write only the blocks in ``names``, under the new names that these have there."""
        if self.writer is not None:
            self.writer.rename(names)

    def commit(
        self,
        block: Block,
        record: BlockRecord,
        linears: Sequence[LinearRecord],
        units: Sequence[UnitRecord],
        changed: Collection[str],
        noted: int,
    ) -> None:
        """Append the records of a pruned block, and write it to disk with them.

        Args:
            block: on the device.
            record, linears, units: its record, and those of its linears and of the structures that it lost.
            changed: full names of the tensors that the run changed.
            noted: how many notes there were before this block.
        """
        peak = 0 if self.memory is None else self.memory.peak()
        most, peaks = zip(*self.ranks.gather((self.batch_size.most, peak)), strict=True)
        self.note(self.batch_size.agree(most))
        self.blocks.append(record)
        self.linears.extend(linears)
        self.units.extend(units)
        if self.writer is None:
            return
        written = self.clock.seconds.get("write", 0.0)
        done = BlockDone(record, tuple(linears), tuple(units), tuple(self.notes[noted:]), most, max(peaks), written)
        with self.clock("write"):
            tensors = block.module.state_dict(prefix=f"{block.name}.")
            self.writer.commit(block.name, tensors, done.to_dict(), changed)

    def replay(self, block: Block, done: BlockDone) -> None:
        """Load the weights of a block that an earlier run committed, and append its records."""
        with self.clock("read"):
            tensors = {name.removeprefix(f"{block.name}."): each for name, each in self._written(block).items()}
            replace_tensors(block.module, tensors)
        self.blocks.append(done.block)
        self.linears.extend(done.linears)
        self.units.extend(done.units)
        self.note(*done.notes)
        self.batch_size.agree(done.batch_sizes)
        before = self.clock.seconds.get("write", 0.0)
        self.clock.seconds["write"] = max(before, done.write_seconds)
        self.resumed_seconds += sum(done.block.seconds.values()) + max(0.0, done.write_seconds - before)
        self.resumed_peak = max(self.resumed_peak, done.peak_bytes)

    def reader(self, block: Block, changed: Collection[str]) -> Read:
        """Returns the pruned weights of a block, which is on the device now."""
        if self.ranks.size == 1 or not isinstance(self.weights, Streamed):
            return partial(self._written, block)
        # Ranks ask at different times, so each keeps its own copy.
        state = block.module.state_dict(prefix=f"{block.name}.")
        kept = {name: self.store.keep(state[name].detach().to("cpu", copy=True)) for name in changed}
        return lambda: kept

    def _written(self, block: Block) -> dict[str, Tensor]:
        def read() -> dict[str, Tensor]:
            assert self.writer is not None
            return self.writer.read(block.name)

        return self.ranks.on_rank0(read)

    def stages(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        total = Counter(self.clock.seconds)
        for block in self.blocks:
            total.update(block.seconds)
        return dict(total)
