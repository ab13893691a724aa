"""OUT is claimed by one run, appears only when whole, and what was there is never lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tiny import snapshot

from optima.checkpointing import Destination, unfinished
from optima.errors import ModelError
from optima.models.journal import Journal
from optima.stopping import Interrupted, interruptible, stop_if_asked, unstoppable

REPORT = json.dumps({"schema_version": 1, "run": {}, "linears": []})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def claim(path: str | Path = "out", overwrite: bool = False, **options: object) -> AbstractContextManager[Destination]:
    return Destination.open(path, overwrite, **options)  # type: ignore[arg-type]


def run(
    path: str | Path = "out", overwrite: bool = False, meanwhile: Callable[[], object] = int, resume: bool | None = None
) -> None:
    with claim(path, overwrite, resume=resume) as destination:
        (destination.directory / "new").write_text("new")
        (destination.directory / "report.json").write_text(REPORT)
        commit(destination)
        meanwhile()


RUN = {"recipe": {"sparsity": 0.5}}


def commit(destination: Destination) -> None:
    Journal(destination.journal, RUN).append({"block": "a", "file": None})


def make_output(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "old").write_text("old")
    (path / "report.json").write_text(REPORT)


def refused(path: str | Path = "out", overwrite: bool = False, **options: object) -> str:
    """The message of a refusal that changes nothing."""
    before = snapshot(Path.cwd().parent)
    with pytest.raises(ModelError) as error, claim(path, overwrite, **options):
        pytest.fail("claimed")
    assert snapshot(Path.cwd().parent) == before
    return str(error.value)


class TestStart:
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("kind", ["file", "fifo", "directory", "link to a directory", "hidden"])
    def test_what_is_not_ours_is_never_replaced(self, here: Path, kind: str, overwrite: bool) -> None:
        if kind == "file":
            (here / "out").write_text(REPORT)
        elif kind == "fifo":
            os.mkfifo(here / "out")
            with pytest.raises(ModelError, match="is no directory"), claim("out", overwrite):
                pass
            assert (here / "out").is_fifo()
            return
        else:
            (here / "thesis").mkdir()
            (here / "thesis" / (".tex" if kind == "hidden" else "report.json")).write_text('{"schema_version": "mine"}')
            (here / "out").symlink_to("thesis") if "link" in kind else (here / "thesis").rename("out")
        message = refused(overwrite=overwrite)
        assert "choose another --output-dir" in message
        assert ("exists" in message) or ("is no output of an earlier run" in message)

    def test_a_device_is_never_replaced(self) -> None:
        assert "is no directory" in refused("/dev/null", True)

    def test_an_earlier_output_is_replaced_only_if_asked(self, here: Path) -> None:
        make_output(here / "out")
        assert "replace it with --overwrite" in refused()
        run(overwrite=True)
        assert snapshot(here).keys() == {"out", "out/new", "out/report.json"}

    @pytest.mark.parametrize("out", ["in", "in/../in", "link", "above", "above/model", "."])
    def test_an_input_is_never_replaced(self, here: Path, out: str) -> None:
        for directory in (here / "in", here / "above"):
            make_output(directory)
        (here / "above" / "model").mkdir()
        (here / "above" / "model" / "report.json").write_text(REPORT)
        (here / "link").symlink_to("in")
        (here / "linked-input").symlink_to("above/model")
        message = refused(out, True, inputs=["link", "linked-input"])
        assert "which this run reads" in message or "holds the current directory" in message

    @pytest.mark.parametrize("inner", ["out/70", "out/deep/.70.optima-partial"])
    def test_nor_is_an_output_that_holds_another(self, inner: str) -> None:
        make_output(Path("out"))
        if inner.endswith("partial"):
            Path(inner).mkdir(parents=True)
        else:
            make_output(Path(inner))
        assert re.search(f"out holds .*{inner}, an output or one in the making", refused(overwrite=True))

    @pytest.mark.parametrize("path", ["/", "/proc", ".", ".."])
    def test_mount_points_and_the_current_directory(self, path: str) -> None:
        with pytest.raises(ModelError, match="cannot be replaced: choose a directory below it"), claim(path, True):
            pass

    @pytest.mark.parametrize(
        "path", ["a\0b", "a\udcff", "a" * 256, "a/" * 3000, "~nobody-of-that-name/out", "loop/out"]
    )
    def test_names_that_no_file_can_have(self, here: Path, path: str) -> None:
        (here / "loop").symlink_to("loop")
        message = refused(path)
        assert "choose another --output-dir" in message
        message.encode("utf-8")

    @pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "a" * 240])
    def test_names_as_long_as_they_may_be(self, here: Path, name: str) -> None:
        run(name)
        assert (here / name / "new").exists()
        assert os.listdir(here) == [name]

    def test_a_current_directory_that_was_deleted(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (here / "gone").mkdir()
        monkeypatch.chdir(here / "gone")
        (here / "gone").rmdir()
        with pytest.raises(ModelError, match="cannot be used"), claim():
            pass
        run(here / "out")
        assert (here / "out" / "new").exists()

    @pytest.mark.parametrize("path", ["file/out", "file/a/b/out"])
    def test_below_a_file(self, here: Path, path: str) -> None:
        (here / "file").touch()
        assert "choose another --output-dir" in refused(path)

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
    def test_read_only(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        def refuse(self: Path, *args: object, **options: object) -> None:
            raise OSError(code, "not for you")

        monkeypatch.setattr(Path, "mkdir", refuse)
        assert "not for you" in refused("a/out")

    def test_a_file_system_without_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr("fcntl.flock", refuse)
        assert "cannot lock files (Function not implemented)" in refused("a/out")

    def test_a_file_system_that_cannot_sync_directories(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def sync(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "not of directories")

        monkeypatch.setattr("os.fsync", sync)
        run()
        assert (here / "out" / "new").exists()

    def test_space_is_checked_first(self) -> None:
        assert "GiB free and the checkpoint needs" in refused("a/out", num_bytes=2 * shutil.disk_usage(".").free)

    def test_a_foreign_directory_of_that_name(self, here: Path) -> None:
        (here / ".out.optima-partial").mkdir()
        (here / ".out.optima-partial" / "thesis").touch()
        assert "no run of optima left it" in refused()


class TestTwoRuns:
    def test_the_second_is_refused_and_told_of_the_first(self, here: Path) -> None:
        with claim() as destination:
            with pytest.raises(ModelError) as error, claim(here / "a" / ".." / "out"):
                pass
            for part in ("another run is writing", sys.argv[0], str(os.getpid())):
                assert part in str(error.value)
            (destination.directory / "new").touch()
        assert (here / "out" / "new").exists()

    def test_the_run_file_says_what_the_run_is(self, here: Path) -> None:
        with claim() as destination:
            found = json.loads((destination.partial / "run.json").read_text())
        assert found.keys() == {"command", "began", "pid", "host", "started"}

    def test_in_another_process(self, here: Path) -> None:
        with claim():
            child = os.fork()
            if child == 0:
                try:
                    with claim():
                        os._exit(0)
                except ModelError:
                    os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    def test_different_outputs_do_not_meet(self, here: Path) -> None:
        with claim("a"):
            run("b")
        assert (here / "a").is_dir()
        assert (here / "b").is_dir()


class TestEnd:
    def test_nothing_is_under_the_name_before(self, here: Path) -> None:
        run("a/b/out", meanwhile=lambda: pytest.fail("there") if Path("a/b/out").exists() else None)
        assert snapshot(here).keys() == {"a", "a/b", "a/b/out", "a/b/out/new", "a/b/out/report.json"}

    def test_an_empty_directory_is_free(self, here: Path) -> None:
        (here / "out").mkdir()
        run()
        assert (here / "out" / "new").exists()

    def test_a_link_stays_and_what_it_points_at_is_written(self, here: Path) -> None:
        (here / "out").symlink_to("elsewhere")
        run()
        assert (here / "out").is_symlink()
        assert (here / "elsewhere" / "new").exists()

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("kind", ["directory", "file", "output"])
    def test_what_appeared_during_the_run_stays(self, here: Path, kind: str, overwrite: bool) -> None:
        def appear() -> None:
            if kind == "file":
                Path("out").write_text("thesis")
            elif kind == "output":
                make_output(Path("out"))
            else:
                Path("out").mkdir()
                Path("out", "thesis").write_text("thesis")

        if kind == "output" and overwrite:
            run(overwrite=True, meanwhile=appear)
            assert (here / "out" / "new").exists()
            return
        with pytest.raises(ModelError, match=r"the finished checkpoint is in .*out\.1"):
            run(overwrite=overwrite, meanwhile=appear)
        assert (here / "out.1" / "new").exists()
        assert not (here / "out" / "new").exists() if kind != "file" else (here / "out").read_text() == "thesis"
        assert set(os.listdir(here)) == {"out", "out.1"}

    def test_a_swap_that_fails_leaves_both(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_output(here / "out")
        rename = Path.rename

        def refuse(self: Path, target: Path) -> Path:
            if self.name == "model" and target.name == "out":
                raise OSError(errno.EIO, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(ModelError, match=r"Input/output error.*is in .*out\.1"):
            run(overwrite=True)
        assert (here / "out" / "old").exists()
        assert (here / "out.1" / "new").exists()

    def test_what_cannot_be_renamed_at_all_stays_where_the_message_says(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: Path, target: Path) -> Path:
            raise OSError(errno.EACCES, "Permission denied")

        def pack() -> None:  # commits no block
            with claim() as destination:
                (destination.directory / "new").write_text("new")
                monkeypatch.setattr(Path, "rename", refuse)

        with pytest.raises(ModelError, match=r"Permission denied.*is in .*\.out\.optima-partial/model"):
            pack()
        assert (here / ".out.optima-partial" / "model" / "new").exists()

    def test_stopped_behind_the_swap_it_was_done(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        make_output(here / "out")

        def stop(*paths: Path) -> None:
            if (here / "out" / "new").exists():
                raise KeyboardInterrupt

        monkeypatch.setattr("optima.checkpointing.sync", stop)
        with pytest.raises(KeyboardInterrupt):
            run(overwrite=True)
        assert snapshot(here).keys() == {"out", "out/new", "out/report.json"}
        assert "goes on with --resume" not in caplog.text

    def test_a_kill_between_two_renames_leaves_the_earlier_one_beside(self, here: Path) -> None:
        make_output(here / "out")
        if os.fork() == 0:
            rename = Path.rename
            Path.rename = lambda self, to: os._exit(0) if self.name == "model" else rename(self, to)  # type: ignore[method-assign]
            run(overwrite=True)
        os.wait()
        assert not (here / "out").exists()
        run(resume=False)
        assert set(os.listdir(here)) == {"out", "out.1"}
        assert (here / "out" / "new").exists()
        assert (here / "out.1" / "old").exists()

    def test_an_old_output_that_cannot_be_deleted_is_named(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        make_output(here / "out")

        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(shutil, "rmtree", refuse)
        run(overwrite=True)
        assert (here / "out" / "new").exists()
        assert ".out.optima-partial cannot be deleted (Permission denied)" in caplog.text


def fail(error: BaseException, path: str = "out", blocks: int = 1) -> None:
    with claim(path) as destination:
        (destination.directory / "config.json").touch()
        for _ in range(blocks):
            commit(destination)
        raise error


class TestFailure:
    @pytest.mark.parametrize(
        "error", [ModelError("no"), KeyboardInterrupt(), FileNotFoundError("x"), ZeroDivisionError()]
    )
    def test_before_the_first_block_leaves_nothing(self, here: Path, error: BaseException) -> None:
        with pytest.raises(type(error)):
            fail(error, "a/b/out", blocks=0)
        assert not list(here.iterdir())

    @pytest.mark.parametrize("error", [ModelError("no"), KeyboardInterrupt()])
    def test_after_it_keeps_what_was_done_and_says_so(
        self, here: Path, caplog: pytest.LogCaptureFixture, error: BaseException
    ) -> None:
        with pytest.raises(type(error)):
            fail(error)
        assert ".out.optima-partial keeps what was done" in caplog.text
        found = unfinished(here / "out")
        assert found is not None
        assert [line["block"] for line in found.journal.blocks] == ["a"]
        assert found.run["pid"] == os.getpid()
        assert not (here / "out").exists()
        with claim(resume=False) as destination:
            assert found.run["started"] in destination.notes[0]
            assert "1 blocks done" in destination.notes[0]
            assert not destination.journal.exists()
        assert unfinished(here / "out") is None

    @pytest.mark.parametrize(
        ("now", "message"),
        [
            (RUN, r"1 blocks done\): optima prune goes on with it by --resume, or deletes it by --no-resume; any"),
            ({"recipe": {"sparsity": 0.6}}, r"left by another run: its recipe.sparsity was 0.5, and this one has 0.6"),
        ],
    )
    def test_after_it_the_next_run_must_say_what_becomes_of_it(self, now: dict[str, object], message: str) -> None:
        with pytest.raises(KeyboardInterrupt):
            fail(KeyboardInterrupt())
        assert re.search(message, refused(run=now))

    def test_a_journal_whose_first_line_is_damaged_is_not_nothing(self, here: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            fail(KeyboardInterrupt())
        journal = here / ".out.optima-partial" / "journal.jsonl"
        journal.write_bytes(b"x" + journal.read_bytes())
        assert "--no-resume" in refused()

    def test_what_is_resumed_is_as_it_was(self, here: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            fail(KeyboardInterrupt())
        (here / ".out.optima-partial" / "tmp123").mkdir()
        with claim(resume=True) as destination:
            assert set(os.listdir(destination.partial)) == {"run.json", "journal.jsonl", "model"}
            assert os.listdir(destination.directory) == ["config.json"]
            assert Journal(destination.journal, RUN).resumed
        assert os.listdir(here / "out") == ["config.json"]

    def test_there_may_be_nothing_to_resume(self, here: Path) -> None:
        with claim(resume=True) as destination:
            assert "nothing was left to resume" in destination.notes[0]
        assert os.listdir(here) == ["out"]

    def test_the_space_of_what_is_there_is_not_asked_for_again(self, here: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            fail(KeyboardInterrupt())
        free = shutil.disk_usage(here).free
        partial = here / ".out.optima-partial"
        for file in (partial / "model" / "model-00001-of-00001.safetensors", partial / "block-00000.safetensors"):
            with file.open("wb") as opened:
                opened.truncate(free)  # sparse: it takes none
        with claim(resume=True, num_bytes=2 * free + free // 2):
            pass

    def test_a_refused_run_leaves_the_unfinished_one(self, here: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            fail(KeyboardInterrupt())
        make_output(here / "out")
        assert "exists" in refused()
        assert unfinished(here / "out") is not None

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 5}'])
    def test_a_run_file_that_was_torn(self, here: Path, content: str) -> None:
        partial = here / ".out.optima-partial"
        (partial / "model").mkdir(parents=True)
        (partial / "run.json").write_text(content)
        (partial / "journal.jsonl").write_text('{"journal": 2}\n{"blo')
        found = unfinished(here / "out")
        assert found is not None
        assert not found.journal.holds_work
        run()
        assert os.listdir(here) == ["out"]

    def test_an_empty_partial_directory(self, here: Path) -> None:
        (here / ".out.optima-partial").mkdir()
        run()
        assert os.listdir(here) == ["out"]


class TestSignals:
    @pytest.fixture(autouse=True)
    def handlers(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_clean_up_as_ctrl_c_does(self, here: Path, number: int) -> None:
        def stop_twice() -> None:
            try:
                signal.raise_signal(number)
            finally:
                # While the first is cleaned up after: not heeded.
                signal.raise_signal(number)

        with pytest.raises(Interrupted) as error, interruptible(), claim():
            stop_twice()
        assert error.value.exit_code == 128 + number
        assert isinstance(error.value, KeyboardInterrupt)
        assert not list(here.iterdir())
        assert signal.getsignal(number) == signal.SIG_DFL

    @pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
    def test_handlers_of_others_stay(self, handler: signal.Handlers) -> None:
        signal.signal(signal.SIGHUP, handler)
        with interruptible():
            assert signal.getsignal(signal.SIGHUP) == handler
            signal.raise_signal(signal.SIGHUP)

    def test_are_ignored_to_the_end_of_a_run_that_has_failed(self) -> None:
        """Another process of the run is no more: the launcher must not end this one before it has cleared up."""
        with interruptible():
            unstoppable()
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        unstoppable()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_a_handler_of_others_is_not_silenced(self) -> None:
        heard: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        with interruptible():
            unstoppable()
            signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_what_a_finalizer_swallowed_is_raised_again(self) -> None:
        class Unlucky:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGTERM)

        with interruptible():
            stop_if_asked()
            Unlucky()
            with pytest.raises(Interrupted, match="SIGTERM"):
                stop_if_asked()
        stop_if_asked()

    def test_another_thread_installs_none(self) -> None:
        def enter() -> None:
            with interruptible():
                found.append(signal.getsignal(signal.SIGTERM))

        found: list[object] = []
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert found == [signal.SIG_DFL]
