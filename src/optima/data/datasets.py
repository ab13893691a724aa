"""Documents of data sets: of the hub, or of local files, whose chats a template makes text of."""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from optima.data.chats import BAD_CHAT, as_text
from optima.data.text import SpecialTokens, special_tokens
from optima.errors import CalibrationError
from optima.models.files import usable_path
from optima.options import CONFIGS, FILES, is_file
from optima.values import shown

if TYPE_CHECKING:
    from optima.data.records import LocalRecords

SURROGATE = re.compile("[\ud800-\udfff]")
TEXT_COLUMN, CHAT_COLUMN = "text", "messages"
NO_COLUMN = "{} has no column {!r} with text: name one of its columns with --text-column: {}"


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
        with self._explained(name):
            records = self._local(name) if is_file(name) else self._of_hub(name)
            yield from (self._text(value, name) for _, value in self._values(records, name))

    def _shuffled(self, names: Sequence[str], random: Random) -> Iterator[str]:
        """The documents of local files, together: where they begin is kept, and each is read again."""
        found, places = [], []
        for name in names:
            with self._explained(name):
                records = self._local(name)
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

    def _local(self, name: str) -> LocalRecords:
        from optima.data.records import file_records

        return file_records(Path(name), (self._source.text_column, CHAT_COLUMN))

    def _of_hub(self, name: str) -> Iterable[tuple[int, dict[str, Any]]]:
        from optima.data.records import hub_records

        source = self._source
        found, revision = hub_records(name, self._config(name), source.split, source.revision, self._seed)
        if len(source.dataset) == 1:
            self.revision = revision
        return enumerate(found)

    def _config(self, name: str) -> str | None:
        return self._source.config or CONFIGS.get(name)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn a failure to read into an error that names the dataset."""
        from optima.data.records import READ_ERRORS

        try:
            yield
        except READ_ERRORS as error:
            place = "" if is_file(name) else f" (config {self._config(name)}, split {self._source.split})"
            remedy = "the file" if is_file(name) else "its name, --dataset-config and --split, and the network"
            known = "/".join(FILES)
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)  # a schema may follow
            raise CalibrationError(
                f"dataset {name!r}{place} cannot be read: {reason}: check {remedy}, or give a local {known} file"
            ) from error

    def _values(self, records: Iterable[tuple[int, dict[str, Any]]], name: str) -> Iterator[tuple[int, Any]]:
        """The number of each record and its text or chat; one without is skipped and counted."""
        column, hub = self._source.text_column, [each for each in self._source.dataset if not is_file(each)]
        found, last = False, ""
        for number, record in records:
            last = ", ".join(record) or last
            chats = CHAT_COLUMN in record and (self._known or hub != [name])
            if name in hub and column not in record and not chats:
                break  # all records of a hub dataset have the same columns
            value = self._value(record, name)
            if value is not None:
                found = True
                yield number, value
            else:
                self.skipped += 1
        if last and not found:
            if last == column:
                raise CalibrationError(f"dataset {name!r} has nothing in its column {column!r}: give one that has text")
            raise CalibrationError(NO_COLUMN.format(f"dataset {name!r}", column, last))

    def _look_for_column(self) -> None:
        """Refuse a column that no record has, even if they have chats: its name may be misspelt."""
        column, last = self._source.text_column, ""
        local = [name for name in self._source.dataset if is_file(name) and Path(name).suffix != ".txt"]
        for name in local if not self._known else []:
            with self._explained(name):
                for _, record in self._local(name):
                    if column in record:
                        self._known = True
                        return
                    last = ", ".join(record) or last
        if last and not self._known and all(map(is_file, self._source.dataset)):
            name = ", ".join(map(repr, self._source.dataset))
            raise CalibrationError(NO_COLUMN.format(f"dataset {name}", column, last))

    def _value(self, record: dict[str, Any], name: str) -> Any:
        """A record's text, or its chat; None if it has neither."""
        column, wanted = self._source.text_column, "text"
        if record.get(column) is None:
            column, wanted = CHAT_COLUMN, "a list of messages"  # a text there would be a chat, written down
        value = record.get(column)
        if value is None or value == []:  # a chat without messages
            return None
        is_chat = isinstance(value, list) and all(isinstance(each, dict) for each in value)
        if is_chat or (isinstance(value, str) and wanted == "text"):
            return value
        others = ", ".join(each for each in record if each != column)
        remedy = f"name another column with --text-column: {others}" if others else "repair the record"
        raise CalibrationError(
            f"column {column!r} of dataset {name!r} holds {shown(value)} ({type(value).__name__}), not {wanted}: "
            f"{remedy}"
        )

    def _text(self, value: Any, name: str) -> str:
        text = value if isinstance(value, str) else self._chat(value, name)
        # Half of a pair that is one letter in UTF-16. A long text is looked through: a copy of it may not fit.
        return text.encode("utf-8", "replace").decode("utf-8") if SURROGATE.search(text) else text

    def _chat(self, messages: list[dict[str, Any]], name: str) -> str:
        """A chat as the model reads it."""
        template = None if self._tokenizer is None else self._tokenizer.chat_template
        if self._tokenizer is None or template is None:
            raise CalibrationError(
                f"dataset {name!r} holds chats, which take a chat template, and this tokenizer "
                f"({type(self._tokenizer).__name__}) has none: use one that has, or name a column of text with "
                "--text-column"
            )
        if (odd := next((each for each in messages if not _is_message(each)), None)) is not None:
            raise CalibrationError(
                f"a chat of dataset {name!r} has a message of {', '.join(odd) or 'nothing'}: each needs a role and a "
                "content; rename its keys, or name a column of text with --text-column"
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


def _check_regular(name: str) -> None:
    """Refuse what would be read for ever (also through a link) and a folder with the name of a file."""
    path = usable_path(name, "dataset", f"give a file of text ({'/'.join(FILES)}) that may be read, or a hub id")
    folder = path.is_dir() and path.suffix not in FILES  # it may be laid out as hub datasets are
    if path.exists() and not path.is_file() and not folder:
        raise CalibrationError(f"dataset {name!r} is no regular file: give a file of text ({'/'.join(FILES)})")
