"""Text to calibrate on, and text of the same source to measure on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from optima.data.datasets import is_file, load_documents
from optima.errors import OptimaError


def split(names: Sequence[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """The documents but for the last ``held_out`` of them, shuffled; and those, in order.

    Raises:
        OptimaError: unless these are local files with documents enough for both.
    """
    if not 0.0 < held_out < 1.0:
        raise OptimaError(f"--held-out is a share above 0 and below 1, not {held_out:g}")
    if remote := [name for name in names if not is_file(name)]:
        raise OptimaError(f"{remote[0]} is read to its end to hold some of it out: give local files")
    documents = list(load_documents(names))
    first = int((1.0 - held_out) * len(documents))
    if not 0 < first < len(documents):
        raise OptimaError(f"{len(documents)} documents cannot be split: give several, a .jsonl file for example")
    shuffled = documents[:first]
    random.Random(seed).shuffle(shuffled)
    return shuffled, documents[first:]
