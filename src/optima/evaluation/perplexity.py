"""Perplexity on held-out text, by the protocol of SparseGPT and Wanda, with the special tokens in every window or once.

The protocol: documents joined by blank lines and tokenised once; consecutive, non-overlapping windows of L tokens; the
exponential of the mean negative log-likelihood of every next token inside the windows. SparseGPT (arXiv 2301.00774) and
Wanda (arXiv 2306.11695) put the tokenizer's BOS at the beginning of the text only, so that all windows but the first
lack it: ``sparsegpt``. By default, ``windows``, every window has the tokenizer's special tokens (BOS, then L - 1 tokens
of text), as in training: on WikiText-2 the dense Gemma 3 270M is far worse with one BOS in all. Where a tokenizer adds
none (GPT-2, Qwen) the two are the same.

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

from optima.data.text import SEPARATOR, SpecialTokens, pack, pieces, special_tokens, text_length, token_ids
from optima.errors import OTHER_DTYPE, CalibrationError, NumericalError, RecipeError
from optima.evaluation.logits import batches, reading
from optima.evaluation.watch import silent

FIRST_DOCUMENTS = 64  # read before it is seen whether they are enough; then as many again, and so on
MARGIN = 64  # tokens beyond the last window


def evaluation_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    max_windows: int | None = None,
    protocol: str = "windows",
) -> Tensor:
    """Cut text into the windows of a protocol, one of ``PROTOCOLS``.

    Returns:
        tokens_NL: int64, the first ``max_windows`` windows, or as many as there are.

    Raises:
        CalibrationError: if the text is shorter than one window, or no list of texts.
        RecipeError: if ``max_windows`` is less than 1.
    """
    if isinstance(documents, str):
        raise CalibrationError("documents must be a list of texts, got one text: put it in a list")
    if max_windows is not None and max_windows < 1:
        raise RecipeError(f"--max-windows must be at least 1, got {max_windows}: leave it out to evaluate all the text")
    special = special_tokens(tokenizer)._replace(after=[])  # no text ends where a window does
    # By protocol sparsegpt windows have no special tokens of their own.
    own = max_seq_length if protocol == "sparsegpt" else text_length(special, max_seq_length)
    enough = None if max_windows is None else max_windows * own + MARGIN
    ids = _beginning(documents, tokenizer, enough)
    if protocol == "sparsegpt":
        ids, special = [*special.before, *ids], SpecialTokens([], [])
    needed = text_length(special, max_seq_length)
    if len(ids) < needed:
        raise CalibrationError(
            f"the evaluation text has {len(ids)} tokens, but one window of {max_seq_length} tokens needs {needed}: "
            "give more text or lower --max-seq-length"
        )
    return pack(ids, special, max_seq_length)[:max_windows]


def _beginning(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, enough: int | None) -> list[int]:
    """The tokens of the joined documents: all, or at least ``enough`` of them, of not many more documents than needed.

    The last few may be others than in the whole text, whose next document they would merge with.
    """
    rest, taken = iter(documents), list[str]()
    while True:
        count = max(len(taken), FIRST_DOCUMENTS)
        more = list(rest if enough is None else islice(rest, count))
        taken += more
        ids = list[int]()
        for piece in pieces(SEPARATOR.join(taken)):
            ids += token_ids([piece], tokenizer)[0]
            if enough is not None and len(ids) >= enough:
                return ids
        if enough is None or len(more) < count:
            return ids


def window_losses(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    tell: Callable[[int, int], None] = silent,
) -> Tensor:
    """Mean negative log-likelihood of the next tokens of each window, from float32 likelihoods.

    The hidden states of ``batch_size`` windows are in memory at once, but only ``LOGITS_BYTES`` of logits, and the few
    copies that a softmax makes of them. A model that cannot compute the logits of some positions only runs one window
    at a time with all its logits in memory, and a warning says so.

    Args:
        model: any causal language model of the library; runs in its own dtype and is left as it was, but on ``device``.
        tokens_NL: token ids, integer.
        device: where to run; None runs where the model is.
        batch_size: windows in one forward pass.
        tell: called with the number of windows that are done, and of all.

    Returns:
        loss_N: float64 on the CPU, in nats a token.

    Raises:
        CalibrationError: if the model has no embedding for a token.
        ModelError: if the model is no causal language model, or cannot read windows of this length.
        NumericalError: if the likelihood of a window is NaN or infinite.
        RecipeError: if ``batch_size`` is less than 1.
    """
    loss_N = torch.zeros(len(tokens_NL), dtype=torch.float64, device="cpu")
    with reading(model, tokens_NL, device) as reader:
        for rows, batch_BL in batches(tokens_NL, batch_size, reader):
            with reader.read(batch_BL) as logits_of:
                for start, stop in reader.slices(batch_BL):
                    loss_N[rows] += next_token_losses(logits_of(start, stop), batch_BL[:, start + 1 : stop + 1])
            check_finite(loss_N[rows], "loss", rows.start)
            tell(min(rows.stop, len(tokens_NL)), len(tokens_NL))
    return loss_N / (tokens_NL.shape[1] - 1)


def perplexity(
    model: PreTrainedModel,
    tokens_NL: Tensor,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
) -> float:
    """exp(mean of -log p(next token)), inf where that overflows; everything else as ``window_losses``."""
    return exponential(window_losses(model, tokens_NL, device=device, batch_size=batch_size).mean().item())


def exponential(loss: float) -> float:
    """Perplexity of a mean loss, inf where it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def next_token_losses(logits_BCV: Tensor, next_BC: Tensor) -> Tensor:
    """Sum of -log p(next token) over the positions of each window, (B,), float64 on the CPU."""
    loss_T = cross_entropy(logits_BCV.float().flatten(0, 1), next_BC.to(logits_BCV.device).flatten(), reduction="none")
    return loss_T.cpu().double().view(next_BC.shape).sum(dim=1)


def check_finite(sums_B: Tensor, what: str, first: int) -> None:
    """Raise ``NumericalError`` if a window's sum is NaN or infinite; ``first`` is the number of the first window."""
    for window, value in enumerate(sums_B.tolist(), first):
        if not math.isfinite(value):
            raise NumericalError(f"the {what} of window {window} is {value}: {OTHER_DTYPE}")
