"""The output directory OUT: prepared beside its name, locked, and put under the name only when whole.

    .OUT.optima-partial/       on the same file system as OUT
        run.json               what the run is (pid, started, command, recipe); locked while the run lives
        journal.jsonl          one line a committed block (see ``journal``)
        own-text               calibration text that the model wrote, if it did
        beside/                all of the result but weights, until it is known that this run may go on
        model/                 what becomes OUT

A run that is killed leaves this directory. The next run into OUT goes on with it or deletes it, as it is told; what has
neither a committed block nor text is deleted without asking.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import IO, Any

from optima.errors import ModelError
from optima.files import (
    ACTIVATIONS,
    PACKED,
    delete,
    digest,
    explain_write_errors,
    swap,
    sync,
    usable_path,
)
from optima.models.journal import Lines, check_same, read_journal
from optima.models.ordered import ORDERING_NAME
from optima.stopping import uninterrupted

_logger = logging.getLogger("optima")

SUFFIX = ".optima-partial"
RUN, JOURNAL, MODEL, BESIDE = "run.json", "journal.jsonl", "model", "beside"
RECORDS = {"report.json": {"schema_version", "run"}, ORDERING_NAME: {"schema_version", "channels"}}
NAME_BYTES = 255  # of one name, on every file system in use


@dataclass(frozen=True)
class Unfinished:
    """What a run that did not end left in ``directory``: its run file (empty if torn), its journal, maybe its text."""

    directory: Path
    run: dict[str, Any]
    journal: Lines

    @classmethod
    def of(cls, partial: Path) -> Unfinished:
        """Read it."""
        run: Any = {}
        with suppress(OSError, ValueError):  # a run that was killed while it wrote the file
            run = json.loads((partial / RUN).read_text(encoding="utf-8"))
        journal = read_journal(partial / JOURNAL)
        return cls(partial, run if isinstance(run, dict) else {}, journal)

    @property
    def holds_work(self) -> bool:
        """Whether a block was committed."""
        return self.journal.holds_work

    def __str__(self) -> str:
        known = ", ".join(f"{key} {self.run[key]}" for key in ("command", "pid", "started") if key in self.run)
        return f"{known or 'unknown'}; {len(self.journal.blocks)} blocks done"

    def ended_as(self, out: Path) -> bool:
        """Whether all that was committed has left for ``out``: nothing remained to be done but to clear up."""
        files = [line["file"] for line in self.journal.blocks if line["file"]]

        def whole(place: Path) -> bool:
            return all(digest(place / file["name"]) == file["sha256"] for file in files)

        return bool(files) and whole(out) and not whole(self.directory / MODEL)


def unfinished(path: Path) -> Unfinished | None:
    """What lies beside ``path``, from a run that is alive or dead; None if nothing does."""
    partial = _beside(path, SUFFIX)
    return None if not partial.is_dir() or partial.is_symlink() else Unfinished.of(partial)


@dataclass
class Destination:
    """The output directory of one run: ``path`` is OUT without links, ``partial`` holds everything until the end.

    ``notes`` say what became of the leavings of an earlier run, and ``began`` which command began the run that goes on.
    ``_finished`` is where the whole output is.
    """

    path: Path
    partial: Path
    notes: list[str] = field(default_factory=list)
    began: str = ""
    _finished: Path | None = None

    @property
    def directory(self) -> Path:
        """What becomes OUT."""
        return self.partial / MODEL

    @property
    def beside(self) -> Path:
        """What goes beside the weights: tried before the long work, and added when the journal is this run's."""
        return self.partial / BESIDE

    def add_beside(self) -> None:
        """Put what is in ``beside`` where it belongs."""
        with explain_write_errors(self.directory):
            shutil.copytree(self.beside, self.directory, dirs_exist_ok=True)

    @property
    def journal(self) -> Path:
        """One line a committed block. A run that fails before the first, and wrote no text, leaves nothing."""
        return self.partial / JOURNAL

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str | Path,
        overwrite: bool = False,
        inputs: Iterable[str | Path] = (),
        num_bytes: int = 0,
        run: Mapping[str, object] | None = None,
        resume: bool | None = None,
    ) -> Iterator[Destination]:
        """Claim OUT; its content takes the name when the context ends without an error.

        Args:
            path: OUT, or a link to it; it and its parents need not exist.
            overwrite: replace an earlier output. Never anything else, nor a directory that holds one of ``inputs``.
            inputs: directories and files that the run reads.
            num_bytes: space that will be needed, checked now.
            run: what decides the result, as far as it is known: told from what an unfinished run says of itself.
            resume: what becomes of the committed blocks of an unfinished run: they stay, or are deleted; None refuses.

        Raises:
            ModelError: now, if OUT cannot be had: it is in use, another run is writing it, it cannot be replaced, it is
                half done and ``resume`` says nothing, or its disk is read-only or too full. At the end, if it cannot
                take its place: the message says where the finished directory is.
        """
        path = usable_path(path, "the output directory", "choose another --output-dir").resolve()
        new_parents = [parent for parent in path.parents if not parent.exists()]
        with ExitStack() as stack:
            stack.callback(_remove_empty, new_parents)
            with explain_write_errors(path):
                read = [Path(os.path.realpath(os.path.expanduser(each))) for each in inputs]  # loops are no error here
                _check_replaceable(path, overwrite, read)
                if path.exists() and not os.access(path, os.W_OK):  # which a rename to another parent asks for
                    raise ModelError(f"{path} may not be changed, nor replaced: see its permissions, or choose another")
                destination = cls(path, _beside(path, SUFFIX))
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.callback(destination._remove_empty)
                stack.enter_context(destination._claim(run or {}, resume))
                # Shards, and beside them experts as they are in the model.
                places = (destination.directory, destination.partial)
                here = sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))
                _check_space(path.parent, num_bytes - here)
                sync(destination.partial, *(parent.parent for parent in (destination.partial, *new_parents)))
            yield destination
            destination._publish(overwrite, read)

    @contextmanager
    def _claim(self, run: Mapping[str, object], resume: bool | None) -> Iterator[None]:
        """Hold the lock of the partial directory, which is removed at the end unless it holds committed blocks."""
        with self._lock() as lock:
            self._take(run, resume)
            try:
                started = datetime.now(UTC).isoformat(timespec="seconds")
                command = shlex.join(sys.argv)
                self.began = self.began or command
                process = {"command": command, "began": self.began, "pid": os.getpid(), "host": socket.gethostname()}
                lock.truncate(0)
                lock.write(json.dumps({**process, "started": started}) + "\n")
                lock.flush()
                self.directory.mkdir(exist_ok=True)
                yield
            except BaseException:
                with uninterrupted():
                    if self._finished is not None:
                        if not self._finished.is_relative_to(self.partial):
                            self._discard()
                    elif self.directory.exists() and Unfinished.of(self.partial).holds_work:
                        _logger.warning("%s keeps what was done: what began it goes on with --resume", self.partial)
                    else:
                        self._discard()
                raise
            self._discard()

    def _take(self, run: Mapping[str, object], resume: bool | None) -> None:
        """Take over what an earlier run left, or delete it; raise ``ModelError`` if that is for the user to say."""
        found = unfinished(self.path)
        assert found is not None, "the lock made the directory"
        keep = False
        if not found.holds_work or found.ended_as(self.path):
            if resume:
                self.notes.append(f"nothing was left to resume beside {self.path}: the run began at the first block")
        elif resume is not False:
            head = found.journal.sound[0].get("run") if found.journal.sound else None
            self.began = str(found.run.get("began", found.run.get("command", "")))
            check_same(head if isinstance(head, dict) else {}, run, self.partial, self.began)
            if resume is None:
                raise ModelError(
                    f"{self.partial} was left by a run into {self.path} that did not end ({found}): optima "
                    "prune goes on with it by --resume, or deletes it by --no-resume; any other command needs another "
                    "--output-dir"
                )
            keep = True
        if keep:
            # Also activations: a kill between the making of their file and its deletion leaves it.
            left = (child for child in self.partial.iterdir() if child.is_dir() or child.name.startswith(ACTIVATIONS))
            delete(child for child in left if child != self.directory)
            return
        if found.run:
            self.notes.append(f"what an unfinished run left beside {self.path} was deleted ({found})")
        self.journal.unlink(missing_ok=True)  # first: what it tells of is then never half there
        delete(child for child in self.partial.iterdir() if child.name != RUN)

    def _lock(self) -> IO[str]:
        """The run file, in a partial directory made or found, locked until it is closed or the process ends."""
        while True:
            _make_or_recognise(self.partial)
            with suppress(FileNotFoundError), ExitStack() as stack:
                lock = stack.enter_context((self.partial / RUN).open("a+", encoding="utf-8"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ModelError(
                        f"another run is writing {self.path} ({unfinished(self.path)}): wait for it, or choose another "
                        "--output-dir"
                    ) from None
                except OSError as error:
                    if not os.fstat(lock.fileno()).st_size:  # made here
                        (self.partial / RUN).unlink()
                    raise ModelError(
                        f"{self.path.parent} is on a file system that cannot lock files ({error.strerror}): two "
                        "runs could write there at once: choose an --output-dir on another, such as a local disk"
                    ) from error
                # Otherwise a run that just ended has removed what was opened here.
                if os.path.samestat(os.fstat(lock.fileno()), (self.partial / RUN).stat()):
                    stack.pop_all()
                    return lock

    def _discard(self) -> None:
        """Remove the partial directory, the lock last, or say that it stays."""
        try:
            delete(child for child in self.partial.iterdir() if child.name != RUN)
            (self.partial / RUN).unlink()
        except OSError as error:
            _logger.warning("%s cannot be deleted (%s): delete it by hand", self.partial, error.strerror)

    def _remove_empty(self) -> None:
        """Remove the partial directory if nothing is in it: behind the lock, for NFS keeps names of open files."""
        with suppress(OSError):  # another run may have claimed it by now
            self.partial.rmdir()

    def _publish(self, overwrite: bool, inputs: list[Path]) -> None:
        """Give the finished directory its name, or keep it under a free one, safe from the next run."""
        with explain_write_errors(self.path):
            sync(*self.directory.rglob("*"), self.directory)
        names = (_beside(self.path, f".{n}", hidden=False) for n in count(1))
        free = next(name for name in names if not os.path.lexists(name))
        try:
            _check_replaceable(self.path, overwrite, inputs)
            if os.path.lexists(self.path) and any(self.path.iterdir()):
                swap(self.directory, self.path, free)
            else:
                # Onto nothing or an empty directory: the system refuses all else.
                self.directory.rename(self.path)
            self._finished = self.path
        except (OSError, ModelError) as error:
            kept = self.directory
            with suppress(OSError):
                kept = kept.rename(free)
            self._finished = kept
            raise ModelError(f"{error}; the finished checkpoint is in {kept}") from error
        # The name first: without the journal, what is not yet under it would count for nothing.
        sync(self.path.parent, self.partial)
        self.journal.unlink(missing_ok=True)


def _beside(path: Path, suffix: str, hidden: bool = True) -> Path:
    """A sibling of ``path`` that is called like it, or like the hash of its name where that would be too long."""
    name = f"{'.' * hidden}{path.name}{suffix}"
    if len(os.fsencode(name)) > NAME_BYTES:
        name = f"{'.' * hidden}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{suffix}"
    return path.with_name(name)


def _check_replaceable(path: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Raise ``ModelError`` unless ``path`` is free, or an earlier output that ``overwrite`` allows to replace."""
    remedy = "choose another --output-dir"
    holds_here = False
    with suppress(FileNotFoundError):  # the current directory has been deleted
        holds_here = Path.cwd().is_relative_to(path)
    if path.is_mount() or holds_here:
        what = "holds the current directory" if holds_here else "is a mount point"
        raise ModelError(f"{path} {what} and cannot be replaced: choose a directory below it")
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ModelError(f"{path} exists and is no directory: {remedy}")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ModelError(
            f"{path} exists, the output of a run that has ended: {remedy}, or replace it with --overwrite"
            if _is_output(path)
            else f"{path} exists: {remedy}"
        )
    for each in inputs:
        if any(above.exists() and above.samefile(path) for above in (each, *each.parents)):
            raise ModelError(f"{path} is or holds {each}, which this run reads, and is not replaced: {remedy}")
    if not _is_output(path):
        raise ModelError(
            f"{path} is no output of an earlier run (it has none of {', '.join(RECORDS)} and packed files), and is not "
            f"replaced: {remedy}"
        )
    if (inner := _output_inside(path)) is not None:
        raise ModelError(f"{path} holds {inner}, an output or one in the making, and is not replaced: {remedy}")


def _output_inside(path: Path) -> Path | None:
    """An output below ``path``, or what a run that goes on writes there."""
    below = (each for each in path.rglob("*") if each.is_dir())
    return next((each for each in below if each.name.endswith(SUFFIX) or _is_output(each)), None)


def _is_output(path: Path) -> bool:
    if any(path.glob(f"*{PACKED}")):
        return True
    return any(_holds(path / name, keys) for name, keys in RECORDS.items())


def _holds(file: Path, keys: set[str]) -> bool:
    """Whether it is a JSON object that has them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and keys <= content.keys()


def _make_or_recognise(partial: Path) -> None:
    """Make a partial directory, or find one that a run of ours made."""
    try:
        partial.mkdir()
    except FileExistsError:
        directory = partial.is_dir() and not partial.is_symlink()
        if not directory or not ((partial / RUN).is_file() or not any(partial.iterdir())):
            raise ModelError(f"{partial} is in the way, and no run of optima left it: move it away") from None


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ModelError(
            f"{directory} has {free / 2**30:.1f} GiB free and the checkpoint needs {num_bytes / 2**30:.1f} GiB: "
            "free some space or choose another --output-dir"
        )


def _remove_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()
