"""A checkpoint packed and unpacked: its safetensors files one by one, everything else as it is. See docs/packing.md."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from optima.checkpointing import Destination
from optima.errors import ModelError
from optima.extras.bitmask import Size, pack_shard, unpack_shard
from optima.files import (
    INDEX_ENDING,
    PACKED,
    PLAIN,
    check_shards,
    explain_write_errors,
    stat_of,
    the_same,
    usable_path,
)
from optima.stopping import interruptible


def pack(directory: str | Path, output_dir: str | Path | None = None, overwrite: bool = False) -> Size:
    """Write a checkpoint anew, its safetensors files packed and all other files as they are.

    Args:
        directory: a local checkpoint in safetensors format; it is left as it is.
        output_dir: the new directory, by default called like ``directory`` with ``-packed`` behind.
        overwrite: replace an earlier output.

    Raises:
        ModelError: if ``directory`` holds no safetensors files, damaged or packed ones, or lacks some, or the output
            cannot be written.
    """
    source = usable_path(directory, "the checkpoint", "name a local directory that you may read")
    before = stat_of(source)
    if packed := _shards(source, PACKED):
        raise ModelError(f"{packed[0]} is packed already: unpack it with optima unpack {source}")
    if not (shards := _shards(source, PLAIN)):
        raise ModelError(f"{source} holds no {PLAIN} files: name the local directory of a checkpoint in this format")
    check_shards(source)
    with _beside(source, "-packed", output_dir, overwrite) as new, the_same(source, before):
        _copy_rest(source, new, PLAIN, PACKED)
        sizes = [pack_shard(shard, new / _renamed(shard.name, PLAIN, PACKED)) for shard in shards]
    return sum(sizes, Size())


def unpack(directory: str | Path, output_dir: str | Path | None = None, overwrite: bool = False) -> int:
    """Restore what ``pack`` was given, bit for bit; returns the bytes of the shards.

    Args:
        directory: what ``pack`` wrote; it is left as it is.
        output_dir: the new directory, by default called like ``directory`` with ``-unpacked`` behind.
        overwrite: replace an earlier output.

    Raises:
        ModelError: if ``directory`` holds no packed files, or damaged ones, or lacks some, or
            the output cannot be written.
    """
    source = usable_path(directory, "the checkpoint", "name a local directory that you may read")
    before = stat_of(source)
    if not (shards := _shards(source, PACKED)):
        raise ModelError(f"{source} holds no {PACKED} files: name a directory that optima pack wrote")
    check_shards(source)
    with _beside(source, "-unpacked", output_dir, overwrite) as new, the_same(source, before):
        _copy_rest(source, new, PACKED, PLAIN)
        size = sum(unpack_shard(shard, new / _renamed(shard.name, PACKED, PLAIN)) for shard in shards)
        for index in new.glob(f"*{PLAIN}{INDEX_ENDING}"):
            for name, file in json.loads(index.read_bytes())["weight_map"].items():
                with safe_open(new / file, framework="pt") as tensors:
                    if name not in tensors.keys():  # noqa: SIM118
                        raise ModelError(f"{source}: {name} is not in {file}, where the index has it: fetch it again")
    return size


def _shards(directory: Path, ending: str) -> list[Path]:
    found = (file for file in sorted(directory.glob(f"*{ending}")) if file.is_file())
    return [file for file in found if ending == PACKED or not file.name.endswith(PACKED)]


def _renamed(name: str, old: str, new: str) -> str:
    return name.removesuffix(old) + new


def place_for(directory: str | Path, output_dir: str | Path | None, suffix: str) -> Path:
    """Where it goes: ``output_dir``, or next to ``directory``, with ``suffix`` appended to its name."""
    if output_dir is not None:
        return Path(output_dir)
    here = Path(os.path.abspath(os.path.expanduser(directory)))
    return here.with_name(here.name + suffix)


@contextmanager
def _beside(source: Path, suffix: str, output: str | Path | None, overwrite: bool) -> Iterator[Path]:
    """The directory that takes the output's name when the context ends without an error."""
    path, source = place_for(source, output, suffix), source.resolve()
    if bad := next((path for path in sorted(source.rglob("*")) if not os.access(path, os.R_OK)), None):
        raise ModelError(f"{bad} cannot be read: see its permissions, or where its link leads")
    with interruptible(), Destination.open(path, overwrite, [source]) as destination:
        if destination.path.is_relative_to(source):
            raise ModelError(f"{destination.path} is inside {source}, which is read: choose another --output-dir")
        with explain_write_errors(destination.path):
            yield destination.directory


def _copy_rest(source: Path, target: Path, old: str, new: str) -> None:
    """Everything but the shards; an index with the new names of its files."""
    shards = set(_shards(source, old))
    for path in sorted(source.iterdir()):
        if path in shards:
            continue
        if path.is_symlink() and not {"blobs", source.name} & set(path.resolve().parts[:-1]):
            raise ModelError(f"{path} is a link out of the checkpoint: replace it by the file itself, or remove it")
        if path.name.endswith(old + INDEX_ENDING):
            # As text, so that unpacking restores its bytes.
            text = path.read_bytes().replace(f'{old}"'.encode(), f'{new}"'.encode())
            (target / _renamed(path.name, old + INDEX_ENDING, new + INDEX_ENDING)).write_bytes(text)
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
