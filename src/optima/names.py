"""Names of linears."""

from __future__ import annotations

import re

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def kind(name: str) -> str:
    """The name with its numbers as ``*``: what linears at the same place of all blocks (and experts) share."""
    return NUMBER.sub("*", name)
