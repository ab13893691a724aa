"""Documents of hub datasets and of local files, read by the ``datasets`` library.

That library is imported where it is used: it takes seconds, which a run on token ids does not need.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from optima.data.text import special_tokens
from optima.errors import CalibrationError
from optima.models.load import HUB_FAILURES

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 10_000  # documents of a hub dataset in memory while it is shuffled
CONFIGS = {"allenai/c4": "en"}  # of datasets with several configurations and no default


@dataclass(frozen=True)
class Documents:
    """Documents, read as they are iterated over, once.

    Attributes:
        texts: the documents, empty ones included.
        revision: commit of the hub dataset, if there is exactly one dataset and it is on the hub.
    """

    texts: Iterator[str]
    revision: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self.texts


def load_documents(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    split: str = "train",
    seed: int | None = None,
) -> Documents:
    """Open datasets and return their documents.

    The text is in the column ``text``, or a chat (a list of messages with ``role`` and ``content``) in ``messages``.
    Records with neither are left out. A ``.txt`` file is one document.

    Args:
        names: local files (``.txt``, ``.jsonl``, ``.json``, ``.parquet``), local directories of files in the hub's
            layout, or hub ids as ``owner/name``, ``owner/name:config``, ``owner/name@revision`` or
            ``owner/name:config@revision``.
        tokenizer: its chat template turns chats into text.
        split: of hub datasets and directories; files have none.
        seed: None reads the datasets in order. Otherwise the records of all files are shuffled together, each hub
            dataset is shuffled through a buffer of 10,000 records, and files and hub datasets alternate. Files are
            held in memory then.

    Raises:
        CalibrationError: if a dataset cannot be read or has no text; while iterating, too.
    """
    opened = {name: _open(name, split) for name in names}
    revision = next(iter(opened.values()))[1] if len(opened) == 1 else None
    if seed is None:
        return Documents(
            chain.from_iterable(
                _texts(name, _values(name, records), tokenizer) for name, (records, _) in opened.items()
            ),
            revision,
        )
    local = [(name, value) for name in opened if is_file(name) for value in _values(name, opened[name][0])]
    Random(seed).shuffle(local)
    parts: list[Iterator[str]] = [chain.from_iterable(_texts(name, [value], tokenizer) for name, value in local)]
    for name, (records, _) in opened.items():
        if not is_file(name):
            shuffled = records.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
            parts.append(_texts(name, _values(name, shuffled), tokenizer))
    return Documents((text for texts in zip_longest(*parts) for text in texts if text is not None), revision)


def _open(name: str, split: str) -> tuple[Any, str | None]:
    from datasets import load_dataset, load_dataset_builder

    with _explained(name):
        path = Path(name).expanduser()
        if not is_file(name):
            hub_id, config, revision = (str(path), None, None) if path.is_dir() else parse_hub_id(name)
            builder = load_dataset_builder(hub_id, config, revision=revision)
            commit = str(builder.hash)  # for a dataset on the hub
            return builder.as_streaming_dataset(split=split), commit if re.fullmatch("[0-9a-f]{40}", commit) else None
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(f"its suffix is none of {', '.join(BUILDERS)}")
        if not path.is_file() or not path.stat().st_size:
            raise ValueError("it is empty" if path.is_file() else "there is no such file")
        builder_name = BUILDERS[path.suffix.lower()]
        options: dict[str, Any] = {"sample_by": "document", "encoding": "utf-8-sig"} if builder_name == "text" else {}
        return load_dataset(builder_name, data_files=str(path), split="train", streaming=True, **options), None


def _values(name: str, records: Iterable[dict[str, Any]]) -> Iterator[Any]:
    found, columns = False, list[str]()
    with _explained(name):
        for record in records:
            columns = list(record)
            if not {"text", "messages"} & record.keys():
                break
            value = record.get("text")
            value = record.get("messages") if value is None else value
            if value is not None and value != []:
                found = True
                yield value
    if columns and not found:
        raise CalibrationError(
            f"dataset {name!r} has no text in the column 'text' or 'messages'. Its columns: {', '.join(columns)}. "
            "Rename the column with the text."
        )


def _texts(name: str, values: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list) and all(isinstance(message, dict) for message in value):
            yield _chat_text(name, value, tokenizer)
        else:
            raise CalibrationError(
                f"dataset {name!r} has a {type(value).__name__} where a text or a list of messages is expected"
            )


def _chat_text(name: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        raise CalibrationError(f"dataset {name!r} has chats, which need a tokenizer with a chat template")
    # Arrow gives every message all the keys that any message has.
    messages = [{key: v for key, v in message.items() if v is not None or key == "content"} for message in messages]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        raise CalibrationError(f"the chat template cannot render a chat of dataset {name!r}: {error}") from error
    # Sequences get their own BOS, unless only the template adds it.
    own_bos = tokenizer.bos_token_id in special_tokens(tokenizer).before
    return text.removeprefix(str(tokenizer.bos_token)) if own_bos else text


@contextmanager
def _explained(name: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError, pa.ArrowException, *HUB_FAILURES) as error:
        raise CalibrationError(f"cannot read dataset {name!r}: {str(error) or type(error).__name__}") from error


def is_file(name: str) -> bool:
    """Whether a dataset is a local file, by its name or because it is there."""
    with suppress(OSError):  # a text in place of a name is too long for one
        return Path(name).suffix.lower() in BUILDERS or Path(name).is_file()
    return False


def parse_hub_id(name: str) -> tuple[str, str | None, str | None]:
    """The id, the configuration and the revision in ``owner/name:config@revision``; the last two may be missing."""
    name, _, revision = name.partition("@")
    name, _, config = name.partition(":")
    return name, config or CONFIGS.get(name), revision or None
