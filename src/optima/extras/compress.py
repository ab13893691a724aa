"""A checkpoint with a bitmap and the kept values in place of each tensor that gets smaller by it, and back.

docs/packing.md has the format and a reader. What is kept is decided by bits: a negative zero is a value. A shard is
held in memory. All other files are copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from optima.checkpointing import Destination
from optima.errors import ModelError
from optima.files import (
    INDEX_ENDING,
    PACKED,
    PLAIN,
    check_shards,
    explain_write_errors,
    usable_path,
)
from optima.stopping import interruptible

BITMAP, VALUES = ".bitmap", ".values"
FORMAT = "optima-packed-2"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Size:
    """Bytes on the disk: of all shards, and of the tensors with a bitmap alone."""

    tensors: int = 0
    sparse: int = 0
    before: int = 0
    after: int = 0
    sparse_before: int = 0
    sparse_after: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        def change(before: int, after: int) -> str:
            return f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / max(before, 1):.1%})"

        sparse = f"{self.sparse} of {self.tensors} tensors got a bitmap"
        return f"{change(self.before, self.after)}\n{sparse}: {change(self.sparse_before, self.sparse_after)}"


def pack(directory: str | Path, output_dir: str | Path | None = None, overwrite: bool = False) -> Size:
    """Write a checkpoint anew, its safetensors files packed and all other files as they are.

    Args:
        directory: a local checkpoint in safetensors format; it is left as it is.
        output_dir: the new directory, by default the name of ``directory`` with ``-packed`` appended.
        overwrite: replace an earlier output.

    Raises:
        ModelError: if ``directory`` holds no safetensors files, damaged or packed ones, or lacks some, or the output
            cannot be written.
    """
    with _converted(directory, output_dir, overwrite, PLAIN, PACKED) as (shards, new):
        sizes = [_pack_shard(shard, new / (shard.name.removesuffix(PLAIN) + PACKED)) for shard in shards]
    return sum(sizes, Size())


def unpack(directory: str | Path, output_dir: str | Path | None = None, overwrite: bool = False) -> int:
    """Restore the checkpoint that ``pack`` read, bit for bit; returns the bytes of the shards.

    Args:
        directory: what ``pack`` wrote; it is left as it is.
        output_dir: the new directory, by default the name of ``directory`` with ``-unpacked`` appended.
        overwrite: replace an earlier output.

    Raises:
        ModelError: if ``directory`` holds no packed files, or damaged ones, or lacks some, or
            the output cannot be written.
    """
    with _converted(directory, output_dir, overwrite, PACKED, PLAIN) as (shards, new):
        size = sum(_unpack_shard(shard, new / (shard.name.removesuffix(PACKED) + PLAIN)) for shard in shards)
        for index in new.glob(f"*{PLAIN}{INDEX_ENDING}"):
            for name, file in json.loads(index.read_bytes())["weight_map"].items():
                with safe_open(new / file, framework="pt") as tensors:
                    if name not in tensors.keys():  # noqa: SIM118
                        raise ModelError(
                            f"{directory}: {name} is not in {file}, where the index has it: fetch it again"
                        )
    return size


def place_for(directory: str | Path, output_dir: str | Path | None, suffix: str) -> Path:
    """``output_dir``, or next to ``directory`` with ``suffix`` appended to its name."""
    here = Path(os.path.abspath(os.path.expanduser(directory)))
    return here.with_name(here.name + suffix) if output_dir is None else Path(output_dir)


@contextmanager
def _converted(
    directory: str | Path, output_dir: str | Path | None, overwrite: bool, old: str, new: str
) -> Iterator[tuple[list[Path], Path]]:
    """The shards, and a directory with all other files, which gets the output's name at the end of the context."""
    source = usable_path(directory, "the checkpoint", "name a local directory that you may read")
    path = place_for(directory, output_dir, "-packed" if new == PACKED else "-unpacked")
    packed = [file for file in sorted(source.glob(f"*{PACKED}")) if file.is_file()]
    plain = [file for file in sorted(source.glob(f"*{PLAIN}")) if file.is_file() and file not in packed]
    shards = packed if old == PACKED else plain
    if old == PLAIN and packed:
        raise ModelError(f"{packed[0]} is packed already: unpack it with optima unpack {source}")
    if not shards:
        raise ModelError(f"{source} holds no {old} files: name the directory of a checkpoint that has them")
    check_shards(source)
    source = source.resolve()
    if bad := next((file for file in sorted(source.rglob("*")) if not os.access(file, os.R_OK)), None):
        raise ModelError(f"{bad} cannot be read: see its permissions, or where its link leads")
    with interruptible(), Destination.open(path, overwrite, [source]) as destination:
        if destination.path.is_relative_to(source):
            raise ModelError(f"{destination.path} is inside {source}, which is read: choose another --output-dir")
        with explain_write_errors(destination.path):
            for file in sorted(source.iterdir()):
                if file.name not in {shard.name for shard in shards}:
                    _copy(file, destination.directory, old, new)
            yield shards, destination.directory


def _copy(path: Path, target: Path, old: str, new: str) -> None:
    if path.is_symlink() and not {"blobs", path.parent.name} & set(path.resolve().parts[:-1]):
        raise ModelError(f"{path} is a link out of the checkpoint: replace it by the file itself, or remove it")
    if path.name.endswith(old + INDEX_ENDING):  # as text, so that unpacking restores its bytes
        name = path.name.removesuffix(old + INDEX_ENDING) + new + INDEX_ENDING
        (target / name).write_bytes(path.read_bytes().replace(f'{old}"'.encode(), f'{new}"'.encode()))
    elif path.is_dir():
        shutil.copytree(path, target / path.name)
    else:
        shutil.copyfile(path, target / path.name)


def _pack_shard(source: Path, target: Path) -> Size:
    tensors = _load(source)
    if taken := sorted(tensors.keys() & {name + part for name in tensors for part in (BITMAP, VALUES)}):
        raise ModelError(f"{source}: {taken[0]} is called like a part of a packed tensor: rename it")
    parts: dict[str, Tensor] = {}
    sparse = before = after = 0
    for name, tensor in tensors.items():
        kept_N = _bits(tensor) != 0
        values = tensor.reshape(-1)[kept_N]
        bitmap = torch.from_numpy(np.packbits(kept_N.numpy(), bitorder="little"))
        if bitmap.nbytes + values.nbytes < tensor.nbytes:
            parts |= {name + BITMAP: bitmap, name + VALUES: values}
            sparse, before, after = sparse + 1, before + tensor.nbytes, after + bitmap.nbytes + values.nbytes
        else:
            parts[name] = tensor
    whole = source.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].decode()
    save_file(parts, target, {"format": FORMAT, "header": header, "sha256": hashlib.sha256(whole).hexdigest()})
    return Size(len(tensors), sparse, len(whole), target.stat().st_size, before, after)


def _unpack_shard(shard: Path, target: Path) -> int:
    parts = _load(shard)
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{shard} is not in the format {FORMAT}: unpack it with the release of optima that packed it")
    try:
        whole = _original(metadata["header"].encode(), parts)
        intact = hashlib.sha256(whole).hexdigest() == metadata["sha256"]
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError):  # a header or parts that do not fit each other
        intact = False
    if not intact:
        raise ModelError(f"{shard} is damaged, its checksum differs: fetch the file again")
    return target.write_bytes(whole)


def _original(header: bytes, parts: dict[str, Tensor]) -> bytes:
    """The bytes of the file that has this header."""
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    found = [len(header).to_bytes(8, "little"), header]
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if (tensor := parts.get(name)) is None:
            values = parts[name + VALUES]
            count = int(np.prod(entry["shape"]))
            kept_N = np.unpackbits(parts[name + BITMAP].numpy(), count=count, bitorder="little").astype(bool)
            tensor = torch.zeros(count, dtype=_bits(values).dtype)
            tensor[torch.from_numpy(kept_N)] = _bits(values)
        found.append(_bits(tensor).numpy().tobytes())
    return b"".join(found)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file} is no whole safetensors file ({error}): fetch it again") from error


def _bits(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as integers, (N,)."""
    return tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
