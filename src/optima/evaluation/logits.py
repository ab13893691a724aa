"""Logits of a causal language model, some positions at a time: all of a window take gigabytes.

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from optima.calibration.probe import PROBE_LENGTH, agree
from optima.device import evaluating, forward_replaced, once
from optima.errors import ModelError, RecipeError
from optima.models.reading import check_length, check_vocabulary, head_of, in_slices, is_encoder_decoder

LOGITS_BYTES = 64 * 2**20  # float32 logits in memory at once: 64 positions of a vocabulary of 262k

LogitsOf = Callable[[int, int], Tensor]  # (start, stop) -> logits_BCV

_logger = logging.getLogger("optima")


@dataclass(frozen=True)
class Reader:
    """Reads the logits of one model.

    Attributes:
        model: on its device, in evaluation mode.
        vocabulary: logits of a position.
        sliced: whether positions can be split; otherwise all logits of a window are in memory.
    """

    model: PreTrainedModel
    vocabulary: int
    sliced: bool

    def read(self, tokens_BL: Tensor) -> AbstractContextManager[LogitsOf]:
        """What gives the logits of positions ``start`` to ``stop`` inside the context."""
        return (_sliced if self.sliced else _whole)(self.model, tokens_BL)

    def slices(self, tokens_BL: Tensor) -> Iterator[tuple[int, int]]:
        """The positions that have a next token, as many at a time as ``LOGITS_BYTES`` hold."""
        num_windows, length = tokens_BL.shape
        step = max(1, LOGITS_BYTES // (4 * self.vocabulary * num_windows))
        for start in range(0, length - 1, step):
            yield start, min(start + step, length - 1)


@contextmanager
def reading(model: PreTrainedModel, tokens_NL: Tensor, device: torch.device | str | None = None) -> Iterator[Reader]:
    """Check that ``model`` can read ``tokens_NL`` and predicts next tokens; put it on ``device``, in evaluation mode.

    Args:
        model: any causal language model of the library; runs in its own dtype and is left as it was, but on ``device``.
        tokens_NL: token ids, integer.
        device: where to run; None runs where the model is.

    Raises:
        CalibrationError: if the model has no embedding for a token.
        ModelError: if the model is no causal language model, or cannot read windows of this length.
    """
    check_text(model, tokens_NL)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    with torch.no_grad(), evaluating(model):
        probe_1L = tokens_NL[:1, :PROBE_LENGTH].to(model.device)
        whole_1LV = _check_causal(model, probe_1L)
        yield Reader(model, whole_1LV.shape[-1], _can_slice(model, probe_1L, whole_1LV))


def check_text(model: PreTrainedModel, tokens_NL: Tensor) -> None:
    """The checks of ``reading`` for which ``model`` may be a skeleton."""
    length = tokens_NL.shape[1]
    if length < 2:
        raise ModelError(f"windows of {length} token have no next token to predict: raise --max-seq-length")
    check_length(model, length)
    check_vocabulary(model, tokens_NL)
    if is_encoder_decoder(model):
        raise ModelError(_not_causal(model, "it is an encoder-decoder"))


def check_kind(model: PreTrainedModel) -> None:
    """Raise ``ModelError`` if a model is known to predict no next tokens; for it may be a skeleton."""
    if is_encoder_decoder(model):
        raise ModelError(_not_causal(model, "it is an encoder-decoder"))
    if not type(model).__module__.startswith("transformers."):
        return
    masked = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()} - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    if type(model).__name__ in masked:
        raise ModelError(_not_causal(model, "it predicts masked tokens from both sides"))
    if head_of(model) is None:
        raise ModelError(_not_causal(model, "it gives no logits over its vocabulary"))


def check_causal(model: PreTrainedModel, tokens_1L: Tensor) -> None:
    """Raise ``ModelError`` unless ``model``, where it is, predicts each next token from those before it."""
    with torch.no_grad(), evaluating(model):
        _check_causal(model, tokens_1L[:, :PROBE_LENGTH].to(model.device))


def batches(tokens_NL: Tensor, batch_size: int, *readers: Reader) -> Iterator[tuple[slice, Tensor]]:
    """The windows in batches on the readers' device, with their places: one by one if a reader keeps all its logits.

    Raises:
        RecipeError: if ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise RecipeError(f"--batch-size must be at least 1, got {batch_size}")
    size = batch_size if all(reader.sliced for reader in readers) else 1
    for start in range(0, len(tokens_NL), size):
        yield slice(start, start + size), tokens_NL[start : start + size].to(readers[0].model.device)


def _check_causal(model: PreTrainedModel, probe_1L: Tensor) -> Tensor:
    """Logits of ``probe_1L`` if ``model`` predicts each next token from the tokens before it; else ``ModelError``.

    Tested, not looked up: other tokens in the second half must not change the logits of the first.
    """
    logits_1LV = getattr(_run(model, probe_1L), "logits", None)
    if logits_1LV is None or logits_1LV.shape[:-1] != probe_1L.shape or logits_1LV.shape[-1] <= int(probe_1L.max()):
        raise ModelError(_not_causal(model, "it gives no logits over its vocabulary"))
    half = probe_1L.shape[1] // 2
    other_1L = torch.cat([probe_1L[:, :half], (probe_1L[:, half:] == 0).to(probe_1L.dtype)], dim=1)
    if not agree(_run(model, other_1L).logits[:, :half], logits_1LV[:, :half], model.dtype):
        raise ModelError(_not_causal(model, "its predictions depend on later tokens, as an encoder's do"))
    assert isinstance(logits_1LV, Tensor)
    return logits_1LV


def _not_causal(model: PreTrainedModel, why: str) -> str:
    name = type(model).__name__
    return f"{name} is no causal language model, and perplexity and tasks need one (GPT, Llama, ...): {why}"


def _can_slice(model: PreTrainedModel, probe_1L: Tensor, whole_1LV: Tensor) -> bool:
    """Whether ``_sliced`` gives the logits ``whole_1LV``: tested, not looked up. A warning says that it does not."""
    half, length = probe_1L.shape[1] // 2, probe_1L.shape[1]
    if in_slices(model) and model.get_decoder() is not model:
        with _sliced(model, probe_1L) as logits_of:
            if agree(torch.cat([logits_of(0, half), logits_of(half, length)], dim=1), whole_1LV, model.dtype):
                return True
    _logger.warning(
        "%s computes its logits in a way that cannot be split by position: all logits of a window are kept in memory",
        type(model).__name__,
    )
    return False


@contextmanager
def _whole(model: PreTrainedModel, tokens_BL: Tensor) -> Iterator[LogitsOf]:
    logits_BLV = _run(model, tokens_BL).logits
    yield lambda start, stop: logits_BLV[:, start:stop]


@contextmanager
def _sliced(model: PreTrainedModel, tokens_BL: Tensor) -> Iterator[LogitsOf]:
    """Logits of some positions at a time, from one pass through all below the head.

    The model's own forward runs for every slice, so that all it does with logits (scaling, softcapping) is done; but
    after the first time its decoder only returns what it returned then.
    """
    decoder: Any = model.get_decoder()

    def logits_of(start: int, stop: int) -> Tensor:
        positions_C = torch.arange(start, stop, device=tokens_BL.device)
        logits_BCV: Tensor = _run(model, tokens_BL, logits_to_keep=positions_C).logits
        return logits_BCV

    with forward_replaced(decoder, once(decoder.forward)):
        yield logits_of


def _run(model: PreTrainedModel, tokens_BL: Tensor, **options: Any) -> Any:
    """What the model's own forward returns."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return model(tokens_BL, **options)
