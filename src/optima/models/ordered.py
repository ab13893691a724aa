"""What tells of a checkpoint that its channels are in another order: written by ``optima order``, copied by a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optima.errors import ModelError

if TYPE_CHECKING:  # optima pack, which reads these names, does not wait for torch
    from torch import nn

ORDERING_NAME = "ordering.json"
SCHEMA_VERSION = 2
_MARK = "optima_orders"  # of a model in memory, what the file would hold


def _home_of(model: nn.Module) -> Path | None:
    """The directory that a model in memory was read from, by what its configuration remembers; None if it was not."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return path if name and (path := Path(name).expanduser()).is_dir() else None


def mark_ordered(model: nn.Module, channels: list[dict[str, Any]]) -> None:
    """Let a model in memory tell that its channels are in another order than where it was read from."""
    vars(model)[_MARK] = json.loads(json.dumps(channels))


def orders_in_memory(model: nn.Module) -> Any:
    """The orders of the channels of a model in memory, by its mark or its directory; None: as it came."""
    if _MARK in vars(model):
        return vars(model)[_MARK]
    return read_orders(_home_of(model))


def write_orders(model: nn.Module, directory: Path) -> None:
    """Copy the orders of a model in memory, or write what a later run reads of them; nothing if it has its own."""
    orders, home = orders_in_memory(model), _home_of(model)
    if _MARK not in vars(model) and home is not None and orders is not None:
        shutil.copyfile(home / ORDERING_NAME, directory / ORDERING_NAME)
    elif orders is not None:
        content = json.dumps({"schema_version": SCHEMA_VERSION, "channels": orders})
        (directory / ORDERING_NAME).write_text(content, encoding="utf-8")


def read_orders(directory: Path | None) -> Any:
    """The orders of a local checkpoint's channels; None if it has its own, or is none, or all stayed where they were.

    Raises:
        ModelError: if the file is damaged.
    """
    file = None if directory is None else directory / ORDERING_NAME
    if file is None or not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["channels"] or None
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is not as optima order wrote it: copy it anew, or order the model again") from error
