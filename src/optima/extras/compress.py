"""Bitmask compression: a checkpoint with a bitmask and the kept values in place of each tensor that gets smaller by it.

docs/compress.md has the format and a reader. What is kept is decided by bits: a negative zero is a value. One shard is
in memory at a time. All other files are copied; links to other places are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from optima.checkpointing import Destination
from optima.errors import ModelError
from optima.files import BITMASK, COMPRESSED, INDEX_ENDING, PLAIN, check_shards, explain_write_errors, usable_path
from optima.stopping import interruptible

VALUES, FORMAT = ".values", "optima-bitmask-1"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: Path  # the new directory
    before: int  # bytes of all shards
    after: int

    def __str__(self) -> str:
        change = self.after / max(self.before, 1)
        return f"{self.before / 1e6:,.1f} MB -> {self.after / 1e6:,.1f} MB ({change:.1%}): {self.path}"


def compress(directory: str | Path, output_dir: str | Path | None = None) -> Conversion:
    """Write a checkpoint anew, its safetensors files compressed and all other files as they are.

    Args:
        directory: a local checkpoint in safetensors format; it stays as it is.
        output_dir: the new directory, by default the name of ``directory`` with ``-compressed`` appended.

    Raises:
        ModelError: if ``directory`` has no safetensors files, damaged or compressed ones, lacks some, or has a link to
            another place, or the output cannot be written.
    """
    return _convert(directory, output_dir, PLAIN, COMPRESSED, _compress_shard)


def restore(directory: str | Path, output_dir: str | Path | None = None) -> Conversion:
    """Restore the checkpoint that ``compress`` read, bit for bit; arguments and errors as there.

    ``directory`` is what ``compress`` wrote; the default name of the new one ends in ``-restored``.
    """
    return _convert(directory, output_dir, COMPRESSED, PLAIN, _restore_shard)


def _convert(
    directory: str | Path, output_dir: str | Path | None, old: str, new: str, convert: Callable[[Path, Path], None]
) -> Conversion:
    source = usable_path(directory, "the checkpoint", "name a local directory that you may read")
    check_shards(source)
    found = sorted(file for file in source.glob(f"*{PLAIN}") if file.is_file())
    if old == PLAIN and any(file.name.endswith(COMPRESSED) for file in found):
        raise ModelError(f"{source} is compressed already: restore it with optima restore {source}")
    shards = {file: file.name.removesuffix(old) + new for file in found if file.name.endswith(old)}
    if not shards:
        raise ModelError(f"{source} holds no {old} files: name the directory of a checkpoint that has them")
    _check_links(source, shards)
    others = sorted(set(source.iterdir()) - shards.keys())
    here = Path(os.path.abspath(source))
    path = here.with_name(here.name + ("-compressed" if new == COMPRESSED else "-restored"))
    path = path if output_dir is None else Path(output_dir)
    with interruptible(), Destination.open(path) as destination:
        target = destination.directory
        with explain_write_errors(destination.path):
            for file in others:
                _copy(file, target, old, new)
            for shard, name in shards.items():
                convert(shard, target / name)
        after = sum((target / name).stat().st_size for name in shards.values())
    return Conversion(path, sum(shard.stat().st_size for shard in shards), after)


def _check_links(source: Path, shards: Collection[Path]) -> None:
    """Refuse links but of shards, to files in ``source``, and from a snapshot in the hub's cache to its blobs."""
    home = source.resolve()
    own = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in source.rglob("*"):
        aim = Path(os.path.realpath(path))  # resolve() raises where links form a loop
        if path.is_symlink() and path not in shards and not (any(map(aim.is_relative_to, own)) and aim.is_file()):
            raise ModelError(f"{path} is a link, but not to a file of the checkpoint: delete it, or copy the file")


def _copy(path: Path, target: Path, old: str, new: str) -> None:
    if path.name.endswith(old + INDEX_ENDING):  # as text, so that restoring gives its bytes
        name = path.name.removesuffix(old + INDEX_ENDING) + new + INDEX_ENDING
        (target / name).write_bytes(path.read_bytes().replace(f'{old}"'.encode(), f'{new}"'.encode()))
    elif path.is_dir():
        shutil.copytree(path, target / path.name)
    else:
        shutil.copyfile(path, target / path.name)


def _compress_shard(source: Path, target: Path) -> None:
    parts: dict[str, Tensor] = {}
    for name, tensor in _load(source).items():
        kept_N = _bits(tensor) != 0
        values = tensor.reshape(-1)[kept_N]
        bitmask = torch.from_numpy(np.packbits(kept_N.numpy(), bitorder="little"))
        smaller = bitmask.nbytes + values.nbytes < tensor.nbytes
        parts |= {name + BITMASK: bitmask, name + VALUES: values} if smaller else {name: tensor}
    whole = source.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].decode()
    save_file(parts, target, {"format": FORMAT, "header": header, "sha256": hashlib.sha256(whole).hexdigest()})


def _restore_shard(source: Path, target: Path) -> None:
    parts = _load(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{source} is not in the format {FORMAT}: restore it with the release that compressed it")
    try:
        whole = _original(metadata["header"].encode(), parts)
        intact = hashlib.sha256(whole).hexdigest() == metadata["sha256"]
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError):  # a header or parts that do not fit each other
        intact = False
    if not intact:
        raise ModelError(f"{source} is damaged, its checksum differs: fetch the file again")
    target.write_bytes(whole)


def _original(header: bytes, parts: dict[str, Tensor]) -> bytes:
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    found = [len(header).to_bytes(8, "little"), header]
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if (tensor := parts.get(name)) is None:
            values, count = _bits(parts[name + VALUES]), math.prod(entry["shape"])
            kept_N = np.unpackbits(parts[name + BITMASK].numpy(), count=count, bitorder="little").astype(bool)
            tensor = torch.zeros(count, dtype=values.dtype)
            tensor[torch.from_numpy(kept_N)] = values
        found.append(_bits(tensor).numpy().tobytes())
    return b"".join(found)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error}): fetch it again") from error


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
