"""A console that leaves to us what becomes of a pipe that nobody reads any more."""

from __future__ import annotations

from rich.console import Console


class OwnConsole(Console):
    """Lets ``BrokenPipeError`` through, where rich's own ends the process with status 1."""

    def on_broken_pipe(self) -> None:
        """Called where the ``BrokenPipeError`` is handled."""
        raise
