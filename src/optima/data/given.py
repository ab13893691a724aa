"""What the caller gives to calibrate on, in the forms in which people have it: text, or batches of a processor.

Shapes: N sequences, B sequences of a batch, L tokens in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from optima.data.batches import LABELS, WORDS_OF, Calibration, inseparable, some_of, words_of
from optima.errors import CalibrationError
from optima.models.reading import is_encoder_decoder

# A DataLoader is one; its batches are tensors, or what a tokenizer or a collator returns.
Batches: TypeAlias = Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]

IDS = "input_ids"
MASK = "attention_mask"
# Arguments that are zero where there is padding.
PADDED = (MASK, "decoder_attention_mask")
# What a batch of nothing but text may hold.
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
    if tokens_BL.ndim != 2 or tokens_BL.is_floating_point() or tokens_BL.dtype == torch.bool or not tokens_BL.numel():
        raise CalibrationError(
            f"a calibration batch has the shape {tuple(tokens.shape)} and dtype {tokens.dtype}: token ids are whole "
            "numbers of shape (batch, length)"
        )
    return tokens_BL.long().cpu()


def given_batches(model: nn.Module, calibration: object, most: Callable[[int], int]) -> Calibration | None:
    """``calibration`` as batches of a processor's outputs, or of pairs; None if it is something else, or text alone.

    Args:
        model: that reads them, or its skeleton.
        calibration: what the caller gave.
        most: how many sequences of so many tokens are taken of pairs of texts.

    Raises:
        CalibrationError: if a batch holds something else than tensors, or is text with padding.
    """
    if isinstance(calibration, (Tensor, str)) or not isinstance(calibration, Iterable):
        return None
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    if not hasattr(calibration, "__len__"):
        return None
    first = next(iter(calibration), None)
    alone = TEXT_ALONE - {LABELS} if is_encoder_decoder(model) else TEXT_ALONE  # which its decoder reads
    if not isinstance(first, Mapping) or set(first) <= alone or _is_record(first):
        return None
    batches = list(_enough(map(_batched, calibration), most) if set(first) <= TEXT_ALONE else calibration)
    for number, batch in enumerate(batches):
        wrong = {"batch": batch} if not isinstance(batch, Mapping) or not batch else batch
        for name, value in wrong.items():
            if not isinstance(value, Tensor) or not value.numel():
                raise CalibrationError(
                    f"calibration batch {number}: {name} is a {type(value).__name__}, not a tensor with numbers: give "
                    "what the model's processor returns with return_tensors='pt'"
                )
            if name == LABELS and LABELS not in alone and value.ndim < 2:
                raise CalibrationError(
                    f"calibration batch {number}: {LABELS} of shape {tuple(value.shape)} are no words for the decoder: "
                    "leave them out"
                )
    return Calibration(None, tuple(dict(batch) for batch in batches), notes=_padding_note(model, batches))


def _enough(batches: Iterable[Any], most: Callable[[int], int]) -> Iterator[Any]:
    """The first of them, as many as have the sequences that are wanted, and of the last one some."""
    count = 0
    for batch in batches:
        words = words_of(batch, WORDS_OF["decoder"]) if _of_tensors(batch) else None
        if words is None or words.ndim != 2:  # refused in a moment
            yield batch
            continue
        wanted, samples = most(words.shape[1]) - count, len(words)
        if samples >= wanted:
            yield batch if inseparable(batch, samples) else some_of(batch, slice(0, wanted), samples)
            return
        yield batch
        count += samples


def _of_tensors(batch: Any) -> bool:
    return isinstance(batch, Mapping) and all(isinstance(value, Tensor) for value in batch.values())


def _batched(pair: Any) -> Any:
    """A pair of texts, as a record of a data set holds it, is a batch of one."""
    if not (_of_tensors(pair) and all(value.ndim == 1 for value in pair.values())):
        return pair
    return {name: value[None] for name, value in pair.items()}


def _is_record(first: Mapping[str, Any]) -> bool:
    """Whether it is a record of a data set, rather than what a processor returns."""
    texts = any(isinstance(value, str) for value in first.values())
    return texts or (IDS in first and not any(isinstance(value, Tensor) for value in first.values()))


def _padding_note(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[str, ...]:
    """What a report must tell of padding beside images or sounds; elsewhere it is refused."""
    masks = [batch[name].bool() for batch in batches for name in PADDED if name in batch]
    if is_encoder_decoder(model):  # whose decoder reads them
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
