"""Calibration text that the caller gives, in the forms in which people have it, as documents or one tensor of tokens.

Shapes: N sequences, B sequences of a batch, L tokens in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optima.errors import CalibrationError

# A DataLoader is one; its batches are tensors, or what a tokenizer or a collator returns.
Batches: TypeAlias = Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]

IDS = "input_ids"
MASK = "attention_mask"
# What a batch of nothing but text may hold.
LABELS = "labels"
DECODER_IDS = "decoder_input_ids"
TEXT_ALONE = {IDS, MASK, "token_type_ids", LABELS}


def given_text(calibration: Any, most: Callable[[int], int], pairs: bool = False) -> Any:
    """Batches of token ids as one tensor (N, L), batches of texts as documents; anything else as it is.

    Args:
        calibration: what the caller gave.
        most: how many sequences of so many tokens are taken of batches.
        pairs: whether the model reads labels too, which would be lost here.

    Raises:
        CalibrationError: if batches differ in length, are padded, or hold no token ids; or labels of pairs.
    """
    if isinstance(calibration, Mapping):
        calibration = [calibration]  # what a tokenizer returns for several texts at once
    if calibration is None or isinstance(calibration, (Tensor, str)) or not isinstance(calibration, Iterable):
        return calibration
    batches = iter(calibration)
    first = next(batches, None)
    everything = chain([] if first is None else [first], batches)
    if isinstance(first, (Tensor, Mapping)) or _wrapped(first):
        if pairs and isinstance(first, Mapping) and {IDS, LABELS} <= set(first):
            raise CalibrationError(
                f"calibration has {LABELS} that would be left out: give a list, or a DataLoader with a length, of "
                "batches of tensors, as a collator returns them"
            )
        return _sequences(everything, most)
    if isinstance(first, (list, tuple)) and first and all(isinstance(text, str) for text in first):
        return chain.from_iterable(everything)
    return everything if batches is calibration else calibration


def _wrapped(batch: Any) -> bool:
    """True for what a ``TensorDataset`` of one tensor gives: a list of it."""
    return isinstance(batch, (list, tuple)) and len(batch) == 1 and isinstance(batch[0], Tensor)


def _sequences(batches: Iterator[Any], most: Callable[[int], int]) -> Tensor:
    found: list[Tensor] = []
    count = 0
    for batch in batches:
        tokens_BL = _tokens(batch)
        if found and tokens_BL.shape[1] != found[0].shape[1]:
            raise CalibrationError(
                f"calibration batches differ in length, {found[0].shape[1]} and {tokens_BL.shape[1]} tokens: pack the "
                "text into sequences of one length, or give the documents themselves"
            )
        found.append(tokens_BL)
        count += len(tokens_BL)
        if count >= most(tokens_BL.shape[1]):
            break
    return torch.cat(found)[: most(found[0].shape[1])]


def _tensor(batch: Mapping[str, Any], name: str) -> Tensor:
    try:
        return torch.as_tensor(batch[name])
    except (ValueError, TypeError) as error:
        raise CalibrationError(
            f"the {name} of a calibration batch are no tensor ({error}): pack the text into sequences of one length, "
            "and let a data set give tensors (dataset.set_format('torch'))"
        ) from error


def _tokens(batch: Any) -> Tensor:
    """The token ids of a batch, (B, L)."""
    if isinstance(batch, Mapping):
        if IDS not in batch:
            raise CalibrationError(
                f"a calibration batch holds {', '.join(map(str, batch)) or 'nothing'}, but no {IDS}: give token ids, "
                "or the texts as a list, such as calibration=dataset['text']"
            )
        for name, value in batch.items():
            if name not in TEXT_ALONE and isinstance(value, Tensor) and value.is_floating_point():
                raise CalibrationError(
                    f"a calibration batch holds {name}, which is no text: give a list of batches as the model's "
                    "processor returns them, the first with all that the model reads"
                )
        tokens = _tensor(batch, IDS)
        if MASK in batch and not _tensor(batch, MASK).bool().all():
            raise CalibrationError(
                "a calibration batch is padded, and padding would count as text: pack the text into sequences of one "
                "length, or give the documents themselves"
            )
    else:
        tokens = _tensor({IDS: batch[0] if _wrapped(batch) else batch}, IDS)
    tokens_BL = tokens[None] if tokens.ndim == 1 else tokens
    if tokens_BL.ndim != 2 or tokens_BL.is_floating_point() or not tokens_BL.numel():
        raise CalibrationError(
            f"a calibration batch has the shape {tuple(tokens.shape)} and dtype {tokens.dtype}: token ids are whole "
            "numbers of shape (batch, length)"
        )
    return tokens_BL.long().cpu()
