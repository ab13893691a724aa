"""Text to calibrate on, and text of the same source to measure on."""

from __future__ import annotations

import random

from optima.calibration.text import Documents, TextSource


def split(source: TextSource, held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """The documents but for the last ``held_out`` of them, shuffled; and those, in order."""
    documents = list(Documents(source))
    first = int((1.0 - held_out) * len(documents))
    shuffled = documents[:first]
    random.Random(seed).shuffle(shuffled)
    return shuffled, documents[first:]
