"""Whoever listens to a run is told all of it: callbacks, the log in JSON, experiment trackers, exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import pytest
from tiny import Refused, make_bert, make_llama, make_tokenizer, make_tokens, prune_arguments
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import optima
from optima import BlockEvent, Callback, OptimaError, Recipe, Report, RunStart, ShareEvent, load_report, prune
from optima.cli import COMMANDS, main
from optima.reporting.log import JsonLog
from optima.reporting.record import LinearRecord
from optima.reporting.trackers import find_trackers

RECIPE = Recipe(selector="wanda", objective="sink", max_seq_length=16, num_calibration_samples=5, device="cpu")
EXIT_CODES = Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md"


class Diary(Callback):
    """Every call, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_start(self, start: RunStart) -> None:
        self.calls.append(("start", start))

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        self.calls.append(("stage", (stage, blocks, linears_per_block, done)))

    def on_share(self, share: ShareEvent) -> None:
        self.calls.append(("share", share))

    def on_linear(self, linear: LinearRecord) -> None:
        self.calls.append(("linear", linear))

    def on_block(self, block: BlockEvent) -> None:
        self.calls.append(("block", block))

    def on_note(self, note: str) -> None:
        self.calls.append(("note", note))

    def on_end(self, report: Report) -> None:
        self.calls.append(("end", report))

    def close(self, error: BaseException | None) -> None:
        self.calls.append(("close", error))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.calls if name == kind]


class TestCallbacks:
    def test_are_told_all_that_the_report_tells(self) -> None:
        diary = Diary()
        report = prune(make_llama(), RECIPE, calibration=make_tokens(), callbacks=[diary])
        kinds = [kind for kind, _ in diary.calls]
        assert kinds == ["start", "note", "stage", *["linear"] * 7, "block", *["linear"] * 7, "block", "end", "close"]
        assert tuple(diary.of("linear")) == report.linears
        assert tuple(block.record for block in diary.of("block")) == report.blocks
        assert [(block.done, block.total, block.left > 0) for block in diary.of("block")] == [
            (1, 2, True),
            (2, 2, False),
        ]
        assert tuple(diary.of("note")) == report.run.notes
        assert diary.of("end") == [report]
        assert diary.of("close") == [None]
        (start,) = diary.of("start")
        assert (start.model, start.output_dir, start.blocks, start.linears) == ("LlamaForCausalLM", None, 2, 14)
        assert (start.samples, start.length) == (5, 16)
        assert start.recipe == report.run.recipe

    def test_walks_before_the_pruning_are_named(self) -> None:
        diary = Diary()
        recipe = Recipe(allocation="loss", max_seq_length=16, device="cpu")
        prune(make_llama(), recipe, calibration=make_tokens(), callbacks=[diary])
        assert [stage for stage, *_ in diary.of("stage")] == ["sweep", "survey", "prune"]
        assert [block.stage for block in diary.of("block")] == ["survey"] * 2 + ["prune"] * 2

    def test_generation_is_a_walk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And the run has begun by then."""
        monkeypatch.chdir(tmp_path)
        diary = Diary()
        Path("text.txt").write_text("the quick brown fox jumps over the lazy dog " * 99)
        recipe = replace(RECIPE, dataset=["text.txt"], self_generated=0.5, num_calibration_samples=36)
        report = prune(make_llama(), recipe, tokenizer=make_tokenizer(), callbacks=[diary])
        assert [kind for kind, _ in diary.calls[:2]] == ["start", "stage"], "before text is written"
        assert diary.of("stage")[0] == ("write", 18, 1, 0)
        shares = [event.share for event in diary.of("share")]
        assert shares == sorted(set(shares))
        assert 0 < shares[0] < 1 == shares[-1]
        assert {event.stage for event in diary.of("share")} == {"write"}
        (start,) = diary.of("start")
        assert (start.samples, start.length) == (36, 16)
        assert report.run.num_tokens == 36 * 16

    @pytest.mark.parametrize(("make", "steps"), [(make_llama, 2 + 3 + 2), (make_bert, 2 + 2)])
    def test_a_sweep_tells_how_far_it_is(self, make: Callable[[], PreTrainedModel], steps: int) -> None:
        """There and back through both blocks, and between them the head, batch by batch, if there is one."""
        diary = Diary()
        recipe = Recipe(max_seq_length=16, device="cpu", batch_size=2)
        prune(make(), recipe, calibration=make_tokens() % 99, callbacks=[diary])
        shares = [event.share for event in diary.of("share")]
        assert len(shares) == steps
        assert 0 < shares[0] < 1 == shares[-1]
        assert shares == sorted(set(shares))
        assert all(event.stage == "sweep" and event.elapsed > 0 <= event.left for event in diary.of("share"))

    def test_an_error_of_one_ends_the_run_and_closes_all(self) -> None:
        class Full(Callback):
            def on_block(self, block: BlockEvent) -> None:
                raise RuntimeError("no more room")

        first, last = Diary(), Diary()
        with pytest.raises(RuntimeError, match="no more room"):
            prune(make_llama(), RECIPE, calibration=make_tokens(), callbacks=[first, Full(), last])
        for diary in (first, last):
            assert str(diary.of("close")[0]) == "no more room"
            assert not diary.of("end")

    def test_a_resumed_run_tells_of_the_blocks_that_were_done(self, root: Path) -> None:
        class Stop(Callback):
            def on_block(self, block: BlockEvent) -> None:
                raise KeyboardInterrupt

        recipe = Recipe(
            selector="wanda", objective="sink", max_seq_length=16, num_calibration_samples=4, dataset=["text.txt"]
        )
        with pytest.raises(KeyboardInterrupt):
            prune("model", recipe, output_dir="out", callbacks=[Stop()])
        diary = Diary()
        report = prune("model", recipe, output_dir="out", callbacks=[diary], resume=True)
        assert [block.resumed for block in diary.of("block")] == [True, False]
        assert [math.isnan(block.left) for block in diary.of("block")] == [True, False], "nothing is known from replays"
        assert tuple(diary.of("linear")) == report.linears[7:]

    def test_the_output_has_its_name_at_the_end(self, root: Path) -> None:
        class Upload(Callback):
            def on_end(self, report: Report) -> None:
                found.append(load_report("out"))

        found: list[Report] = []
        options = {"callbacks": [Upload()], "calibration": make_tokens(), "overwrite": True}
        (root / "out").mkdir()
        reports = [prune("model", replace(RECIPE, sparsity=s), output_dir="out", **options) for s in (0.5, 0.25)]
        assert found == reports

    def test_progress_can_be_left_out(self, capfd: pytest.CaptureFixture[str]) -> None:
        prune(make_llama(), RECIPE, calibration=make_tokens(), progress=False)
        assert capfd.readouterr() == ("", "")


class TestNotebook:
    """A notebook runs cells inside an event loop, with a stderr of its own, and some run them in another thread."""

    def test_inside_an_event_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = io.StringIO()  # no terminal, no fileno
        monkeypatch.setattr("sys.stderr", screen)

        async def cell() -> Report:
            return prune(make_llama(), RECIPE, calibration=make_tokens())

        report = asyncio.run(cell())
        assert len(report.linears) == 14
        lines = [line.split("  ")[0] for line in screen.getvalue().splitlines()]
        assert lines[0] == "reading the calibration text"
        assert lines[-2:] == ["block 1/2", "block 2/2"]

    def test_in_another_thread(self, root: Path) -> None:
        found: list[Report] = []
        recipe = Recipe(
            selector="wanda", objective="sink", max_seq_length=16, num_calibration_samples=4, dataset=["text.txt"]
        )
        thread = threading.Thread(target=lambda: found.append(prune("model", recipe, output_dir="out")))
        thread.start()
        thread.join()
        assert found == [load_report("out")]


def test_calibration_as_people_have_it() -> None:
    """All forms are in tests/unit/test_given.py."""
    tokens = make_tokens()
    loader = DataLoader(TensorDataset(tokens), batch_size=2)
    first, second = (prune(make_llama(), RECIPE, calibration=text) for text in (tokens, loader))
    assert first.run.data_hash == second.run.data_hash
    with pytest.raises(OptimaError, match="differ in length"):
        prune(make_llama(), RECIPE, calibration=[tokens[:2], tokens[:2, :8]])


def log_of(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(prune_arguments("--selector", "wanda", "--objective", "sink", "--log-format", "json", *options)) == code
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


class TestJsonLog:
    @pytest.fixture(autouse=True)
    def own_logging(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is logged is the process's; the test's runs must leave pytest's handlers alone."""
        monkeypatch.setattr("optima.reporting.log.JsonLog.take_over", lambda self: None)

    def test_every_line_is_an_object(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lines = log_of(capsys)
        events = [line["event"] for line in lines]
        assert events == ["start", "stage", *["linear"] * 7, "block", *["linear"] * 7, "block", "end"]
        assert all(re.match(r"\d{4}-\d\d-\d\dT.*\+00:00$", line["time"]) for line in lines)
        report = load_report("out")
        assert lines[0]["log_version"] == 1
        assert lines[0]["output_dir"] == "out"
        assert [line["error"] for line in lines if line["event"] == "linear"] == [one.error for one in report.linears]
        assert [line["done"] for line in lines if line["event"] == "block"] == [1, 2]
        assert lines[-1]["gap_max"] == report.gap_max

    @pytest.mark.parametrize("options", [["--sparsity", "2"], ["--unknown"]])
    def test_errors_too(self, root: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
        (line,) = log_of(capsys, *options, code=2)
        assert (line["event"], line["exit_code"]) == ("error", 2)
        assert "sparsity" in line["message"] or "unknown" in line["message"]

    def test_an_unknown_format_is_refused(self, late: Refused) -> None:
        assert "--log-format" in late("--log-format", "xml")


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Whatever takes over the process's logging, all handlers come back."""
    root = logging.getLogger()
    found = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in [root, *found]]
    level = root.level
    root.handlers.clear()
    yield
    for logger, handlers, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("propagates", [True, False])
def test_what_libraries_say_is_a_line_too(capsys: pytest.CaptureFixture[str], propagates: bool) -> None:
    screen = io.StringIO()
    own = logging.getLogger("library.with.a.handler")
    own.addHandler(logging.StreamHandler())
    own.propagate = propagates
    JsonLog(screen).take_over()
    logging.getLogger("library").error("one")
    transformers_logging.get_logger("transformers.x").error("two")
    own.error("three")
    lines = [json.loads(line) for line in screen.getvalue().splitlines()]
    assert [(line["event"], line["level"], line["message"]) for line in lines] == [
        ("log", "error", "one"),
        ("log", "error", "two"),
        ("log", "error", "three"),
    ]
    assert capsys.readouterr().err == ""


def test_nothing_is_said_before_the_log_takes_over(root: Path) -> None:
    script = "import datasets, logging, torch\nfrom optima.cli import main\nmain({})\n" + "".join(
        f"logging.getLogger({name!r}).warning('late')\n" for name in ("datasets", "huggingface_hub", "torch.fx")
    )
    arguments = ["prune", "nowhere", "--output-dir", "out", "--recipe", "best", "--pattern", "2:4"]
    command = [sys.executable, "-c", script.format([*arguments, "--log-format", "json"])]
    errors = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = [json.loads(line) for line in errors.splitlines()]
    assert "allocation loss is left out" in lines[0]["message"]
    assert [line["event"] for line in lines] == ["log", "error", "log", "log", "log"]


class FakeTracker(ModuleType):
    """What trackio and wandb have in common."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> FakeTracker:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (values, step)))

    def finish(self, **options: Any) -> None:
        self.calls.append(("finish", options))


class TestTrackers:
    @pytest.mark.parametrize(("name", "ending"), [("trackio", {}), ("wandb", {"exit_code": 0})])
    def test_a_point_a_block_and_the_totals(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: dict[str, int]
    ) -> None:
        fake = FakeTracker(name)
        monkeypatch.setitem(sys.modules, name, fake)
        assert main(prune_arguments("--report-to", name)) == 0
        (kind, options), *logs, last = fake.calls
        assert (kind, options["project"], options["name"]) == ("init", "optima", "out")
        assert options["config"]["selector"] == "optima"
        assert last == ("finish", ending)
        report = load_report("out")
        assert [step for _, (_, step) in logs] == [1, 2, 2]
        for block, (_, (values, _)) in enumerate(logs[:2]):
            own = {one.name.rpartition(".")[2]: one for one in report.linears if one.block == block}
            assert values["error/mlp.up_proj"] == pytest.approx(own["up_proj"].error)
            assert values["gap/self_attn.q_proj"] == own["q_proj"].gap_max
        assert logs[2][1][0]["run/error"] == report.error_geomean

    @pytest.mark.parametrize("family", ["t5", "qwen3_moe"])
    def test_steps_go_on_over_stacks_and_experts_are_one_kind(
        self, monkeypatch: pytest.MonkeyPatch, family: str
    ) -> None:
        fake = FakeTracker("wandb")
        monkeypatch.setitem(sys.modules, "wandb", fake)
        prune(families.build(family), RECIPE, calibration=families.make_ids(), callbacks=find_trackers(["wandb"]))
        logs = [call for kind, call in fake.calls if kind == "log"]
        *steps, last = (step for _, step in logs)
        assert steps == list(range(1, len(logs)))
        assert last == steps[-1]
        assert not [name for values, _ in logs for name in values if name[-1].isdigit()]

    def test_steps_go_on_where_a_run_was_resumed(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        class Stop(Callback):
            def on_block(self, block: BlockEvent) -> None:
                raise KeyboardInterrupt

        recipe = replace(RECIPE, dataset=["text.txt"])
        with pytest.raises(KeyboardInterrupt):
            prune("model", recipe, output_dir="out", callbacks=[Stop()])
        fake = FakeTracker("wandb")
        monkeypatch.setitem(sys.modules, "wandb", fake)
        prune("model", recipe, output_dir="out", callbacks=find_trackers(["wandb"]), resume=True)
        assert [step for kind, (_, step) in fake.calls[1:-1]] == [2, 2], "the second block, and the totals"

    def test_tensorboard_can_read_what_is_written(self, root: Path) -> None:
        reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        assert main(prune_arguments("--report-to", "tensorboard")) == 0
        (directory,) = Path("runs").iterdir()
        assert directory.name.endswith("-out")
        found = reading.EventAccumulator(str(directory)).Reload()
        errors = [event.value for event in found.Scalars("error/mlp.up_proj")]
        own = [one.error for one in load_report("out").linears if one.name.endswith("up_proj")]
        assert errors == pytest.approx(own, rel=1e-6)

    def test_a_run_that_fails_is_marked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stop(Callback):
            def on_block(self, block: BlockEvent) -> None:
                raise KeyboardInterrupt

        fake = FakeTracker("wandb")
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with pytest.raises(KeyboardInterrupt):
            prune(make_llama(), RECIPE, calibration=make_tokens(), callbacks=[*find_trackers(["wandb"]), Stop()])
        assert fake.calls[-1] == ("finish", {"exit_code": 1})

    def test_one_that_cannot_begin(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("tensorboard")
        Path("runs").touch()
        assert main(prune_arguments("--report-to", "tensorboard")) == 2
        assert "--report-to tensorboard cannot begin (" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
    def test_one_that_is_not_installed_is_refused_first(
        self, late: Refused, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        for module in [name, *(loaded for loaded in sys.modules if loaded.startswith("torch.utils.tensorboard"))]:
            monkeypatch.setitem(sys.modules, module, None)
        assert late("--report-to", name).endswith(f"pip install {name}")

    def test_names_that_are_none(self, late: Refused) -> None:
        assert "choose among none, tensorboard" in late("--report-to", "mlflow")
        assert "excludes wandb" in late("--report-to", "none", "wandb")
        assert find_trackers(["none"]) == find_trackers([]) == []


class TestExitCodes:
    """The codes of docs/reference/exit-codes.md are those that a shell sees."""

    def codes(self) -> set[int]:
        return set(map(int, re.findall(r"^\| (\d+) \|", EXIT_CODES.read_text(encoding="utf-8"), re.MULTILINE)))

    def test_the_page_has_them_all(self) -> None:
        assert self.codes() == {0, 1, 2, 129, 130, 137, 141, 143}

    def test_done_and_refused(self, root: Path) -> None:
        for arguments, code in (["--version"], 0), ([], 2):
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == code
        assert main(["prune", "nowhere", "--output-dir", "out"]) == 2

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    def test_signals(self, root: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int) -> None:
        def told(self: object, *_: object) -> None:
            os.kill(os.getpid(), number)

        monkeypatch.setattr("optima.reporting.progress.Progress.on_block", told)
        before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        try:
            assert main(prune_arguments()) == code
        finally:
            signal.signal(number, before)

    def test_a_bug_is_no_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Python ends with 1 and the traceback."""
        monkeypatch.setitem(COMMANDS, "pack", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["pack", "somewhere"])


def test_the_public_names_are_there() -> None:
    assert optima.Callback is Callback
    assert {"Callback", "BlockEvent", "RunStart"} <= set(optima.__all__)
