"""From text to windows of tokens: tokenise documents, and pack the tokens into windows of one length.

Shapes: N windows, L tokens in each (special tokens included).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optima.errors import CalibrationError

SEPARATOR = "\n\n"
BATCH, CHARACTERS = 64, 2**16  # tokenised at once, to keep every core busy: pieces of text, and the longest of them


class SpecialTokens(NamedTuple):
    """Ids of the tokens that a tokenizer puts around a text (BOS; [CLS] and [SEP]; or none)."""

    before: list[int]
    after: list[int]


def calibration_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, max_seq_length: int
) -> Tensor:
    """Pack documents into calibration sequences.

    Documents are tokenised one by one, each followed by a blank line, and cut into consecutive windows. Every window
    carries the tokenizer's special tokens, because models treat position 0 (an attention sink) specially. Blank
    documents are left out, and reading stops soon after there are enough.

    Returns:
        tokens_NL: int64, (num_samples, max_seq_length).

    Raises:
        CalibrationError: if there is too little text.
    """
    if isinstance(documents, str):
        raise CalibrationError("documents must be a list of texts, got one text: put it in a list")
    special = special_tokens(tokenizer)
    needed = num_samples * text_length(special, max_seq_length)
    ids: list[int] = []
    for batch in _batches(documents):
        ids += chain.from_iterable(token_ids(batch, tokenizer))
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, but {num_samples} samples of {max_seq_length} tokens need "
            f"{needed}: give more text, or lower --num-calibration-samples or --max-seq-length"
        )
    return pack(ids[:needed], special, max_seq_length)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in documents:
        if not isinstance(text, str):
            raise CalibrationError(
                f"documents must be texts, got {type(text).__name__}: give token ids as a tensor of shape (samples, "
                "length)"
            )
        whole = "" if text.isspace() else text + SEPARATOR
        for begin in range(0, len(whole) if text else 0, CHARACTERS):
            batch.append(whole[begin : begin + CHARACTERS])
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The tokens that ``tokenizer`` adds around a text, found by tokenising one with and without them.

    Raises:
        CalibrationError: if the text's own tokens cannot be distinguished from the added ones.
    """
    probe = "The quick brown fox"
    (full,), (plain,) = tokenizer([probe])["input_ids"], token_ids([probe], tokenizer)
    places = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    if not plain or len(places) != 1:
        raise CalibrationError(
            f"cannot tell which special tokens the tokenizer adds: {probe!r} becomes {full}, and {plain} without "
            "special tokens; use the tokenizer that was published with the model"
        )
    return SpecialTokens(full[: places[0]], full[places[0] + len(plain) :])


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text, whole, without special tokens."""
    # verbose=False: no warning that a text is longer than the model can read; it is cut into windows later.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def text_length(special: SpecialTokens, max_seq_length: int) -> int:
    """Tokens of text that fit in one window with the special tokens.

    Raises:
        CalibrationError: if none fit.
    """
    num_special = len(special.before) + len(special.after)
    if max_seq_length <= num_special:
        raise CalibrationError(
            f"a sequence of {max_seq_length} tokens has no room for text besides the tokenizer's special tokens "
            f"({num_special}): raise --max-seq-length"
        )
    return max_seq_length - num_special


def pack(ids: Sequence[int], special: SpecialTokens, max_seq_length: int) -> Tensor:
    """Cut ``ids`` into as many consecutive full windows as there are, special tokens around each.

    Returns:
        tokens_NL: int64; what is left over at the end is dropped.
    """
    length = text_length(special, max_seq_length)
    text_NL = torch.tensor(ids, dtype=torch.int64)[: len(ids) // length * length].reshape(-1, length)
    before, after = (torch.tensor(own, dtype=torch.int64).expand(len(text_NL), -1) for own in special)
    return torch.cat([before, text_NL, after], dim=1)


def data_hash(tokens: Tensor) -> str:
    """SHA-256 of the token ids as little-endian int64, in hex: equal data, equal hash, on every machine."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()
