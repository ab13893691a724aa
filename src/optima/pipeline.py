"""The whole story on one page: for each block observe, prune its linears, carry the outputs on, commit it to disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optima.allocation import Allocation
from optima.calibration.gradient import regional_gradients
from optima.calibration.loss_weights import LossWeights
from optima.calibration.statistics import Found, observe
from optima.calibration.streams import Streams
from optima.device import Stopwatch, full_precision
from optima.linalg.statistics import Statistics
from optima.linear import Methods, prune_linear
from optima.models.stacks import Block, Linear, Stack
from optima.models.weights import Resident
from optima.models.writer import Writer
from optima.patterns import Pattern
from optima.reporting.progress import Progress
from optima.reporting.record import BlockRecord, LinearRecord
from optima.selectors.base import LinearTask, needs_of
from optima.tuning import Tuned, Tuning, energy, tune

Dump = Callable[[Linear, Statistics], None]


@dataclass
class Job:
    """What a run does to each block, and what has become of those done so far.

    Attributes:
        methods: what is done to each linear.
        patterns: the pattern of each linear by its full name.
        device: where blocks are calibrated and solved.
        damping: of the hessians, relative to their mean diagonal.
        sink_weight: without loss weights, of the first token of each sequence, see ``optima.calibration.statistics``.
        progress: is told of every linear and block.
        weights: brings blocks to the device.
        writer: commits blocks to disk; None for a model that stays in memory.
        dump: called with each linear and its statistics before it is pruned.
        loss: weights of tokens and rows by the model's loss, or None.
        tuning: of blocks, or None.
        linears, blocks: the records so far.
        notes: what was not done, or deviated from the recipe.
    """

    methods: Methods
    patterns: Mapping[str, Pattern]
    device: torch.device
    damping: float
    sink_weight: float
    progress: Progress = field(default_factory=Progress)
    weights: Resident = field(default_factory=Resident)
    writer: Writer | None = None
    dump: Dump | None = None
    loss: LossWeights | None = None
    tuning: Tuning | None = None
    linears: list[LinearRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = Stopwatch(self.device)  # of what happens outside the blocks

    def stages(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        total = Counter(self.clock.seconds)
        for block in self.blocks:
            total.update(block.seconds)
        return dict(total)

    @torch.no_grad()
    def prune(self, stack: Stack, streams: Streams) -> None:
        """Prune the linears of ``stack``; ``streams`` hold the inputs of its first block."""
        blocks = stack.blocks[: stack.needed]
        self.progress.start(len(blocks), max(len(block.linears) for block in blocks))
        dense = streams.copy() if self.tuning is not None else None
        for block in blocks:
            clock = Stopwatch(self.device)
            first = len(self.linears)
            with self.weights.on(block, self.device, clock):
                if dense is not None:
                    with clock("forward"):
                        dense.advance(block, self.device)
                keeps = self._prune(block, streams, clock)
                tuned = Tuned((), 0)
                if dense is not None and keeps:
                    with clock("tune"):
                        tuned = self._tune(block, keeps, streams, dense.hidden, first)
                if block is not blocks[-1]:
                    with clock("forward"):
                        streams.advance(block, self.device)
            if self.writer is not None:
                with clock("write"):
                    names = [record.name for record in self.linears[first:]]
                    self.writer.commit(block.name, block.module.state_dict(prefix=f"{block.name}."), names)
            self.blocks.append(BlockRecord(block.index, block.name, clock.seconds, tuned.held_out, tuned.best))
            self.progress.block(block.index + 1)

    def _tune(
        self, block: Block, keeps: Mapping[str, Tensor], streams: Streams, targets: Sequence[Tensor], first: int
    ) -> Tuned:
        """Tune a pruned block; the records from number ``first`` on tell what is no longer certified."""
        assert self.tuning is not None
        weights = self._weights_in_tuning(block, streams, targets)
        tuned = tune(block, keeps, streams, targets, weights, self.tuning, self.device)
        written = {linear.name: linear for linear in block.linears}
        for place in range(first, len(self.linears) if tuned.best else first):
            record = self.linears[place]
            sparsity = float((written[record.name].read() == 0).double().mean())
            self.linears[place] = replace(
                record, sparsity=sparsity, tuned=True, gap_written_max=None, gap_written_median=None, loss_written=None
            )
        return tuned

    def _weights_in_tuning(self, block: Block, streams: Streams, targets: Sequence[Tensor]) -> list[Tensor] | None:
        """Of each batch's tokens, (T,), of mean 1, as the objective says; None: all alike.

        By the loss a relative error e of a token with output y costs |g|^2 |y|^2 e, tempered as all weights are. Tuning
        without them would lose the first token of a sequence, on which most attention rests.
        """
        if self.loss is not None:
            return self.loss.of_tokens(block.name, [energy(target).flatten() for target in targets])
        weights = []
        for (samples, length), target in zip(streams.sizes, targets, strict=True):
            weight_BL = torch.ones(samples, length)
            weight_BL[:, 0] = max(self.sink_weight * length, 1.0)
            if target.shape[:-1] == (length, samples) != (samples, length):
                weight_BL = weight_BL.mT
            elif target.shape[:-1] != (samples, length):
                return None
            weights.append(weight_BL.flatten() / weight_BL.mean())
        return weights

    @torch.no_grad()
    def survey(self, stack: Stack, streams: Streams, allocation: Allocation) -> dict[str, float]:
        """Each linear's share of one sparsity, from a pass over the dense blocks; ``streams`` are used up."""
        blocks = stack.blocks[: stack.needed]
        self.progress.start(len(blocks), 1)
        for block in blocks:
            with self.weights.on(block, self.device, self.clock):
                for found in self._observe(block, streams, self.clock):
                    if found.statistics is None:
                        continue
                    for linear in found.linears:
                        weight_OD = linear.read().to(self.device, torch.float32, copy=True)
                        rows = None if self.loss is None else self.loss.of_rows(linear.name)
                        task = LinearTask(linear.name, weight_OD, found.statistics, row_weight_O=rows)
                        allocation.observe(block.index, task)
                if block is not blocks[-1]:
                    with self.clock("forward"):
                        streams.advance(block, self.device)
            self.progress.block(block.index + 1)
        return allocation.allocate()

    def _observe(self, block: Block, streams: Streams, clock: Stopwatch) -> Iterator[Found]:
        """The statistics of each distinct input; all have been gathered when the first is given."""
        for found in observe(block, streams, self.device, self.sink_weight, self.damping, clock, self.loss):
            if not found.told:
                names = ", ".join(linear.name for linear in found.linears)
                what = "sink_weight does not count" if self.loss is None else "weights of tokens do not count"
                note = f"{block.name}: {what} for {names}: not given one input for each token"
                if note not in self.notes:  # a survey saw the same
                    self.notes.append(note)
            yield found

    def _prune(self, block: Block, streams: Streams, clock: Stopwatch) -> dict[str, Tensor]:
        gradients, keeps = {}, {}
        if block.linears and "gradient" in needs_of(self.methods.selector):
            with clock("gradient"), full_precision():
                gradients = regional_gradients(block, streams, self.device)
        for found in self._observe(block, streams, clock):
            for linear in found.linears:
                if found.statistics is None:
                    self.notes.append(f"{linear.name} was not pruned: no calibration token reached it")
                    continue
                if self.dump is not None:
                    self.dump(linear, found.statistics)
                stored = linear.read()
                weight_OD = stored.to(self.device, torch.float32, copy=True)
                rows_O = None if self.loss is None else self.loss.of_rows(linear.name)
                task = LinearTask(linear.name, weight_OD, found.statistics, gradients.get(linear.name), rows_O)
                result = prune_linear(task, self.patterns[linear.name], self.methods, stored.dtype, clock)
                linear.write(result.weight_OD)
                effective = None if self.loss is None else self.loss.effective_tokens(found.linears[0].name)
                self.linears.append(replace(result.record, block=block.index, tokens_effective=effective))
                self.notes.extend(result.notes)
                self.progress.linear(self.linears[-1])
                keeps[linear.name] = result.keep_OD
        return keeps
