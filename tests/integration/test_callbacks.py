"""Callbacks and exit codes of a run."""

from __future__ import annotations

import asyncio
import io
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import raising
from tiny import make_llama, make_tokenizer, make_tokens, prune_arguments

from optima import BlockEvent, Callback, Recipe, Report, RunStart, load_report, prune
from optima.cli import main

RECIPE = Recipe(selector="wanda", objective="sink", max_seq_length=16, num_calibration_samples=5)
EXIT_CODES = Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md"


class Diary(Callback):
    """Every call, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_start(self, start: RunStart) -> None:
        self.calls.append(("start", start))

    def on_stage(self, stage: str, blocks: int, done: int) -> None:
        self.calls.append(("stage", (stage, blocks, done)))

    def on_progress(self, fraction: float, elapsed: float, left: float) -> None:
        assert elapsed > 0 <= left
        self.calls.append(("progress", fraction))

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
    def test_get_all_that_the_report_has(self) -> None:
        diary = Diary()
        report = prune(make_llama(), RECIPE, calibration=make_tokens(), callbacks=[diary])
        kinds = [kind for kind, _ in diary.calls]
        assert kinds == ["start", "note", "stage", "block", "block", "end", "close"]
        assert tuple(linear for block in diary.of("block") for linear in block.linears) == report.linears
        assert tuple(block.record for block in diary.of("block")) == report.blocks
        assert [(each.done, each.total, each.left > 0) for each in diary.of("block")] == [(1, 2, True), (2, 2, False)]
        assert tuple(diary.of("note")) == report.run.notes
        assert diary.of("end") == [report]
        assert diary.of("close") == [None]
        (start,) = diary.of("start")
        assert (start.model, start.blocks, start.linears) == ("LlamaForCausalLM", 2, 14)
        assert (start.samples, start.length) == (5, 16)
        assert start.recipe == report.run.recipe

    def test_generation_is_a_stage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And the run has begun by then."""
        monkeypatch.chdir(tmp_path)
        diary = Diary()
        Path("text.txt").write_text("the quick brown fox jumps over the lazy dog " * 99)
        recipe = RECIPE.replace(dataset=["text.txt"], self_generated=0.5, num_calibration_samples=36)
        report = prune(make_llama(), recipe, tokenizer=make_tokenizer(), callbacks=[diary])
        assert [kind for kind, _ in diary.calls[:2]] == ["start", "stage"], "before text is written"
        assert diary.of("stage")[0] == ("generate", 18, 0)
        fractions = diary.of("progress")
        assert fractions == sorted(set(fractions))
        assert 0 < fractions[0] < 1 == fractions[-1]
        (start,) = diary.of("start")
        assert (start.samples, start.length) == (36, 16)
        assert report.run.num_tokens == 36 * 16

    def test_an_error_of_one_ends_the_run_and_closes_all(self) -> None:
        class Full(Callback):
            on_block = raising(RuntimeError("no more room"))

        first, last = Diary(), Diary()
        with pytest.raises(RuntimeError, match="no more room"):
            prune(make_llama(), RECIPE, calibration=make_tokens(), callbacks=[first, Full(), last])
        for diary in (first, last):
            assert str(diary.of("close")[0]) == "no more room"
            assert not diary.of("end")

    def test_a_resumed_run_reports_the_blocks_that_were_done(self, root: Path) -> None:
        class Stop(Callback):
            on_block = raising(KeyboardInterrupt())

        recipe = RECIPE.replace(dataset=["text.txt"])
        with pytest.raises(KeyboardInterrupt):
            prune("model", recipe, output_dir="out", callbacks=[Stop()])
        diary = Diary()
        prune("model", recipe, output_dir="out", callbacks=[diary], resume=True)
        assert [block.resumed for block in diary.of("block")] == [True, False]
        assert [math.isnan(block.left) for block in diary.of("block")] == [True, False], "nothing is known from replays"

    def test_the_output_has_its_name_at_the_end(self, root: Path) -> None:
        class Upload(Callback):
            def on_end(self, report: Report) -> None:
                found.append(load_report("out"))

        found: list[Report] = []
        (root / "out").mkdir()
        report = prune("model", RECIPE, output_dir="out", callbacks=[Upload()], calibration=make_tokens())
        assert found == [report]


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
        assert lines[-2:] == ["pruning: block 1/2", "pruning: block 2/2"]


class TestExitCodes:
    """The codes of docs/reference/exit-codes.md are those that a shell sees."""

    def test_the_page_has_them_all(self) -> None:
        codes = re.findall(r"^\| (\d+) \|", EXIT_CODES.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(map(int, codes)) == {0, 1, 2, 129, 130, 137, 141, 143}

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    def test_signals(self, root: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int) -> None:
        def stop(self: object, *_: object) -> None:
            os.kill(os.getpid(), number)

        monkeypatch.setattr("optima.reporting.callbacks.Progress.on_block", stop)
        before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        try:
            assert main(prune_arguments()) == code
        finally:
            signal.signal(number, before)
