"""The algorithm: block by block, collect Hessians, prune the linears, tune the block, and commit it.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from optima.allocate import allocate, saliency_quantiles
from optima.calibration.activations import Activations
from optima.calibration.batch_size import BatchSize
from optima.calibration.fisher import tuned_batches
from optima.calibration.lm_head import LmHead
from optima.calibration.statistics import Found, observe, routing_notes
from optima.calibration.store import Store
from optima.calibration.weights import FisherWeights
from optima.core.statistics import Statistics
from optima.device import PeakMemory, Stopwatch, give_back_freed_memory
from optima.distributed import ALONE, Ranks
from optima.linear import LinearResult, Methods, prune_linear
from optima.models.blocks import Block, Linear, Stack, is_expert
from optima.models.offload import Read, Resident, Weights
from optima.models.save import Writer
from optima.patterns import Pattern
from optima.recipe import EXPERT_TOKENS
from optima.reporting.callbacks import Callbacks
from optima.reporting.record import BlockDone, BlockRecord, LinearRecord
from optima.selectors.base import LinearTask
from optima.sharing import Pruned, share_owned
from optima.tune import Tuned, Tuning, changed, tune_block

# Mamba reads the weight of its dt_proj like this.
UNCALLED = "its module was never called, which does not mean that the model does not use its weight"


@dataclass
class Job:
    """How blocks are pruned, and the records of those that are done.

    Attributes:
        methods: selector and solver of each linear.
        device: where blocks are pruned.
        damping: of the Hessians, relative to their mean diagonal.
        sink_weight: without Fisher weights, of the first token of each sequence, see ``optima.calibration.statistics``.
        progress: callbacks.
        weights: brings blocks to the device.
        store: keeps activations.
        writer: commits blocks to disk, and has those of an earlier run; None for a model that stays in memory.
        loss: Fisher weights of tokens and rows, or None.
        tuning: of blocks, or None.
        lm_head: for tuning the last block on logits; None: it is tuned like the others.
        linears, blocks: the records so far.
        notes: what was not done, or deviated from the recipe.
        memory: of this process, from the start of the run.
        resumed_seconds: what an earlier run spent on the blocks that it committed.
        resumed_peak: the most memory that it took, in bytes.
        batch_size: automatic batch-size reduction.
        clock: of what happens outside the blocks.
        earlier: blocks of earlier stacks: a report numbers the blocks of a model.
    """

    methods: Methods
    device: torch.device
    damping: float
    sink_weight: float
    progress: Callbacks = field(default_factory=Callbacks)
    weights: Weights = field(default_factory=Resident)
    store: Store = field(default_factory=Store)
    writer: Writer | None = None
    loss: FisherWeights | None = None
    tuning: Tuning | None = None
    lm_head: LmHead | None = None
    linears: list[LinearRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memory: PeakMemory | None = None
    resumed_seconds: float = 0.0
    resumed_peak: int = 0

    def __post_init__(self) -> None:
        self.batch_size = BatchSize(self.device)
        self.clock = Stopwatch(self.device)
        self.earlier = 0

    @torch.no_grad()
    def prune(self, stack: Stack, acts: Activations, patterns: Mapping[str, Pattern], runs_again: bool = False) -> None:
        """Prune the linears of ``stack``.

        Args:
            stack: with the linears to prune.
            acts: the inputs of its first block.
            patterns: the pattern of each linear by its full name.
            runs_again: whether the model will run these blocks for a later stack.
        """
        blocks = stack.blocks[: stack.needed]
        committed = acts.ranks.on_rank0(lambda: {} if self.writer is None else self.writer.done)
        tuned_on = [] if self.tuning is None else tuned_batches(acts, self.tuning.share)
        dense = None if self.tuning is None else acts.part(tuned_on)  # dense inputs, for the targets of tuning
        self._start(blocks, acts, committed)
        for block in blocks:
            resumed = committed.get(block.name)
            clock = self.clock if resumed else Stopwatch(self.device, self.progress.step)
            linears, notes = len(self.linears), len(self.notes)
            with self.weights.on(block, self.device, clock):
                if dense is not None:
                    with clock("forward"):
                        dense.forward(block)
                tuned = Tuned((), 0)
                if resumed:
                    self._replay(acts, block, BlockDone.from_dict(resumed))
                else:
                    pruned = self._prune_block(block, acts, patterns, clock)
                    if dense is not None and pruned.keeps:
                        with clock("logits" if self._on_logits(block) else "tune"):
                            tuned = self._tune(block, pruned, acts.part(tuned_on), tuned_on, dense.hidden, linears)
                    del pruned
                if self.loss is not None:
                    self.loss.forget([block.name, *(linear.name for linear in block.linears)])
                if block is not blocks[-1]:
                    with clock("forward"):
                        acts.forward(block)
                self._finish(block, acts, tuned, clock, linears, notes, commits=not resumed)
                if runs_again:
                    self.weights.replaced(block, self._reader(acts.ranks, block))
            give_back_freed_memory()
            self.progress.notes(self.notes)
            self.progress.block(block.name, self.blocks[-1], self.linears[linears:] if resumed else None)
        self.earlier += len(stack.blocks)

    def _prune_block(
        self, block: Block, acts: Activations, patterns: Mapping[str, Pattern], clock: Stopwatch
    ) -> Pruned:
        """Prune the block's linears, each on the rank with its statistics; afterwards all ranks have all weights."""
        ranks, pruned = acts.ranks, Pruned()
        for found in self.observe(block, acts, clock):
            effective = None if self.loss is None else self.loss.effective.get(found.linears[0].name)
            pruned.owners |= dict.fromkeys((linear.name for linear in found.linears), found.owner)
            for linear in found.linears if found.owner in (None, ranks.rank) else ():
                if found.statistics is None:
                    why = "no calibration token reached it" if is_expert(linear) else UNCALLED
                    pruned.done[linear.name] = None, (f"{linear.name} was not pruned: {why}",)
                    continue
                together = ranks if found.owner is None else ALONE
                result = self._prune_linear(linear, found.statistics, patterns[linear.name], clock, together)
                linear.write(result.weight_OD)
                record = replace(result.record, block=self.earlier + block.index, tokens_effective=effective)
                pruned.done[linear.name] = record, result.notes
                self.progress.linear(record)
                if self.tuning is not None:  # five bytes a weight, on the device
                    pruned.keeps[linear.name] = result.keep_OD
                    if result.solution_OD is not None:
                        pruned.solutions[linear.name] = result.solution_OD
            del found  # or it would be there while the pass goes on
        if ranks.size > 1:
            with clock("share"):
                pruned.share(block.linears, ranks)
        self._record(block, acts, pruned)
        return pruned

    def _prune_linear(
        self, linear: Linear, statistics: Statistics, pattern: Pattern, clock: Stopwatch, ranks: Ranks
    ) -> LinearResult:
        rows_O = None if self.loss is None else self.loss.rows.get(linear.name)
        coupling_OO = None if self.loss is None else self.loss.coupling.get(linear.name)
        task = LinearTask(linear.name, self._dense(linear), statistics, rows_O, coupling_OO)
        return prune_linear(task, pattern, self.methods, linear.read().dtype, clock, ranks)

    def observe(self, block: Block, acts: Activations, clock: Stopwatch, *, onward: bool = False) -> Iterator[Found]:
        """The statistics of each group of linears with one input; ``onward``: ``acts`` become the block's outputs."""
        for found in observe(block, acts, self.sink_weight, self.damping, clock, self.loss, onward):
            if not found.weighted:
                names = ", ".join(linear.name for linear in found.linears)
                what, why = "sink_weight does not count", "they do not get one input for each token"
                if self.loss is not None:
                    what, why = "weights of tokens do not count", f"{why}, or have no gradient"
                note = f"{block.name}: {what} for {names}: {why}"
                if note not in self.notes:  # the sensitivity pass found the same
                    self.notes.append(note)
            yield found
            del found  # or it would be there while the pass goes on

    def _tune(
        self,
        block: Block,
        pruned: Pruned,
        acts: Activations,
        batches: Sequence[int],
        targets: Sequence[Tensor],
        first: int,
    ) -> Tuned:
        """Tune a pruned block; the records from number ``first`` on lose their certificates."""
        assert self.tuning is not None
        with torch.inference_mode(False):  # gradients are taken through what is made of them
            known = None if self.loss is None else self.loss.tokens.get(block.name)
        weights = known and [known[batch] for batch in batches]
        lm_head = self.lm_head if self._on_logits(block) else None
        tuned = tune_block(
            block, pruned.keeps, acts, targets, self.tuning, self.loss, weights, lm_head, pruned.solutions
        )
        self.notes += [tuned.problem] if tuned.problem and tuned.problem not in self.notes else []
        written = {linear.name: linear for linear in block.linears}
        for place in range(first, len(self.linears) if tuned.best else first):
            record = self.linears[place]
            sparsity = float((written[record.name].read() == 0).double().mean())
            self.linears[place] = replace(
                record, sparsity=sparsity, tuned=True, gap_written_max=None, gap_written_median=None, loss_written=None
            )
        return tuned

    @torch.no_grad()
    def sensitivity(self, stack: Stack, acts: Activations, sparsity: float, batches: Sequence[int]) -> dict[str, float]:
        """Each linear's share of one ``sparsity``, from a pass of some ``batches`` over the dense blocks."""
        quantiles: dict[str, Tensor] = {}
        sizes = {linear.name: math.prod(linear.shape) for block in stack.blocks for linear in block.linears}
        whole, acts = self.loss, acts.part(batches).counted()
        self.loss = None if whole is None else whole.part(batches)
        blocks = stack.blocks[: stack.needed]
        self.progress.stage("sensitivity", len(blocks))
        for block in blocks:
            with self.weights.on(block, self.device, self.clock):
                quantiles |= self._quantiles(block, acts, onward=block is not blocks[-1])
            self.progress.block(block.name)
        self.loss = whole
        return allocate(sparsity, quantiles, sizes)

    def _quantiles(self, block: Block, acts: Activations, onward: bool) -> dict[str, Tensor]:
        measured: dict[str, Tensor | None] = {}
        owners: dict[str, int | None] = {}
        for found in self.observe(block, acts, self.clock, onward=onward):
            owners |= dict.fromkeys((linear.name for linear in found.linears), found.owner)
            for linear in found.linears if found.owner in (None, acts.ranks.rank) else ():
                measured[linear.name] = None
                if found.statistics is not None:
                    rows = None if self.loss is None else self.loss.rows.get(linear.name, torch.zeros(linear.shape[0]))
                    task = LinearTask(linear.name, self._dense(linear), found.statistics, row_weight_O=rows)
                    measured[linear.name] = saliency_quantiles(task)
            del found  # or it would be there while the pass goes on
        measured = share_owned(measured, owners, acts.ranks)
        names = [linear.name for group in acts.groups(block) for linear in group]
        return {name: own for name in names if (own := measured[name]) is not None}

    def stages(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        total = Counter(self.clock.seconds)
        for block in self.blocks:
            total.update(block.seconds)
        return dict(total)

    def _start(self, blocks: Sequence[Block], acts: Activations, committed: Mapping[str, object]) -> None:
        last = 1.0
        if self.tuning is not None and self.lm_head is not None and self._on_logits(blocks[-1]):
            last = self.lm_head.tuning_cost(max((length for _, length in acts.sizes), default=1))
        done = sum(block.name in committed for block in blocks)
        self.progress.stage("prune", len(blocks), max(len(block.linears) for block in blocks), done, last)

    def _on_logits(self, block: Block) -> bool:
        return self.lm_head is not None and self.lm_head.read(block)

    def _record(self, block: Block, acts: Activations, pruned: Pruned) -> None:
        """Append the records of the block's linears, in the order of their groups."""
        routed = {}
        for linear in (linear for group in acts.groups(block) for linear in group):
            record, notes = pruned.done[linear.name]
            self.notes.extend(notes)
            if record is not None:
                self.linears.append(record)
                if is_expert(linear):
                    routed[linear.name] = record.tokens
                if pruned.owners[linear.name] not in (None, acts.ranks.rank):
                    self.progress.linear(record)
        self.notes.extend(routing_notes(block.name, routed, EXPERT_TOKENS))

    def _finish(
        self, block: Block, acts: Activations, tuned: Tuned, clock: Stopwatch, linears: int, notes: int, commits: bool
    ) -> None:
        """Append the block's record, and commit its weights with all records and notes since ``linears``, ``notes``."""
        peak = 0 if self.memory is None else self.memory.peak()
        found = acts.ranks.gather((acts.batch_size.note(), acts.batch_size.most, peak))
        batch_notes, most, peaks = zip(*found, strict=True)
        self.notes.extend(dict.fromkeys(filter(None, batch_notes)))
        acts.batch_size.limit(most, noted=True)  # all ranks agree
        if not commits:
            return
        seconds = dict(clock.seconds)  # without the commit, which a resumed block would lack
        number = self.earlier + block.index
        self.blocks.append(BlockRecord(number, block.name, seconds, tuned.held_out, tuned.best, tuned.on_logits))
        if self.writer is None:
            return
        records, new = tuple(self.linears[linears:]), tuple(self.notes[notes:])
        written = self.clock.seconds.get("write", 0.0)
        done = BlockDone(self.blocks[-1], records, new, most, max(peaks), written)
        with self.clock("write"):
            tensors = block.module.state_dict(prefix=f"{block.name}.")
            self.writer.commit(block.name, tensors, done.to_dict(), self._changed(block))

    def _replay(self, acts: Activations, block: Block, found: BlockDone) -> None:
        """Load the weights of a block that an earlier run committed, and append its records."""
        with self.clock("read"):
            written = self._written(acts.ranks, block)
            tensors = {name.removeprefix(f"{block.name}."): tensor for name, tensor in written.items()}
            unknown = block.module.load_state_dict(tensors, strict=False).unexpected_keys
            assert not unknown, f"{block.name} has no {unknown}"
        self.blocks.append(found.block)
        self.linears.extend(found.linears)
        self.notes.extend(found.notes)
        acts.batch_size.limit(found.halved, noted=True)
        before = self.clock.seconds.get("write", 0.0)
        self.clock.seconds["write"] = max(before, found.write_seconds)
        self.resumed_seconds += sum(found.block.seconds.values()) + max(0.0, found.write_seconds - before)
        self.resumed_peak = max(self.resumed_peak, found.peak_bytes)

    def _reader(self, ranks: Ranks, block: Block) -> Read:
        """Returns the pruned weights of a block, which is on the device now."""
        if ranks.size == 1 or isinstance(self.weights, Resident):
            return partial(self._written, ranks, block)
        # A rank asks as often as it has batches, the others may not ask at the same time: each keeps its own.
        names = self._changed(block)
        state = block.module.state_dict(prefix=f"{block.name}.")
        kept = {name: self.store.keep(state[name].detach().to("cpu", copy=True)) for name in names}
        return lambda: kept

    def _changed(self, block: Block) -> list[str]:
        """Full names of the tensors that pruning changed in the block that was done last."""
        found = changed(block, {record.name for record in self.linears}, tuned=self.blocks[-1].tuning_epoch > 0)
        places = {parameter.data_ptr() for parameter in found.values()}  # one parameter may have several names
        state = block.module.state_dict(prefix=f"{block.name}.")
        return [name for name, tensor in state.items() if tensor.data_ptr() in places]

    def _written(self, ranks: Ranks, block: Block) -> dict[str, Tensor]:
        """The committed tensors of a block; all ranks call it at the same time."""

        def read() -> dict[str, Tensor]:
            assert self.writer is not None
            return self.writer.read(block.name)

        return ranks.on_rank0(read)

    def _dense(self, linear: Linear) -> Tensor:
        """A copy of the weight, (O, D), in float32, or float64 if it is."""
        stored = linear.read()
        return stored.to(self.device, torch.promote_types(stored.dtype, torch.float32), copy=True)
