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
WHITE = b" \t\r\n" + BOM


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
    found = json.loads(path.read_text(encoding="utf-8-sig"), strict=False)
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
        begin, line = 0, 1
        with self.path.open("rb") as file:
            while read := file.readline():
                values, read = _values(file, read, f"line {line}")
                for place, value in values:
                    yield begin + place, _record(value, f"line {line}")
                begin, line = begin + len(read), line + read.count(b"\n")

    def __getitem__(self, number: int) -> Record:
        place = f"the line behind {number} bytes"
        with self.path.open("rb") as file:
            file.seek(number)
            values, _ = _values(file, file.readline(), place)
        return _record(values[0][1], place)


def _values(file: BinaryIO, read: bytes, place: str) -> tuple[list[tuple[int, object]], bytes]:
    """The values of a line that was ``read``, each with the bytes before it, and of more lines until they are whole."""
    while True:
        begin = len(BOM) if read.startswith(BOM) else 0
        found: list[tuple[int, object]] = []
        try:
            text, end = read[begin:].decode("utf-8"), 0
            while (start := end + len(text[end:]) - len(text[end:].lstrip())) < len(text):
                value, end = DECODER.raw_decode(text, start)
                found.append((begin + len(text[:start].encode()), value))
            return found, read
        except json.JSONDecodeError as error:
            # As many lines again: of records over many lines each is looked at few times.
            more = b"".join(islice(file, max(read.count(b"\n"), 1))) if error.pos >= len(text.rstrip()) else b""
            if not more:
                raise ValueError(f"{place}: {error}") from error
            read += more
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: {error}") from error


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
