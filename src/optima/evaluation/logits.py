"""Windows of tokens in batches, and the check that a model is a causal language model.

Shapes: N windows, B windows in a batch, L tokens in each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.lm_head import plain_forward, positions_of_slices
from optima.calibration.probe import agree
from optima.errors import ModelError
from optima.models.inspect import check_length, check_vocabulary, is_encoder_decoder

PROBE_LENGTH = 8  # tokens


def batches(tokens_NL: Tensor, batch_size: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The windows in batches on ``device``, each with its rows."""
    for start in range(0, len(tokens_NL), batch_size):
        rows = slice(start, min(start + batch_size, len(tokens_NL)))
        yield rows, tokens_NL[rows].to(device)


def predicting(model: PreTrainedModel, tokens_BL: Tensor) -> Sequence[Tensor]:
    """The positions that have a next token, (C,), as many at a time as fit ``LOGITS_BYTES``."""
    at_L = torch.arange(tokens_BL.shape[1] - 1, device=tokens_BL.device)
    return positions_of_slices(model, at_L, len(tokens_BL))


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
    logits_1LV = getattr(plain_forward(model, probe_1L), "logits", None)
    if logits_1LV is None or logits_1LV.shape[:-1] != probe_1L.shape or logits_1LV.shape[-1] <= int(probe_1L.max()):
        raise ModelError(f"{name}: it has no logits over its vocabulary")
    half = probe_1L.shape[1] // 2
    other_1L = torch.cat([probe_1L[:, :half], (probe_1L[:, half:] == 0).to(probe_1L.dtype)], dim=1)
    if not agree(plain_forward(model, other_1L).logits[:, :half], logits_1LV[:, :half], model.dtype):
        raise ModelError(f"{name}: its predictions depend on later tokens")
    return int(logits_1LV.shape[-1])
