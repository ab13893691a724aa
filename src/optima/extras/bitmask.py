"""Safetensors files without zeros: a bitmap and the kept values in the place of each tensor that gains from it.

docs/packing.md has the format and a reader. What is kept is decided by bits: a negative zero is a value. Every tensor
passes through in chunks, so memory stays flat whatever its size. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from optima.errors import ModelError
from optima.files import read_header

BITMAP, VALUES = ".bitmap", ".values"
FRACTIONS, EXPONENTS = ".fractions", ".exponents"  # of bfloat16 values: sign and mantissa as they are, exponents coded
PARTS = (BITMAP, VALUES, FRACTIONS, EXPONENTS)
HEADER = "__metadata__"  # no tensor can be called like that
FORMAT = "optima-packed-1"
CHUNK = 2**20  # weights; a multiple of 8, so that chunks of a bitmap join
ITEM_BYTES = (1, 2, 4, 8)  # dtypes of other sizes stay as they are

Bits = NDArray[Any]  # weights as unsigned whole numbers
Parts = Iterator[tuple[str, bytes]]


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


@dataclass(frozen=True)
class _Stored:
    """A tensor, or a part of one, in a safetensors file: where its bytes are in the file."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int

    @property
    def item_bytes(self) -> int:
        """Of one weight; 0 if weights do not fill bytes."""
        bits = int(found[0]) if (found := re.search(r"\d+", self.dtype)) else 8  # BOOL has a byte
        return bits // 8 if bits % 8 == 0 and bits // 8 in ITEM_BYTES else 0


def _tensors(file: Path) -> tuple[list[_Stored], dict[str, str]]:
    """The tensors of a safetensors file by place, and its metadata; what is damaged or cut short is refused."""
    try:
        with safe_open(file, framework="numpy"):  # checks the header against the length of the file
            header, start = read_header(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is no whole safetensors file ({error}): fetch it again") from error
    return _parse(header, start), header.get(HEADER) or {}


def _parse(header: Mapping[str, Any], start: int) -> list[_Stored]:
    """The tensors that a header lists, in the order of their bytes, which begin at ``start``."""
    found = [
        _Stored(name, entry["dtype"], entry["shape"], *(start + at for at in entry["data_offsets"]))
        for name, entry in header.items()
        if name != HEADER
    ]
    return sorted(found, key=lambda stored: (stored.start, stored.end))


def _chunks(file: IO[bytes], stored: _Stored) -> Iterator[bytes]:
    size = CHUNK * max(stored.item_bytes, 1)
    for start in range(stored.start, stored.end, size):
        file.seek(start)
        yield file.read(min(size, stored.end - start))


def _bits(chunk: bytes, item_bytes: int) -> Bits:
    return np.frombuffer(chunk, f"<u{item_bytes}")


def _encode(chunks: Iterable[bytes], item_bytes: int, masked: bool, coded: bool) -> Parts:
    """The bytes of each part of a tensor, piece by piece: with a bitmap, with coded exponents, both or neither."""
    coder = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    for chunk in chunks:
        values = _bits(chunk, item_bytes if masked or coded else 1)
        if masked:
            kept = values != 0
            yield BITMAP, np.packbits(kept, bitorder="little").tobytes()
            values = values[kept]
        if coded:
            yield FRACTIONS, (values >> 8 & 0x80 | values & 0x7F).astype(np.uint8).tobytes()
            yield EXPONENTS, coder.compress((values >> 7).astype(np.uint8).tobytes())
        else:
            yield (VALUES, values.tobytes()) if masked else ("", chunk)
    if coded:
        yield EXPONENTS, coder.flush()


def _survey(file: IO[bytes], stored: _Stored, code_exponents: bool) -> tuple[str, dict[str, int]]:
    """The checksum of a tensor, and the bytes of its parts in the smallest form."""
    digest, kept = hashlib.sha256(), 0
    for chunk in _chunks(file, stored):
        digest.update(chunk)
        if stored.item_bytes:
            kept += int(np.count_nonzero(_bits(chunk, stored.item_bytes)))
    length, item_bytes = stored.end - stored.start, stored.item_bytes
    forms = [{"": length}]
    if item_bytes:
        bitmap = {BITMAP: -(-length // item_bytes // 8)}
        forms.append(bitmap | {VALUES: kept * item_bytes})
    if code_exponents and stored.dtype == "BF16":
        masked = sum(forms[1].values()) < length
        sizes = Counter[str]()
        for part, data in _encode(_chunks(file, stored), item_bytes, masked, True):
            sizes[part] += len(data)
        forms.append(dict(sizes))
    return digest.hexdigest(), min(forms, key=lambda form: sum(form.values()))


def pack_shard(source: Path, target: Path, code_exponents: bool) -> Size:
    """Write ``source``, a safetensors file, as ``target``, a new file, packed.

    Raises:
        ModelError: if ``source`` is damaged.
        OSError: if ``target`` cannot be written.
    """
    stored, _ = _tensors(source)
    names = {each.name for each in stored}
    if taken := sorted(names & {name + part for name in names for part in PARTS}):
        raise ModelError(f"{source}: {taken[0]} is called like a part of a packed tensor: rename it")
    with source.open("rb") as file, target.open("xb") as out:
        original = file.read(stored[0].start if stored else source.stat().st_size)[8:]
        digests = {HEADER: hashlib.sha256(original).hexdigest()}
        forms = {}
        for each in stored:
            digests[each.name], forms[each.name] = _survey(file, each, code_exponents)
        header, starts = _layout(original.decode(), digests, stored, forms)
        out.write(header)
        for each in stored:
            form = forms[each.name]
            at = {part: len(header) + starts[each.name + part] for part in form}
            for part, data in _encode(_chunks(file, each), each.item_bytes, BITMAP in form, EXPONENTS in form):
                out.seek(at[part])
                at[part] += out.write(data)
    return _size(source, target, stored, forms)


def _size(source: Path, target: Path, stored: list[_Stored], forms: Mapping[str, Mapping[str, int]]) -> Size:
    packed = [each for each in stored if BITMAP in forms[each.name]]
    before = sum(each.end - each.start for each in packed)
    after = sum(sum(forms[each.name].values()) for each in packed)
    return Size(len(stored), len(packed), source.stat().st_size, target.stat().st_size, before, after)


def _layout(
    original: str, digests: Mapping[str, str], stored: list[_Stored], forms: Mapping[str, Mapping[str, int]]
) -> tuple[bytes, dict[str, int]]:
    """The header of a packed shard with its length in front, and where each part begins behind it."""
    parts = [(each, part, size) for each in stored for part, size in forms[each.name].items()]
    # The widest first, so that every part lies at a multiple of its width.
    parts.sort(key=lambda entry: -(entry[0].item_bytes if entry[1] in ("", VALUES) else 1))
    metadata = {"format": FORMAT, "header": original, "sha256": json.dumps(digests)}
    header: dict[str, Any] = {HEADER: metadata}
    starts, start = {}, 0
    for each, part, size in parts:
        shape = {"": each.shape, VALUES: [size // max(each.item_bytes, 1)]}.get(part, [size])
        dtype = each.dtype if part in ("", VALUES) else "U8"
        header[each.name + part] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        starts[each.name + part] = start
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


@dataclass(frozen=True)
class Original:
    """What a packed shard says of the file that it was made from.

    Attributes:
        header: as it was, without its length.
        stored: the tensors, at their places in that file.
        digests: SHA-256 of the header and of each tensor's bytes.
        parts: the tensors of the packed shard.
    """

    header: bytes
    stored: list[_Stored]
    digests: Mapping[str, str]
    parts: Mapping[str, _Stored]

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self.stored[-1].end if self.stored else 8 + len(self.header)


def read_original(shard: Path) -> Original:
    """The contents of a packed shard.

    Raises:
        ModelError: if it is damaged, or no packed shard.
    """
    parts, metadata = _tensors(shard)
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{shard} is not in the format {FORMAT}: unpack it with the release of optima that packed it")
    try:
        header, digests = metadata["header"].encode(), json.loads(metadata["sha256"])
        intact = hashlib.sha256(header).hexdigest() == digests[HEADER]
        stored = _parse(json.loads(header), 8 + len(header)) if intact else []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(shard, "its header") from error
    if not intact:
        raise _damaged(shard, "its header")
    return Original(header, stored, digests, {part.name: part for part in parts})


def _damaged(shard: Path, what: str) -> ModelError:
    return ModelError(f"{shard}: {what} is damaged, its checksum differs: fetch the file again")


def unpack_shard(shard: Path, target: Path, original: Original) -> None:
    """Write what ``shard`` was made from as ``target``, a new file.

    Raises:
        ModelError: if a tensor is damaged.
        OSError: if ``target`` cannot be written.
    """
    with shard.open("rb") as file, target.open("xb") as out:
        out.write(len(original.header).to_bytes(8, "little") + original.header)
        for each in original.stored:
            digest = hashlib.sha256()
            try:
                for data in _decode(file, original.parts, each):
                    digest.update(data)
                    out.write(data)
            except (KeyError, ValueError, zlib.error) as error:  # parts that are missing, too short, or do not inflate
                raise _damaged(shard, each.name) from error
            if digest.hexdigest() != original.digests.get(each.name):
                raise _damaged(shard, each.name)


def _decode(file: IO[bytes], parts: Mapping[str, _Stored], each: _Stored) -> Iterator[bytes]:
    """The bytes of a tensor in chunks."""
    if each.name in parts:
        yield from _chunks(file, parts[each.name])
        return
    bitmap = _Part(file, parts[each.name + BITMAP]) if each.name + BITMAP in parts else None
    coded = each.name + EXPONENTS in parts
    values = _Part(file, parts[each.name + (FRACTIONS if coded else VALUES)])
    exponents = _Inflated(_Part(file, parts[each.name + EXPONENTS])) if coded else None
    length = (each.end - each.start) // each.item_bytes
    for first in range(0, length, CHUNK):
        count = min(CHUNK, length - first)
        kept = np.ones(count, bool)
        if bitmap is not None:
            packed = np.frombuffer(bitmap.read(-(-count // 8)), np.uint8)
            kept = np.unpackbits(packed, count=count, bitorder="little").astype(bool)
        number = int(kept.sum())
        chunk = np.zeros(count, f"<u{each.item_bytes}")
        if exponents is None:
            chunk[kept] = _bits(values.read(number * each.item_bytes), each.item_bytes)
        else:
            fractions = _bits(values.read(number), 1).astype("<u2")
            middle = _bits(exponents.read(number), 1).astype("<u2")
            chunk[kept] = (fractions & 0x80) << 8 | middle << 7 | fractions & 0x7F
        yield chunk.tobytes()


class _Part:
    """A part of a tensor, read from its start on."""

    def __init__(self, file: IO[bytes], stored: _Stored) -> None:
        self.file, self.at, self.end = file, stored.start, stored.end

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, or as many as there are."""
        self.file.seek(self.at)
        data = self.file.read(min(size, self.end - self.at))
        self.at += len(data)
        return data


class _Inflated:
    """What a coded part unfolds to, read from its start on."""

    def __init__(self, part: _Part) -> None:
        self.part, self.coder, self.ready = part, zlib.decompressobj(), b""

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, or as many as there are."""
        while len(self.ready) < size and (piece := self.part.read(2**16)):
            self.ready += self.coder.decompress(piece)
        data, self.ready = self.ready[:size], self.ready[size:]
        return data
