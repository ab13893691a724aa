"""The calibration data of a run: the caller's, or that of the recipe's datasets, and what the model generates.

Shapes: N sequences, L tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.data.datasets import Documents, load_documents
from optima.data.generate import generate_tokens
from optima.data.text import calibration_tokens, special_tokens
from optima.distributed import Ranks
from optima.errors import CalibrationError
from optima.recipe import RunOptions
from optima.reporting.callbacks import Callbacks


@dataclass(frozen=True)
class Calibration:
    """Calibration data as the model reads it.

    Attributes:
        tokens_NL: token ids, (samples, length) int64.
        revision: of a hub dataset, where it is known.
        notes: for the report.
    """

    tokens_NL: Tensor
    revision: str | None = None
    notes: tuple[str, ...] = ()


def load_calibration(
    options: RunOptions, tokenizer: PreTrainedTokenizerBase | None, calibration: Tensor | Iterable[str] | None
) -> Calibration:
    """The caller's calibration data, or that of the datasets of the resolved options, without what the model generates.

    Raises:
        CalibrationError: if there is no text, too little of it, or no tokenizer to read it with.
    """
    if isinstance(calibration, Tensor):
        return Calibration(calibration.cpu().long())
    if tokenizer is None:
        raise CalibrationError("a model in memory needs its tokenizer, or calibration token ids as a tensor")
    documents = load_documents(options.dataset, tokenizer, seed=options.seed) if calibration is None else calibration
    tokens_NL = calibration_tokens(
        documents, tokenizer, options.samples() - _num_generated(options), options.max_seq_length
    )
    return Calibration(tokens_NL, revision=documents.revision if isinstance(documents, Documents) else None)


def _num_generated(options: RunOptions) -> int:
    count = options.samples()
    return min(max(int(options.self_generated * count), 1), count - 1) if options.self_generated else 0


def add_generated(
    text: Calibration,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RunOptions,
    device: torch.device,
    ranks: Ranks,
    progress: Callbacks,
) -> Calibration:
    """``text``, and the sequences that the model generates, if the options ask for them."""
    count, tokens_NL = _num_generated(options), text.tokens_NL
    if not count or tokenizer is None:
        return text
    progress.stage("generate", count)
    generated_NL = generate_tokens(
        model,
        tokens_NL,
        count,
        len(special_tokens(tokenizer).before),
        seed=options.seed,
        device=device,
        ranks=ranks,
        progress=progress.progress,
    )
    note = f"self-generated calibration data: {count} of {options.samples()} sequences"
    return replace(text, tokens_NL=torch.cat([tokens_NL, generated_NL]), notes=(*text.notes, note))
