"""Perplexity on held-out text.

Documents are joined by blank lines and tokenised once, and cut into consecutive windows of L tokens; perplexity is the
exponential of the mean negative log-likelihood of every next token inside the windows. By protocol ``windows`` each
window begins with the special tokens that the tokenizer adds (BOS, then L - 1 tokens of text). By ``sparsegpt`` they
stand once before the text, as in the code of SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695). Where a
tokenizer adds none the two are the same.

Shapes: N windows, B windows in a batch, L tokens in each, C consecutive positions (a slice of L), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.lm_head import sliced_logits
from optima.data.text import SEPARATOR, SpecialTokens, pack, pieces, special_tokens, text_length, token_ids
from optima.device import evaluating
from optima.errors import OTHER_DTYPE, CalibrationError, NumericalError
from optima.evaluation.logits import batches, check_causal, predicting

PROTOCOLS = ("windows", "sparsegpt")
FIRST_DOCUMENTS = 64  # read first where the number of windows is limited, and doubled until they are enough
MARGIN = 64  # tokens after the last window, since the last ones may merge with the next document


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
    own = max_seq_length if protocol == "sparsegpt" else text_length(special, max_seq_length)
    ids = _tokens(documents, tokenizer, None if max_windows is None else max_windows * own + MARGIN)
    if protocol == "sparsegpt":
        ids, special = [*special.before, *ids], SpecialTokens([], [])
    needed = text_length(special, max_seq_length)
    if len(ids) < needed:
        raise CalibrationError(
            f"the evaluation text has {len(ids)} tokens, but one window of {max_seq_length} tokens needs {needed}: "
            "give more text or lower --max-seq-length"
        )
    return pack(ids, special, max_seq_length)[:max_windows]


def _tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, enough: int | None) -> list[int]:
    """The tokens of the joined documents: of all, or of so many of the first that there are ``enough``."""
    rest, taken, ids = iter(documents), list[str](), list[int]()
    while more := list(rest if enough is None else islice(rest, max(len(taken), FIRST_DOCUMENTS))):
        taken += more
        ids = [number for piece in pieces(SEPARATOR.join(taken)) for number in token_ids([piece], tokenizer)[0]]
        if enough is not None and len(ids) >= enough:
            break
    return ids


def window_losses(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Tensor:
    """Mean negative log-likelihood of the next tokens of each window, from float32 likelihoods.

    Args:
        model: any causal language model of transformers; its dtype is kept, and its mode is restored.
        tokens_NL: token ids, integer.
        device: where the model goes and runs; None keeps its own.
        batch_size: windows in one forward pass.
        progress: called with the number of windows that are done, and of all.

    Returns:
        loss_N: float64 on the CPU, in nats a token.

    Raises:
        CalibrationError: if the model has no embedding for a token.
        ModelError: if the model is not causal, or cannot read windows of this length.
        NumericalError: if the likelihood of a window is NaN or infinite.
    """
    loss_N = torch.zeros(len(tokens_NL), dtype=torch.float64, device="cpu")
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    with torch.no_grad(), evaluating(model):
        check_causal(model, tokens_NL)
        for rows, batch_BL in batches(tokens_NL, batch_size, model.device):
            with sliced_logits(model, batch_BL) as logits_of:
                for at_C in predicting(model, batch_BL):
                    loss_N[rows] += next_token_losses(logits_of(at_C), batch_BL[:, at_C + 1])
            check_finite(loss_N[rows], rows.start)
            progress(rows.stop, len(tokens_NL))
    return loss_N / (tokens_NL.shape[1] - 1)


def perplexity(
    model: PreTrainedModel, tokens_NL: Tensor, *, device: torch.device | str | None = None, batch_size: int = 1
) -> float:
    """exp(mean of -log p(next token)), infinite where that overflows; everything else as ``window_losses``."""
    return window_losses(model, tokens_NL, device=device, batch_size=batch_size).mean().exp().item()


def next_token_losses(logits_BCV: Tensor, next_BC: Tensor) -> Tensor:
    """Sum of -log p(next token) over the positions of each window, (B,), float64 on the CPU."""
    loss_T = cross_entropy(logits_BCV.float().flatten(0, 1), next_BC.to(logits_BCV.device).flatten(), reduction="none")
    return loss_T.cpu().double().view(next_BC.shape).sum(dim=1)


def check_finite(sums_B: Tensor, first: int) -> None:
    """Raise ``NumericalError`` if a window's sum is NaN or infinite; ``first`` is the number of the first window."""
    for window, value in enumerate(sums_B.tolist(), first):
        if not math.isfinite(value):
            raise NumericalError(f"the loss of window {window} is {value}: {OTHER_DTYPE}")
