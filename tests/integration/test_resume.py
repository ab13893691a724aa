"""A run that was stopped at any moment goes on, and ends with the very bits of one that was not."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import MESSAGES, Disk, finish, on_call, raising, start, stop_at_sync
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_tokens, prune_arguments, save_model, save_text, snapshot, weight_files

import optima
from optima.checkpointing import Journal
from optima.cli import main
from optima.device import PeakMemory
from optima.errors import ModelError
from optima.models.save import Writer
from optima.patterns import Pattern
from optima.selectors.base import LinearTask, Selection
from optima.selectors.ranking import top_scores

BLOCKS = 3
PARTIAL = Path(".out.optima-partial")
JOURNAL = PARTIAL / "journal.jsonl"
SLOW = pytest.mark.slow
TIMED = ("report.json", "report.md", "report.html")  # all else is compared byte by byte


def build(home: Path) -> None:
    save_model(home / "model", make_llama(num_hidden_layers=BLOCKS).bfloat16())
    save_text(home / "text.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbed."""
    home = tmp_path_factory.mktemp("whole")
    build(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        # Here, not in a child: children share what is imported at first use.
        assert main(prune_arguments()) == 0
    return home / "out"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build(tmp_path)
    return tmp_path


def said() -> str:
    return " ".join(Path(MESSAGES).read_text().split())


def files(out: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in snapshot(out).items() if name not in TIMED}


def untimed(out: Path) -> optima.Report:
    """The report without what differs from run to run."""
    report = optima.load_report(out)
    notes = tuple(note for note in report.run.notes if "resume" not in note and "unfinished" not in note)
    run = dataclasses.replace(report.run, peak_memory_bytes=0, seconds=0, created="", stages={}, notes=notes)
    linears = tuple(dataclasses.replace(linear, seconds=0) for linear in report.linears)
    blocks = tuple(dataclasses.replace(block, seconds={}) for block in report.blocks)
    return optima.Report(run, linears, blocks)


def check_same(whole: Path, out: Path = Path("out")) -> None:
    assert files(out) == files(whole)
    assert vars(untimed(out).run) == vars(untimed(whole).run)
    assert untimed(out) == untimed(whole)
    assert sorted(os.listdir()) == ["messages.txt", "model", out.name, "text.txt"]


def check_goes_on(whole: Path, *options: str) -> str:
    """The next run ends as an undisturbed one; returns its notes."""
    if not Path("out").exists():
        assert finish(start("out", "--resume", *options)) == 0, said()
    elif PARTIAL.exists():  # it was stopped when there was nothing left to do but clear up
        assert finish(start("out", "--resume", "--overwrite", *options)) == 0, said()
    check_same(whole)
    return "; ".join(optima.load_report("out").run.notes)


def count_syncs() -> int:
    """How often a run brings something to the disk."""
    calls = Path("calls")

    def prepare() -> None:
        fsync = os.fsync

        def note(handle: int) -> None:
            with calls.open("a") as opened:
                opened.write("x")
            fsync(handle)

        os.fsync = note

    assert finish(start("counted", prepare=prepare)) == 0
    shutil.rmtree("counted")
    count = len(calls.read_text())
    calls.unlink()
    return count


def stopped(blocks: int = 2, *options: str) -> None:
    """A run that was killed when it had committed so many blocks."""

    def prepare() -> None:
        commit = Writer.commit

        def counted(self: Writer, *args: object) -> None:
            commit(self, *args)  # type: ignore[arg-type]
            if len(self.done) == blocks:
                os.kill(os.getpid(), signal.SIGKILL)

        Writer.commit = counted  # type: ignore[assignment, method-assign]

    assert finish(start("out", *options, prepare=prepare)) == -signal.SIGKILL
    assert len(Journal(JOURNAL).blocks) == blocks


class TestStopped:
    @pytest.mark.parametrize("blocks", [1, pytest.param(2, marks=SLOW), BLOCKS])
    def test_after_a_block(self, whole: Path, blocks: int) -> None:
        stopped(blocks)
        assert f"resumed after model.layers.{blocks - 1}" in check_goes_on(whole)

    def test_seconds_and_peak_memory_are_of_all_runs(self) -> None:
        def slow() -> None:
            clock = time.perf_counter
            time.perf_counter = lambda: 1e6 * clock()
            PeakMemory.peak = lambda self: 10**15  # type: ignore[method-assign]
            stop_at_sync(13)()

        assert finish(start("out", prepare=slow)) == -signal.SIGKILL
        assert Journal(JOURNAL).blocks
        assert finish(start("out", "--resume")) == 0, said()
        run = optima.load_report("out").run
        assert run.seconds > 1e4
        assert run.peak_memory_bytes == 10**15

    def test_again_and_again(self, whole: Path) -> None:
        stopped(1)
        for count in (7, 5, 9):  # in a block, at the note of the resumed run, behind a block
            assert finish(start("out", "--resume", prepare=stop_at_sync(count))) == -signal.SIGKILL
        notes = check_goes_on(whole)
        assert "resumed after model.layers.0" in notes

    def test_self_generated_data_is_generated_again(self) -> None:
        written = ("--self-generated", "0.5")
        assert finish(start("undisturbed", *written)) == 0
        stopped(1, *written)
        assert finish(start("out", "--resume", *written)) == 0, said()
        assert files(Path("out")) == files(Path("undisturbed"))
        notes = [note for note in optima.load_report("out").run.notes if "resumed" not in note]
        assert notes == list(optima.load_report("undisturbed").run.notes)

    def test_by_a_signal_that_says_how_to_go_on(self, whole: Path) -> None:
        assert finish(start("out", prepare=stop_at_sync(13, signal.SIGTERM))) == 128 + signal.SIGTERM
        assert "--resume" in said()
        check_goes_on(whole)

    def test_by_a_loss_of_power(self, whole: Path) -> None:
        lost_power_at(whole, [10, 11], names=True)

    @pytest.mark.slow
    def test_at_every_other_write_over_an_earlier_output(self, whole: Path) -> None:
        stopped_at(whole, range(count_syncs() - 12, count_syncs() + 1, 2), "--overwrite")

    @pytest.mark.slow
    @pytest.mark.parametrize("names", [True, False])
    def test_by_a_loss_of_power_at_every_other_write(self, whole: Path, names: bool) -> None:
        """One begins at the first write and one at the second, so that every write is lost in one of both ways."""
        lost_power_at(whole, range(1 + names, count_syncs() + 1, 2), names)

    @pytest.mark.slow
    def test_at_random_moments(self, whole: Path) -> None:
        started = time.perf_counter()
        assert finish(start("first")) == 0
        seconds = time.perf_counter() - started
        shutil.rmtree("first")
        draw = random.Random(0)
        for _ in range(20):
            child = start("out", "--resume")
            time.sleep(draw.uniform(0, 1.05 * seconds))
            os.kill(child, signal.SIGKILL)
            finish(child)
            if draw.random() < 0.5:  # else the next goes on with it, and is killed too
                check_goes_on(whole)
            if Path("out").exists():
                shutil.rmtree("out")


def stopped_at(whole: Path, counts: range | list[int], *options: str) -> None:
    for count in counts:
        if options:
            assert finish(start("out", "--sparsity", "0.7", "--no-resume")) == 0
        assert finish(start("out", *options, prepare=stop_at_sync(count))) == -signal.SIGKILL
        if options and PARTIAL.exists():
            assert finish(start("out", "--resume", "--overwrite")) == 0, said()
        check_goes_on(whole)
        shutil.rmtree("out")


def lost_power_at(whole: Path, counts: range | list[int], names: bool) -> None:
    for count in counts:
        assert finish(start("out", prepare=Disk(count, names))) == -signal.SIGKILL
        check_goes_on(whole)
        shutil.rmtree("out")


class TestFullDisk:
    def test_a_file_too_large(self, whole: Path) -> None:
        """What is outside the blocks is larger than a block."""

        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

        assert finish(start("out", prepare=prepare)) == 2
        assert "free some space" in said()
        assert "--resume" in said()
        assert len(Journal(JOURNAL).blocks) == BLOCKS
        check_goes_on(whole)

    def test_in_the_middle_of_a_line(self, whole: Path) -> None:
        def prepare() -> None:
            append = Journal.append

            def fill(self: Journal, line: dict[str, object]) -> None:
                if line.get("block") == "model.layers.2":
                    with self.file.open("a") as opened:
                        opened.write('{"block": "model.la')
                    raise OSError(errno.ENOSPC, "No space left on device")
                append(self, line)

            Journal.append = fill  # type: ignore[method-assign, assignment]

        assert finish(start("out", prepare=prepare)) == 2
        assert "No space left on device" in said()
        notes = check_goes_on(whole)
        assert "resumed after model.layers.1" in notes


class TestDamage:
    @pytest.mark.parametrize("size", [pytest.param(0, marks=SLOW), 100, pytest.param(None, marks=SLOW)])
    def test_a_shard_is_done_again_with_all_after_it(self, whole: Path, size: int | None) -> None:
        stopped(3)
        (shard,) = PARTIAL.glob("model/model-00002-*")
        shard.unlink() if size is None else os.truncate(shard, size)
        assert f"resumed after model.layers.0: {shard.resolve()}" in check_goes_on(whole)

    @pytest.mark.parametrize(
        "edit",
        [
            pytest.param(lambda lines: [lines[0], lines[1][1:], *lines[2:]], id="no json"),
        ],
    )
    def test_a_line_is_done_again_with_all_after_it(self, whole: Path, edit: Callable[[list[str]], list[str]]) -> None:
        stopped(3)
        lines = JOURNAL.read_text().splitlines()
        edited = edit(lines)
        assert edited != lines
        JOURNAL.write_text("".join(f"{line}\n" for line in edited))
        assert f"resumed from the first block on: line 2 of {JOURNAL.resolve()} is damaged" in check_goes_on(whole)

    def test_what_a_journal_belongs_to_cannot_be_edited(self, whole: Path) -> None:
        stopped()
        text = JOURNAL.read_text()
        JOURNAL.write_text(text.replace('"seed": 0', '"seed": 1', 1))
        for option in ("--resume", "--overwrite"):
            assert finish(start("out", option)) == 2
            assert "--no-resume" in said()
        JOURNAL.write_text(text)
        check_goes_on(whole)


class TestOtherRuns:
    def test_a_fresh_one_must_say_what_becomes_of_it(self, whole: Path) -> None:
        stopped()
        before = snapshot(PARTIAL)
        assert finish(start("out")) == 2
        assert "--no-resume" in said()
        assert snapshot(PARTIAL) == before
        assert finish(start("out", "--no-resume")) == 0
        check_same(whole)
        assert any("unfinished" in note for note in optima.load_report("out").run.notes)

    def test_another_one_is_refused_by_what_differs(self, whole: Path) -> None:
        stopped()
        for key, change, undo in CHANGES:
            before, options = snapshot(PARTIAL / "model"), change() or []
            assert finish(start("out", "--resume", *options)) == 2
            assert f"its {key}" in said()
            assert snapshot(PARTIAL / "model") == before
            undo()
        assert finish(start("out", "--resume", "--device", "cpu")) == 0, said()
        assert weight_files(Path("out")) == weight_files(whole)

    @pytest.mark.slow
    def test_another_version_or_number_of_threads_is_noted(self, whole: Path) -> None:
        stopped()

        def newer() -> None:
            torch.set_num_threads(2)
            optima.run.library_versions = lambda: {"torch": "99.0"}  # type: ignore[attr-defined]

        assert finish(start("out", "--resume", prepare=newer)) == 0, said()
        notes = "; ".join(optima.load_report("out").run.notes)
        assert "versions.torch" in notes
        assert "device" in notes

    def test_one_at_the_same_time_is_refused(self, whole: Path) -> None:
        stopped()
        (wait, go), (told, end) = os.pipe(), os.pipe()

        def prepare() -> None:
            import optima.run

            prune_model = optima.run.prune_model

            def waits(*args: object) -> object:
                os.write(go, b"x")
                os.read(told, 1)
                return prune_model(*args)  # type: ignore[arg-type]

            optima.run.prune_model = waits  # type: ignore[assignment]

        child = start("out", "--resume", prepare=prepare)
        os.close(go)
        assert os.read(wait, 1) == b"x", f"it ended before it came to prune: {finish(child)} {said()}"
        for option in ("--resume", "--no-resume"):
            assert finish(start("out", option)) == 2
            assert "another run is writing" in said()
        os.write(end, b"x")
        assert finish(child) == 0
        check_same(whole)

    def test_there_may_be_nothing_to_resume(self, whole: Path) -> None:
        assert "no unfinished run of" in check_goes_on(whole)


def edit_weights() -> None:
    weights = load_file("model/model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    os.replace("model/model.safetensors", "kept")
    save_file(weights, "model/model.safetensors", {"format": "pt"})


def edit_config() -> None:
    shutil.copy("model/config.json", "kept")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def edit_text() -> None:
    shutil.copy("text.txt", "kept")
    save_text(Path("text.txt"), "Other words. " * 99)


def put_back(file: str) -> Callable[[], object]:
    return lambda: os.replace("kept", file)


# What differs; how to make it so, with options; how to undo it.
CHANGES: list[tuple[str, Callable[[], list[str] | None], Callable[[], object]]] = [
    ("recipe.damping", lambda: ["--damping", "0.1"], int),
    ("recipe.batch_size", lambda: ["--batch-size", "4"], int),
    ("weights", edit_weights, put_back("model/model.safetensors")),
    ("configuration", edit_config, put_back("model/config.json")),
    (
        "tokens",
        edit_text,
        put_back("text.txt"),
    ),
]


class TestMethods:
    """What looks at more than one block, or keeps something between blocks."""

    def test_a_tuned_run_goes_on(self, root: Path) -> None:
        options = ["--tuning-epochs", "2", "--sparsity", "0.7"]
        assert finish(start("whole", *options)) == 0
        shutil.move("whole", root.parent / f"whole-{root.name}")
        stopped(2, *options)
        check_goes_on(root.parent / f"whole-{root.name}", *options)


class TestModelInMemory:
    def interrupted(self, monkeypatch: pytest.MonkeyPatch) -> optima.Report | torch.nn.Module:
        model = make_llama()
        commit = Writer.commit

        def interrupt(self: Writer, *args: object) -> None:
            commit(self, *args)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Writer, "commit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                optima.prune(model, output_dir="out", calibration=make_tokens())
        return model

    def test_goes_on_if_it_is_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interrupted(monkeypatch)
        expected, model = make_llama(), make_llama()
        optima.prune(expected, output_dir="expected", calibration=make_tokens())
        optima.prune(model, output_dir="out", calibration=make_tokens(), resume=True)
        assert files(Path("out")) == files(Path("expected"))
        assert untimed(Path("out")) == untimed(Path("expected"))
        state = expected.state_dict()
        assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())

    def test_does_not_if_it_is_half_pruned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.interrupted(monkeypatch)
        with pytest.raises(ModelError, match="its weights was"):
            optima.prune(model, output_dir="out", calibration=make_tokens(), resume=True)

    def test_only_with_the_selector_that_it_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(selector: Lot, resume: bool | None = None) -> None:
            recipe = optima.Recipe(selector=selector, sparsity=0.5, objective="plain")
            optima.prune(make_llama(), recipe, output_dir="out", calibration=make_tokens(), resume=resume)

        with monkeypatch.context() as patch:
            patch.setattr(Writer, "commit", on_call(2, Writer.commit, raising(KeyboardInterrupt())))
            with pytest.raises(KeyboardInterrupt):
                run(Lot(1))
        with pytest.raises(ModelError, match="selector"):
            run(Lot(2), resume=True)
        run(Lot(1), resume=True)


def test_a_run_without_a_place_has_nothing_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*prune_arguments(), "--resume=yes"]) == 2
    assert "--resume" in capsys.readouterr().err


class Lot:
    """A selector as docs/howto/extend.md makes one: no dataclass."""

    published_scope = "row"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __repr__(self) -> str:
        return f"Lot({self.seed})"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        generator = torch.Generator().manual_seed(self.seed)
        return Selection(top_scores(torch.rand(task.weight_OD.shape, generator=generator), pattern))
