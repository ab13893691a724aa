"""Calibration data of the caller: documents, token ids, or batches of the arguments of a forward pass.

Shapes: N sequences, B sequences in a batch, L tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from optima.data.text import data_hash
from optima.errors import CalibrationError
from optima.models.fingerprint import hash_tensors
from optima.models.inputs import (
    DECODER_IDS,
    EMBEDDED,
    IDS,
    LABELS,
    MASK,
    TOKENS_OF,
    Batch,
    first_named,
    rows_of,
)
from optima.models.inspect import arguments_of, check_vocabulary, is_encoder_decoder

# A DataLoader is one; its batches are tensors, or what a tokenizer or a collator returns.
Batches: TypeAlias = Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]
PADDED = (MASK, "decoder_attention_mask")  # arguments that are zero where there is padding
TEXT_ALONE = {IDS, MASK, "token_type_ids", LABELS}  # what a batch of nothing but text may hold


@dataclass(frozen=True)
class Calibration:
    """Calibration data as the model reads it.

    Attributes:
        tokens_NL: token ids, (samples, length) int64; None if there are ``inputs``.
        inputs: batches of a processor's outputs, each the arguments of a forward pass by name.
        revision: of a hub data set, where it is known.
        notes: for the report.
    """

    tokens_NL: Tensor | None
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    revision: str | None = None
    notes: tuple[str, ...] = ()

    def batches(self, size: int) -> Sequence[Batch]:
        """``size`` sequences at a time, or as they were made."""
        return self.inputs if self.tokens_NL is None else self.tokens_NL.split(min(size, len(self.tokens_NL)))

    @property
    def num_tokens(self) -> int:
        """Tokens that the last stack reads."""
        names = (DECODER_IDS, LABELS, IDS, EMBEDDED)
        found = [self.tokens_NL, *(first_named(batch, names) for batch in self.inputs)]
        return sum(0 if tensor is None else tensor.shape[:2].numel() for tensor in found)

    @property
    def longest(self) -> int | None:
        """Tokens in the longest sequence that a stack reads; None where one reads none (audio)."""
        if self.tokens_NL is not None:
            return self.tokens_NL.shape[1]
        if any(first_named(batch, (IDS, EMBEDDED)) is None for batch in self.inputs):
            return None
        names = (IDS, EMBEDDED, DECODER_IDS, LABELS)
        return max(batch[name].shape[1] for batch in self.inputs for name in names if name in batch)

    @property
    def largest(self) -> int:
        """Sequences in the largest of ``inputs``."""
        return max(map(_samples, self.inputs))

    @property
    def size(self) -> tuple[int, int]:
        """Sequences, and tokens in each."""
        if self.tokens_NL is not None:
            return len(self.tokens_NL), self.tokens_NL.shape[1]
        samples = sum(map(_samples, self.inputs))
        return samples, self.num_tokens // samples

    @property
    def hash(self) -> str:
        """SHA-256 in hex: equal data, equal hash."""
        if self.tokens_NL is not None:
            return data_hash(self.tokens_NL)
        return hash_tensors(item for batch in self.inputs for item in sorted(batch.items()))

    def check(self, model: nn.Module) -> None:
        """Raise ``CalibrationError`` for tokens or arguments that ``model``, or its skeleton, does not know."""
        if self.tokens_NL is not None:
            check_vocabulary(model, self.tokens_NL)
        known = arguments_of(model)
        for number, batch in enumerate(self.inputs):
            if IDS in batch and not any(tensor.is_floating_point() for tensor in batch.values()):
                check_vocabulary(model, batch[IDS])  # with images, models may have ids of their own
            if unknown := [name for name in batch if name not in known]:
                raise CalibrationError(
                    f"calibration batch {number} has {', '.join(unknown)}, which {type(model).__name__} does not read: "
                    f"give what its forward pass takes ({', '.join(known[:8])} ...)"
                )


def _samples(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def read_calibration(model: nn.Module, calibration: Any, most: Callable[[int], int]) -> Any:
    """Calibration data of the caller in one of four forms: None, documents, token ids, batches of model arguments.

    Args:
        model: that reads it, or its skeleton.
        calibration: None; a tensor of token ids; a dict; or an iterable, such as a ``DataLoader``, of texts, tensors or
            dicts.
        most: how many sequences of so many tokens are used of an iterable.

    Returns:
        None, an iterable of texts, a tensor (N, L), or a ``Calibration``.

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
    text_alone = TEXT_ALONE - {LABELS} if is_encoder_decoder(model) else TEXT_ALONE  # its decoder reads labels
    if isinstance(first, Mapping) and any(isinstance(value, str) for value in first.values()):
        raise CalibrationError(
            f"a calibration batch holds {', '.join(map(str, first))}, but no {IDS}: give the texts as a list, such as "
            "calibration=dataset['text']"
        )
    if isinstance(first, Mapping) and not set(first) <= text_alone:
        if not hasattr(calibration, "__len__"):
            raise CalibrationError(
                f"calibration batches with {', '.join(map(str, first))} must be a list, or a DataLoader with a length"
            )
        given = list(everything)
        _check_arguments(given, LABELS in text_alone)
        used = list(_enough(given, most)) if set(first) <= TEXT_ALONE else given
        return Calibration(None, tuple(map(dict, used)), notes=_padding_note(model, used))
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
    if IDS not in batch:
        raise CalibrationError(f"a calibration batch holds {', '.join(map(str, batch)) or 'nothing'}, but no {IDS}")
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


def _check_arguments(batches: Sequence[Any], labels_unread: bool) -> None:
    """Raise ``CalibrationError`` unless all are dicts of tensors."""
    for number, batch in enumerate(batches):
        values = {"batch": batch} if not isinstance(batch, Mapping) or not batch else batch
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise CalibrationError(
                    f"calibration batch {number}: {name} is a {type(value).__name__}, not a tensor: give what the "
                    "model's processor returns with return_tensors='pt'"
                )
            if name == LABELS and not labels_unread and value.ndim < 2:
                raise CalibrationError(
                    f"calibration batch {number}: {LABELS} of shape {tuple(value.shape)} are no tokens for the "
                    "decoder: leave them out"
                )


def _enough(batches: Iterable[Mapping[str, Tensor]], most: Callable[[int], int]) -> Iterator[Mapping[str, Tensor]]:
    """As many batches of pairs as have the sequences that are used, and a part of the last one."""
    count = 0
    for batch in batches:
        tokens = first_named(batch, TOKENS_OF["decoder"])
        samples = _samples(batch)
        wanted = samples if tokens is None else most(tokens.shape[1]) - count
        if wanted > 0:
            few = slice(0, min(wanted, samples))
            yield {name: rows_of(each, few, samples) for name, each in batch.items()}
        count += samples


def _padding_note(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[str, ...]:
    """A note on padding in batches with images or sounds; elsewhere padding is refused."""
    masks = [batch[name].bool() for batch in batches for name in PADDED if name in batch]
    if is_encoder_decoder(model):  # whose decoder reads labels
        masks += [batch[LABELS] >= 0 for batch in batches if LABELS in batch]
    padded = sum(int((~mask).sum()) for mask in masks)
    if not padded:
        return ()
    if not any(tensor.is_floating_point() for batch in batches for tensor in batch.values()):
        raise CalibrationError(
            "calibration batches are padded, and padding would count as text: give batches of sequences of one length, "
            "or of one sequence each"
        )
    return (f"padding counts as text: {padded / sum(mask.numel() for mask in masks):.0%} of the positions are padded",)
