"""OUT is claimed by one run, appears only when whole, and what was there is never lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tiny import snapshot

from optima.checkpointing import Destination, Journal
from optima.errors import ModelError
from optima.stopping import Interrupted, interruptible, stop_if_asked

RUN = {"recipe": {"sparsity": 0.5}}
PARTIAL = ".out.optima-partial"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def claim(path: str | Path = "out", **options: object) -> AbstractContextManager[Destination]:
    return Destination.open(path, **options)  # type: ignore[arg-type]


def commit(destination: Destination) -> None:
    destination.journal.begin(RUN)
    destination.journal.append({"block": "a", "file": None})


def run(path: str | Path = "out", meanwhile: Callable[[], object] = int, resume: bool | None = None) -> None:
    with claim(path, resume=resume) as destination:
        (destination.directory / "new").write_text("new")
        commit(destination)
        meanwhile()


def fail(error: BaseException, path: str = "out", blocks: int = 1) -> None:
    with claim(path) as destination:
        (destination.directory / "config.json").touch()
        for _ in range(blocks):
            commit(destination)
        raise error


def refused(path: str | Path = "out", **options: object) -> str:
    """The message of a refusal that changes nothing."""
    before = snapshot(Path.cwd().parent)
    with pytest.raises(ModelError) as error, claim(path, **options):
        pytest.fail("claimed")
    assert snapshot(Path.cwd().parent) == before
    return str(error.value)


class TestStart:
    @pytest.mark.parametrize("kind", ["file", "directory", "link to a directory", "hidden"])
    def test_what_is_there_is_never_replaced(self, here: Path, kind: str) -> None:
        if kind == "file":
            (here / "out").write_text("thesis")
        else:
            (here / "thesis").mkdir()
            (here / "thesis" / (".tex" if kind == "hidden" else "report.json")).write_text('{"schema_version": "mine"}')
            (here / "out").symlink_to("thesis") if "link" in kind else (here / "thesis").rename("out")
        assert "choose another --output-dir" in refused()

    @pytest.mark.parametrize("path", ["/", "/proc", ".", ".."])
    def test_mount_points_and_the_current_directory(self, path: str) -> None:
        with pytest.raises(ModelError, match="choose a directory below it"), claim(path):
            pass


class TestTwoRuns:
    def test_the_second_is_refused_and_names_the_first(self, here: Path) -> None:
        with claim() as destination:
            with pytest.raises(ModelError) as error, claim(here / "a" / ".." / "out"):
                pass
            assert sys.argv[0] in str(error.value)
            assert str(os.getpid()) in str(error.value)
            (destination.directory / "new").touch()
            child = os.fork()
            if child == 0:
                try:
                    with claim():
                        os._exit(0)
                except ModelError:
                    os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            run("other")
        assert (here / "out" / "new").exists()
        assert (here / "other" / "new").exists()


class TestEnd:
    def test_nothing_is_under_the_name_before(self, here: Path) -> None:
        run("a/b/out", meanwhile=lambda: pytest.fail("there") if Path("a/b/out").exists() else None)
        assert snapshot(here).keys() == {"a", "a/b", "a/b/out", "a/b/out/new"}

    @pytest.mark.parametrize("kind", ["directory", "file"])
    def test_what_appeared_during_the_run_stays(self, here: Path, kind: str) -> None:
        def appear() -> None:
            if kind == "directory":
                Path("out").mkdir()
            (Path("out", "thesis") if kind == "directory" else Path("out")).write_text("thesis")

        with pytest.raises(ModelError, match=r"the finished checkpoint is in .*optima-partial/model"):
            run(meanwhile=appear)
        assert (here / ".out.optima-partial" / "model" / "new").exists()
        assert "thesis" in ((here / "out").read_text() if kind == "file" else os.listdir(here / "out"))


class TestFailure:
    @pytest.mark.parametrize("error", [ModelError("no"), KeyboardInterrupt(), FileNotFoundError("x")])
    def test_before_the_first_block_leaves_nothing(self, here: Path, error: BaseException) -> None:
        with pytest.raises(type(error)):
            fail(error, blocks=0)
        assert not list(here.iterdir())

    @pytest.mark.parametrize("error", [ModelError("no"), KeyboardInterrupt()])
    def test_after_it_the_work_is_kept(
        self, here: Path, caplog: pytest.LogCaptureFixture, error: BaseException
    ) -> None:
        with pytest.raises(type(error)):
            fail(error)
        assert f"{PARTIAL} keeps" in caplog.text
        assert len(Journal(here / PARTIAL / "journal.jsonl").blocks) == 1
        assert not (here / "out").exists()
        assert "--no-resume" in refused(run=RUN)
        assert "recipe.sparsity was 0.5" in refused(run={"recipe": {"sparsity": 0.6}}, resume=True)
        (here / PARTIAL / "tmp123").mkdir()
        with claim(resume=True, run=RUN) as destination:
            assert set(os.listdir(destination.partial)) == {"run.json", "journal.jsonl", "model"}
            destination.journal.begin(RUN)
            assert destination.journal.resumed
        assert set(os.listdir(here / "out")) == {"config.json"}

    @pytest.mark.parametrize("content", [None, "", "{", '{"pid": 5}'])
    def test_a_run_that_was_killed_as_it_began(self, here: Path, content: str | None) -> None:
        (here / PARTIAL).mkdir()
        if content is not None:
            (here / PARTIAL / "model").mkdir()
            (here / PARTIAL / "run.json").write_text(content)
            (here / PARTIAL / "journal.jsonl").write_text('{"journal": 3}\n{"blo')
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
                signal.raise_signal(number)  # during the cleanup: ignored

        with pytest.raises(Interrupted) as error, interruptible(), claim():
            stop_twice()
        assert error.value.exit_code == 128 + number
        assert isinstance(error.value, KeyboardInterrupt)
        assert not list(here.iterdir())
        assert signal.getsignal(number) == signal.SIG_DFL

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_one_that_a_finalizer_swallowed_is_raised_again(self) -> None:
        class Unlucky:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGTERM)

        with interruptible():
            stop_if_asked()
            Unlucky()
            with pytest.raises(Interrupted, match="SIGTERM"):
                stop_if_asked()
        stop_if_asked()
