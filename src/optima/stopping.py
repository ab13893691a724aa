"""Signals that end a process: they raise an exception, so that the process can clean up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
_asked: list[int] = []  # signals received
_replaced: dict[int, Any] = {}  # signal -> handler before ``interruptible``


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP; ``exit_code`` is 128 + the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` at SIGINT, SIGTERM and SIGHUP, except where another handler than the default is set.

    Later signals are ignored, so that they do not interrupt the cleanup. Does nothing outside of the main thread.
    """
    own: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        free = [number for number, default in DEFAULTS.items() if signal.getsignal(number) == default]
        own = {number: signal.signal(number, _stop) for number in free}
        _replaced.update(own)
    try:
        yield
    finally:
        if own:
            _asked.clear()
        for number, handler in own.items():
            del _replaced[number]
            if signal.getsignal(number) in (_stop, signal.SIG_IGN):
                signal.signal(number, handler)


def unstoppable() -> None:
    """Ignore the signals that ``interruptible`` handles until its context ends."""
    if threading.current_thread() is threading.main_thread():
        for number in _replaced:
            signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: object) -> None:
    _asked.append(number)
    unstoppable()
    raise Interrupted(number)


def stop_if_asked() -> None:
    """Raise ``Interrupted`` again if a signal was received: Python drops exceptions that are raised in a finalizer."""
    if _asked:
        raise Interrupted(_asked[0])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore signals inside, for a short cleanup in the main thread."""
    known: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        known = {each: signal.signal(each, signal.SIG_IGN) for each in DEFAULTS}
    try:
        yield
    finally:
        for number, handler in known.items():
            if handler is not None:  # None: not installed from Python, so it cannot be restored
                signal.signal(number, handler)
