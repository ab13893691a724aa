"""Perplexity on held-out text, and the KL divergence from a reference model (Dutta et al., arXiv 2407.09141).

Documents are joined by blank lines, tokenised once, and cut into consecutive windows of L tokens; perplexity is the
exponential of the mean negative log-likelihood of every next token inside the windows. With protocol ``windows`` each
window begins with the special tokens that the tokenizer adds (BOS, then L - 1 tokens of text). With ``sparsegpt`` they
stand once before the text, as in the code of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695). Without such
tokens both protocols are the same.

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.activations import agree
from optima.console import pace
from optima.data.text import SEPARATOR, SpecialTokens, pack, special_tokens, text_length, token_ids
from optima.errors import OTHER_DTYPE, CalibrationError, ModelError, NumericalError
from optima.models.forward import evaluating, forward
from optima.models.inspect import check_length, check_vocabulary, is_encoder_decoder
from optima.models.logits import positions_of_slices, sliced_logits

PROTOCOLS = ("windows", "sparsegpt")
FIRST_DOCUMENTS = 64  # read first where the number of windows is limited, and doubled until they are enough
MARGIN = 64  # tokens after the last window, since the last ones may merge with the next document
PROGRESS_SECONDS = 30.0  # between two lines
PROBE_LENGTH = 8  # tokens of the test for a causal model


def evaluation_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    max_windows: int | None = None,
    protocol: str = "windows",
) -> Tensor:
    """Cut text into the windows of a protocol.

    Returns:
        tokens_NL: int64, at most ``max_windows`` windows.

    Raises:
        CalibrationError: if the text is shorter than one window.
    """
    special = special_tokens(tokenizer)._replace(after=[])  # a window does not end a text
    length = max_seq_length if protocol == "sparsegpt" else text_length(special, max_seq_length)
    enough = math.inf if max_windows is None else max_windows * length + MARGIN
    rest, texts, ids = iter(documents), list[str](), list[int]()
    while len(ids) < enough and (more := list(islice(rest, max(len(texts), FIRST_DOCUMENTS)))):
        texts += more if max_windows is not None else [*more, *rest]
        (ids,) = token_ids([SEPARATOR.join(texts)], tokenizer)
    if protocol == "sparsegpt":
        ids, special = [*special.before, *ids], SpecialTokens([], [])
    if len(ids) < length:
        raise CalibrationError(
            f"the evaluation text has {len(ids)} tokens, but one window of {max_seq_length} tokens needs {length}: "
            "give more text or lower --max-seq-length"
        )
    return pack(ids, special, max_seq_length)[:max_windows]


class WindowMeans(NamedTuple):
    """Means over the tokens of each window that have a next one, float64 on the CPU.

    Attributes:
        loss_N: negative log-likelihood of the next token, in nats.
        kl_N: KL(reference || model), in nats; zero without a reference.
        top1_N: fraction of tokens for which both models predict the same next token; zero without a reference.
    """

    loss_N: Tensor
    kl_N: Tensor
    top1_N: Tensor


def measure_windows(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    reference: PreTrainedModel | None = None,
    *,
    batch_size: int = 1,
    log: Callable[[str], object] = lambda line: None,
) -> WindowMeans:
    """Loss of a causal language model on each window, and its divergence from ``reference``, on the model's device.

    Args:
        model: its dtype is kept, and its mode is restored.
        tokens_NL: token ids, integer.
        reference: on the same device.
        batch_size: windows in one forward pass.
        log: called with a line of progress from time to time.

    Raises:
        CalibrationError: if the model has no embedding for a token.
        ModelError: if a model is not causal, cannot read windows of this length, or has another vocabulary.
        NumericalError: if the loss of a window is NaN or infinite.
    """
    sums_3N = torch.zeros(3, len(tokens_NL), dtype=torch.float64, device="cpu")
    models = [model] if reference is None else [model, reference]
    started = shown = time.monotonic()
    with torch.no_grad(), ExitStack() as modes:
        for each in models:
            modes.enter_context(evaluating(each))
        if len(sizes := {check_causal(each, tokens_NL): None for each in models}) > 1:
            own, other = sizes
            raise ModelError(
                f"KL divergence needs one vocabulary, and these have {other} and {own} tokens: leave --divergence out"
            )
        for first in range(0, len(tokens_NL), batch_size):
            rows = slice(first, first + batch_size)
            batch_BL = tokens_NL[rows].to(model.device)
            at_L = torch.arange(batch_BL.shape[1] - 1, device=batch_BL.device)
            with ExitStack() as slices:
                logits_of = [slices.enter_context(sliced_logits(each, batch_BL)) for each in models]
                for at_C in positions_of_slices(model, at_L, len(batch_BL)):
                    q_BCV, *p_BCV = (logits(at_C).float() for logits in logits_of)
                    sums_3N[0, rows] += _losses(q_BCV, batch_BL[:, at_C + 1])
                    for each_BCV in p_BCV:
                        sums_3N[1, rows] += _divergences(each_BCV, q_BCV)
                        sums_3N[2, rows] += (each_BCV.argmax(-1) == q_BCV.argmax(-1)).sum(dim=1).cpu()
            for window, value in enumerate(sums_3N[:, rows].sum(dim=0).tolist(), first):
                if not math.isfinite(value):
                    raise NumericalError(f"the loss of window {window} is {value}: {OTHER_DTYPE}")
            done, now = min(rows.stop, len(tokens_NL)), time.monotonic()
            if now - shown >= PROGRESS_SECONDS:
                shown, left = now, (now - started) / done * (len(tokens_NL) - done)
                log(f"window {done}/{len(tokens_NL)}  {pace(now - started, left)}")
    return WindowMeans(*(sums_3N / (tokens_NL.shape[1] - 1)))


def perplexity(model: PreTrainedModel, tokens_NL: Tensor, *, batch_size: int = 1) -> float:
    """exp(mean of -log p(next token)), infinite where that overflows; errors: see ``measure_windows``."""
    return measure_windows(model, tokens_NL, batch_size=batch_size).loss_N.mean().exp().item()


def _losses(logits_BCV: Tensor, next_BC: Tensor) -> Tensor:
    loss_T = cross_entropy(logits_BCV.flatten(0, 1), next_BC.to(logits_BCV.device).flatten(), reduction="none")
    return loss_T.cpu().double().view(next_BC.shape).sum(dim=1)


def _divergences(p_BCV: Tensor, q_BCV: Tensor) -> Tensor:
    kl_BCV = kl_div(log_softmax(q_BCV, dim=-1), log_softmax(p_BCV, dim=-1), reduction="none", log_target=True)
    return kl_BCV.sum(dim=-1).cpu().double().sum(dim=1)


def check_causal(model: PreTrainedModel, tokens_NL: Tensor) -> int:
    """The size of the vocabulary of a model that predicts each of these tokens from those before it.

    Tested on a few tokens: other ones in their second half must not change the logits of the first half.

    Raises:
        CalibrationError: if the model has no embedding for a token.
        ModelError: if the model is not causal, or cannot read sequences of this length.
    """
    length, name = tokens_NL.shape[1], f"{type(model).__name__} is not a causal language model"
    if length < 2:
        raise ModelError(f"a window of {length} token has no next token to predict: raise --max-seq-length")
    if is_encoder_decoder(model):
        raise ModelError(f"{name}: it is an encoder-decoder")
    check_length(model, length)
    check_vocabulary(model, tokens_NL)
    probe_1L = tokens_NL[:1, :PROBE_LENGTH].to(model.device)
    logits_1LV = getattr(forward(model, probe_1L), "logits", None)
    if logits_1LV is None or logits_1LV.shape[:-1] != probe_1L.shape or logits_1LV.shape[-1] <= int(probe_1L.max()):
        raise ModelError(f"{name}: it has no logits over its vocabulary")
    half = probe_1L.shape[1] // 2
    other_1L = torch.cat([probe_1L[:, :half], (probe_1L[:, half:] == 0).to(probe_1L.dtype)], dim=1)
    if not agree(forward(model, other_1L).logits[:, :half], logits_1LV[:, :half], model.dtype):
        raise ModelError(f"{name}: its predictions depend on later tokens")
    return int(logits_1LV.shape[-1])
