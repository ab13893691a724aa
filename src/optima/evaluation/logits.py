"""Logits of a causal language model, some positions at a time: those of a whole window can take gigabytes.

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.probe import agree
from optima.device import forward_replaced, once
from optima.errors import ModelError
from optima.models.inspect import check_length, check_vocabulary, in_slices, is_encoder_decoder

LOGITS_BYTES = 64 * 2**20  # float32 logits in memory at once: 64 positions of a vocabulary of 262k
PROBE_LENGTH = 8  # tokens


@contextmanager
def sliced_logits(model: PreTrainedModel, tokens_BL: Tensor) -> Iterator[Callable[[int, int], Tensor]]:
    """A function inside the context: (start, stop) -> logits_BCV of these positions.

    The model's own forward runs for every slice, so that scaling and softcapping of logits are its own. Its decoder
    runs in the first of these passes, and the others reuse its output. A model without ``logits_to_keep`` computes all
    logits at once.
    """
    decoder: Any = model.get_decoder()
    if not in_slices(model) or decoder is model:
        logits_BLV: Tensor = _forward(model, tokens_BL).logits
        yield lambda start, stop: logits_BLV[:, start:stop]
        return

    def logits_of(start: int, stop: int) -> Tensor:
        positions_C = torch.arange(start, stop, device=tokens_BL.device)
        logits_BCV: Tensor = _forward(model, tokens_BL, logits_to_keep=positions_C).logits
        return logits_BCV

    with forward_replaced(decoder, once(decoder.forward)):
        yield logits_of


def slices(tokens_BL: Tensor, vocabulary: int) -> Iterator[tuple[int, int]]:
    """The positions that have a next token, as many at a time as ``LOGITS_BYTES`` hold."""
    num_windows, length = tokens_BL.shape
    step = max(1, LOGITS_BYTES // (4 * vocabulary * num_windows))
    for start in range(0, length - 1, step):
        yield start, min(start + step, length - 1)


def batches(tokens_NL: Tensor, batch_size: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The windows in batches on ``device``, each with its rows."""
    for start in range(0, len(tokens_NL), batch_size):
        rows = slice(start, min(start + batch_size, len(tokens_NL)))
        yield rows, tokens_NL[rows].to(device)


def check_causal(model: PreTrainedModel, tokens_NL: Tensor) -> int:
    """The size of the vocabulary of a model that reads these tokens and predicts each from those before it.

    Tested on a few tokens: other ones in their second half must not change the logits of the first half.

    Raises:
        CalibrationError: if the model has no embedding for a token.
        ModelError: if the model is not causal, or cannot read sequences of this length.
    """
    length = tokens_NL.shape[1]
    if length < 2:
        raise ModelError(f"a window of {length} token has no next token to predict: raise --max-seq-length")
    name = f"{type(model).__name__} is not a causal language model"
    if is_encoder_decoder(model):
        raise ModelError(f"{name}: it is an encoder-decoder")
    check_length(model, length)
    check_vocabulary(model, tokens_NL)
    probe_1L = tokens_NL[:1, :PROBE_LENGTH].to(model.device)
    logits_1LV = getattr(_forward(model, probe_1L), "logits", None)
    if logits_1LV is None or logits_1LV.shape[:-1] != probe_1L.shape or logits_1LV.shape[-1] <= int(probe_1L.max()):
        raise ModelError(f"{name}: it has no logits over its vocabulary")
    half = probe_1L.shape[1] // 2
    other_1L = torch.cat([probe_1L[:, :half], (probe_1L[:, half:] == 0).to(probe_1L.dtype)], dim=1)
    if not agree(_forward(model, other_1L).logits[:, :half], logits_1LV[:, :half], model.dtype):
        raise ModelError(f"{name}: its predictions depend on later tokens")
    return int(logits_1LV.shape[-1])


def _forward(model: PreTrainedModel, tokens_BL: Tensor, **options: Any) -> Any:
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return model(tokens_BL, **options)
