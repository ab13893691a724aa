"""One run from a checkpoint to the same model with its channels in another order: an ordinary checkpoint too.

Shapes: O outputs, D inputs, R rows, H heads, W channels of a head, E hidden size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.checkpointing import Destination
from optima.device import default_torch_settings, evaluating, memory_explained
from optima.distributed import joined
from optima.errors import ModelError, RecipeError
from optima.extras.channels import KINDS, Kind
from optima.extras.record import Ordering
from optima.extras.run import Run
from optima.inputs import add_generated, load_calibration, make_store
from optima.models.auxiliary import to_save
from optima.models.load import load_tokenizer
from optima.models.ordered import ORDERING_NAME, SCHEMA_VERSION, mark_ordered
from optima.models.save import open_writer, prepare
from optima.patterns import NM
from optima.plan import known_orders, load_weights, plan_run
from optima.recipe import Recipe
from optima.reporting.callbacks import Callbacks, Progress, make_progress
from optima.stopping import interruptible

REMEDY = "lower --batch-size, then --max-seq-length; --objective sink needs no gradients"


def order(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Iterable[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    channels: Collection[Kind] = KINDS,
    overwrite: bool = False,
    progress: bool = True,
) -> Ordering:
    """Write a model with its channels where patterns n:m lose less: the same function, to be pruned afterwards.

    Weights of the linears with a pattern n:m count by what the loss feels of their removal, as far as a diagonal tells
    (``optima.core.shifted.saliency_unit``), on inputs of the dense model. The values of heads are turned by
    orthogonal matrices, other channels change places. Every block is tried at random first, and the model as a whole
    in the end.

    Args:
        model: a hub id, a local directory, a GGUF file, all of which is read into memory; or a model in memory, which
            is changed in place.
        recipe: its patterns, calibration and objective count.
        output_dir: where the checkpoint and ``ordering.json`` are written; may be None for a model in memory.
        tokenizer: for a model in memory; a path brings its own.
        calibration: instead of the recipe's dataset: documents, or token ids of shape (samples, length).
        device: auto, cpu, cuda or cuda:N.
        trust_remote_code: run code that comes with the checkpoint.
        channels: the kinds to order or turn: those inside an MLP (permuted) and of value heads (rotated).
        overwrite: replace an earlier output.
        progress: tell of each block.

    Raises:
        OptimaError: for anything that cannot be done, or if there is nothing to write in another order. Nothing is left
            half-written. A model in memory may compute something else then: load it anew.
    """
    started = time.perf_counter()
    _check_channels(channels)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined())
        if ranks.size > 1:
            raise RecipeError("channels are ordered by one process: start it without torchrun")
        stack.enter_context(default_torch_settings())
        if isinstance(recipe, Recipe):
            recipe = recipe.replace(tuning_epochs=0)
        plan = plan_run(model, recipe, output_dir, calibration, ranks, device, trust_remote_code)
        if known_orders(plan.source, plan.model) is not None:
            raise ModelError(f"the channels of {plan.name} are in order already: order the model as it came")
        if not any(isinstance(pattern, NM) for pattern in plan.patterns.values()):
            raise RecipeError("the order of channels matters to patterns n:m alone: add --pattern 2:4, for example")
        stack.enter_context(memory_explained(plan.device, REMEDY))
        destination = None
        if output_dir is not None:
            stack.enter_context(interruptible())
            opened = Destination.open(output_dir, overwrite, plan.inputs, plan.output_bytes)
            destination = stack.enter_context(opened)
        reader = load_tokenizer(plan.source) if plan.source is not None and tokenizer is None else tokenizer
        shown = stack.enter_context(Callbacks([make_progress() if progress else Progress()]))
        text = load_calibration(plan.recipe, reader, plan.calibration)
        text.check(plan.model)
        network, weights = load_weights(plan, "its channels change places")
        if destination is not None:
            saved = to_save(plan.source, tokenizer, reader)
            prepare(network, saved, plan.source, destination.directory)
        recipe = plan.recipe
        text = add_generated(text, network, reader, recipe, plan.device, ranks, shown)
        store = make_store(destination, ranks)
        run = Run(plan, network, weights, shown, frozenset(channels), store)
        with evaluating(network):
            try:
                run.order(text.batches(plan.batch_size))
            finally:
                if run.done:
                    mark_ordered(network, [asdict(each) for each in run.done])
        seconds = time.perf_counter() - started
        notes = (*weights.notes, *text.notes, *run.notes)
        found = Ordering(plan.name, recipe.to_dict(), tuple(run.done), notes, seconds)
        if destination is not None:
            if not run.done:
                raise ModelError(f"nothing has another order, so nothing is written: {'; '.join(run.notes)}")
            content = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(found)})
            writer = open_writer(network, plan.blocks, destination, {}, weights)
            writer.publish(lambda directory: (directory / ORDERING_NAME).write_text(content, encoding="utf-8"))
    return found


def _check_channels(channels: Collection[Kind]) -> None:
    known = ", ".join(KINDS)
    if isinstance(channels, str):
        raise RecipeError(f"channels must be a list of kinds, got {channels!r}: for example {KINDS[:1]}")
    if not channels:
        raise RecipeError(f"channels is empty, and nothing would be ordered: choose among {known}")
    if unknown := sorted(set(channels) - set(KINDS)):
        raise RecipeError(f"there are no channels {unknown[0]!r}: choose among {known}")
