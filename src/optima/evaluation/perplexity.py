"""Perplexity on held-out text, by the protocol of SparseGPT and Wanda, with the special tokens in every window.

The protocol: documents joined by blank lines and tokenised once; consecutive, non-overlapping windows of L tokens; the
exponential of the mean negative log-likelihood of every next token inside the windows. SparseGPT (arXiv 2301.00774) and
Wanda (arXiv 2306.11695) put the tokenizer's BOS at the beginning of the text only, so that all windows but the first
lack it. Here every window has the tokenizer's special tokens (BOS, then L - 1 tokens of text), as in training: on
WikiText-2 the dense Gemma 3 270M is far worse with one BOS in all. Where a
tokenizer adds none (GPT-2, Qwen) the two are the same.

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), T = B C,
V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.text import SEPARATOR, pack, special_tokens, text_length, token_ids
from optima.device import evaluating, forward_replaced
from optima.errors import CalibrationError, ModelError, NumericalError, RecipeError
from optima.models.reading import check_length, check_vocabulary

LOGITS_BYTES = 64 * 2**20  # float32 logits in memory at once: 64 positions of a vocabulary of 262k
PROBE_LENGTH = 8  # tokens on which a model is checked before the long work

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
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity of a causal language model on windows of tokens.

    The hidden states of ``batch_size`` windows are in memory at once, but only ``LOGITS_BYTES`` of logits, and the few
    copies that a softmax makes of them. A model whose head cannot run on some positions only (see ``find_body``) runs
    one window at a time with all its logits in memory, and a warning says so.

    Args:
        model: any causal language model of the library; runs in its own dtype and is left as it was, but on ``device``.
        tokens_NL: token ids, integer.
        device: where to run; None runs where the model is.
        batch_size: windows in one forward pass.
        progress: is told (windows done, N) after each batch.

    Returns:
        exp(mean of -log p(next token)), from float32 likelihoods and their float64 mean; inf where that overflows.

    Raises:
        ModelError: if the model is no causal language model, or cannot read windows of this length or these tokens.
        NumericalError: if the likelihood of a window is NaN or infinite.
        RecipeError: if ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise RecipeError(f"--batch-size must be at least 1, got {batch_size}")
    check_windows(model, tokens_NL)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    num_windows, length = tokens_NL.shape
    total, done = 0.0, 0
    with evaluating(model):
        probe_1L = tokens_NL[:1, :PROBE_LENGTH].to(model.device)
        vocabulary = check_causal(model, probe_1L)
        body = find_body(model, probe_1L)
        while done < num_windows:
            batch_BL = tokens_NL[done : done + (batch_size if body is not None else 1)]
            nll_B = _negative_log_likelihood(model, body, batch_BL.to(model.device), vocabulary)
            _check_finite(nll_B, done)
            total += nll_B.sum().item()
            done += len(batch_BL)
            if progress is not None:
                progress(done, num_windows)
    try:
        return math.exp(total / (num_windows * (length - 1)))
    except OverflowError:
        return math.inf


def check_windows(model: PreTrainedModel, tokens_NL: Tensor) -> None:
    """Raise ``ModelError`` or ``CalibrationError`` if ``model`` cannot read windows of this length or these tokens."""
    length = tokens_NL.shape[1]
    if length < 2:
        raise ModelError(f"windows of {length} token have no next token to predict: raise --max-seq-length")
    check_length(model, length)
    check_vocabulary(model, tokens_NL)


def check_causal(model: PreTrainedModel, probe_1L: Tensor) -> int:
    """Vocabulary size of ``model``, if it predicts each next token from the tokens before it.

    Tested, not looked up: other tokens in the second half must not change the logits of the first.

    Raises:
        ModelError: if it does not.
    """
    problem = f"{type(model).__name__} is no causal language model, and perplexity needs one (GPT, Llama, ...): "
    if model.config.is_encoder_decoder:
        raise ModelError(problem + "it is an encoder-decoder")
    logits_1LV = _logits(model, probe_1L)
    length = probe_1L.shape[1]
    if logits_1LV is None or logits_1LV.shape[:-1] != (1, length) or logits_1LV.shape[-1] <= int(probe_1L.max()):
        raise ModelError(problem + "it gives no logits over its vocabulary")
    half = length // 2
    other_1L = probe_1L.clone()
    other_1L[:, half:] = (other_1L[:, half:] + 1) % _num_embeddings(model)
    other_1LV = _logits(model, other_1L)
    assert other_1LV is not None
    if not _close(logits_1LV[:, :half], other_1LV[:, :half]):
        raise ModelError(problem + "its predictions depend on later tokens, as an encoder's do")
    return logits_1LV.shape[-1]


def find_body(model: PreTrainedModel, probe_1L: Tensor) -> nn.Module | None:
    """The module below the head: the head alone, on slices of its output, gives the logits of the whole model.

    Tested, not looked up: the slices' logits are compared with the whole's.

    Returns:
        The body; None, with a warning, if there is none.
    """
    decoder = getattr(model, "get_decoder", lambda: None)()  # below the base model in OPT
    for body in (decoder, model.base_model):
        if body is not None and body is not model and _is_sliceable(model, body, probe_1L):
            return body
    _logger.warning(
        "%s computes its logits in a way that cannot be split by position: all logits of a window are kept in memory",
        type(model).__name__,
    )
    return None


def _is_sliceable(model: PreTrainedModel, body: nn.Module, probe_1L: Tensor) -> bool:
    whole_1LV = _logits(model, probe_1L)
    half, length = probe_1L.shape[1] // 2, probe_1L.shape[1]
    try:
        with _sliced(model, body, probe_1L) as logits_of:
            slices_1LV = torch.cat([logits_of(0, half), logits_of(half, length)], dim=1)
    except (RuntimeError, ValueError, IndexError):  # the head wants the hidden states of every position
        return False
    return whole_1LV is not None and slices_1LV.shape == whole_1LV.shape and _close(slices_1LV, whole_1LV)


def _negative_log_likelihood(
    model: PreTrainedModel, body: nn.Module | None, tokens_BL: Tensor, vocabulary: int
) -> Tensor:
    """Sum over the L - 1 next tokens of each window, float64 on the CPU, (B,)."""
    num_windows, length = tokens_BL.shape
    step = max(1, LOGITS_BYTES // (4 * vocabulary * num_windows))
    nll_B = torch.zeros(num_windows, dtype=torch.float64)
    with _whole(model, tokens_BL) if body is None else _sliced(model, body, tokens_BL) as logits_of:
        for start in range(0, length - 1, step):
            stop = min(start + step, length - 1)
            logits_BCV = logits_of(start, stop).float()
            next_BC = tokens_BL[:, start + 1 : stop + 1].to(logits_BCV.device)
            nll_T = cross_entropy(logits_BCV.flatten(0, 1), next_BC.flatten(), reduction="none")
            nll_B += nll_T.cpu().double().view_as(next_BC).sum(dim=1)
    return nll_B


def _check_finite(nll_B: Tensor, first: int) -> None:
    """Raise ``NumericalError`` naming the window; ``first`` is the number of the batch's first."""
    for window, nll in enumerate(nll_B.tolist(), first):
        if not math.isfinite(nll):
            raise NumericalError(
                f"the loss of window {window} is {nll}: weights or activations hold NaN or overflow; check the "
                "checkpoint, or load it with --dtype float32"
            )


def _num_embeddings(model: PreTrainedModel) -> int:
    weight_VD = model.get_input_embeddings().weight
    assert isinstance(weight_VD, Tensor)
    return weight_VD.shape[0]


def _logits(model: PreTrainedModel, tokens_BL: Tensor) -> Tensor | None:
    """Logits of the model's own forward, None if it has none."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    logits: Tensor | None = getattr(model(tokens_BL, **options), "logits", None)
    return logits


@contextmanager
def _whole(model: PreTrainedModel, tokens_BL: Tensor) -> Iterator[LogitsOf]:
    logits_BLV = _logits(model, tokens_BL)
    assert logits_BLV is not None
    yield lambda start, stop: logits_BLV[:, start:stop]


@contextmanager
def _sliced(model: PreTrainedModel, body: nn.Module, tokens_BL: Tensor) -> Iterator[LogitsOf]:
    """Logits of some positions at a time, from one pass through the body.

    The model's own forward runs for every slice, so that all it does after the body (projections, scaling, softcapping)
    is done; but after the first time its body only returns the hidden states that it has stored.
    """
    replay = _Replay(body.forward)

    def logits_of(start: int, stop: int) -> Tensor:
        replay.positions = slice(start, stop)
        logits_BCV = _logits(model, tokens_BL)
        assert logits_BCV is not None
        return logits_BCV

    with forward_replaced(body, replay):
        yield logits_of


class _Replay:
    """A body's forward that runs once and then returns its stored output at the ``positions`` asked for."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.output: Any = None
        self.positions = slice(None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is None:
            self.output = self.forward(*args, **kwargs)
        if isinstance(self.output, tuple):
            return (self.output[0][:, self.positions], *self.output[1:])
        if dataclasses.is_dataclass(self.output) and hasattr(self.output, "last_hidden_state"):
            hidden_BCD = self.output.last_hidden_state[:, self.positions]
            return dataclasses.replace(self.output, last_hidden_state=hidden_BCD)  # type: ignore[type-var]
        raise ValueError(f"a body returned {type(self.output).__name__}, which holds no known hidden states")


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of products of another shape; NaN equals NaN (a loss will report it)."""
    tolerance = max(1e-4, 8 * torch.finfo(a.dtype).eps)
    scale = b.float().nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(a.float(), b.float(), rtol=0, atol=tolerance * scale, equal_nan=True)
