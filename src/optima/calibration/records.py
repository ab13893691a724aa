"""Records of data sets, from the hub or from local files. Imported when there is a data set to read, for ``datasets``
takes much memory, which a run on tokens that the caller brought does not need."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from optima.models.failures import HUB_FAILURES

SHUFFLE_BUFFER = 10_000  # documents of a hub dataset in memory while it is shuffled
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of the datasets library
# What the library and reading its records raise for a bad name, network, split, configuration or file.
READ_ERRORS = (OSError, ValueError, RuntimeError, ImportError, DatasetsError, *HUB_FAILURES)


def hub_records(
    name: str, config: str | None, split: str, revision: str | None, seed: int | None
) -> tuple[Iterable[dict[str, Any]], str | None]:
    """The records of a data set of the hub, shuffled if there is a seed, and its commit if it lives there."""
    builder = load_dataset_builder(name, config, revision=revision)
    records: Iterable[dict[str, Any]] = builder.as_streaming_dataset(split=split)
    if seed is not None:
        records = records.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)  # type: ignore[attr-defined]
    # The hash of a dataset that lives on the hub is its commit.
    return records, str(builder.hash) if re.fullmatch("[0-9a-f]{40}", str(builder.hash)) else None


def file_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a local file."""
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
