"""The inputs of a run: the model's weights, the calibration data, and the batches of each process.

Shapes: N sequences, L tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.store import Store
from optima.checkpointing import Destination
from optima.data.batches import Calibration
from optima.data.datasets import Documents, load_documents
from optima.data.generate import generate_tokens
from optima.data.text import calibration_tokens, special_tokens
from optima.distributed import Ranks
from optima.errors import CalibrationError
from optima.main_memory import available_memory, total_memory
from optima.recipe import Recipe
from optima.reporting.callbacks import Callbacks

FREE_SHARE = 0.5  # of the free main memory, for activations: the rest of them is in files
CACHE_SHARE = 0.125  # of the main memory, for the KV cache while the model generates
MOST_UNEVEN = 1.25  # the largest part of the sequences that a rank takes, relative to equal parts


def load_calibration(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, calibration: Tensor | Iterable[Any] | None
) -> Calibration:
    """The caller's calibration data, or that of the resolved recipe's datasets, without what the model generates.

    Raises:
        CalibrationError: if there is no text, too little of it, or no tokenizer to read it with.
    """
    if isinstance(calibration, Tensor):
        return Calibration(calibration.cpu().long())
    if tokenizer is None:
        raise CalibrationError("a model in memory needs its tokenizer, or calibration token ids as a tensor")
    documents = load_documents(recipe.dataset, tokenizer, seed=recipe.seed) if calibration is None else calibration
    tokens_NL = calibration_tokens(
        documents, tokenizer, recipe.samples() - _num_generated(recipe), recipe.max_seq_length
    )
    return Calibration(tokens_NL, revision=documents.revision if isinstance(documents, Documents) else None)


def _num_generated(recipe: Recipe) -> int:
    count = recipe.samples()
    return min(max(int(recipe.self_generated * count), 1), count - 1) if recipe.self_generated else 0


def add_generated(
    text: Calibration,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    device: torch.device,
    ranks: Ranks,
    progress: Callbacks,
) -> Calibration:
    """``text``, and the sequences that the model generates, if the recipe asks for them."""
    count, tokens_NL = _num_generated(recipe), text.tokens_NL
    if not count or tokenizer is None:
        return text
    progress.stage("generate", count)
    generated_NL = generate_tokens(
        model,
        tokens_NL,
        count,
        len(special_tokens(tokenizer).before),
        seed=recipe.seed,
        device=device,
        memory=int(CACHE_SHARE * total_memory() / ranks.here()) if device.type == "cpu" else None,
        ranks=ranks,
        progress=progress.progress,
    )
    note = f"self-generated calibration data: {count} of {recipe.samples()} sequences"
    return replace(text, tokens_NL=torch.cat([tokens_NL, generated_NL]), notes=(*text.notes, note))


def batches_of_rank(text: Calibration, batch_size: int, ranks: Ranks) -> Sequence[Tensor]:
    """The batches of this process: some of those of one process, unless that leaves too much to one of them."""
    tokens_NL, count = text.tokens_NL, len(text.tokens_NL)
    batches: Sequence[Tensor] = tokens_NL.split(batch_size)
    ranks.check_sequences(count)
    most, fair = -(-len(batches) // ranks.size) * batch_size, -(-count // ranks.size)
    if len(batches) >= ranks.size and most <= MOST_UNEVEN * fair:
        return batches[ranks.part(len(batches))]
    own: Sequence[Tensor] = tokens_NL[ranks.part(count)].split(batch_size)
    return own


def make_store(destination: Destination | None, ranks: Ranks) -> Store:
    """A store of activations in half of the free memory; its files are in the staging directory if it is here."""
    directory = ranks.on_rank0(lambda: None if destination is None else destination.partial)
    budget = int(FREE_SHARE * available_memory() / ranks.here())
    return Store(budget, directory if directory is not None and directory.is_dir() else None)
