"""The journal of a run: what it is, then one line a committed block. It is what a killed run goes on from.

    {"journal": 2, "run": {...}, "chain": ...}          all that decides the result
    {"block": name, "file": {"name": ..., "sha256": ...}, "beside": ..., "places": {...}, "record": ..., "chain": ...}
    {"note": text, "chain": ...}                        what a later run made of it

``chain`` is a hash of the line and of all before it: a line that is torn, edited, missing or out of order ends what
counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optima.errors import ModelError
from optima.files import sync

FORMAT = 2
START = (0, "")  # of a file without lines: where it ends, and the chain so far
SHOWN = 60  # letters of a value in a message
# What is compared by hashes, which tell a reader nothing.
HASHED = {
    "code": "of optima, or what came with the model, was changed since",
    "selector.code": "was changed since",
    "configuration": "is that of another model",
    "weights": "are those of another model",
    "tokens": "are of other text",
    "masks": "are others",
}


@dataclass(frozen=True)
class Lines:
    """What a journal file holds.

    Attributes:
        sound: its lines up to the first that is torn or was changed, without their chains.
        marks: where each of them ends, in bytes, and its chain.
        whole: how many lines there are that end, sound or not.
        problem: what ends ``sound`` before the file does; None if nothing.
    """

    sound: tuple[dict[str, Any], ...]
    marks: tuple[tuple[int, str], ...]
    whole: int
    problem: str | None

    @property
    def blocks(self) -> tuple[dict[str, Any], ...]:
        """The lines of committed blocks."""
        return tuple(line for line in self.sound if "block" in line)

    @property
    def holds_work(self) -> bool:
        """Whether a block was committed, or a line behind the first is damaged, which may have told of one."""
        return bool(self.blocks) or self.whole > max(len(self.sound), 1)


def read_journal(file: Path) -> Lines:
    """The lines of a journal; none of a file that is not there."""
    *whole, torn = (file.read_bytes() if file.exists() else b"").split(b"\n")
    sound: list[dict[str, Any]] = []
    marks = [START]
    problem = f"the last line of {file} was torn" if torn else None
    for number, text in enumerate(whole, 1):
        line = _parse(text)
        end, chain = marks[-1]
        if line.pop("chain", None) != _link(chain, line):
            problem = f"line {number} of {file} is damaged, or not the one that was written there"
            break
        sound.append(line)
        marks.append((end + len(text) + 1, _link(chain, line)))
    return Lines(tuple(sound), tuple(marks[1:]), len(whole), problem)


class Journal:
    """A journal that is written: lines are added, each on the disk when ``append`` returns.

    Attributes:
        file: one JSON object a line.
        lines: those that count, the head first.
        resumed: whether an earlier run wrote it.
        problem: why what an earlier run wrote does not all count; None if it does.
    """

    def __init__(self, file: Path, run: Mapping[str, Any], began: str = "") -> None:
        """Begin a journal, or go on with the one that is there.

        Args:
            file: where it is or will be.
            run: all that decides the result, as JSON.
            began: the command that began the run.

        Raises:
            ModelError: if what is there belongs to another run (the message names the first key that differs and both
                values), or its first line is damaged.
        """
        self.file = file
        found = read_journal(file)
        self.lines, self._marks, self.problem = list(found.sound), [START, *found.marks], found.problem
        self.resumed = found.holds_work
        if not self.resumed:
            self.keep(0)
            self.append({"journal": FORMAT, "run": dict(run)})
            return
        if not found.sound or found.sound[0].get("journal") != FORMAT:
            raise ModelError(
                f"the first line of {file} is damaged or of another version: what this run is cannot be told; begin "
                "again with --no-resume"
            )
        check_same(found.sound[0]["run"], run, file.parent, began)
        self.keep(len(self.lines))

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line and bring it to the disk."""
        value: dict[str, Any] = json.loads(json.dumps(line))
        end, chain = self._marks[-1]
        chain = _link(chain, value)
        data = (json.dumps({**value, "chain": chain}) + "\n").encode()
        with self.file.open("ab") as opened:
            opened.write(data)
        sync(self.file, self.file.parent)
        self.lines.append(value)
        self._marks.append((end + len(data), chain))

    def keep(self, count: int) -> None:
        """Forget all lines but the first ``count``, on the disk too."""
        del self.lines[count:], self._marks[count + 1 :]
        if self.file.exists():
            os.truncate(self.file, self._marks[-1][0])
            sync(self.file)


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], directory: Path, command: str = "") -> None:
    """Raise ``ModelError`` at the first key of both, however deep, whose values differ; ``command`` began the run."""
    for key, old, new in differences(earlier, json.loads(json.dumps(now))):
        differs = HASHED.get(key) or f"was {shown(old)}, and this one has {shown(new)}"
        begun = f" ({command})" if command else ""
        raise ModelError(
            f"{directory} was left by another run: its {key} {differs}; finish it as it was begun{begun}, with "
            "--resume, or delete it and begin again with --no-resume"
        )


def differences(earlier: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys with both values, where these differ."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in earlier if key == "" else sorted({*earlier, *now}):
            if key or name in now:  # at the top, what is not known yet is compared later
                yield from differences(earlier.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif earlier != now:
        yield key, earlier, now


def shown(value: Any) -> str:
    """For a message."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _parse(text: bytes) -> dict[str, Any]:
    """A line's object; an empty one, which no line is, where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _link(chain: str, line: Mapping[str, Any]) -> str:
    return hashlib.sha256((chain + json.dumps(line, sort_keys=True)).encode()).hexdigest()
