"""Names of linears: kinds, and regexes that cannot run for ever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable

from optima.errors import RecipeError

# Seconds that all regexes of a recipe may take on all names of a model together.
PATIENCE = 5.0
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# One repeat of one character at most costs the square of a name's length; anything else is tried out first.
SIMPLE = re.compile(r"(?:[\w\s.:^$|-]|\\[.dwsbDWSB])*(?:[*+?](?:[\w\s.:^$|-]|\\[.dwsbDWSB])*)?")
TRIAL = """
import json, re, sys
regexes, names = json.load(sys.stdin)
for number, regex in enumerate(regexes):
    print(number, flush=True)
    for name in names:
        re.search(regex, name)
"""


def kind(name: str) -> str:
    """The name with its numbers as ``*``: what linears at the same place of all blocks (and experts) share."""
    return NUMBER.sub("*", name)


def check_bounded(regexes: Iterable[str], names: Collection[str]) -> None:
    """Search ``names`` for each regex in a process that can be stopped, so that nothing hangs when it is done here.

    Raises:
        RecipeError: naming the regex that backtracks without end.
    """
    doubtful = [regex for regex in regexes if not SIMPLE.fullmatch(regex)]
    if not doubtful:
        return
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        subprocess.run(
            command,
            input=json.dumps([doubtful, list(names)]).encode(),
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        regex = doubtful[int((error.stdout or b"0").split()[-1])]
        raise RecipeError(
            f"the regex {regex!r} does not finish on the names of this model's linears: give it fewer "
            "repeats, and none inside another as in (a+)+"
        ) from error
