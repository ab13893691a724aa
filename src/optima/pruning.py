"""The algorithm: capture activations, find Fisher weights, allocate sparsity, and prune the model block by block.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.allocate import allocate, saliency_quantiles, with_shares
from optima.calibration.activations import Activations, capture
from optima.calibration.fisher import chosen_batches
from optima.calibration.hessians import observe, routing_notes
from optima.calibration.weights import FisherWeights
from optima.device import Stopwatch
from optima.distributed import ALONE
from optima.linear import Methods, prune_linear
from optima.loop import Outcome, find_fisher_weights, run_blocks
from optima.models.blocks import Block, Linear, Stack, is_expert
from optima.models.forward import evaluating
from optima.models.offload import outside_device
from optima.patterns import Pattern
from optima.plan import PrunePlan
from optima.recipe import EXPERT_TOKENS, FISHER_FRACTION, SINK_WEIGHT, Recipe
from optima.reporting.record import LinearRecord
from optima.selectors.base import LinearTask
from optima.state import RunState
from optima.tune import make_tuner

# Mamba reads the weight of its dt_proj like this.
UNCALLED = "its module was never called, which does not mean that the model does not use its weight"


@torch.no_grad()
def prune_model(
    model: PreTrainedModel, stacks: Sequence[Stack], batches: Sequence[Tensor], plan: PrunePlan, run: RunState
) -> dict[str, Pattern]:
    """Prune the linears of all ``stacks`` by the patterns of the ``plan``; returns the patterns as applied."""
    patterns, recipe = dict(plan.patterns), plan.options
    needed = [stack for stack in stacks if stack.needed]
    with evaluating(model):
        for stack in needed:
            # A decoder reads what the pruned encoder made.
            with run.clock("forward"), run.weights.outside(outside_device(model, run.device)):
                whole = recipe.objective == "loss"
                acts = capture(model, stack, batches, whole, run.ranks, run.store, run.batch_size)
            fisher = head = None
            if recipe.objective == "loss":
                fisher, head = find_fisher_weights(model, stack, acts, run, "coupling" in plan.methods.needs)
            if fisher is not None and recipe.allocation == "loss":
                patterns = with_shares(patterns, sensitivity_pass(stack, acts, fisher, recipe, run))
            elif fisher is None and recipe.objective == "loss":
                names = {linear.name for block in stack.blocks for linear in block.linears}
                patterns |= {name: pattern for name, pattern in plan.fallback.items() if name in names}
            run.first_block = sum(len(each.blocks) for each in stacks[: stacks.index(stack)])
            sink_weight = 0.0 if fisher is not None or recipe.objective == "plain" else SINK_WEIGHT
            step = PruneStep(acts, fisher, patterns, plan.methods, sink_weight, run)
            tuner = make_tuner(acts, fisher, head, recipe)
            run_blocks(stack, acts, fisher, tuner, run, step, runs_again=stack is not needed[-1])
    return patterns


@dataclass(frozen=True)
class PruneStep:
    """Prunes the linears of a block, each on the rank that has its Hessian; afterwards all ranks have all weights.

    Attributes:
        acts: the inputs of the block.
        fisher: weights of tokens and rows, or None.
        patterns: the pattern of each linear by its full name.
        methods: selector and solver.
        sink_weight: of the first token of each sequence, see ``observe``.
        run: settings and records.
    """

    acts: Activations
    fisher: FisherWeights | None
    patterns: Mapping[str, Pattern]
    methods: Methods
    sink_weight: float
    run: RunState

    def __call__(self, block: Block, clock: Stopwatch) -> Outcome:
        """Prune the block, which is on the device."""
        run, fisher, pruned = self.run, self.fisher, Pruned()
        for found in observe(block, self.acts, self.sink_weight, run.options.damping, clock, fisher):
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
                pattern, dtype = self.patterns[linear.name], linear.read().dtype
                result = prune_linear(task, pattern, self.methods, dtype, clock, ranks)
                linear.write(result.weight_OD)
                pruned.records[linear.name] = replace(result.record, block=run.first_block + block.index)
                pruned.notes[linear.name] = result.notes
                if run.options.tuning_epochs:
                    pruned.keeps[linear.name] = result.keep_OD
                    if result.solution_OD is not None:
                        pruned.solutions[linear.name] = result.solution_OD
            del found  # its factorised Hessian would be in memory beside the next one
        if run.ranks.size > 1:
            with clock("share"):
                _share(block, pruned, run, solved=self.methods.solver is not None)
        return Outcome(pruned.in_order(block, self.acts, run), keeps=pruned.keeps, solutions=pruned.solutions)


@torch.no_grad()
def sensitivity_pass(
    stack: Stack, acts: Activations, fisher: FisherWeights, recipe: Recipe, run: RunState
) -> dict[str, float]:
    """Each linear's share of the recipe's sparsity, from a pass over the dense blocks with some of the batches."""
    experts = any(is_expert(linear) for block in stack.blocks for linear in block.linears)
    batches = chosen_batches(acts, 1.0 if experts else FISHER_FRACTION)  # each expert gets few tokens
    acts, fisher = acts.part(batches), fisher.part(batches)
    blocks, quantiles = stack.blocks[: stack.needed], dict[str, Tensor]()
    run.progress.stage("sensitivity", len(blocks))
    for block in blocks:
        own: dict[str, Tensor] = {}
        with run.weights.on(block, run.device, run.clock):
            onward = block is not blocks[-1]
            for found in observe(block, acts, 0.0, recipe.damping, run.clock, fisher, onward):
                if found.hessian is not None and found.owner in (None, run.ranks.rank):
                    for linear in found.linears:
                        rows_O = fisher.rows.get(linear.name, torch.zeros(linear.shape[0]))
                        task = LinearTask(linear.name, _dense(linear, run), found.hessian, row_weight_O=rows_O)
                        own[linear.name] = saliency_quantiles(task)
                del found  # its factorised Hessian would be in memory beside the next one
        every = run.ranks.gather_dict(own)
        names = [linear.name for group in acts.groups(block) for linear in group]
        quantiles |= {name: every[name] for name in names if name in every}
        run.progress.block(block.name)
    sizes = {linear.name: math.prod(linear.shape) for block in stack.blocks for linear in block.linears}
    return allocate(recipe.one_sparsity, quantiles, sizes)


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


def _share(block: Block, pruned: Pruned, run: RunState, solved: bool) -> None:
    ranks = run.ranks
    pruned.notes = ranks.gather_dict(pruned.notes)
    pruned.records = ranks.gather_dict(pruned.records)
    for linear in block.linears:
        owner = pruned.owners[linear.name]
        if owner is None or linear.name not in pruned.records:
            continue
        linear.write(ranks.broadcast_(linear.read().contiguous(), owner))
        dtypes = {"keeps": torch.bool, "solutions": torch.promote_types(linear.read().dtype, torch.float32)}
        for kind, dtype in dtypes.items() if run.options.tuning_epochs else ():
            if kind == "keeps" or solved:
                tensors = getattr(pruned, kind)
                empty_OD = torch.empty(linear.shape, dtype=dtype, device=run.device)
                tensors[linear.name] = ranks.broadcast_(tensors.get(linear.name, empty_OD).contiguous(), owner)


def _dense(linear: Linear, run: RunState) -> Tensor:
    """A copy of the weight, (O, D), in float32, or float64 if it is."""
    stored = linear.read()
    return stored.to(run.device, torch.promote_types(stored.dtype, torch.float32), copy=True)
