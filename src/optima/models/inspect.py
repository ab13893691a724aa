"""What a model can read: token sequences, how long, of which vocabulary. Asked before long work.

Shapes: N sequences, L tokens in each, V vocabulary, E hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.errors import CalibrationError, ModelError


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has two stacks, the second of which reads what the first made."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def head_of(model: nn.Module) -> nn.Module | None:
    """The LM head."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def arguments_of(model: nn.Module) -> list[str]:
    """What the model's forward pass takes, by its class: one that someone put in its place may not say."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def check_length(model: nn.Module, length: int) -> None:
    """Raise ``ModelError`` if ``model``, or its skeleton, reads no token sequences of ``length``."""
    if "input_ids" not in arguments_of(model):
        what = getattr(model, "main_input_name", "nothing")
        raise ModelError(f"{type(model).__name__} reads {what}, not text: models are calibrated on text alone")
    if is_encoder_decoder(model):
        if length < 2:
            raise ModelError(f"{type(model).__name__} reads the two halves of a text: use --max-seq-length 2 or more")
        length = length - length // 2
    positions = num_positions(model)
    if positions is not None and length > positions:
        raise ModelError(
            f"sequences of {length} tokens exceed the {positions} positions of {type(model).__name__}: "
            f"use --max-seq-length {positions} or less"
        )


def num_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model has positions for; None if it names no limit."""
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # MPT's name
    if not isinstance(positions, int) or positions < 1:  # XLNet says -1
        return None
    # RoBERTa's family counts positions from behind the padding's.
    tables = (module for name, module in model.named_modules() if "position" in name)
    unused = [
        table.padding_idx for table in tables if isinstance(table, nn.Embedding) and table.padding_idx is not None
    ]
    return positions - max(unused, default=-1) - 1


def check_vocabulary(model: nn.Module, tokens_NL: Tensor) -> None:
    """Raise ``CalibrationError`` if ``tokens_NL`` hold an id that ``model``, or its skeleton, has no embedding for."""
    if not len(tokens_NL):
        return
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    size, lowest, largest = len(embedding.weight), int(tokens_NL.min()), int(tokens_NL.max())
    if lowest < 0 or largest >= size:
        raise CalibrationError(
            f"the tokens run from {lowest} to {largest}, but {type(model).__name__} has a vocabulary of {size}: use "
            "the tokenizer that was published with the model"
        )
