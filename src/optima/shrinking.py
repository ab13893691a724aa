"""Shrink a model: remove MLP neurons of every block, and whole blocks, and repair what stays.

Blocks go first, by the divergence of the model's predictions. Neurons go by their cost to the loss, block by block on
the inputs that the smaller blocks before give; their reader is re-solved exactly, and the block is tuned towards the
dense block's output. The result has one size in all blocks, which its configuration says.

Shapes: O outputs, D inputs (neurons).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.activations import Activations, capture
from optima.calibration.hessians import observe
from optima.calibration.weights import FisherWeights
from optima.core.shared_set import remove_greedily, solve_shared
from optima.device import Stopwatch
from optima.loop import Outcome, find_fisher_weights, run_blocks
from optima.models.blocks import Block, Stack, linears_of
from optima.models.forward import evaluating
from optima.models.offload import outside_device, replace_tensors
from optima.plan import ShrinkPlan, resolve_shrink
from optima.recipe import SINK_WEIGHT, Shrink
from optima.reporting.callbacks import Callback
from optima.reporting.record import Report, UnitRecord
from optima.run import open_run
from optima.state import RunState
from optima.structures.config import renamed, smaller_config
from optima.structures.depth import choose_blocks
from optima.structures.neurons import energy_removed, find_neurons, metric_root, smaller_tensors
from optima.tune import make_tuner


def shrink(
    model: str | Path | PreTrainedModel,
    options: Shrink,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Iterable[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    resume: bool | None = None,
) -> Report:
    """Remove neurons and blocks from a model, in one shot: it becomes smaller, and faster in every runtime.

    Args:
        model: see ``optima.prune``; a model in memory becomes smaller in place.
        options: what to remove, and how to repair.
        output_dir: where the smaller checkpoint, the report and the options are written; may be None for a model in
            memory.
        tokenizer, calibration, device, trust_remote_code, callbacks, progress, resume: see ``optima.prune``.

    Returns:
        The report: what went, and what was lost where.

    Raises:
        OptimaError: for anything that cannot be done, before the long work begins wherever possible.
    """
    with open_run(
        model,
        partial(resolve_shrink, options=options),
        output_dir=output_dir,
        tokenizer=tokenizer,
        calibration=calibration,
        device=device,
        trust_remote_code=trust_remote_code,
        callbacks=callbacks,
        progress=progress,
        resume=resume,
    ) as opened:
        network, plan, run = opened.network, opened.plan, opened.state
        stack = plan.stack_of(network)
        dropped, config = shrink_stack(network, stack, opened.batches, plan, run)
        vars(network.config).update(vars(config))
        report = opened.publish(plan.options, smaller=True)
        if plan.source is None:
            _close_ranks(network, stack, dropped)
    return report


@torch.no_grad()
def shrink_stack(
    model: PreTrainedModel, stack: Stack, batches: Sequence[Tensor], plan: ShrinkPlan, run: RunState
) -> tuple[list[int], PretrainedConfig]:
    """Shrink the blocks of a stack.

    Returns:
        The numbers of the blocks that are gone, which are still in the model, and the configuration of the rest.
    """
    with evaluating(model):
        with run.clock("forward"), run.weights.outside(outside_device(model, run.device)):
            acts = capture(model, stack, batches, True, run.ranks, run.store, run.batch_size)
        fisher, head = find_fisher_weights(model, stack, acts, run, coupled=plan.width is not None)
        dropped = run.decided("blocks", lambda: choose_blocks(stack, acts, head, plan.options.blocks or 0, run))
        gone = sorted(map(int, dropped))
        config = smaller_config(model, stack, gone, plan.width)
        run.drop(renamed(stack, gone))
        run.units += [
            UnitRecord(int(index), stack.blocks[int(index)].name, "block", 0, 1, error=lost)
            for index, lost in dropped.items()
        ]
        kept = replace(stack, blocks=tuple(block for block in stack.blocks if block.index not in gone))
        tuner = make_tuner(acts, fisher, head, plan.options)
        if tuner is not None:
            tuner.skip([block for block in stack.blocks if block.index in gone], run.weights)
        run_blocks(kept, acts, fisher, tuner, run, ShrinkStep(acts, fisher, plan, run), stage="shrink")
    return gone, config


@dataclass(frozen=True)
class ShrinkStep:
    """Removes the neurons of a block that cost least, and re-solves the linear that reads the others.

    Attributes:
        acts: the inputs of the block.
        fisher: weights of tokens and rows, or None.
        plan: what to remove.
        run: settings and records.
    """

    acts: Activations
    fisher: FisherWeights | None
    plan: ShrinkPlan
    run: RunState

    def __call__(self, block: Block, clock: Stopwatch) -> Outcome:
        """Shrink the block, which is on the device."""
        whole = replace(block, linears=tuple(linears_of(block.module, block.name)))
        every = tuple(linear for linear in whole.linears if linear.name not in block.routers)
        whole = replace(whole, linears=every)
        outcome = Outcome(keeps=dict.fromkeys(linear.name for linear in every), block=whole)
        if self.plan.width is not None:
            names, unit = self._remove_neurons(block, self.plan.width, clock)
            outcome.names, outcome.units = names, [unit]
        return outcome

    def _remove_neurons(self, block: Block, width: int, clock: Stopwatch) -> tuple[list[str], UnitRecord]:
        run, fisher, neurons = self.run, self.fisher, find_neurons(block)
        sink_weight = 0.0 if fisher is not None else SINK_WEIGHT
        (found,) = observe(block, self.acts, sink_weight, run.options.damping, clock, fisher)
        (linear,), began = found.linears, time.perf_counter()
        decided = None
        if found.owner in (None, run.ranks.rank) and found.hessian is not None:
            rows_O = None if fisher is None else fisher.rows.get(linear.name)
            coupling_OO = None if fisher is None else fisher.coupling.get(linear.name)
            weight_OD = linear.read().to(run.device, torch.promote_types(linear.read().dtype, torch.float32))
            root_OO = metric_root(rows_O, coupling_OO, len(weight_OD))
            with clock("select"):
                keep_D = remove_greedily(found.hessian, weight_OD, root_OO, linear.shape[1] - width)
            with clock("solve"):
                solution = solve_shared(found.hessian, weight_OD, keep_D)
            energy = energy_removed(found.hessian.diagonal_D, weight_OD, root_OO, keep_D)
            lost = found.hessian.loss(solution.weight_RD - weight_OD).sum() / found.hessian.loss(weight_OD).sum()
            facts = {"energy": energy, "error": float(lost), "gap": float(solution.gap_R.max())}
            decided = keep_D.cpu(), solution.weight_RD.cpu(), facts
        keep_D, weight_OD, facts = run.ranks.broadcast(decided, found.owner or 0)
        tensors = smaller_tensors(block, neurons, keep_D, weight_OD.to(run.device))
        replace_tensors(block.module, tensors)
        seconds = time.perf_counter() - began
        number = run.first_block + block.index
        unit = UnitRecord(number, neurons.name, "neurons", width, len(keep_D), seconds=seconds, **facts)
        return [f"{block.name}.{name}" for name in tensors], unit


def _close_ranks(model: PreTrainedModel, stack: Stack, dropped: Sequence[int]) -> None:
    """Remove the blocks ``dropped`` from a model in memory, and number the others anew."""
    parent = model.get_submodule(stack.blocks[0].name.rpartition(".")[0])
    for index in sorted(dropped, reverse=True):
        del parent[index]  # type: ignore[operator]
    for number, block in enumerate(parent.children()):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
