"""A console that leaves to us what becomes of a pipe that nobody reads any more, and of a full disk behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from optima.errors import OptimaError


class OwnConsole(Console):
    """Lets ``BrokenPipeError`` through, where rich's own ends the process with status 1."""

    def on_broken_pipe(self) -> None:
        """Called where the ``BrokenPipeError`` is handled."""
        raise


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
