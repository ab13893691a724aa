"""What a model is given to read: token ids, or a processor's outputs, and which of them each stack runs on.

An encoder-decoder reads the first half of every text with its encoder, and goes on with the second half in its decoder,
behind the token that starts it: prefix language modelling (Raffel et al., JMLR 2020, section 3.1.4), which needs no
pairs of texts.

Shapes: N sequences, B sequences in a batch, L tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optima.calibration.halving import rows_of
from optima.data.text import data_hash
from optima.errors import CalibrationError
from optima.models.fingerprint import hash_tensors
from optima.models.reading import arguments_of, check_vocabulary, is_encoder_decoder, needed_arguments
from optima.models.stacks import Stack

Batch = Tensor | Mapping[str, Tensor]
LABELS, DECODER_IDS = "labels", "decoder_input_ids"
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
            unknown = [name for name in batch if name not in known]
            if unknown:
                raise CalibrationError(
                    f"calibration batch {number} has {', '.join(unknown)}, which {type(model).__name__} does not read: "
                    f"give what its forward pass takes ({', '.join(known[:8])} ...)"
                )


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

    Where samples cannot be told apart, all of them.
    """
    if isinstance(batch, Tensor):
        return batch[:1, : length * (1 + is_encoder_decoder(model))]
    samples = len(next(iter(batch.values())))
    return batch if inseparable(batch, samples) else some_of(batch, slice(0, 1), samples)


def inseparable(batch: Batch, samples: int) -> str:
    """Why a batch cannot be taken apart into samples; empty if it can."""
    tensors = {} if isinstance(batch, Tensor) else batch
    odd = next((name for name, tensor in tensors.items() if tensor.shape[:1] != (samples,)), None)
    return f"{odd} cannot be taken apart into {samples} samples" if odd else ""


def some_of(batch: Batch, part: slice, samples: int) -> Batch:
    """Some samples of a batch, which is not ``inseparable``, or all of them."""
    if isinstance(batch, Tensor):
        return rows_of(batch, part, samples)
    return {name: rows_of(tensor, part, samples) for name, tensor in batch.items()}


def words_alone(model: nn.Module, batch: Batch) -> Batch:
    """What of a batch its head needs where no block runs: words, without what sees, unless the model insists on it.

    Images may not be one a sample, so that a batch with them cannot always be taken apart, and its words can.
    """
    if isinstance(batch, Tensor):
        return batch
    words = next(name for name in (*WORDS_OF["whole"], "inputs_embeds") if name in batch)  # or the sweep had raised
    needed = {words, *needed_arguments(model)}
    return {name: tensor for name, tensor in batch.items() if name in needed}


def words_of(given: Mapping[str, Tensor], names: Sequence[str]) -> Tensor | None:
    """Those of the first of ``names`` that a batch has."""
    return next((given[name] for name in names if name in given), None)
