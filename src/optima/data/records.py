"""Records of data sets, from the hub or from local files. Imported when there is a data set to read, for ``datasets``
takes much memory, which a run on tokens that the caller brought does not need."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset_builder
from datasets.exceptions import DatasetsError

from optima.models.failures import HUB_FAILURES

ROWS = 256  # of a parquet file that become records at a time
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
BOM = b"\xef\xbb\xbf"
WHITE, SPACE = b" \t\r\n" + BOM, re.compile(r"\s*")


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
        first = next((line for line in file if line.strip(WHITE)), b"").lstrip(WHITE)[:1]
        if first != b"[":
            return JsonLines(path)
        file.seek(0)
        lists = [value for _, value, _ in _values(file)]
    found = [each for value in lists for each in (value if isinstance(value, list) else [value])]
    return Held([_record(each, f"record {number}") for number, each in enumerate(found, 1)])


def _record(value: object, place: str) -> Record:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{place} holds a {type(value).__name__}, not an object with columns")
    return value or {}


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
    """A record a line, or over several lines, or several on one. Their numbers are the bytes before them."""

    path: Path

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        with self.path.open("rb") as file:
            for number, value, line in _values(file):
                yield number, _record(value, f"line {line}")

    def __getitem__(self, number: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(number)
            _, value, line = next(_values(file))
        return _record(value, f"line {line} behind {number} bytes")


def _values(file: BinaryIO) -> Iterator[tuple[int, object, int]]:
    """The values from here on, each with the bytes before it and the line that ends it; no more is held than one takes.

    Of a value over many lines as many lines again are read before it is looked at once more.
    """
    rest, before, line, lines = "", file.tell(), 0, 0  # what is not whole yet, the bytes before it, and its lines
    problem: ValueError | None = None
    while new := list(islice(file, max(lines, 1))):
        if new[0].startswith(BOM) and not rest:
            new[0], before = new[0][len(BOM) :], before + len(BOM)
        line, lines, end = line + len(new), lines + len(new), 0
        try:
            rest += b"".join(new).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {line}: {error}") from error
        while (start := _behind_space(rest, end)) < len(rest):
            try:
                value, stop = DECODER.raw_decode(rest, start)
            except json.JSONDecodeError as error:
                problem = ValueError(f"line {line}: {error}")
                if error.pos < len(rest.rstrip()) and not error.msg.startswith("Unterminated string"):
                    raise problem from error
                break
            before += _bytes(rest[end:start])
            yield before, value, line
            before, end, lines = before + _bytes(rest[start:stop]), stop, 0
        before, rest = before + _bytes(rest[end:start]), rest[start:]
    if rest and problem is not None:
        raise problem


def _behind_space(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return place if found is None else found.end()


def _bytes(text: str) -> int:
    return len(text.encode())


@dataclass(frozen=True)
class Parquet:
    """A record a row; of the columns that are wanted, and the names of all. Read again, the columns are held."""

    path: Path
    columns: Sequence[str]

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        numbers = count()
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(ROWS, [group], self._wanted):
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
