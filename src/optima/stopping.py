"""Signals that would end a process: it clears up as at Ctrl-C, and is not stopped while it does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATING = (signal.SIGTERM, signal.SIGHUP)
_asked: list[int] = []  # signals that asked this process to stop
_replaced: dict[int, Any] = {}  # handlers that ``interruptible`` took the place of


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C would raise ``KeyboardInterrupt``; ``exit_code`` is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` at SIGTERM and SIGHUP. Handlers that others set stay, as does nohup's.

    A second signal is ignored, so that it does not interrupt the cleaning up. Does nothing outside the main thread.
    """
    own: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        free = [number for number in TERMINATING if signal.getsignal(number) == signal.SIG_DFL]
        own = {number: signal.signal(number, _stop) for number in free}
        _replaced.update(own)
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in own.items():
            del _replaced[number]
            if signal.getsignal(number) in (_stop, signal.SIG_IGN):
                signal.signal(number, handler)


def unstoppable() -> None:
    """Let signals do nothing until the ``interruptible`` context ends. What has a handler of others is left to it."""
    if threading.current_thread() is threading.main_thread():
        for number in _replaced:
            signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: object) -> None:
    _asked.append(number)
    unstoppable()
    raise Interrupted(number)


def stop_if_asked() -> None:
    """Raise ``Interrupted`` once more: in a finalizer Python swallows what a signal raises."""
    if _asked:
        raise Interrupted(_asked[0])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that would end the process do nothing inside: to clear up is short. For the main thread."""
    known: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        known = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, *TERMINATING)}
    try:
        yield
    finally:
        for number, handler in known.items():
            if handler is not None:  # one that is not Python's cannot be put back by it
                signal.signal(number, handler)
