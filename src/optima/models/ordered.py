"""What tells of a checkpoint that its channels are in another order: written by ``optima order``, copied by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optima.errors import ModelError

ORDERING_NAME = "ordering.json"


def home_of(name: str | None) -> Path | None:
    """The directory that a model in memory was read from, by what its configuration remembers; None if it was not."""
    return path if name and (path := Path(name).expanduser()).is_dir() else None


def read_orders(directory: Path | None) -> Any:
    """The orders of a local checkpoint's channels; None if it has its own, or is none.

    Raises:
        ModelError: if the file is damaged.
    """
    file = None if directory is None else directory / ORDERING_NAME
    if file is None or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["channels"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is not as optima order wrote it: copy it anew, or order the model again") from error
