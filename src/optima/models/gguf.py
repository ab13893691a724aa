"""Check the structure of a GGUF file before the library that reads it, which believes every count it finds.

Source: the GGUF specification, version 3 (ggml). Layout: magic, version, number of tensors, number of key-value pairs,
the pairs, the tensors' names and shapes.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

from optima.errors import ModelError

MAGIC = b"GGUF"
# struct formats of the scalar types, by their number; 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def read_scalars(file: Path) -> dict[str, Any]:
    """The file's scalar values by key, such as ``llama.block_count``.

    Raises:
        ModelError: if the file is no GGUF file, ends too early, or has a count that cannot be.
    """
    with file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise ModelError(f"{file} is no GGUF file: give a GGUF file, a model directory or a hub id")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _Reader(content).read()
            except (struct.error, ValueError, OverflowError, RecursionError) as error:
                raise ModelError(
                    f"{file} is a GGUF file that is cut off or damaged ({error}): download it again"
                ) from error


class _Reader:
    """Walks over a file; a step past its end is a ``ValueError`` or, within a number, a ``struct.error``."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        # The version tells the order of bytes: it is small in one of the two.
        self._order = "<" if struct.unpack_from("<I", content, len(MAGIC))[0] < 2**16 else ">"

    def read(self) -> dict[str, Any]:
        self._skip(len(MAGIC) + 4)
        tensors, pairs = self._take("Q"), self._take("Q")
        found = {}
        for _ in range(pairs):
            key = self._content.read(self._take("Q")).decode("utf-8")
            found[key] = self._value(self._take("I"))
        for _ in range(tensors):
            self._skip(self._take("Q"))
            self._skip(8 * self._take("I") + 12)  # the shape, the type and the offset
        return {key: value for key, value in found.items() if value is not None}

    def _take(self, code: str) -> Any:
        form = self._order + code
        return struct.unpack(form, self._content.read(struct.calcsize(form)))[0]

    def _skip(self, count: int) -> None:
        self._content.seek(count, os.SEEK_CUR)

    def _value(self, kind: int) -> Any:
        """A scalar; None for text and arrays, which are only walked over."""
        if kind in SCALARS:
            return self._take(SCALARS[kind])
        if kind == STRING:
            self._skip(self._take("Q"))
        elif kind == ARRAY:
            of, count = self._take("I"), self._take("Q")
            if of in SCALARS:
                self._skip(count * struct.calcsize(self._order + SCALARS[of]))
            else:
                for _ in range(count):
                    self._value(of)
        else:
            raise ValueError(f"there is no type {kind}")
        return None
