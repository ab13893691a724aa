"""What a model is given to read: token ids, or a processor's outputs, and which of them each stack runs on.

An encoder-decoder reads the first half of every text with its encoder, and goes on with the second half in its decoder,
behind the token that starts it: prefix language modelling (Raffel et al., JMLR 2020, section 3.1.4), which needs no
pairs of texts.

Shapes: N sequences, B sequences in a batch, L tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from optima.calibration.batch_size import rows_of
from optima.data.text import data_hash
from optima.errors import CalibrationError
from optima.models.blocks import Stack
from optima.models.fingerprint import hash_tensors
from optima.models.inspect import arguments_of, check_vocabulary, is_encoder_decoder, needed_arguments

Batch = Tensor | Mapping[str, Tensor]
# A DataLoader is one; its batches are tensors, or what a tokenizer or a collator returns.
Batches: TypeAlias = Iterable[Tensor | Mapping[str, Any] | Sequence[Any]]
IDS, MASK, LABELS, DECODER_IDS = "input_ids", "attention_mask", "labels", "decoder_input_ids"
PADDED = (MASK, "decoder_attention_mask")  # arguments that are zero where there is padding
TEXT_ALONE = {IDS, MASK, "token_type_ids", LABELS}  # what a batch of nothing but text may hold
# Arguments that hold the words of a batch, in the order in which they are looked for.
WORDS_OF = {"decoder": (DECODER_IDS, LABELS), "encoder": ("input_ids",), "whole": ("input_ids",)}


@dataclass(frozen=True)
class Calibration:
    """The text that decides.

    Attributes:
        tokens_NL: token ids, (samples, length) int64; None if ``inputs`` are given.
        inputs: batches of a processor's outputs, each the arguments of a forward pass by name.
        revision: of a hub data set, where it is known.
        notes: what a report must tell of it.
    """

    tokens_NL: Tensor | None
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    revision: str | None = None
    notes: tuple[str, ...] = ()

    def batches(self, size: int) -> Sequence[Batch]:
        """As they are given to the model: ``size`` sequences at a time, or as they were made."""
        return self.inputs if self.tokens_NL is None else self.tokens_NL.split(min(size, len(self.tokens_NL)))

    @property
    def num_tokens(self) -> int:
        """Words that are read."""
        names = (DECODER_IDS, LABELS, "input_ids", "inputs_embeds")
        words = [words_of(batch, names) for batch in self.inputs]
        return sum(0 if tensor is None else tensor.shape[:2].numel() for tensor in [*words, self.tokens_NL])

    @property
    def longest(self) -> int | None:
        """Words in the longest sequence that a stack reads; None where one reads none (sounds)."""
        if self.tokens_NL is not None:
            return self.tokens_NL.shape[1]
        if any(words_of(batch, ("input_ids", "inputs_embeds")) is None for batch in self.inputs):
            return None
        names = ("input_ids", "inputs_embeds", DECODER_IDS, LABELS)
        return max(batch[name].shape[1] for batch in self.inputs for name in names if name in batch)

    @property
    def largest(self) -> int:
        """Sequences in the largest of the batches that were given."""
        return max(len(next(iter(batch.values()))) for batch in self.inputs)

    @property
    def size(self) -> tuple[int, int]:
        """Sequences, and the words in each."""
        if self.tokens_NL is not None:
            return len(self.tokens_NL), self.tokens_NL.shape[1]
        samples = sum(len(next(iter(batch.values()))) for batch in self.inputs)
        return samples, self.num_tokens // samples

    @property
    def hash(self) -> str:
        """SHA-256 in hex: equal data, equal hash."""
        if self.tokens_NL is not None:
            return data_hash(self.tokens_NL)
        return hash_tensors(item for batch in self.inputs for item in sorted(batch.items()))

    def check(self, model: nn.Module) -> None:
        """Raise ``CalibrationError`` for words or arguments that ``model``, or its skeleton, does not know."""
        if self.tokens_NL is not None:
            check_vocabulary(model, self.tokens_NL)
        known = arguments_of(model)
        for number, batch in enumerate(self.inputs):
            if IDS in batch and not any(tensor.is_floating_point() for tensor in batch.values()):
                check_vocabulary(model, batch[IDS])  # with images, models may have ids of their own
            unknown = [name for name in batch if name not in known]
            if unknown:
                raise CalibrationError(
                    f"calibration batch {number} has {', '.join(unknown)}, which {type(model).__name__} does not read: "
                    f"give what its forward pass takes ({', '.join(known[:8])} ...)"
                )


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
    if isinstance(first, Mapping) and not set(first) <= text_alone and not _is_record(first):
        if not hasattr(calibration, "__len__"):
            raise CalibrationError(
                f"calibration batches with {', '.join(map(str, first))} must be a list, or a DataLoader with a length"
            )
        pairs = set(first) <= TEXT_ALONE
        return _arguments(model, list(_enough(map(_batched, everything), most) if pairs else everything), text_alone)
    if isinstance(first, Mapping) and {IDS, LABELS} <= set(first) and LABELS not in text_alone:
        raise CalibrationError(f"calibration has {LABELS} that are no tensors: give batches as a collator returns them")
    if isinstance(first, Tensor | Mapping) or _of_one_tensor(first):
        return _sequences(everything, most)
    if isinstance(first, list | tuple) and first and all(isinstance(text, str) for text in first):
        return chain.from_iterable(everything)
    return everything if batches is calibration else calibration


def _of_one_tensor(batch: Any) -> bool:
    """Whether it is a batch of a ``TensorDataset`` of one tensor."""
    return isinstance(batch, list | tuple) and len(batch) == 1 and isinstance(batch[0], Tensor)


def _is_record(first: Mapping[str, Any]) -> bool:
    """Whether it is a record of a dataset, rather than what a processor returns."""
    texts = any(isinstance(value, str) for value in first.values())
    return texts or (IDS in first and not any(isinstance(value, Tensor) for value in first.values()))


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
        raise CalibrationError(
            f"a calibration batch holds {', '.join(map(str, batch)) or 'nothing'}, but no {IDS}: give token ids, "
            "or the texts as a list, such as calibration=dataset['text']"
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
    _check_values(name, tensor)
    tokens = tensor[None] if tensor.ndim == 1 and name != "calibration" else tensor
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise CalibrationError(
            f"{name} must be token ids, whole numbers of shape (samples, length), got {tuple(tensor.shape)} "
            f"{tensor.dtype}"
        )
    return tokens.long().cpu()


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        kind = "on the meta device" if tensor.is_meta else "empty" if tensor.layout == torch.strided else "sparse"
        raise CalibrationError(f"{name} is {kind}, {tuple(tensor.shape)}: give a dense tensor with values")


def _arguments(model: nn.Module, batches: Sequence[Any], text_alone: Collection[str]) -> Calibration:
    """Batches of the arguments of a forward pass."""
    for number, batch in enumerate(batches):
        values = {"batch": batch} if not isinstance(batch, Mapping) or not batch else batch
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise CalibrationError(
                    f"calibration batch {number}: {name} is a {type(value).__name__}, not a tensor: give what the "
                    "model's processor returns with return_tensors='pt'"
                )
            _check_values(f"calibration batch {number}: {name}", value)
            if name == LABELS and LABELS not in text_alone and value.ndim < 2:
                raise CalibrationError(
                    f"calibration batch {number}: {LABELS} of shape {tuple(value.shape)} are no tokens for the "
                    "decoder: leave them out"
                )
    return Calibration(None, tuple(dict(batch) for batch in batches), notes=_padding_note(model, batches))


def _enough(batches: Iterable[Any], most: Callable[[int], int]) -> Iterator[Any]:
    """As many batches of pairs as have the sequences that are used, and a part of the last one."""
    count = 0
    for batch in batches:
        tokens = words_of(batch, WORDS_OF["decoder"]) if _of_tensors(batch) else None
        if tokens is None or tokens.ndim != 2:  # refused later
            yield batch
            continue
        wanted, samples = most(tokens.shape[1]) - count, len(tokens)
        if samples >= wanted:
            yield batch if indivisible(batch, samples) else some_of(batch, slice(0, wanted), samples)
            return
        yield batch
        count += samples


def _of_tensors(batch: Any) -> bool:
    return isinstance(batch, Mapping) and all(isinstance(value, Tensor) for value in batch.values())


def _batched(pair: Any) -> Any:
    """A pair of texts, as a record of a dataset holds it, is a batch of one."""
    if not (_of_tensors(pair) and all(value.ndim == 1 for value in pair.values())):
        return pair
    return {name: value[None] for name, value in pair.items()}


def _padding_note(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[str, ...]:
    """A note on padding in batches with images or sounds; elsewhere padding is refused."""
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


def arguments(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What a forward pass of ``model`` is called with for a batch."""
    if not isinstance(batch, Tensor):
        return dict(batch)
    if not is_encoder_decoder(model):
        return {"input_ids": batch}
    half = batch.shape[1] // 2
    decoded, start = batch[:, half:], _decoder_start(model)
    if start is not None:  # it reads each word to tell the next
        decoded = torch.cat([torch.full_like(decoded[:, :1], start), decoded[:, :-1]], dim=1)
    return {"input_ids": batch[:, :half], DECODER_IDS: decoded}


def _decoder_start(model: nn.Module) -> int | None:
    """The token that a decoder reads first, as ``generate`` finds it; None where nothing names one."""
    settings = [getattr(model, name, None) for name in ("config", "generation_config")]
    found = [getattr(each, name, None) for name in ("decoder_start_token_id", "bos_token_id") for each in settings]
    return next((token for token in found if isinstance(token, int)), None)


def words_size(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """(B, L) of the words that the model's head predicts.

    Raises:
        CalibrationError: if the batch has none, or none for the decoder.
    """
    names: tuple[str, ...] = WORDS_OF["decoder"] if is_encoder_decoder(model) else (*WORDS_OF["whole"], "inputs_embeds")
    words = words_of(arguments(model, batch), names)
    if words is None:
        raise CalibrationError(
            f"a calibration batch has no {' or '.join(names)}, of which the loss is: add them, or take objective sink"
        )
    return len(words), words.shape[1]


def stack_size(model: nn.Module, stack: Stack, batch: Batch) -> tuple[int, int | None]:
    """(B, L) of the hidden states of a stack; L None where it does not show in what the model is given (audio)."""
    given: Any = arguments(model, batch)
    words = words_of(given, WORDS_OF[stack.part])
    if words is not None:
        return len(words), words.shape[1]
    return len(given.get(getattr(model, "main_input_name", ""), next(iter(given.values())))), None


def first_of(model: nn.Module, batch: Batch, length: int) -> Batch:
    """Enough of a batch to look at a model with: ``length`` tokens of a stack, or a sample of a processor's outputs.

    Where samples cannot be distinguished, all of them.
    """
    if isinstance(batch, Tensor):
        return batch[:1, : length * (1 + is_encoder_decoder(model))]
    samples = len(next(iter(batch.values())))
    return batch if indivisible(batch, samples) else some_of(batch, slice(0, 1), samples)


def indivisible(batch: Batch, samples: int) -> str:
    """Why a batch cannot be taken apart into samples; empty if it can."""
    tensors = {} if isinstance(batch, Tensor) else batch
    odd = next((name for name, tensor in tensors.items() if tensor.shape[:1] != (samples,)), None)
    return f"{odd} cannot be taken apart into {samples} samples" if odd else ""


def some_of(batch: Batch, part: slice, samples: int) -> Batch:
    """Some samples of a batch, which is not ``indivisible``, or all of them."""
    if isinstance(batch, Tensor):
        return rows_of(batch, part, samples)
    return {name: rows_of(tensor, part, samples) for name, tensor in batch.items()}


def words_alone(model: nn.Module, batch: Batch) -> Batch:
    """What of a batch its head needs where no block runs: words, without what sees, unless the model insists on it.

    Images may not be one a sample, so that a batch with them cannot always be taken apart, and its words can.
    """
    if isinstance(batch, Tensor):
        return batch
    words = next(
        name for name in (*WORDS_OF["whole"], "inputs_embeds") if name in batch
    )  # or the gradient pass had raised
    needed = {words, *needed_arguments(model)}
    return {name: tensor for name, tensor in batch.items() if name in needed}


def words_of(given: Mapping[str, Tensor], names: Sequence[str]) -> Tensor | None:
    """Those of the first of ``names`` that a batch has."""
    return next((given[name] for name in names if name in given), None)
