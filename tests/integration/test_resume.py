"""A run that was stopped at any moment goes on, and ends with the very bits of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import MESSAGES, finish, lose_power_at_sync, on_call, raising, start, stop_at_sync
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_tokens, prune_arguments, save_model, save_text, snapshot

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
TUNED = ("--tuning-epochs", "2", "--sparsity", "0.7")
GENERATED = ("--self-generated", "0.5")


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
        # Here, not in a child: children share what is imported at first use. They have one thread.
        torch.set_num_threads(1)
        assert main(prune_arguments()) == 0
    return home / "out"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build(tmp_path)
    return tmp_path


def printed() -> str:
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


def check_same(whole: Path) -> None:
    assert files(Path("out")) == files(whole)
    assert vars(untimed(Path("out")).run) == vars(untimed(whole).run)
    assert untimed(Path("out")) == untimed(whole)
    assert not PARTIAL.exists()


def check_goes_on(whole: Path, *options: str) -> str:
    """The next run ends as an undisturbed one; returns its notes."""
    if not Path("out").exists():
        assert finish(start("out", "--resume", *options)) == 0, printed()
    elif PARTIAL.exists():  # the run was stopped when there was nothing left to do but clear up
        shutil.rmtree(PARTIAL)
    check_same(whole)
    return "; ".join(optima.load_report("out").run.notes)


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
    @pytest.mark.parametrize(
        ("blocks", "options"), [(1, ()), pytest.param(2, (), marks=SLOW), (BLOCKS, ()), (2, TUNED), (1, GENERATED)]
    )
    def test_after_a_block(self, whole: Path, root: Path, blocks: int, options: tuple[str, ...]) -> None:
        if options:
            assert finish(start("out", *options)) == 0
            whole = Path("out").rename(root.parent / f"whole-{root.name}")
        stopped(blocks, *options)
        assert f"resumed after model.layers.{blocks - 1}" in check_goes_on(whole, *options)

    def test_seconds_and_peak_memory_are_of_all_runs(self) -> None:
        def slow() -> None:
            clock = time.perf_counter
            time.perf_counter = lambda: 1e6 * clock()
            PeakMemory.peak = lambda self: 10**15  # type: ignore[method-assign]
            stop_at_sync(13)()

        assert finish(start("out", prepare=slow)) == -signal.SIGKILL
        assert finish(start("out", "--resume")) == 0, printed()
        run = optima.load_report("out").run
        assert run.seconds > 1e4
        assert run.peak_memory_bytes == 10**15

    def test_by_a_signal_that_says_how_to_go_on(self, whole: Path) -> None:
        assert finish(start("out", prepare=stop_at_sync(13, signal.SIGTERM))) == 128 + signal.SIGTERM
        assert "--resume" in printed()
        check_goes_on(whole)

    @pytest.mark.parametrize(("first", "last"), [(10, 11), pytest.param(1, 999, marks=SLOW)])
    def test_by_a_loss_of_power(self, whole: Path, first: int, last: int) -> None:
        for count in range(first, last + 1):
            code = finish(start("out", prepare=lose_power_at_sync(count)))
            check_goes_on(whole)
            shutil.rmtree("out")
            if code == 0 and count > 20:  # it brings nothing more to the disk
                break
            assert code == -signal.SIGKILL

    @SLOW
    def test_at_random_moments(self, whole: Path) -> None:
        started = time.perf_counter()
        assert finish(start("first")) == 0
        seconds = time.perf_counter() - started
        draw = random.Random(0)
        for _ in range(20):
            child = start("out", "--resume")
            time.sleep(draw.uniform(0, 1.05 * seconds))
            os.kill(child, draw.choice([signal.SIGKILL, signal.SIGTERM]))
            if finish(child) == 0 or draw.random() < 0.5:  # else the next goes on with it, and is stopped too
                check_goes_on(whole)
            if Path("out").exists():
                shutil.rmtree("out")

    def test_by_a_full_disk(self, whole: Path) -> None:
        """What is outside the blocks is larger than a block."""
        full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, 30_000))
        assert finish(start("out", prepare=full)) == 2
        assert "free some space" in printed()
        assert "--resume" in printed()
        assert len(Journal(JOURNAL).blocks) == BLOCKS
        check_goes_on(whole)


class TestDamage:
    @pytest.mark.parametrize("size", [100, pytest.param(None, marks=SLOW)])
    def test_a_shard_is_done_again_with_all_after_it(self, whole: Path, size: int | None) -> None:
        stopped(3)
        (shard,) = PARTIAL.glob("model/model-00002-*")
        shard.unlink() if size is None else os.truncate(shard, size)
        assert f"resumed after model.layers.0: {shard.resolve()}" in check_goes_on(whole)

    def test_a_line_is_done_again_with_all_after_it(self, whole: Path) -> None:
        stopped(3)
        first, second, *rest = JOURNAL.read_text().splitlines()
        JOURNAL.write_text("".join(f"{line}\n" for line in (first, second[1:], *rest)))
        assert "resumed from the first block on: line 2" in check_goes_on(whole)


class TestOtherRuns:
    def test_a_fresh_one_must_say_what_becomes_of_it(self, whole: Path) -> None:
        stopped()
        before = snapshot(PARTIAL)
        assert finish(start("out")) == 2
        assert "--no-resume" in printed()
        assert snapshot(PARTIAL) == before
        assert finish(start("out", "--no-resume")) == 0
        check_same(whole)
        assert any("unfinished" in note for note in optima.load_report("out").run.notes)

    def test_another_one_is_refused_by_what_differs(self, whole: Path) -> None:
        stopped()
        for key, file, change in CHANGES:
            shutil.copy(file, "kept")
            before, options = snapshot(PARTIAL / "model"), change() or []
            assert finish(start("out", "--resume", *options)) == 2
            assert f"its {key}" in printed()
            assert snapshot(PARTIAL / "model") == before
            os.replace("kept", file)

    def test_there_may_be_nothing_to_resume(self, whole: Path) -> None:
        assert "no unfinished run of" in check_goes_on(whole)


def edit_weights() -> None:
    """The file keeps its size and time."""
    file = Path("model/model.safetensors")
    weights, times = load_file(file), file.stat()
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def edit_config() -> None:
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def edit_text() -> None:
    save_text(Path("text.txt"), "Other words. " * 99)


# What differs; a file; how to make it differ, with options.
CHANGES: list[tuple[str, str, Callable[[], list[str] | None]]] = [
    ("recipe.damping", "text.txt", lambda: ["--damping", "0.1"]),
    ("recipe.batch_size", "text.txt", lambda: ["--batch-size", "4"]),
    ("configuration", "model/config.json", edit_config),
    ("tokens", "text.txt", edit_text),
    ("weights", "model/model.safetensors", edit_weights),
]


class TestModelInMemory:
    def test_goes_on_if_it_is_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, half, model = make_llama(), make_llama(), make_llama()
        optima.prune(expected, output_dir="expected", calibration=make_tokens())
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "commit", on_call(2, Writer.commit, raising(KeyboardInterrupt())))
            with pytest.raises(KeyboardInterrupt):
                optima.prune(half, output_dir="out", calibration=make_tokens())
        with pytest.raises(ModelError, match="its weights was"):
            optima.prune(half, output_dir="out", calibration=make_tokens(), resume=True)
        optima.prune(model, output_dir="out", calibration=make_tokens(), resume=True)
        assert files(Path("out")) == files(Path("expected"))
        assert untimed(Path("out")) == untimed(Path("expected"))
        state = expected.state_dict()
        assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())

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
