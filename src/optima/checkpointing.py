"""The output directory OUT of a run and its journal: locked, staged in a sibling, resumed, published when it is whole.

    .OUT.optima-partial/       on the same file system as OUT
        run.json               which process writes here; locked while it lives
        journal.jsonl          what the run is, then one line per committed block
        model/                 becomes OUT

A run that is killed leaves this directory, from which ``--resume`` continues. OUT may exist if it is empty.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from optima.console import warn
from optima.distributed import Ranks
from optima.errors import ModelError
from optima.files import ACTIVATIONS, delete, explain_write_errors, sync, usable_path, write_whole
from optima.stopping import uninterrupted

FORMAT = 7  # of the journal: raised when an earlier one can no longer be resumed
RUN, JOURNAL, MODEL = "run.json", "journal.jsonl", "model"
SHOWN = 60  # letters of a value in a message
ENVIRONMENT = "environment"  # of a run: versions and device, which may change before it is resumed
OWN = ("weights", "masks")  # each process may have its own copy of these files


def check_alike(run: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise ``ModelError`` on all ranks if they are not in the same run."""
    first, *others = ranks.gather(_plain({key: value for key, value in run.items() if key not in OWN}))
    for rank, other in enumerate(others, 1):
        for key, theirs, own in differences(first, other):
            raise ModelError(
                f"process {rank} has another {key} than process 0 ({_shown(own)}, and {_shown(theirs)}): start all "
                "processes with the same model, options, versions and kind of device"
            )


def differences(earlier: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys with both values where these differ; at the top, only keys that both have."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for name in sorted({*earlier, *now} if key else earlier.keys() & now.keys()):
            yield from differences(earlier.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif earlier != now:
        yield key, earlier, now


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


class Journal:
    """One JSON object per line, each on the disk when ``append`` returns.

    {"journal": 7, "run": {...}, "command": ...}                      the first line
    {"block": name, "files": {name: sha256, ...}, ...}                a committed block, see ``optima.models.save``
    {"note": text}                                                    for the report
    {"decided": name, "value": ...}                                   once for the whole run, before the first block

    A line that is no JSON ends what counts; the last one may have been torn by a kill.

    Attributes:
        lines: those that count.
        problem: why the others do not; None if there are none.
        resumed: whether an earlier run wrote it.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.resumed = file, False
        self.lines: list[dict[str, Any]] = []
        self.problem: str | None = None
        *whole, _ = (file.read_bytes() if file.exists() else b"").split(b"\n")
        for text in whole:
            try:
                self.lines.append(json.loads(text))
            except ValueError:
                self.problem = f"line {len(self.lines) + 1} of {file} is damaged"
                break

    @property
    def head(self) -> dict[str, Any]:
        """The first line; empty if it is damaged."""
        return self.lines[0] if self.lines else {}

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The lines of committed blocks."""
        return [line for line in self.lines if "block" in line]

    def decided(self, name: str) -> Any:
        """What an earlier run decided under this name; None if nothing."""
        return next((line["value"] for line in self.lines if line.get("decided") == name), None)

    @property
    def holds_work(self) -> bool:
        """Whether a block was committed, or a line is damaged, which may have been one."""
        return bool(self.blocks) or self.problem is not None

    def begin(self, run: Mapping[str, Any]) -> None:
        """Write the first line, or check that the one that is there is of the same run.

        Raises:
            ModelError: if it is of another run (the message names what differs) or another format.
        """
        self.resumed = self.holds_work
        if not self.resumed:
            self.keep(0)
            self.append({"journal": FORMAT, "run": dict(run), "command": shlex.join(sys.argv)})
            return
        self.check(run)
        self.keep(len(self.lines))
        for key, old, new in differences({ENVIRONMENT: self.head["run"].get(ENVIRONMENT)}, _plain(run)):
            what = key.partition(".")[2]
            self.append({"note": f"resumed with a different {what}: {_shown(old)} before, {_shown(new)} now"})

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise ``ModelError`` if the journal is of another run, as far as ``run`` is known."""
        place = self.file.parent
        if self.head.get("journal") != FORMAT:
            raise ModelError(f"the first line of {self.file} is damaged or of another version: use --no-resume")
        for key, old, new in differences(self.head["run"], _plain(run)):
            if not key.startswith(ENVIRONMENT):
                raise ModelError(
                    f"{place} was left by another run ({self.head.get('command')}): its {key} was {_shown(old)}, and "
                    f"is {_shown(new)} now; repeat that command with --resume, or delete its work with --no-resume"
                )

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line and bring it to the disk."""
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
        sync(self.file, self.file.parent)
        self.lines.append(_plain(line))

    def keep(self, number: int) -> None:
        """Forget all lines but the first ``number``, on the disk too."""
        del self.lines[number:]
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in self.lines).encode())


@dataclass
class Destination:
    """The output directory of one run.

    Attributes:
        path: OUT without links.
        partial: its sibling, which holds everything until the end.
        journal: of this run, or of the one that it resumes.
        notes: whether an unfinished run was deleted or not found, for the report.
    """

    path: Path
    partial: Path
    journal: Journal
    notes: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """What becomes OUT."""
        return self.partial / MODEL

    @classmethod
    @contextmanager
    def open(
        cls, path: str | Path, num_bytes: int = 0, run: Mapping[str, object] | None = None, resume: bool | None = None
    ) -> Iterator[Destination]:
        """Claim OUT; its content takes the name when the context ends without an error.

        Args:
            path: OUT, or a link to it; it and its parents need not exist.
            num_bytes: space that will be needed, checked now.
            run: what identifies it, compared with an unfinished run.
            resume: whether the committed blocks of an unfinished run stay or are deleted; None refuses.

        Raises:
            ModelError: now, if another run is writing OUT, OUT has files or is half done and ``resume`` is None, or its
                disk is read-only or too full. At the end, if OUT has files by then: the message says where the
                finished directory is.
        """
        path = usable_path(path, "the output directory", "choose another --output-dir").resolve()
        with explain_write_errors(path):
            _check_free(path)
        partial = path.with_name(f".{path.name}.optima-partial")
        with ExitStack() as stack:
            with explain_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(_lock(partial, path))
            destination, begun = cls(path, partial, Journal(partial / JOURNAL)), False
            try:
                with explain_write_errors(path):
                    destination._take_over(run or {}, resume)
                    written = sum(file.stat().st_size for file in partial.rglob("*.safetensors"))
                    _check_space(path.parent, num_bytes - written)
                    _describe_process(lock)
                    destination.directory.mkdir(exist_ok=True)
                    sync(partial, partial.parent)
                begun = True
                yield destination
            except BaseException:
                with uninterrupted():
                    if not destination.directory.exists() or not Journal(partial / JOURNAL).holds_work:
                        destination._discard()
                    elif begun:
                        warn(f"{partial} keeps the committed blocks: repeat the command with --resume")
                raise
            destination._publish()
            destination._discard()

    def _take_over(self, run: Mapping[str, object], resume: bool | None) -> None:
        journal = self.journal
        unfinished = journal.holds_work and self.directory.exists()  # else the output had its name already
        if unfinished and resume is not False:
            journal.check(run)
            if resume is None:
                raise ModelError(
                    f"{self.partial} was left by an unfinished run ({journal.head.get('command')}; "
                    f"{len(journal.blocks)} blocks done): resume it with --resume, or delete its work with --no-resume"
                )
            # A kill leaves temporary directories and files of activations.
            scratch = [each for each in self.partial.iterdir() if each.is_dir() or each.name.startswith(ACTIVATIONS)]
            delete(each for each in scratch if each != self.directory)
            return
        if resume:
            self.notes.append(f"no unfinished run of {self.path} was found: the run began at the first block")
        elif unfinished:
            self.notes.append(f"the {len(journal.blocks)} blocks of an unfinished run into {self.path} were deleted")
        journal.file.unlink(missing_ok=True)  # first: without it, nothing else counts
        delete(each for each in self.partial.iterdir() if each.name != RUN)
        self.journal = Journal(journal.file)

    def _publish(self) -> None:
        with explain_write_errors(self.path):
            sync(*self.directory.rglob("*"), self.directory)
        try:
            self.directory.rename(self.path)  # onto nothing or an empty directory: the system refuses all else
        except OSError as error:
            raise ModelError(f"{error}; the finished checkpoint is in {self.directory}: move it away") from error
        sync(self.path.parent, self.partial)

    def _discard(self) -> None:
        try:
            delete(each for each in self.partial.iterdir() if each.name != RUN)
            (self.partial / RUN).unlink()
            self.partial.rmdir()
        except OSError as error:
            warn(f"{self.partial} cannot be deleted ({error.strerror}): delete it by hand")


def _lock(partial: Path, path: Path) -> IO[str]:
    """The run file, in a partial directory made or found, locked until it is closed or the process ends."""
    while True:
        partial.mkdir(exist_ok=True)
        if not (partial / RUN).is_file() and any(partial.iterdir()):
            raise ModelError(f"{partial} is in the way, and no run of optima left it: move it away")
        with suppress(FileNotFoundError), ExitStack() as stack:
            lock = stack.enter_context((partial / RUN).open("a+", encoding="utf-8"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                known = (partial / RUN).read_text(encoding="utf-8").strip()
                raise ModelError(
                    f"another run is writing {path} ({known}): wait for it, or choose another --output-dir"
                ) from None
            # Otherwise a run that just ended has removed what was opened here.
            if os.path.samestat(os.fstat(lock.fileno()), (partial / RUN).stat()):
                stack.pop_all()
                return lock


def _describe_process(lock: IO[str]) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    process = {"pid": os.getpid(), "host": socket.gethostname(), "started": started, "command": shlex.join(sys.argv)}
    lock.truncate(0)
    lock.write(json.dumps(process) + "\n")
    lock.flush()


def _check_free(path: Path) -> None:
    if path.is_mount() or Path(os.path.realpath(".")).is_relative_to(path):
        raise ModelError(f"{path} is a mount point or holds the current directory: choose a directory below it")
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ModelError(f"{path} exists: delete it, or choose another --output-dir")


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ModelError(
            f"{directory} has {free / 2**20:,.0f} MiB free and the checkpoint needs {num_bytes / 2**20:,.0f} MiB: free "
            "some space or choose another --output-dir"
        )
