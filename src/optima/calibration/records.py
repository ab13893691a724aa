"""Records of data sets, from the hub or from local files. Imported when there is a data set to read, for ``datasets``
takes much memory, which a run on tokens that the caller brought does not need."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset_builder
from datasets.exceptions import DatasetsError

from optima.models.failures import HUB_FAILURES

SHUFFLE_BUFFER = 10_000  # documents of a hub dataset in memory while it is shuffled
# What reading records raises for a bad name, network, split, configuration or file; TypeError: columns of the hub whose
# later records have other types.
READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    ImportError,
    DatasetsError,
    pa.ArrowException,
    *HUB_FAILURES,
)
Record = dict[str, Any]
DECODER = json.JSONDecoder(strict=False)  # control characters inside texts are the text's
WHITE = b" \t\r\n\xef\xbb\xbf"  # and a byte order mark


class LocalRecords(Protocol):
    """The records of a local file, each with a number by which it is read again; no more is held than has to be."""

    def __iter__(self) -> Iterator[tuple[int, Record]]: ...

    def __getitem__(self, number: int) -> Record: ...


def hub_records(
    name: str, config: str | None, split: str, revision: str | None, seed: int | None
) -> tuple[Iterable[Record], str | None]:
    """The records of a data set of the hub, shuffled if there is a seed, and its commit if it lives there."""
    builder = load_dataset_builder(name, config, revision=revision)
    records: Iterable[Record] = builder.as_streaming_dataset(split=split)
    if seed is not None:
        records = records.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)  # type: ignore[attr-defined]
    # The hash of a dataset that lives on the hub is its commit.
    return records, str(builder.hash) if re.fullmatch("[0-9a-f]{40}", str(builder.hash)) else None


def file_records(path: Path, columns: Sequence[str]) -> LocalRecords:
    """The records of a local file; of a ``.txt`` file one, with its text in the first of the ``columns``.

    Args:
        path: of the file.
        columns: that are wanted. Of other columns records may have any, of any types.
    """
    if path.suffix == ".txt":
        return Held([{columns[0]: path.read_text(encoding="utf-8-sig")}])
    if path.suffix == ".parquet":
        return Parquet(path, columns)
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"files of type {path.suffix!r} are not supported")
    with path.open("rb") as file:
        first = next((line for line in file if line.strip(WHITE)), b"").strip(WHITE)
    return JsonLines(path) if _is_whole(first) else Held(_every(path.read_text(encoding="utf-8-sig")))


def _is_whole(line: bytes) -> bool:
    """Whether a first line holds a record: the file is then one of lines, not a list or records over several lines."""
    try:
        return not line or isinstance(DECODER.decode(line.decode("utf-8")), dict)
    except json.JSONDecodeError:
        return False


def _every(text: str) -> list[Record]:
    """The records of a list, or one after another."""
    found: list[object] = []
    text, place = text.strip(), 0
    while place < len(text):
        value, place = DECODER.raw_decode(text, place)
        found += value if isinstance(value, list) else [value]
        while text[place : place + 1].isspace():
            place += 1
    return [_record(each, f"record {number}") for number, each in enumerate(found, 1)]


def _record(value: object, place: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{place} holds a {type(value).__name__}, not an object with columns")
    return value


@dataclass(frozen=True)
class Held:
    """Records in memory, numbered."""

    records: Sequence[Record]

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        return iter(enumerate(self.records))

    def __getitem__(self, number: int) -> Record:
        return self.records[number]


@dataclass(frozen=True)
class JsonLines:
    """A record a line. Their numbers are where lines begin."""

    path: Path

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        begin = 0
        with self.path.open("rb") as file:
            for number, line in zip(count(1), file, strict=False):
                if line.strip(WHITE):
                    yield begin, self._read(line, f"line {number}")
                begin += len(line)

    def __getitem__(self, number: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(number)
            return self._read(file.readline(), f"the line at byte {number}")

    def _read(self, line: bytes, place: str) -> Record:
        try:
            value = DECODER.decode(line.decode("utf-8-sig").strip())
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        return _record(value, place)


@dataclass(frozen=True)
class Parquet:
    """A record a row; of the columns that are wanted, and the names of all."""

    path: Path
    columns: Sequence[str]

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        numbers = count()
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=self._wanted):
                for row in batch.to_pylist():
                    yield next(numbers), self._empty | row

    def __getitem__(self, number: int) -> Record:
        row: Record = self._table.slice(number, 1).to_pylist()[0]
        return self._empty | row

    @cached_property
    def _empty(self) -> Record:
        return dict.fromkeys(pq.read_schema(self.path).names)

    @property
    def _wanted(self) -> list[str]:
        return [column for column in self.columns if column in self._empty]

    @cached_property
    def _table(self) -> pa.Table:
        return pq.read_table(self.path, columns=self._wanted)
