"""From text to windows of tokens: read documents, tokenise them, pack the tokens into windows of one length.

Shapes: N windows, L tokens in each (special tokens included).
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optima.errors import CalibrationError

SEPARATOR = "\n\n"
SHUFFLE_BUFFER = 10_000  # documents of a hub dataset in memory while it is shuffled
BATCH_CHARACTERS = 1_000_000  # text tokenised at once: enough to keep every core busy
LOADERS = {".txt": None, ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of the datasets library
# What load_dataset and reading its records raise for a bad name, network, split, configuration or file.
READ_ERRORS = (OSError, ValueError, RuntimeError, ImportError, DatasetsError)


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        dataset: hub ids (``allenai/c4``) or local files. A ``.txt`` file is one document, ``.jsonl``, ``.json`` and
            ``.parquet`` files hold one per record.
        config: configuration of a hub dataset (``en``). Local files have none.
        split: split of a hub dataset. Local files have none and are read whole.
        text_column: the column that holds the text; a null in it is an empty document.
    """

    dataset: tuple[str, ...]
    config: str | None = None
    split: str = "train"
    text_column: str = "text"


class SpecialTokens(NamedTuple):
    """Ids of the tokens that a tokenizer puts around a text (BOS; [CLS] and [SEP]; or none)."""

    before: list[int]
    after: list[int]


def load_documents(source: TextSource, limit: int | None = None, seed: int | None = None) -> list[str]:
    """The first ``limit`` documents of ``read_documents``, all if None."""
    return list(islice(read_documents(source, seed), limit))


def read_documents(source: TextSource, seed: int | None = None) -> Iterator[str]:
    """Read documents, no more of a hub dataset than is asked for.

    Args:
        source: where to read.
        seed: None reads the datasets one after the other in their own order. Otherwise the documents of all local
            files are shuffled together, each hub dataset is shuffled through a buffer, and they take turns.

    Yields:
        Documents, empty ones included.

    Raises:
        CalibrationError: if a dataset, split, configuration or column cannot be read (when its turn comes).
    """
    if seed is None:
        for name in source.dataset:
            yield from _read_dataset(name, source)
        return
    documents = [text for name in source.dataset if _is_file(name) for text in _read_dataset(name, source)]
    Random(seed).shuffle(documents)
    streams = [_read_dataset(name, source, seed) for name in source.dataset if not _is_file(name)]
    for turn in zip_longest(documents, *streams):
        yield from (text for text in turn if text is not None)


def calibration_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_samples: int, max_seq_length: int
) -> Tensor:
    """Pack documents into calibration sequences.

    Documents are tokenised one by one, each followed by a blank line, and cut into consecutive windows. Every window
    carries the tokenizer's special tokens, because models treat position 0 (an attention sink) specially. Blank
    documents are left out, and no more are read than needed.

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
    for batch in _batches(text for text in documents if text.strip()):
        for document_ids in token_ids([text + SEPARATOR for text in batch], tokenizer):
            ids += document_ids
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, but {num_samples} samples of {max_seq_length} tokens need "
            f"{needed}: give more text, or lower --num-calibration-samples or --max-seq-length"
        )
    return pack(ids[:needed], special, max_seq_length)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The tokens that ``tokenizer`` adds around a text, found by tokenising one with and without them.

    Raises:
        CalibrationError: if the text's own tokens cannot be told from the added ones.
    """
    probe = "The quick brown fox"
    (full,), (plain,) = tokenizer([probe])["input_ids"], token_ids([probe], tokenizer)
    places = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    if not plain or len(places) != 1:
        raise CalibrationError(
            f"cannot tell which special tokens the tokenizer adds: it reads {probe!r} as {full}, and as {plain} "
            "without special tokens; use the tokenizer that was published with the model"
        )
    return SpecialTokens(full[: places[0]], full[places[0] + len(plain) :])


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text, whole, without special tokens."""
    # verbose=False: no warning that a text is longer than the model can read; it is cut into windows later.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def text_length(special: SpecialTokens, max_seq_length: int) -> int:
    """Tokens of text that fit in one window beside the special tokens.

    Raises:
        CalibrationError: if none fit.
    """
    num_special = len(special.before) + len(special.after)
    if max_seq_length <= num_special:
        raise CalibrationError(
            f"a sequence of {max_seq_length} tokens has no room for text beside the tokenizer's special tokens "
            f"({num_special}): raise --max-seq-length"
        )
    return max_seq_length - num_special


def pack(ids: Sequence[int], special: SpecialTokens, max_seq_length: int) -> Tensor:
    """Cut ``ids`` into as many consecutive full windows as there are, special tokens around each.

    Returns:
        tokens_NL: int64; what is left over at the end is dropped.
    """
    length = text_length(special, max_seq_length)
    num_windows = len(ids) // length
    text = torch.tensor(ids[: num_windows * length], dtype=torch.int64).reshape(num_windows, length)
    before = torch.tensor(special.before, dtype=torch.int64).expand(num_windows, -1)
    after = torch.tensor(special.after, dtype=torch.int64).expand(num_windows, -1)
    return torch.cat([before, text, after], dim=1)


def data_hash(tokens: Tensor) -> str:
    """SHA-256 of the token ids as little-endian int64, in hex: equal data, equal hash, on every machine."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive documents, about ``BATCH_CHARACTERS`` at a time."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_file(name: str) -> bool:
    return Path(name).suffix in LOADERS or Path(name).is_file()


def _read_dataset(name: str, source: TextSource, seed: int | None = None) -> Iterator[str]:
    """The documents of one dataset; ``seed`` shuffles a hub dataset, local files are shuffled by the caller."""
    try:
        if not _is_file(name):
            yield from _texts(_hub_records(name, source, seed), name, source.text_column)
        elif Path(name).suffix == ".txt":
            yield Path(name).read_text(encoding="utf-8-sig")
        else:
            yield from _texts(_file_records(Path(name)), name, source.text_column)
    except READ_ERRORS as error:
        place = "" if _is_file(name) else f" (config {source.config}, split {source.split})"
        remedy = "the file" if _is_file(name) else "its name, --dataset-config and --split, and the network"
        raise CalibrationError(
            f"dataset {name!r}{place} cannot be read: {error}: check {remedy}, or give a local {'/'.join(LOADERS)} file"
        ) from error


def _hub_records(name: str, source: TextSource, seed: int | None) -> Iterable[dict[str, Any]]:
    records = load_dataset(name, source.config, split=source.split, streaming=True)
    shuffled: Iterable[dict[str, Any]]
    shuffled = records if seed is None else records.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return shuffled


def _file_records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix not in LOADERS:
        raise ValueError(f"files of type {path.suffix!r} are not supported")
    # Streaming converts nothing to a cache; the locks that the library leaves all the same go to a temporary place.
    with tempfile.TemporaryDirectory() as cache:
        try:
            file = str(path.absolute())
            records = load_dataset(
                LOADERS[path.suffix], data_files=[file], split="train", streaming=True, cache_dir=cache
            )
        except StopIteration:  # how the library says that there is no record at all
            return
        yield from records


def _texts(records: Iterable[dict[str, Any]], name: str, column: str) -> Iterator[str]:
    for record in records:
        if column not in record:
            raise CalibrationError(
                f"dataset {name!r} has no column {column!r}: name one of its columns with --text-column: "
                f"{', '.join(record)}"
            )
        text = record[column]
        if text is not None and not isinstance(text, str):
            raise CalibrationError(
                f"column {column!r} of dataset {name!r} holds {type(text).__name__}, not text: name another of its "
                f"columns with --text-column: {', '.join(record)}"
            )
        yield text or ""
