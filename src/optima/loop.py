"""The loop over blocks, which every verb runs with a step of its own: dense targets, step, tuning, next inputs, commit.

Shapes: see the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.activations import Activations
from optima.calibration.fisher import LOGITS, fisher_weights
from optima.calibration.lm_head import LmHead
from optima.calibration.weights import FisherWeights
from optima.device import Stopwatch, full_precision, give_back_freed_memory
from optima.errors import NotDifferentiableError
from optima.models.blocks import Block, Stack
from optima.recipe import FISHER_FRACTION
from optima.reporting.record import BlockRecord, LinearRecord, UnitRecord
from optima.state import RunState
from optima.tune import Tuned, Tuner, changed_names

Record = TypeVar("Record")


@dataclass
class Outcome:
    """What the step of a block did.

    Attributes:
        records: of the linears that it pruned, in order.
        units: records of the structures that it removed.
        names: full names of the tensors of those structures, which have other shapes now.
        block: the block with the linears to tune; None: as the step got it.
        keeps: of the linears to tune, by their full names: the mask, or None where all weights are tuned.
        solutions: weights of linears before rounding, where tuning starts.
    """

    records: list[LinearRecord] = field(default_factory=list)
    units: list[UnitRecord] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    block: Block | None = None
    keeps: Mapping[str, Tensor | None] = field(default_factory=dict)
    solutions: dict[str, Tensor] = field(default_factory=dict)


Step = Callable[[Block, Stopwatch], Outcome]


@torch.no_grad()
def run_blocks(
    stack: Stack,
    acts: Activations,
    fisher: FisherWeights | None,
    tuner: Tuner | None,
    run: RunState,
    step: Step,
    runs_again: bool = False,
    stage: str = "prune",
) -> None:
    """Run ``step`` on each block, tune it, and commit it; blocks that an earlier run committed are replayed.

    Args:
        stack: its blocks up to the last one that is needed.
        acts: the inputs of its first block.
        fisher: weights of tokens and rows, or None.
        tuner: tunes blocks; None: they are not tuned.
        run: settings and records.
        step: changes a block, which is on the device.
        runs_again: whether the model will run these blocks for a later stack.
        stage: what progress calls it.
    """
    blocks, committed = stack.blocks[: stack.needed], run.committed()
    run.progress.stage(stage, len(blocks), sum(block.name in committed for block in blocks))
    for block in blocks:
        done, noted = committed.get(block.name), len(run.notes)
        clock = Stopwatch(run.device, run.progress.step) if done is None else run.clock
        with run.weights.on(block, run.device, clock):
            if tuner is not None:
                tuner.forward(block, clock)
            if done is None:
                outcome, tuned = step(block, clock), Tuned((), 0)
                whole = outcome.block or block
                if tuner is not None and outcome.keeps:
                    tuned = tuner.tune(whole, outcome.keeps, outcome.solutions, acts, clock)
                    run.note(tuned.problem)
                records = [_tuned(record, block) if tuned.best else record for record in outcome.records]
                changed = outcome.keeps.keys() if tuned.best else {record.name for record in records}
                names = list(dict.fromkeys([*outcome.names, *changed_names(whole, changed, tuned.best > 0)]))
                units = outcome.units
                del outcome
            else:
                run.replay(block, done)
                records, units = list(done.linears), list(done.units)
                names = changed_names(block, {record.name for record in records}, done.block.tuning_epoch > 0)
            if fisher is not None:
                fisher.forget([block.name, *(linear.name for linear in block.linears)])
            if block is not blocks[-1]:
                with clock("forward"):
                    acts.forward(block)
            if done is None:
                index, times = run.first_block + block.index, dict(clock.seconds)
                record = BlockRecord(index, block.name, times, tuned.held_out, tuned.best, tuned.on_logits)
                run.commit(block, record, records, units, names, noted)
            if runs_again:
                run.weights.replaced(block, run.reader(block, names))
        give_back_freed_memory()
        run.progress.notes(run.notes)
        run.progress.block(block.name, run.blocks[-1], records, units, resumed=done is not None)


def find_fisher_weights(
    model: PreTrainedModel, stack: Stack, acts: Activations, run: RunState, coupled: bool
) -> tuple[FisherWeights | None, LmHead | None]:
    """The Fisher weights of a stack, and its LM head for tuning on logits. A model without gradients has neither.

    ``coupled``: find row correlations too.
    """
    run.progress.stage("gradients", len(stack.blocks))
    options = run.options
    try:
        with run.clock("gradients"), full_precision():
            fisher = fisher_weights(
                model,
                stack,
                acts,
                options.seed,
                residual=bool(options.tuning_epochs),
                weights=run.weights,
                share=FISHER_FRACTION,
                progress=run.progress.progress,
                coupled=coupled,
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


def _tuned(record: LinearRecord, block: Block) -> LinearRecord:
    weight_OD = next(linear for linear in block.linears if linear.name == record.name).read()
    sparsity, none = float((weight_OD == 0).double().mean()), None
    return replace(record, sparsity=sparsity, tuned=True, gap_written_max=none, loss_written=none)
