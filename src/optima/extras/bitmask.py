"""Safetensors files without zeros: a bitmap and the kept values in place of each tensor that gets smaller by it.

docs/packing.md has the format and a reader. What is kept is decided by bits: a negative zero is a value. A shard is
held in memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from optima.errors import ModelError

BITMAP, VALUES = ".bitmap", ".values"
FORMAT = "optima-packed-2"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Size:
    """Bytes on the disk, unpacked and packed.

    Attributes:
        tensors: how many there are.
        sparse: how many of them have a bitmap.
        before: the unpacked shards.
        after: the packed shards.
        sparse_before: the tensors with a bitmap alone, unpacked.
        sparse_after: the same, packed.
    """

    tensors: int = 0
    sparse: int = 0
    before: int = 0
    after: int = 0
    sparse_before: int = 0
    sparse_after: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        """For people."""

        def change(before: int, after: int) -> str:
            return f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / max(before, 1):.1%})"

        pruned = (
            f"{self.sparse} of {self.tensors} tensors got a bitmap: {change(self.sparse_before, self.sparse_after)}"
        )
        return f"{change(self.before, self.after)}\n{pruned}"


def pack_shard(source: Path, target: Path) -> Size:
    """Write ``source``, a safetensors file, as ``target``, a new file, packed.

    Raises:
        ModelError: if ``source`` is damaged.
        OSError: if ``target`` cannot be written.
    """
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


def unpack_shard(shard: Path, target: Path) -> int:
    """Write what ``shard`` was made from as ``target``, a new file, and return its bytes.

    Raises:
        ModelError: if ``shard`` is damaged, or no packed shard.
        OSError: if ``target`` cannot be written.
    """
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
    with target.open("xb") as out:
        return out.write(whole)


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
