"""The algorithm: capture activations, find Fisher weights, allocate sparsity, and prune the model block by block.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.allocate import allocate, saliency_quantiles, with_shares
from optima.calibration.activations import Activations, capture
from optima.calibration.fisher import LOGITS, chosen_batches, fisher_weights
from optima.calibration.hessians import Found, observe, routing_notes
from optima.calibration.lm_head import LmHead
from optima.calibration.weights import FisherWeights
from optima.device import Stopwatch, full_precision, give_back_freed_memory
from optima.distributed import ALONE
from optima.errors import NotDifferentiableError
from optima.linear import prune_linear
from optima.models.blocks import Block, Linear, Stack, is_expert
from optima.models.forward import evaluating
from optima.models.offload import outside_device
from optima.patterns import Pattern
from optima.recipe import EXPERT_TOKENS, FISHER_FRACTION, SINK_WEIGHT
from optima.reporting.record import BlockRecord, LinearRecord
from optima.selectors.base import LinearTask
from optima.state import RunState
from optima.tune import Tuned, Tuning, changed, tune_block

# Mamba reads the weight of its dt_proj like this.
UNCALLED = "its module was never called, which does not mean that the model does not use its weight"


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    stacks: Sequence[Stack],
    batches: Sequence[Tensor],
    patterns: Mapping[str, Pattern],
    run: RunState,
) -> dict[str, Pattern]:
    """Prune the linears of all ``stacks`` by the ``patterns`` of their names; returns the patterns as applied."""
    patterns, by_loss = dict(patterns), run.recipe.objective == "loss"
    needed = [stack for stack in stacks if stack.needed]
    with evaluating(model):
        for stack in needed:
            # A decoder reads what the pruned encoder made.
            with run.clock("forward"), run.weights.outside(outside_device(model, run.device)):
                acts = capture(model, stack, batches, by_loss, run.ranks, run.store, run.batch_size)
            fisher, head = find_fisher_weights(model, stack, acts, run) if by_loss else (None, None)
            if fisher is None:
                names = {linear.name for block in stack.blocks for linear in block.linears}
                patterns |= {name: pattern for name, pattern in run.fallback.items() if name in names}
            elif run.recipe.allocation == "loss":
                patterns = with_shares(patterns, sensitivity_pass(stack, acts, fisher, run))
            run.first_block = sum(len(each.blocks) for each in stacks[: stacks.index(stack)])
            prune_stack(stack, acts, fisher, head, patterns, run, runs_again=stack is not needed[-1])
    return patterns


@torch.no_grad()
def prune_stack(
    stack: Stack,
    acts: Activations,
    fisher: FisherWeights | None,
    head: LmHead | None,
    patterns: Mapping[str, Pattern],
    run: RunState,
    runs_again: bool = False,
) -> None:
    """Prune the linears of a stack, block by block.

    Args:
        stack: with the linears to prune.
        acts: the inputs of its first block.
        fisher: weights of tokens and rows, or None.
        head: the LM head, if the last block is tuned on logits.
        patterns: the pattern of each linear by its full name.
        run: settings and records.
        runs_again: whether the model will run these blocks for a later stack.
    """
    blocks, committed = stack.blocks[: stack.needed], run.committed()
    tuner = make_tuner(acts, fisher, head, run)
    done = sum(block.name in committed for block in blocks)
    run.progress.stage("prune", len(blocks), done)
    for block in blocks:
        resumed, noted = committed.get(block.name), len(run.notes)
        clock = run.clock if resumed else Stopwatch(run.device, run.progress.step)
        with run.weights.on(block, run.device, clock):
            if tuner is not None:
                tuner.forward(block, clock)
            if resumed is not None:
                run.replay(block, resumed)
                records, tuned = list(resumed.linears), Tuned(resumed.block.tuning, resumed.block.tuning_epoch)
            else:
                pruned = prune_block(block, acts, fisher, patterns, run, clock, for_tuning=tuner is not None)
                records, tuned = pruned.in_order(block, acts, run), Tuned((), 0)
                if tuner is not None and pruned.keeps:
                    tuned = tuner.tune(block, pruned, acts, clock)
                    run.note(tuned.problem)
                    records = [_tuned(record, block) for record in records] if tuned.best else records
                del pruned
            if fisher is not None:
                fisher.forget([block.name, *(linear.name for linear in block.linears)])
            if block is not blocks[-1]:
                with clock("forward"):
                    acts.forward(block)
            names = _changed_names(block, records, tuned)
            if resumed is None:
                outcome = (dict(clock.seconds), tuned.held_out, tuned.best, tuned.on_logits)
                record = BlockRecord(run.first_block + block.index, block.name, *outcome)
                run.commit(block, record, records, names, noted)
            if runs_again:
                run.weights.replaced(block, run.reader(block, names))
        give_back_freed_memory()
        run.progress.notes(run.notes)
        run.progress.block(block.name, run.blocks[-1], records, resumed is not None)


def prune_block(
    block: Block,
    acts: Activations,
    fisher: FisherWeights | None,
    patterns: Mapping[str, Pattern],
    run: RunState,
    clock: Stopwatch,
    *,
    for_tuning: bool,
) -> Pruned:
    """Prune the block's linears, each on the rank that has its Hessian; afterwards all ranks have all weights.

    ``for_tuning``: return masks and unrounded weights too.
    """
    pruned = Pruned()
    for found in collect_hessians(block, acts, fisher, run, clock):
        pruned.owners |= dict.fromkeys((linear.name for linear in found.linears), found.owner)
        for linear in found.linears if found.owner in (None, run.ranks.rank) else ():
            if found.hessian is None:
                why = "no calibration token reached it" if is_expert(linear) else UNCALLED
                pruned.notes[linear.name] = (f"{linear.name} was not pruned: {why}",)
                continue
            rows_O = None if fisher is None else fisher.rows.get(linear.name)
            coupling_OO = None if fisher is None else fisher.coupling.get(linear.name)
            task = LinearTask(linear.name, _dense(linear, run), found.hessian, rows_O, coupling_OO)
            ranks = run.ranks if found.owner is None else ALONE
            result = prune_linear(task, patterns[linear.name], run.methods, linear.read().dtype, clock, ranks)
            linear.write(result.weight_OD)
            index = run.first_block + block.index
            pruned.records[linear.name] = replace(result.record, block=index)
            pruned.notes[linear.name] = result.notes
            if for_tuning:
                pruned.keeps[linear.name] = result.keep_OD
                if result.solution_OD is not None:
                    pruned.solutions[linear.name] = result.solution_OD
        del found  # or its Hessian would be in memory during the next pass
    if run.ranks.size > 1:
        with clock("share"):
            _share(block, pruned, run, for_tuning)
    return pruned


def collect_hessians(
    block: Block,
    acts: Activations,
    fisher: FisherWeights | None,
    run: RunState,
    clock: Stopwatch,
    *,
    onward: bool = False,
) -> Iterator[Found]:
    """The statistics of each group of linears with one input; ``onward``: ``acts`` become the block's outputs."""
    sink_weight = 0.0 if fisher is not None or run.recipe.objective == "plain" else SINK_WEIGHT
    return observe(block, acts, sink_weight, run.recipe.damping, clock, fisher, onward)


def find_fisher_weights(
    model: PreTrainedModel, stack: Stack, acts: Activations, run: RunState
) -> tuple[FisherWeights | None, LmHead | None]:
    """The Fisher weights of a stack, and its LM head for tuning on logits. A model without gradients has neither."""
    run.progress.stage("gradients", len(stack.blocks))
    try:
        with run.clock("gradients"), full_precision():
            fisher = fisher_weights(
                model,
                stack,
                acts,
                run.recipe.seed,
                residual=bool(run.recipe.tuning_epochs),
                weights=run.weights,
                share=FISHER_FRACTION,
                progress=run.progress.progress,
                coupled="coupling" in run.methods.needs,
            )
    except NotDifferentiableError as error:
        part = "" if stack.part == "whole" else f" in the {stack.part}"
        how = "with the same sparsity for all linears and without tuning"
        why = f"because there are no gradients: {error}"
        run.note(*run.ranks.gather(f"objective sink replaces objective loss{part}, {how}, {why}"))
        return None, None
    if fisher.loss != LOGITS:
        run.note(f"objective loss is {fisher.loss}: the model has no LM head")
        return fisher, None
    # In an encoder-decoder a call of the LM head would run the other stack.
    return fisher, LmHead(model, stack, run.weights) if stack.part == "whole" else None


@torch.no_grad()
def sensitivity_pass(stack: Stack, acts: Activations, fisher: FisherWeights, run: RunState) -> dict[str, float]:
    """Each linear's share of the recipe's sparsity, from a pass over the dense blocks with some of the batches."""
    experts = any(is_expert(linear) for block in stack.blocks for linear in block.linears)
    batches = chosen_batches(acts, 1.0 if experts else FISHER_FRACTION)  # each expert gets few tokens
    acts, fisher = acts.part(batches), fisher.part(batches)
    blocks, quantiles = stack.blocks[: stack.needed], dict[str, Tensor]()
    run.progress.stage("sensitivity", len(blocks))
    for block in blocks:
        own: dict[str, Tensor] = {}
        with run.weights.on(block, run.device, run.clock):
            for found in collect_hessians(block, acts, fisher, run, run.clock, onward=block is not blocks[-1]):
                if found.hessian is not None and found.owner in (None, run.ranks.rank):
                    for linear in found.linears:
                        rows_O = fisher.rows.get(linear.name, torch.zeros(linear.shape[0]))
                        task = LinearTask(linear.name, _dense(linear, run), found.hessian, row_weight_O=rows_O)
                        own[linear.name] = saliency_quantiles(task)
                del found  # or its Hessian would be in memory during the next pass
        every = run.ranks.gather_dict(own)
        names = [linear.name for group in acts.groups(block) for linear in group]
        quantiles |= {name: every[name] for name in names if name in every}
        run.progress.block(block.name)
    sizes = {linear.name: math.prod(linear.shape) for block in stack.blocks for linear in block.linears}
    return allocate(run.recipe.one_sparsity, quantiles, sizes)


@dataclass
class Pruned:
    """The outcome for a block's linears, by name.

    Attributes:
        owners: the rank that prunes each; None: all ranks together.
        records: of those that were pruned.
        notes: for the report.
        keeps, solutions: masks, and weights before rounding, for tuning.
    """

    owners: dict[str, int | None] = field(default_factory=dict)
    records: dict[str, LinearRecord] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    keeps: dict[str, Tensor] = field(default_factory=dict)
    solutions: dict[str, Tensor] = field(default_factory=dict)

    def in_order(self, block: Block, acts: Activations, run: RunState) -> list[LinearRecord]:
        """The records in the order of the linears' groups; their notes go to the report."""
        ordered = [linear for group in acts.groups(block) for linear in group]
        run.note(*(note for linear in ordered for note in self.notes[linear.name]))
        pruned = [linear for linear in ordered if linear.name in self.records]
        routed = {linear.name: self.records[linear.name].tokens for linear in pruned if is_expert(linear)}
        run.note(*routing_notes(block.name, routed, EXPERT_TOKENS))
        return [self.records[linear.name] for linear in pruned]


def _share(block: Block, pruned: Pruned, run: RunState, for_tuning: bool) -> None:
    """Broadcast records, notes, weights, and what tuning needs, from the owners to all ranks."""
    ranks = run.ranks
    pruned.notes = ranks.gather_dict(pruned.notes)
    pruned.records = ranks.gather_dict(pruned.records)
    for linear in block.linears:
        owner = pruned.owners[linear.name]
        if owner is None or linear.name not in pruned.records:
            continue
        linear.write(ranks.broadcast_(linear.read().contiguous(), owner))
        dtypes = {"keeps": torch.bool, "solutions": torch.promote_types(linear.read().dtype, torch.float32)}
        for kind, dtype in dtypes.items() if for_tuning else ():
            if kind == "keeps" or run.methods.solver is not None:
                tensors = getattr(pruned, kind)
                empty_OD = torch.empty(linear.shape, dtype=dtype, device=run.device)
                tensors[linear.name] = ranks.broadcast_(tensors.get(linear.name, empty_OD).contiguous(), owner)


@dataclass
class Tuner:
    """Tunes the blocks of a stack towards the dense blocks' outputs.

    Attributes:
        tuning: how.
        batches: those that blocks are tuned on.
        dense: dense inputs of these batches.
        fisher, head: as of ``prune_stack``.
    """

    tuning: Tuning
    batches: list[int]
    dense: Activations
    fisher: FisherWeights
    head: LmHead | None

    def forward(self, block: Block, clock: Stopwatch) -> None:
        """Advance the dense inputs to the outputs of the dense ``block``, which are the targets."""
        with clock("forward"):
            self.dense.forward(block)

    def tune(self, block: Block, pruned: Pruned, acts: Activations, clock: Stopwatch) -> Tuned:
        """Tune a pruned block with the inputs ``acts``."""
        head = self.head if self.head is not None and block is self.head.stack.blocks[-1] else None
        tokens = self.fisher.tokens.get(block.name)
        weights = None if tokens is None else [tokens[batch] for batch in self.batches]
        part, targets = acts.part(self.batches), self.dense.hidden
        metric_EE, solutions = self.fisher.residual[block.name], pruned.solutions
        with clock("tune" if head is None else "logits"):
            return tune_block(block, pruned.keeps, part, targets, self.tuning, metric_EE, weights, head, solutions)


def make_tuner(acts: Activations, fisher: FisherWeights | None, head: LmHead | None, run: RunState) -> Tuner | None:
    """A tuner of the stack that ``acts`` enters; None if its blocks are not tuned."""
    recipe = run.recipe
    if not recipe.tuning_epochs or fisher is None:
        return None
    tuning = Tuning(recipe.tuning_epochs, recipe.learning_rate, recipe.seed)
    batches = chosen_batches(acts, recipe.tuning_fraction, tuned=True)
    return Tuner(tuning, batches, acts.part(batches), fisher, head)


def _dense(linear: Linear, run: RunState) -> Tensor:
    """A copy of the weight, (O, D), in float32, or float64 if it is."""
    stored = linear.read()
    return stored.to(run.device, torch.promote_types(stored.dtype, torch.float32), copy=True)


def _tuned(record: LinearRecord, block: Block) -> LinearRecord:
    """The record of a tuned linear, whose weights have no certificate."""
    weight_OD = next(linear for linear in block.linears if linear.name == record.name).read()
    sparsity, none = float((weight_OD == 0).double().mean()), None
    return replace(record, sparsity=sparsity, tuned=True, gap_written_max=none, loss_written=none)


def _changed_names(block: Block, records: Sequence[LinearRecord], tuned: Tuned) -> list[str]:
    """Full names of the tensors that pruning and tuning changed."""
    found = changed(block, {record.name for record in records}, tuned=tuned.best > 0)
    places = {parameter.data_ptr() for parameter in found.values()}  # one parameter may have several names
    state = block.module.state_dict(prefix=f"{block.name}.")
    return [name for name, tensor in state.items() if tensor.data_ptr() in places]
