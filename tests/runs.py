"""Runs in forked child processes, which can be killed, lose power, or be refused space."""

from __future__ import annotations

import contextlib
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

# A child shares what is imported before the fork: without these, each child would import them itself, for seconds.
import datasets  # noqa: F401
import scipy.optimize  # noqa: F401
import torch
from tiny import prune_arguments

import optima.evaluation.evaluate
import optima.run  # noqa: F401
from optima.cli import main

MESSAGES = "messages.txt"


def start(
    out: str,
    *options: str,
    prepare: Callable[[], object] = int,
    messages: str = MESSAGES,
    model: str = "model",
    verb: str = "prune",
) -> int:
    """Starts ``optima prune``, or another verb; returns its process id.

    ``prepare`` runs there first; stderr goes to ``messages``.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    torch.set_num_threads(1)  # a fork does not copy threads: the child would wait for those of the parent
    # The child must not return into pytest, whatever happens.
    with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere, open(messages, "w") as file:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stderr = file  # pytest had put its own there, and takes what is logged
        logging.basicConfig(stream=file, force=True)
        prepare()
        code = main([verb, *prune_arguments("--output-dir", out, *options, model=model)[1:]])
        file.flush()
    os._exit(code)


def run_script(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python path arguments`` in a forked child."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            code: object = 1
            torch.set_num_threads(1)
            try:
                signal.alarm(300)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr, sys.argv = open(1, "w"), open(2, "w"), [str(path), *arguments]  # noqa: SIM115
                sys.path.insert(0, str(path.parent))
                runpy.run_path(str(path), run_name="__main__")
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
                if isinstance(code, str):
                    print(code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:  # the child must not return into pytest
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        code = finish(child)
        printed = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess([str(path), *arguments], code, *printed)


def finish(child: int) -> int:
    """Its exit status; negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stop_at_sync(count: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """For ``prepare``: the process gets a signal when it brings something to the disk for the ``count``-th time."""

    def prepare() -> None:
        fsync, calls = os.fsync, iter(range(1, 10**6))

        def stop(handle: int) -> None:
            if next(calls) == count:
                os.kill(os.getpid(), number)
            fsync(handle)

        os.fsync = stop

    return prepare


def lose_power_at_sync(count: int) -> Callable[[], None]:
    """As ``stop_at_sync``, and files are left with what they had when they were last brought to the disk."""

    def prepare() -> None:
        fsync, calls, root = os.fsync, iter(range(1, 10**6)), Path.cwd()
        before, contents = set(root.rglob("*")), dict[int, bytes]()

        def noted(handle: int) -> None:
            fsync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_file():
                contents[path.stat().st_ino] = path.read_bytes()
            if next(calls) == count:
                for file in set(root.rglob("*")) - before:
                    if file.is_file() and file.name != MESSAGES:
                        file.write_bytes(contents.get(file.stat().st_ino, b""))
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = noted

    return prepare


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def on_call(number: int, method: Callable[..., object], act: Callable[[], object]) -> Callable[..., object]:
    """``method``, but for its ``number``-th call, before which ``act`` is called."""
    calls: list[None] = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(None)
        if len(calls) == number:
            act()
        return method(*args, **kwargs)

    return counted
