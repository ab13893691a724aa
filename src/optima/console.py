"""Lines of progress and warnings on a console; control characters never reach a terminal."""

from __future__ import annotations

import logging
import re
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.text import Text

from optima.errors import OptimaError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class OwnConsole(Console):
    """Removes control characters; lets ``BrokenPipeError`` through, where rich's own ends the process with status 1."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Called for every string, also of a table."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Called where the ``BrokenPipeError`` is handled."""
        raise


def printable(text: str) -> str:
    """``text`` without C0 and C1 control characters, except tab and newline: a checkpoint's names may hold them."""
    return CONTROL.sub("", text)


def one_line(text: str) -> str:
    """``printable`` text, with a space for each line break and run of spaces."""
    return " ".join(printable(text).split())


def warn(text: str) -> None:
    """Log a warning, on one line."""
    logging.getLogger("optima").warning(one_line(text))


def say(console: Console | None, text: str) -> None:
    """Print a line as it is, if there is a console. Raises ``OptimaError`` if it cannot be written."""
    try:
        if console is not None:
            console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise OptimaError(f"cannot write to standard error: {error.strerror}") from error


def pace(elapsed: float, left: float) -> str:
    """Seconds used and left, as lines of progress show them; NaN is shown as unknown."""
    left_text = "unknown" if left != left else str(timedelta(seconds=round(left)))
    return f"{timedelta(seconds=round(elapsed))} elapsed  {left_text} left"
