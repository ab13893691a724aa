"""The whole story on one page: for each block observe, prune its linears, carry the outputs on, commit it to disk."""

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
from optima.calibration.fisher import FisherWeights, tuned_batches
from optima.calibration.lm_head import LmHead
from optima.calibration.statistics import Found, observe, routing_notes
from optima.calibration.store import Store
from optima.core.statistics import Statistics
from optima.device import PeakMemory, Stopwatch, give_back_freed_memory
from optima.distributed import ALONE, Ranks
from optima.linear import LinearResult, Methods, prune_linear
from optima.models.blocks import Block, Linear, Stack, is_expert
from optima.models.offload import Read, Resident, Weights
from optima.models.save import Writer
from optima.patterns import Pattern
from optima.reporting.callbacks import Callbacks
from optima.reporting.record import BlockDone, BlockRecord, LinearRecord
from optima.selectors.base import LinearTask
from optima.sharing import Pruned, share_owned
from optima.tune import Tuned, Tuning, changed, tune_block

# Mamba reads the weight of its dt_proj like this.
UNCALLED = "its module was never called, which does not mean that the model does not use its weight"


@dataclass
class Job:
    """What a run does to each block, and what has become of those done so far.

    Attributes:
        methods: what is done to each linear.
        device: where blocks are calibrated and solved.
        damping: of the hessians, relative to their mean diagonal.
        expert_tokens: fewer tokens at an expert are noted.
        sink_weight: without loss weights, of the first token of each sequence, see ``optima.calibration.statistics``.
        progress: tells of every linear and block.
        weights: brings blocks to the device.
        store: keeps activations.
        writer: commits blocks to disk, and knows those that an earlier run did; None for a model that stays in memory.
        loss: weights of tokens and rows by the model's loss, or None.
        tuning: of blocks, or None.
        words: who has the head that reads the stack, by which its last block is tuned; None: as the others are.
        linears, blocks: the records so far.
        memory: of this process, from the start of the run.
        resumed_seconds: what an earlier run spent on the blocks that it had done.
        resumed_peak: the most memory that it had taken by then, in bytes.
        notes: what was not done, or deviated from the recipe.
        batch_size: how many sequences run together.
        clock: of what happens outside the blocks.
        earlier: blocks of the stacks before: a report numbers the blocks of a model.
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
    words: LmHead | None = None
    linears: list[LinearRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memory: PeakMemory | None = None
    resumed_seconds: float = 0.0
    resumed_peak: int = 0
    expert_tokens: int = 0

    def __post_init__(self) -> None:
        self.batch_size = BatchSize(self.device)
        self.clock = Stopwatch(self.device)
        self.earlier = 0

    def stages(self) -> dict[str, float]:
        """Seconds of each stage so far."""
        total = Counter(self.clock.seconds)
        for block in self.blocks:
            total.update(block.seconds)
        return dict(total)

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
        ranks = acts.ranks
        resumed = ranks.on_rank0(lambda: {} if self.writer is None else self.writer.done)
        done = sum(block.name in resumed for block in blocks)
        last = self._last_tuning(blocks[-1], acts)
        self.progress.stage("prune", len(blocks), max(len(block.linears) for block in blocks), done, last)
        taken = [] if self.tuning is None else tuned_batches(acts, self.tuning.share)
        dense = None if self.tuning is None else acts.part(taken)
        for block in blocks:
            again = block.name in resumed
            clock = self.clock if again else Stopwatch(self.device, self.progress.step)
            linears, notes = len(self.linears), len(self.notes)
            with self.weights.on(block, self.device, clock):
                if dense is not None:
                    with clock("forward"):
                        dense.forward(block)
                if again:
                    self._replay(acts, block, BlockDone.from_dict(resumed[block.name]))
                else:
                    # Tuning begins with what enters the block.
                    pruned, tuned = self._prune(block, acts, patterns, clock), Tuned((), 0)
                    if dense is not None and pruned.keeps:
                        with clock("logits" if self.words is not None and self.words.read(block) else "tune"):
                            tuned = self._tune(block, pruned, (acts, taken, dense.hidden), linears)
                    del pruned
                if self.loss is not None:
                    self.loss.forget([block.name, *(linear.name for linear in block.linears)])
                if block is not blocks[-1]:
                    with clock("forward"):
                        acts.forward(block)
                for each in [acts] if dense is None else [acts, dense]:
                    each.forget(block)
                # In the journal with the block: a run that goes on from here tells of it too.
                peak = 0 if self.memory is None else self.memory.peak()
                told, halved, peaks = zip(
                    *ranks.gather((acts.batch_size.note(), acts.batch_size.most, peak)), strict=True
                )
                self.notes.extend(dict.fromkeys(filter(None, told)))
                if not again:
                    number = self.earlier + block.index
                    took = dict(clock.seconds)  # without the commit, which a resumed block would lack
                    loss = tuned.held_out, tuned.best, tuned.on_logits
                    self.blocks.append(BlockRecord(number, block.name, took, *loss))
                    records, new = tuple(self.linears[linears:]), tuple(self.notes[notes:])
                    written = self.clock.seconds.get("write", 0.0)
                    self._commit(block, BlockDone(self.blocks[-1], records, new, halved, max(peaks), written))
                if runs_again:
                    self.weights.replaced(block, self._reader(ranks, block))
            give_back_freed_memory()
            self.progress.notes(self.notes)
            self.progress.block(block.name, self.blocks[-1], self.linears[linears:] if again else None)
        self.earlier += len(stack.blocks)

    def _last_tuning(self, block: Block, acts: Activations) -> float:
        """Cost of tuning the last block relative to another, for the estimate of the time left."""
        if self.tuning is None or self.words is None or not self.words.read(block):
            return 1.0
        return self.words.tuning_cost(max((length for _, length in acts.sizes), default=1))

    def _reader(self, ranks: Ranks, block: Block) -> Read:
        """Gives what pruning made of a block, which is on the device."""
        if ranks.size == 1 or isinstance(self.weights, Resident):
            return partial(self._written, ranks, block)
        # A process asks as often as it has batches, the others may not ask at the same time: each keeps its own.
        names = self._changed(block)
        state = block.module.state_dict(prefix=f"{block.name}.")
        kept = {name: self.store.keep(state[name].detach().to("cpu", copy=True)) for name in names}
        return lambda: kept

    def _changed(self, block: Block) -> list[str]:
        """Full names of the tensors of a block, the last that was done, that pruning changed."""
        found = changed(block, {record.name for record in self.linears}, tuned=self.blocks[-1].tuning_epoch > 0)
        places = {parameter.data_ptr() for parameter in found.values()}  # one parameter may have several names
        state = block.module.state_dict(prefix=f"{block.name}.")
        return [name for name, tensor in state.items() if tensor.data_ptr() in places]

    def _written(self, ranks: Ranks, block: Block) -> dict[str, Tensor]:
        """What was committed of a block, which every process asks for at the same time."""

        def read() -> dict[str, Tensor]:
            assert self.writer is not None
            return self.writer.read(block.name)

        return ranks.on_rank0(read)

    def _replay(self, acts: Activations, block: Block, found: BlockDone) -> None:
        """Give a block that an earlier run committed its weights, and the report what it told of it."""
        with self.clock("read"):
            written = self._written(acts.ranks, block)
            tensors = {name.removeprefix(f"{block.name}."): tensor for name, tensor in written.items()}
            unknown = block.module.load_state_dict(tensors, strict=False).unexpected_keys
            assert not unknown, f"{block.name} has no {unknown}"
        self.blocks.append(found.block)
        self.linears.extend(found.linears)
        self.notes.extend(found.notes)
        acts.batch_size.resume(found.halved, acts.ranks.rank)
        before = self.clock.seconds.get("write", 0.0)
        self.clock.seconds["write"] = max(before, found.write_seconds)
        self.resumed_seconds += sum(found.block.seconds.values()) + max(0.0, found.write_seconds - before)
        self.resumed_peak = max(self.resumed_peak, found.peak_bytes)

    def _commit(self, block: Block, done: BlockDone) -> None:
        """Write a block that is done, and what the report will tell of it."""
        if self.writer is None:
            return
        with self.clock("write"):
            tensors = block.module.state_dict(prefix=f"{block.name}.")
            self.writer.commit(block.name, tensors, done.to_dict(), self._changed(block))

    def _tune(
        self,
        block: Block,
        pruned: Pruned,
        given: tuple[Activations, Sequence[int], Sequence[Tensor]],
        first: int,
    ) -> Tuned:
        """Tune a pruned block; the records from number ``first`` on tell what is no longer certified."""
        assert self.tuning is not None
        words = self.words if self.words is not None and self.words.read(block) else None
        acts, batches, targets = given
        with torch.inference_mode(False):  # gradients are taken through what is made of them
            known = None if self.loss is None else self.loss.of_tokens(block.name)
        weights = known and [known[batch] for batch in batches]
        own = acts.part(batches)
        tuned = tune_block(block, pruned.keeps, own, targets, self.tuning, self.loss, weights, words, pruned.solutions)
        self.notes += [text for text in (tuned.problem, tuned.note) if text and text not in self.notes]
        written = {linear.name: linear for linear in block.linears}
        for place in range(first, len(self.linears) if tuned.best else first):
            record = self.linears[place]
            sparsity = float((written[record.name].read() == 0).double().mean())
            self.linears[place] = replace(
                record, sparsity=sparsity, tuned=True, gap_written_max=None, gap_written_median=None, loss_written=None
            )
        return tuned

    @torch.no_grad()
    def survey(self, stack: Stack, acts: Activations, sparsity: float, batches: Sequence[int]) -> dict[str, float]:
        """Each linear's share of one sparsity, from a pass of some ``batches`` over the dense blocks."""
        quantiles: dict[str, Tensor] = {}
        sizes = {linear.name: math.prod(linear.shape) for block in stack.blocks for linear in block.linears}
        whole, acts = self.loss, acts.part(batches).counted()
        self.loss = None if whole is None else whole.part(batches)
        blocks = stack.blocks[: stack.needed]
        self.progress.stage("sensitivity", len(blocks))
        for block in blocks:
            with self.weights.on(block, self.device, self.clock):
                quantiles |= self._survey(block, acts, onward=block is not blocks[-1])
            acts.forget(block)
            self.progress.block(block.name)
        self.loss = whole
        return allocate(sparsity, quantiles, sizes)

    def _survey(self, block: Block, acts: Activations, onward: bool) -> dict[str, Tensor]:
        measured: dict[str, Tensor | None] = {}
        owners: dict[str, int | None] = {}
        for found in self.observe(block, acts, self.clock, onward=onward):
            owners |= dict.fromkeys((linear.name for linear in found.linears), found.owner)
            for linear in found.linears if found.owner in (None, acts.ranks.rank) else ():
                measured[linear.name] = self._measure(linear, found.statistics)
            del found  # or it would be there while the pass goes on
        measured = share_owned(measured, owners, acts.ranks)
        names = [linear.name for group in acts.groups(block) for linear in group]
        return {name: own for name in names if (own := measured[name]) is not None}

    def _measure(self, linear: Linear, statistics: Statistics | None) -> Tensor | None:
        if statistics is None:
            return None
        rows = None if self.loss is None else self.loss.compared(linear.name, linear.shape[0])
        task = LinearTask(linear.name, self._dense(linear), statistics, row_weight_O=rows)
        return saliency_quantiles(task)

    def observe(self, block: Block, acts: Activations, clock: Stopwatch, *, onward: bool = False) -> Iterator[Found]:
        """The statistics of each distinct input; all have been gathered, and ``acts`` gone ``onward``, at once."""
        for found in observe(block, acts, self.sink_weight, self.damping, clock, self.loss, onward):
            if not found.weighted:
                names = ", ".join(linear.name for linear in found.linears)
                what, why = "sink_weight does not count", "not given one input for each token"
                if self.loss is not None:
                    what, why = "weights of tokens do not count", f"{why}, or the loss feels none of them"
                note = f"{block.name}: {what} for {names}: {why}"
                if note not in self.notes:  # a survey saw the same
                    self.notes.append(note)
            yield found
            del found  # or it would be there while the pass goes on

    def _prune(self, block: Block, acts: Activations, patterns: Mapping[str, Pattern], clock: Stopwatch) -> Pruned:
        """Prune the block's linears, each in the process that has its statistics; all have all weights afterwards."""
        ranks, pruned = acts.ranks, Pruned()
        for found in self.observe(block, acts, clock):
            effective = None if self.loss is None else self.loss.effective_tokens(found.linears[0].name)
            pruned.owners |= dict.fromkeys((linear.name for linear in found.linears), found.owner)
            for linear in found.linears if found.owner in (None, ranks.rank) else ():
                if found.statistics is None:
                    why = "no calibration token reached it" if is_expert(linear) else UNCALLED
                    pruned.done[linear.name] = None, (f"{linear.name} was not pruned: {why}",)
                else:
                    together = ranks if found.owner is None else ALONE
                    pattern = patterns[linear.name]
                    result = self._prune_linear(linear, found.statistics, pattern, clock, together)
                    linear.write(result.weight_OD)
                    record = replace(result.record, block=self.earlier + block.index, tokens_effective=effective)
                    pruned.done[linear.name] = record, result.notes
                    self.progress.linear(record)
                    if self.tuning is not None:  # five bytes a weight, on the device
                        pruned.keeps[linear.name] = result.keep_OD
                        if result.solution_OD is not None:
                            pruned.solutions[linear.name] = result.solution_OD
            del found  # or it would be there while the pass goes on
        self._share(pruned, block.linears, ranks, clock)
        self._tell(block, acts, pruned)
        return pruned

    def _share(self, pruned: Pruned, linears: Sequence[Linear], ranks: Ranks, clock: Stopwatch) -> None:
        if ranks.size > 1:
            with clock("share"):
                pruned.share(linears, ranks)

    def _tell(self, block: Block, acts: Activations, pruned: Pruned) -> None:
        """Let the report know of the block's linears, in the order of their groups."""
        routed = {}
        for linear in (linear for group in acts.groups(block) for linear in group):
            told, notes = pruned.done[linear.name]
            self.notes.extend(notes)
            if told is not None:
                self.linears.append(told)
                if is_expert(linear):
                    routed[linear.name] = told.tokens
                if pruned.owners[linear.name] not in (None, acts.ranks.rank):
                    self.progress.linear(told)
        self.notes.extend(routing_notes(block.name, routed, self.expert_tokens))

    def _prune_linear(
        self, linear: Linear, statistics: Statistics, pattern: Pattern, clock: Stopwatch, ranks: Ranks
    ) -> LinearResult:
        rows_O = None if self.loss is None else self.loss.of_rows(linear.name)
        coupling_OO = None if self.loss is None else self.loss.coupling.get(linear.name)
        task = LinearTask(linear.name, self._dense(linear), statistics, rows_O, coupling_OO)
        return prune_linear(task, pattern, self.methods, linear.read().dtype, clock, ranks)

    def _dense(self, linear: Linear) -> Tensor:
        """A copy of the weight, (O, D), in float32, or float64 if it is."""
        stored = linear.read()
        return stored.to(self.device, torch.promote_types(stored.dtype, torch.float32), copy=True)
