"""What is done before the long work, whatever it is: every check, then the weights and the text are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.store import Store
from optima.checkpointing import Destination
from optima.data.batches import Batch, Calibration
from optima.data.datasets import Documents, load_documents
from optima.data.generate import generate_tokens
from optima.data.text import calibration_tokens, special_tokens
from optima.distributed import Ranks
from optima.errors import CalibrationError, ModelError, RecipeError
from optima.memory import HostMemory, host_memory, host_room
from optima.models.blocks import count_parameters
from optima.models.load import Source, commit_of, find_source, pinned, skeleton
from optima.models.moe import split_on_disk
from optima.models.offload import Resident, Streamed, Weights, open_weights
from optima.patterns import Pattern, Unstructured
from optima.preflight.checks import check_shared
from optima.preflight.fitting import Fitted, fit
from optima.preflight.in_memory import check_in_memory
from optima.recipe import Recipe
from optima.reporting.callbacks import Callbacks

_logger = logging.getLogger("optima")

# Of several processes, the largest part of the sequences, relative to equal parts.
MOST_UNEVEN = 1.25


@dataclass(frozen=True)
class Checked(Fitted):
    """What is known of a run before anything is opened."""

    device: torch.device
    source: Source | None
    scope_named: bool  # by the user

    def as_applied(self, patterns: Mapping[str, Pattern]) -> Recipe:
        """The recipe that gives the same run again: an open scope stays open if the loss turned out to say nothing."""
        ranked = {each.scope for each in patterns.values() if isinstance(each, Unstructured)}
        own = self.scope_named or self.recipe.scope is None or ranked <= {self.recipe.scope}
        return self.recipe if own else self.recipe.replace(scope=None)


def check(model: object, recipe: object, output_dir: object, calibration: object, ranks: Ranks) -> Checked:
    """Make every check that needs neither weights nor text; arguments as of ``optima.prune``."""
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe must be a Recipe, got {type(recipe).__name__}: build one, or read it by load_recipe")
    device = ranks.on(recipe.device)
    if isinstance(model, PreTrainedModel):
        source, structure = None, model
        check_in_memory(model, output_dir is not None)
    elif isinstance(model, str | Path):
        source = find_source(str(model), recipe.trust_remote_code, recipe.revision)
        structure, config = skeleton(source)
        source = pinned(source, config)
        if output_dir is None:
            raise RecipeError("output_dir is missing: a model that is read from disk must be written somewhere")
    else:
        raise ModelError(f"model must be a path, a hub id or a model of transformers, got {type(model).__name__}")
    fitted = fit(source, structure, recipe, calibration)
    check_shared(fitted.recipe.num_calibration_samples, ranks)
    return Checked(**vars(fitted), device=device, source=source, scope_named=recipe.scope is not None)


def read(
    checked: Checked, tokenizer: PreTrainedTokenizerBase | None, ranks: Ranks, whole: str | None = None
) -> tuple[PreTrainedModel, Weights, dict[str, Any], Calibration]:
    """The model, what the report says of where it is from, and the text: read first; ``generated`` adds to it.

    ``whole``: why the weights are not streamed.
    """
    text = ranks.on_rank0(lambda: find_calibration(checked.recipe, tokenizer, checked.calibration))
    text.check(checked.structure)
    if checked.recipe.self_generated:
        whole = whole or "it generates calibration data"
    return *_network(checked, whole, ranks), text


def find_calibration(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, given: Tensor | Calibration | Iterable[Any] | None
) -> Calibration:
    """The calibration tokens: given as they are, or from given documents, or from the resolved recipe's data sets.

    Batches of a processor's outputs are taken as they are. The share that the model generates is not read.

    Raises:
        CalibrationError: if there is no text, too little of it, or no tokenizer to read it with.
    """
    if isinstance(given, Tensor):
        return Calibration(given.cpu().long())
    if isinstance(given, Calibration):
        return given
    if tokenizer is None:
        raise CalibrationError("a model in memory needs its tokenizer, or calibration token ids as a tensor")
    documents = load_documents(recipe.dataset, tokenizer, seed=recipe.seed) if given is None else given
    assert recipe.num_calibration_samples is not None, "a run resolves it"
    samples = recipe.num_calibration_samples
    if recipe.self_generated:
        samples -= min(max(int(recipe.self_generated * samples), 1), samples - 1)
    tokens_NL = calibration_tokens(documents, tokenizer, samples, recipe.max_seq_length)
    return Calibration(tokens_NL, revision=documents.revision if isinstance(documents, Documents) else None)


def generated(
    checked: Checked,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Calibration,
    ranks: Ranks,
    progress: Callbacks,
) -> Calibration:
    """``text`` and the sequences that the model generates, as many as the recipe's ``self_generated`` says."""
    recipe, read_NL = checked.recipe, text.tokens_NL
    if not recipe.self_generated:
        return text
    assert tokenizer is not None
    assert read_NL is not None
    assert recipe.num_calibration_samples is not None, "a run resolves it"
    count = recipe.num_calibration_samples - len(read_NL)
    progress.stage("generate", count)
    tokens_NL = generate_tokens(
        network,
        read_NL,
        count,
        len(special_tokens(tokenizer).before),
        seed=recipe.seed,
        device=checked.device,
        memory=host_room(recipe, ranks.here()) if checked.device.type == "cpu" else None,
        ranks=ranks,
        progress=progress.progress,
    )
    note = f"self-generated calibration data: {count} of {recipe.num_calibration_samples} sequences"
    return replace(text, tokens_NL=torch.cat([read_NL, tokens_NL]), notes=(*text.notes, note))


def _network(checked: Checked, whole: str | None, ranks: Ranks) -> tuple[PreTrainedModel, Weights, dict[str, Any]]:
    """The model, who gives it its weights, and what the report says of them; ``whole``: see ``read``."""
    source = checked.source
    model = checked.structure
    if source is None:
        return model, Resident(model), {"model": type(model).__name__}

    processes, short = ranks.here(), list[str]()

    def fits(streamed: bool) -> None:
        memory = memory_of(checked, streamed)
        if said := memory.shortage(processes):
            short.append(said)
            if ranks.first:
                _logger.warning("%s", said)

    network, weights = open_weights(source, model, checked.recipe.dtype, fits, whole)
    weights.notes = (*weights.notes, *short)
    return network, weights, {"model": source.name, "model_revision": commit_of(source)}


def own_batches(text: Calibration, batch_size: int, ranks: Ranks) -> tuple[Sequence[Batch], bool]:
    """The batches of this process, and whether they are those of one process that has them all.

    They are, unless that leaves too much to one of them.

    Raises:
        RecipeError: unless every process has a sequence.
    """
    tokens_NL, batches = text.tokens_NL, text.batches(batch_size)
    count = len(batches) if tokens_NL is None else len(tokens_NL)
    check_shared(count, ranks)
    if tokens_NL is None:
        return batches[ranks.part(count)], True
    most, fair = -(-len(batches) // ranks.size) * batch_size, -(-count // ranks.size)
    if len(batches) >= ranks.size and most <= MOST_UNEVEN * fair:
        return batches[ranks.part(len(batches))], True
    return tokens_NL[ranks.part(count)].split(batch_size), False


def memory_of(checked: Checked, streamed: bool) -> HostMemory:
    """What a run takes of the main memory."""
    blocks = checked.found.blocks
    return host_memory(checked.structure, blocks, checked.recipe, checked.methods, checked.dtype, streamed)


def claim(
    checked: Checked, output_dir: str | Path, overwrite: bool, run: dict[str, Any], resume: bool | None
) -> AbstractContextManager[Destination]:
    """The output's place, if it can be had; arguments as of ``Destination.open``."""
    named = [checked.source and checked.source.local, checked.recipe.mask_from, *checked.recipe.dataset]
    inputs = [path for path in named if path and os.path.lexists(os.path.expanduser(path))]
    # What commits no block (a run that is not told of itself) keeps nothing beside.
    beside = split_on_disk(checked.structure, [each.module for each in checked.found.linears]) if run else 0
    num_bytes = (count_parameters(checked.structure) + beside) * checked.dtype.itemsize
    return Destination.open(output_dir, overwrite, inputs, num_bytes, run, resume)


def store_of(checked: Checked, weights: Weights, destination: Destination | None, ranks: Ranks) -> Store:
    """For activations, with the memory that weights and work leave; its files are beside the output if it is here."""
    streamed = isinstance(weights, Streamed)
    memory = memory_of(checked, streamed)
    there = memory.least - memory.weights * streamed
    left = memory.left(ranks.here(), there)
    beside = ranks.on_rank0(lambda: None if destination is None else destination.partial)
    return Store(left, beside if beside is not None and beside.is_dir() else None)
