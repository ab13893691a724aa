"""From text to windows of tokens: read documents, tokenise them, pack the tokens into windows of one length.

Shapes: N windows, L tokens in each (special tokens included).
"""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain, zip_longest
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from optima.calibration.chats import BAD_CHAT, as_text
from optima.errors import CalibrationError, RecipeError
from optima.options import CONFIGS, OF_HUB

if TYPE_CHECKING:
    from optima.calibration.records import LocalRecords

SEPARATOR = "\n\n"
TEXT_COLUMN, CHAT_COLUMN = "text", "messages"
NO_COLUMN = "{} has no column {!r} with text: name one of its columns with --text-column: {}"
# Tokenised at once: so many documents keep every core busy; so many characters take about a gigabyte.
BATCH_DOCUMENTS, MOST_AT_ONCE = 64, 2**22
FILES = (".txt", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        dataset: hub ids (``allenai/c4``) or local files. A ``.txt`` file is one document, ``.jsonl``, ``.json`` and
            ``.parquet`` files hold one per record.
        config: configuration of a hub dataset (``en``). Local files have none.
        split: split of a hub dataset. Local files have none and are read whole.
        text_column: the column that holds the text, or a chat: a list of messages, each with a role and its content.
            Records without it may have a chat in a column ``messages``.
        revision: commit, tag or branch of a hub dataset; None for its newest.
    """

    dataset: tuple[str, ...]
    config: str | None = None
    split: str = "train"
    text_column: str = TEXT_COLUMN
    revision: str | None = None


class SpecialTokens(NamedTuple):
    """Ids of the tokens that a tokenizer puts around a text (BOS; [CLS] and [SEP]; or none)."""

    before: list[int]
    after: list[int]


class Documents:
    """The documents of a source, read as they are asked for and no more of a hub dataset than that.

    Args:
        source: where to read.
        seed: None reads the datasets one after the other in their own order. Otherwise the documents of all local
            files are shuffled together, each hub dataset is shuffled through a buffer, and they take turns.
        tokenizer: whose template turns chats into text; without one they are refused.

    Attributes:
        skipped: records read so far that have nothing in the text column.
        revision: commit of the hub dataset; None until it is read, for several of them and for local files.

    Raises:
        CalibrationError: while iterating, if a dataset, split, configuration or column cannot be read, or if no
            record of a file has text; when made, if a file is a device, a pipe or a directory.
    """

    def __init__(
        self, source: TextSource, seed: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        source = replace(source, dataset=tuple(map(os.path.expanduser, source.dataset)))  # a recipe's, not a shell's
        for name in source.dataset:
            _check_regular(name)
        self.skipped = 0
        self.revision: str | None = None
        self._known = source.text_column == TEXT_COLUMN  # whether a record has the column
        self._source = source
        self._seed = seed
        self._tokenizer = tokenizer
        self._special: SpecialTokens | None = None  # found once

    def __iter__(self) -> Iterator[str]:
        """Documents, empty ones included."""
        source, seed = self._source, self._seed
        self._look_for_column()
        if seed is None:
            for name in source.dataset:
                yield from self._read(name)
            return
        documents = self._shuffled([name for name in source.dataset if is_file(name)], Random(seed))
        streams = [self._read(name) for name in source.dataset if not is_file(name)]
        for turn in zip_longest(documents, *streams):
            yield from (text for text in turn if text is not None)

    def _read(self, name: str) -> Iterator[str]:
        """The documents of one dataset; local files in their own order."""
        from optima.calibration.records import hub_records

        source, records = self._source, self._records(name)
        with self._explained(name):
            if records is not None:
                yield from (self._text(value, name) for _, value in self._values(records, name))
                return
            config = source.config or CONFIGS.get(name)
            found, revision = hub_records(name, config, source.split, source.revision, self._seed)
            if len(source.dataset) == 1:
                self.revision = revision
            yield from (self._text(value, name) for _, value in self._values(enumerate(found), name))

    def _shuffled(self, names: Sequence[str], random: Random) -> Iterator[str]:
        """The documents of local files, together: where they begin is kept, and each is read again."""
        found, places = [], []
        for name in names:
            records = self._records(name)
            assert records is not None
            with self._explained(name):
                places.append(array("q", (number for number, _ in self._values(records, name))))
            found.append((name, records))
        ends = list(accumulate(map(len, places)))
        order = array("q", range(ends[-1] if ends else 0))
        random.shuffle(order)
        for number in order:
            file = bisect_right(ends, number)
            name, records = found[file]
            with self._explained(name):
                text = self._text(self._value(records[places[file][number - ends[file]]], name), name)
            yield text

    def _records(self, name: str) -> LocalRecords | None:
        """Of a local file; None of a dataset of the hub."""
        from optima.calibration.records import file_records

        with self._explained(name):
            return file_records(Path(name), (self._source.text_column, CHAT_COLUMN)) if is_file(name) else None

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn a failure to read into an error that names the dataset."""
        from optima.calibration.records import READ_ERRORS

        source = self._source
        config = source.config or CONFIGS.get(name)
        try:
            yield
        except READ_ERRORS as error:
            place = "" if is_file(name) else f" (config {config}, split {source.split})"
            remedy = "the file" if is_file(name) else "its name, --dataset-config and --split, and the network"
            known = "/".join(FILES)
            raise CalibrationError(
                f"dataset {name!r}{place} cannot be read: {error}: check {remedy}, or give a local {known} file"
            ) from error

    def _values(self, records: Iterable[tuple[int, dict[str, Any]]], name: str) -> Iterator[tuple[int, Any]]:
        """The number of each record and its text or chat; one without is skipped and counted."""
        column, hub = self._source.text_column, [each for each in self._source.dataset if not is_file(each)]
        found, last = False, ""
        for number, record in records:
            last = ", ".join(record) or last
            # All records of a hub dataset have the same columns.
            if name in hub and not {column, CHAT_COLUMN} & record.keys():
                break
            if hub == [name] and not self._known and column not in record:
                break
            value = self._value(record, name)
            if value is not None:
                found = True
                yield number, value
            else:
                self.skipped += 1
        if last and not found:
            raise CalibrationError(NO_COLUMN.format(f"dataset {name!r}", column, last))

    def _look_for_column(self) -> None:
        """Refuse a column that no record has, even if they have chats: its name may be misspelt."""
        column, last = self._source.text_column, ""
        local = [name for name in self._source.dataset if is_file(name) and Path(name).suffix != ".txt"]
        for name in local if not self._known else []:
            with self._explained(name):
                for _, record in self._records(name) or ():
                    if column in record:
                        self._known = True
                        return
                    last = ", ".join(record) or last
        if last and not self._known and all(map(is_file, self._source.dataset)):
            name = ", ".join(map(repr, self._source.dataset))
            raise CalibrationError(NO_COLUMN.format(f"dataset {name}", column, last))

    def _value(self, record: dict[str, Any], name: str) -> Any:
        """A record's text, or its chat; None if it has neither."""
        column = self._source.text_column
        value = record.get(column)
        value = record.get(CHAT_COLUMN) if value is None else value
        if value is None or value == []:  # a chat without messages
            return None
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            return value
        raise CalibrationError(
            f"column {column!r} of dataset {name!r} holds {type(value).__name__}, not text: name one of its columns "
            f"with --text-column: {', '.join(record)}"
        )

    def _text(self, value: Any, name: str) -> str:
        text = value if isinstance(value, str) else self._chat(value, name)
        return text.encode("utf-8", "replace").decode("utf-8")  # half of a pair that is one letter in UTF-16

    def _chat(self, messages: list[dict[str, Any]], name: str) -> str:
        """A chat as the model reads it."""
        template = None if self._tokenizer is None else self._tokenizer.chat_template
        if self._tokenizer is None or template is None:
            raise CalibrationError(
                f"dataset {name!r} holds chats, which take a chat template, and this tokenizer "
                f"({type(self._tokenizer).__name__}) has none: use one that has, or name a column of text with "
                "--text-column"
            )
        if odd := next((each for each in messages if not _is_message(each)), None):
            raise CalibrationError(
                f"a chat of dataset {name!r} has a message of {', '.join(odd)}: each needs a role and a content; "
                "rename its keys, or name a column of text with --text-column"
            )
        # Arrow gives each message of a column all the keys that any of them has.
        messages = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]
        try:
            text = as_text(self._tokenizer, messages)
        except BAD_CHAT as error:
            raise CalibrationError(
                f"a chat of dataset {name!r} does not fit the model's chat template: {error}: each message must have a "
                "role that it knows, and a content"
            ) from error
        # Unless the template alone brings it, every window has its own.
        self._special = self._special or special_tokens(self._tokenizer)
        own = self._tokenizer.bos_token_id in self._special.before
        return text.removeprefix(self._tokenizer.bos_token or "") if own else text


def _is_message(message: Mapping[str, Any]) -> bool:
    return "role" in message and bool({"content", "tool_calls"} & message.keys())


def calibration_tokens(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    max_seq_length: int,
    fewer: bool = False,
) -> Tensor:
    """Pack documents into calibration sequences.

    Documents are tokenised one by one, each followed by a blank line, and cut into consecutive windows. Every window
    carries the tokenizer's special tokens, because models treat position 0 (an attention sink) specially. Blank
    documents are left out, and reading stops soon after there are enough. ``fewer``: or as many as there are.

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
    texts = (text + SEPARATOR for text in map(_text, documents) if text.strip())
    for batch in _batches(texts):
        ids += chain.from_iterable(token_ids(batch, tokenizer))
        if len(ids) >= needed:
            break
    if len(ids) < needed and not fewer:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, but {num_samples} samples of {max_seq_length} tokens need "
            f"{needed}: give more text, or lower --num-calibration-samples or --max-seq-length"
        )
    return pack(ids[:needed], special, max_seq_length)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts that are tokenised at once; one that is long is cut behind ends of lines, for tokens take memory."""
    batch: list[str] = []
    for text in texts:
        for piece in pieces(text):
            batch.append(piece)
            if len(batch) == BATCH_DOCUMENTS or sum(map(len, batch)) >= MOST_AT_ONCE:
                yield batch
                batch = []
    if batch:
        yield batch


def pieces(text: str) -> Iterator[str]:
    """The text, in pieces that end with a line if it is long: tokens at a cut may be others than in the whole."""
    begin = 0
    while len(text) - begin > MOST_AT_ONCE:
        end = text.rfind("\n", begin, begin + MOST_AT_ONCE) + 1 or begin + MOST_AT_ONCE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _text(document: object) -> str:
    if not isinstance(document, str):
        raise CalibrationError(
            f"documents must be texts, got {type(document).__name__}: give token ids as a tensor of shape (samples, "
            "length)"
        )
    return document


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


def _check_regular(name: str) -> None:
    """Refuse what would be read for ever (also through a link) and a folder with the name of a file."""
    path = Path(name)
    folder = path.is_dir() and path.suffix not in FILES  # it may be laid out as hub datasets are
    if path.exists() and not path.is_file() and not folder:
        raise CalibrationError(f"dataset {name!r} is no regular file: give a file of text ({'/'.join(FILES)})")


def check_of_hub(settings: object, names: Sequence[str]) -> None:
    """Raise ``RecipeError`` if ``settings`` choose parts of data sets of the hub, and ``names`` are none of them."""
    said = any(getattr(settings, name) != getattr(type(settings), name) for name in OF_HUB)
    if said and all(map(is_file, names)):
        raise RecipeError(
            "--dataset-config, --split and --dataset-revision are for data sets of the hub: leave them out"
        )


def is_file(name: str) -> bool:
    """Whether a data set is a local file, by its name or because it is there."""
    return Path(name).suffix in FILES or Path(name).is_file()
