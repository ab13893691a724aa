"""Perplexity on held-out text, by the protocol of SparseGPT and Wanda, with the special tokens in every window.

The protocol: documents joined by blank lines and tokenised once; consecutive, non-overlapping windows of L tokens; the
exponential of the mean negative log-likelihood of every next token inside the windows. SparseGPT (arXiv 2301.00774) and
Wanda (arXiv 2306.11695) put the tokenizer's BOS at the beginning of the text only, so that all windows but the first
lack it. Here every window has the tokenizer's special tokens (BOS, then L - 1 tokens of text), as in training: on
WikiText-2 the dense Gemma 3 270M is far worse with one BOS in all. Where a tokenizer adds none (GPT-2, Qwen) the two
are the same.

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), T = B C,
V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.probe import PROBE_LENGTH, agree
from optima.calibration.text import SEPARATOR, pack, special_tokens, text_length, token_ids
from optima.device import evaluating, forward_replaced
from optima.errors import CalibrationError, ModelError, NumericalError, RecipeError
from optima.models.reading import check_length, check_vocabulary

LOGITS_BYTES = 64 * 2**20  # float32 logits in memory at once: 64 positions of a vocabulary of 262k

LogitsOf = Callable[[int, int], Tensor]  # (start, stop) -> logits_BCV

_logger = logging.getLogger("optima")


def evaluation_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, max_windows: int | None = None
) -> Tensor:
    """Cut text into the windows of the protocol.

    Returns:
        tokens_NL: int64, the first ``max_windows`` windows, or as many as there are.

    Raises:
        CalibrationError: if the text is shorter than one window.
        RecipeError: if ``max_windows`` is less than 1.
    """
    if max_windows is not None and max_windows < 1:
        raise RecipeError(f"--max-windows must be at least 1, got {max_windows}: leave it out to evaluate all the text")
    special = special_tokens(tokenizer)
    (ids,) = token_ids([SEPARATOR.join(documents)], tokenizer)
    needed = text_length(special, max_seq_length)
    if len(ids) < needed:
        raise CalibrationError(
            f"the evaluation text has {len(ids)} tokens, but one window of {max_seq_length} tokens needs {needed}: "
            "give more text or lower --max-seq-length"
        )
    return pack(ids, special, max_seq_length)[:max_windows]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
) -> float:
    """Perplexity of a causal language model on windows of tokens.

    The hidden states of ``batch_size`` windows are in memory at once, but only ``LOGITS_BYTES`` of logits, and the few
    copies that a softmax makes of them. A model that cannot compute the logits of some positions only runs one window
    at a time with all its logits in memory, and a warning says so.

    Args:
        model: any causal language model of the library; runs in its own dtype and is left as it was, but on ``device``.
        tokens_NL: token ids, integer.
        device: where to run; None runs where the model is.
        batch_size: windows in one forward pass.

    Returns:
        exp(mean of -log p(next token)), from float32 likelihoods and their float64 mean; inf where that overflows.

    Raises:
        CalibrationError: if the model has no embedding for a token.
        ModelError: if the model is no causal language model, or cannot read windows of this length.
        NumericalError: if the likelihood of a window is NaN or infinite.
        RecipeError: if ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise RecipeError(f"--batch-size must be at least 1, got {batch_size}")
    num_windows, length = tokens_NL.shape
    if length < 2:
        raise ModelError(f"windows of {length} token have no next token to predict: raise --max-seq-length")
    check_length(model, length)
    check_vocabulary(model, tokens_NL)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    total, done = 0.0, 0
    with evaluating(model):
        probe_1L = tokens_NL[:1, :PROBE_LENGTH].to(model.device)
        whole_1LV = _check_causal(model, probe_1L)
        logits = _sliced if _can_slice(model, probe_1L, whole_1LV) else _whole
        while done < num_windows:
            batch_BL = tokens_NL[done : done + (batch_size if logits is _sliced else 1)].to(model.device)
            with logits(model, batch_BL) as logits_of:
                nll_B = _negative_log_likelihood(logits_of, batch_BL, whole_1LV.shape[-1])
            for window, nll in enumerate(nll_B.tolist(), done):
                if not math.isfinite(nll):
                    raise NumericalError(
                        f"the loss of window {window} is {nll}: weights or activations hold NaN or overflow; check "
                        "the checkpoint, or load it with --dtype float32"
                    )
            total += nll_B.sum().item()
            done += len(batch_BL)
    try:
        return math.exp(total / (num_windows * (length - 1)))
    except OverflowError:
        return math.inf


def _check_causal(model: PreTrainedModel, probe_1L: Tensor) -> Tensor:
    """Logits of ``probe_1L`` if ``model`` predicts each next token from the tokens before it; else ``ModelError``.

    Tested, not looked up: other tokens in the second half must not change the logits of the first.
    """
    problem = f"{type(model).__name__} is no causal language model, and perplexity needs one (GPT, Llama, ...): "
    if model.config.is_encoder_decoder:
        raise ModelError(problem + "it is an encoder-decoder")
    logits_1LV = getattr(_run(model, probe_1L), "logits", None)
    if logits_1LV is None or logits_1LV.shape[:-1] != probe_1L.shape or logits_1LV.shape[-1] <= int(probe_1L.max()):
        raise ModelError(problem + "it gives no logits over its vocabulary")
    half = probe_1L.shape[1] // 2
    other_1L = torch.cat([probe_1L[:, :half], (probe_1L[:, half:] == 0).to(probe_1L.dtype)], dim=1)
    if not agree(_run(model, other_1L).logits[:, :half], logits_1LV[:, :half]):
        raise ModelError(problem + "its predictions depend on later tokens, as an encoder's do")
    assert isinstance(logits_1LV, Tensor)
    return logits_1LV


def _can_slice(model: PreTrainedModel, probe_1L: Tensor, whole_1LV: Tensor) -> bool:
    """Whether ``_sliced`` gives the logits ``whole_1LV``: tested, not looked up. A warning says that it does not."""
    half, length = probe_1L.shape[1] // 2, probe_1L.shape[1]
    if "logits_to_keep" in inspect.signature(model.forward).parameters and model.get_decoder() is not model:
        with _sliced(model, probe_1L) as logits_of:
            if agree(torch.cat([logits_of(0, half), logits_of(half, length)], dim=1), whole_1LV):
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
    forward = decoder.forward
    outputs: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    def logits_of(start: int, stop: int) -> Tensor:
        positions_C = torch.arange(start, stop, device=tokens_BL.device)
        logits_BCV: Tensor = _run(model, tokens_BL, logits_to_keep=positions_C).logits
        return logits_BCV

    with forward_replaced(decoder, once):
        yield logits_of


def _run(model: PreTrainedModel, tokens_BL: Tensor, **options: Any) -> Any:
    """What the model's own forward returns."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return model(tokens_BL, **options)


def _negative_log_likelihood(logits_of: LogitsOf, tokens_BL: Tensor, vocabulary: int) -> Tensor:
    """Sum over the L - 1 next tokens of each window, float64 on the CPU, (B,)."""
    num_windows, length = tokens_BL.shape
    step = max(1, LOGITS_BYTES // (4 * vocabulary * num_windows))
    nll_B = torch.zeros(num_windows, dtype=torch.float64)
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        logits_BCV = logits_of(start, stop).float()
        next_BC = tokens_BL[:, start + 1 : stop + 1].to(logits_BCV.device)
        nll_T = cross_entropy(logits_BCV.flatten(0, 1), next_BC.flatten(), reduction="none")
        nll_B += nll_T.cpu().double().view_as(next_BC).sum(dim=1)
    return nll_B
