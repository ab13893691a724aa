"""Calibration data of the caller: documents or token ids.

Shapes: N sequences, B sequences in a batch, L tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optima.data.text import data_hash
from optima.errors import CalibrationError

# A DataLoader is one; its batches are tensors, or what a tokenizer or a collator returns.
Batches: TypeAlias = Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]
IDS, MASK = "input_ids", "attention_mask"
TEXT_ALONE = {IDS, MASK, "token_type_ids", "labels"}  # what a batch may hold


@dataclass(frozen=True)
class Calibration:
    """Calibration data as the model reads it.

    Attributes:
        tokens_NL: token ids, (samples, length) int64.
        revision: of a hub data set, where it is known.
        notes: for the report.
    """

    tokens_NL: Tensor
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """SHA-256 in hex: equal data, equal hash."""
        return data_hash(self.tokens_NL)


def read_calibration(calibration: Any, most: Callable[[int], int]) -> Tensor | Iterable[str] | None:
    """Calibration data of the caller in one of three forms: None, documents, or token ids, (N, L).

    Args:
        calibration: None; a tensor of token ids; a dict; or an iterable, such as a ``DataLoader``, of texts, tensors or
            dicts.
        most: how many sequences of so many tokens are used of an iterable.

    Raises:
        CalibrationError: if it is anything else; or batches are padded, differ in length or hold no token ids.
    """
    if calibration is None:
        return None
    if isinstance(calibration, Tensor):
        return _token_ids("calibration", calibration)
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    if isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration must be token ids, a list of documents or batches by name, got {type(calibration).__name__}"
        )
    batches = iter(calibration)
    first = next(batches, None)
    everything = chain([] if first is None else [first], batches)
    if isinstance(first, Tensor | Mapping) or _of_one_tensor(first):
        return _sequences(everything, most)
    if isinstance(first, list | tuple) and first and all(isinstance(text, str) for text in first):
        return chain.from_iterable(everything)
    return everything if batches is calibration else calibration


def _of_one_tensor(batch: Any) -> bool:
    """Whether it is a batch of a ``TensorDataset`` of one tensor."""
    return isinstance(batch, list | tuple) and len(batch) == 1 and isinstance(batch[0], Tensor)


def _sequences(batches: Iterable[Any], most: Callable[[int], int]) -> Tensor:
    found: list[Tensor] = []
    for batch in batches:
        tokens_BL = _batch_tokens(batch)
        if found and tokens_BL.shape[1] != found[0].shape[1]:
            raise CalibrationError(
                f"calibration batches differ in length, {found[0].shape[1]} and {tokens_BL.shape[1]} tokens: pack the "
                "text into sequences of one length, or give the documents themselves"
            )
        found.append(tokens_BL)
        if sum(map(len, found)) >= most(tokens_BL.shape[1]):
            break
    return torch.cat(found)[: most(found[0].shape[1])]


def _batch_tokens(batch: Any) -> Tensor:
    """The token ids of a batch, (B, L)."""
    if not isinstance(batch, Mapping):
        return _token_ids("a calibration batch", batch[0] if _of_one_tensor(batch) else batch)
    if IDS not in batch or not TEXT_ALONE.issuperset(batch):
        raise CalibrationError(
            f"a calibration batch holds {', '.join(map(str, batch)) or 'nothing'}: give {IDS} alone, or the documents "
            "as a list, such as calibration=dataset['text']"
        )
    tokens_BL, mask = _token_ids(IDS, batch[IDS]), batch.get(MASK)
    if mask is not None and not torch.as_tensor(mask).bool().all():
        raise CalibrationError(
            "a calibration batch is padded, and padding would count as text: pack the text into sequences of one "
            "length, or give the documents themselves"
        )
    return tokens_BL


def _token_ids(name: str, ids: Any) -> Tensor:
    """Token ids as int64 on the CPU, (B, L)."""
    try:
        tensor = torch.as_tensor(ids)
    except (ValueError, TypeError) as error:
        raise CalibrationError(
            f"{name} are no tensor ({error}): pack the text into sequences of one length, and let a dataset return "
            "tensors (dataset.set_format('torch'))"
        ) from error
    tokens = tensor[None] if tensor.ndim == 1 and name != "calibration" else tensor
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise CalibrationError(
            f"{name} must be token ids, whole numbers of shape (samples, length), got {tuple(tensor.shape)} "
            f"{tensor.dtype}"
        )
    return tokens.long().cpu()
