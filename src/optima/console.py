"""Lines for who watches, and a console that leaves to us what becomes of a closed pipe or a full disk behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console

from optima.errors import OptimaError


class OwnConsole(Console):
    """Lets ``BrokenPipeError`` through, where rich's own ends the process with status 1."""

    def on_broken_pipe(self) -> None:
        """Called where the ``BrokenPipeError`` is handled."""
        raise


def say(console: Console | None, text: str) -> None:
    """Print a line as it is, if there is a console."""
    if console is not None:
        with explain_log_errors():
            console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def pace(elapsed: float, left: float) -> str:
    """These seconds as lines of progress say them."""
    used, more = (timedelta(seconds=round(seconds)) for seconds in (elapsed, left))
    return f"{used} elapsed  {more} left"


@contextmanager
def explain_log_errors() -> Iterator[None]:
    """A log that cannot be written is one clear error; one that nobody reads stays a ``BrokenPipeError``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OptimaError(
            f"standard error cannot be written ({error.strerror}): free some space, or send it elsewhere"
        ) from error
