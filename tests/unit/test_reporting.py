"""The record of a run, its renderings in text and Markdown, and the progress display."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from records import BLOCK, RUN, linear, report, unsolved
from rich.console import Console

from optima.errors import OptimaError
from optima.reporting.callbacks import Callbacks, Progress, RunStart, make_progress
from optima.reporting.markdown import render_markdown
from optima.reporting.record import SCHEMA_VERSION, BlockRecord, Report, load_report, weighted_mean
from optima.reporting.summary import render_summary


def section(text: str, title: str) -> list[str]:
    """Lines under ``## title`` up to the next heading."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip().splitlines()


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


class TestRecord:
    def test_round_trip(self, tmp_path: Path) -> None:
        original = report(linear(), unsolved(block=1), notes=("one", "two"), weights_left_out=("mtp.0",))
        assert original.save(tmp_path) == tmp_path / "report.json"
        assert load_report(tmp_path) == load_report(str(tmp_path / "report.json")) == original
        assert original.save(tmp_path / "other.json") == tmp_path / "other.json"

    def test_numbers_that_json_cannot_hold_survive(self, tmp_path: Path) -> None:
        text = report(linear(gap_max=math.inf, error=math.nan, error_mask=math.inf)).save(tmp_path).read_text()
        json.loads(text, parse_constant=pytest.fail)
        loaded = load_report(tmp_path).linears[0]
        assert (loaded.gap_max, loaded.error_mask) == (math.inf, math.inf)
        assert math.isnan(loaded.error)

    def test_totals(self) -> None:
        big = linear(block=1, shape=(8, 12), sparsity=0.75, error=0.4, gap_max=2e-4, rows_not_converged=3)
        totals = report(linear(), big, unsolved(block=2, error=0.0, shape=(8, 8), sparsity=0.0))
        assert totals.sparsity == pytest.approx((0.5 * 32 + 0.75 * 96) / (32 + 96 + 64))
        assert weighted_mean(totals.linears[:2], "sparsity") == pytest.approx((0.5 * 32 + 0.75 * 96) / 128)
        assert totals.error_geomean == pytest.approx(math.sqrt(0.1 * 0.4))
        assert (totals.gap_max, totals.rows_not_converged) == (2e-4, 3)
        assert report(linear(), linear(gap_written_max=None, tuned=True)).gap_written_max is None
        assert math.isnan(report(linear(gap_max=math.nan), linear(gap_max=1.0)).gap_max)
        empty = Report(RUN, ())
        assert (empty.sparsity, empty.error_geomean, empty.gap_max, empty.rows_not_converged) == (0.0, 0.0, None, 0)

    @pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[]", b'{"schema_version": 1}', None])
    def test_other_files_are_refused(self, tmp_path: Path, text: bytes | None) -> None:
        if text is not None:
            (tmp_path / "report.json").write_bytes(text)
        with pytest.raises(OptimaError, match=f"cannot read|reads {SCHEMA_VERSION}"):
            load_report(tmp_path)

    @pytest.mark.parametrize(
        ("place", "change"),
        [
            ("run.extra", lambda c: c["run"].update(extra=1)),
            ("run.seed", lambda c: c["run"].update(seed=True)),
            ("linears.0.error_mask", lambda c: c["linears"][0].update(error_mask="big")),
            ("blocks.0.seconds.solve", lambda c: c["blocks"][0].update(seconds={"solve": None})),
        ],
    )
    def test_malformed_content_names_the_field(self, tmp_path: Path, place: str, change: object) -> None:
        file = report().save(tmp_path)
        content = json.loads(file.read_text())
        change(content)  # type: ignore[operator]
        file.write_text(json.dumps(content))
        with pytest.raises(OptimaError, match=re.escape(f": {place}: ")):
            load_report(tmp_path)


class TestSummary:
    def test_a_certified_run(self) -> None:
        text = render_summary(report(linear(), linear(block=1)))
        parts = ("50.00%", "wanda + low-rank-cg", "0.1000 in the result", "all 16 rows", "5.0e-05", "2.0e-03")
        assert all(part in text for part in (*parts, "(50.0% lower"))
        assert "Warning" not in text

    def test_the_certificate_of_a_tuned_run_is_of_the_weights_before_tuning(self) -> None:
        linears = (linear(block=0), linear(block=1, tuned=True, gap_written_max=None))
        blocks = (BlockRecord(0, "b.0", {}, (2.0, 2.5), 0), BlockRecord(1, "b.1", {}, (2.0, 0.5), 1))
        text = render_summary(replace(report(*linears), blocks=blocks))
        first = next(line for line in text.splitlines() if "ertificate" in line)
        assert "before tuning" in first
        assert "1 of 2 linear layers, which carry no certificate as written" in first
        assert "changed 1 of 2 blocks: held-out loss -50.0%" in text
        assert "As written" not in text

    def test_the_last_block_is_tuned_on_the_logits(self) -> None:
        tuned = replace(
            report(linear(tuned=True)), blocks=(replace(BLOCK, tuning=(0.088, 0.0877), tuning_epoch=1, on_logits=True),)
        )
        assert "KL to the dense model 0.0877 nats per token (0.088 before" in render_summary(tuned)

    def test_no_certificate(self) -> None:
        assert "some rows have no certificate" in render_summary(report(linear(gap_max=math.inf)))
        assert "13 of 16 rows" in render_summary(report(linear(), linear(block=1, rows_not_converged=3)))
        assert "0 of 8 rows" in render_summary(report(linear(error=math.nan))), (
            "a row whose error is NaN is not certified"
        )
        text = render_summary(report(unsolved(), recipe={"selector": "sparsegpt", "gap": 1e-4}))
        assert "with sparsegpt." in text
        assert "No certificate" in text
        assert render_summary(Report(RUN, ())) == "- Nothing was pruned."

    def test_runtimes(self) -> None:
        assert "MACKO" in render_summary(report())
        assert "sparse tensor cores" in render_summary(report(linear(pattern="2:4")))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": 15}, "fewer than 4 calibration tokens"),
            ({"error_selector": 0.09}, "worse than the selector's"),
            ({"error": math.nan}, "not a finite number"),
            ({"rows_not_converged": 3}, "3 rows did not converge"),
        ],
    )
    def test_warnings(self, changes: dict[str, object], message: str) -> None:
        lines = [line for line in render_summary(report(linear(**changes))).splitlines() if "Warning" in line]
        assert len(lines) == 1
        assert message in lines[0]
        assert "model.layers.0.mlp.up_proj" in lines[0]

    def test_rounding_is_no_warning(self) -> None:
        for changes in ({"shape": (8, 5), "sparsity": 0.4}, {"error_selector": 0.1 - 1e-6}, {"tokens": 16}):
            assert "Warning" not in render_summary(report(linear(**changes)))


class TestMarkdown:
    def test_times(self) -> None:
        lines = section(render_markdown(report(stages={"forward": 31.0, "solve": 15.5})), "Time")
        times = [["forward", "31.0 s", "50%"], ["solve", "15.5 s", "25%"], ["everything else", "15.5 s", "25%"]]
        assert cells(lines)[2:] == times

    def test_kinds_are_short_names_where_those_are_unique(self) -> None:
        names = ["attention.self.query", "attention.output.dense", "output.dense", "experts.0.up", "experts.1.up"]
        text = render_markdown(report(*(linear(name, block) for block in (0, 1) for name in names)))
        kinds = [
            line.split("|")[1].strip() for line in section(text, "By kind of linear layer") if line.startswith("| `")
        ]
        assert kinds == ["`query`", "`attention.output.dense`", "`output.dense`", "`up`"]

    def test_texts_of_a_checkpoint_are_inert(self) -> None:
        evil = "evil\n\x1b[31m<script>\x9b"
        text = render_markdown(report(linear(evil), model=evil, notes=(f"tensor {evil}", "c")))
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        assert section(text, "Notes") == ["- tensor evil [31m&lt;script>", "- c"]
        assert "\x1b" not in render_summary(report(linear(evil, sparsity=1.0)))


def run_of(progress: Progress, blocks: int = 2) -> None:
    with Callbacks([progress]) as callbacks:
        callbacks.start(RunStart("tiny", "cpu", {}, blocks, 2 * blocks, samples=8, length=16))
        callbacks.stage("prune", blocks)
        for block in range(blocks):
            callbacks.step("hessian")
            callbacks.block(f"block.{block}", linears=[linear(block=block)])


def screen_of(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


class TestProgress:
    def test_a_line_per_block_where_stderr_is_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        run_of(Progress())
        assert capsys.readouterr() == ("", "")
        run_of(make_progress())
        output, lines = capsys.readouterr()
        assert output == ""
        shown = [line.partition("  ")[0] for line in lines.splitlines()[1:]]
        assert shown == ["pruning: 2 blocks", "pruning: block 1/2", "pruning: block 2/2"]
        assert "mean error 0.1000" in lines

    def test_time_left_counts_the_blocks_of_this_run(self) -> None:
        now, screen = 100.0, io.StringIO()
        callbacks = Callbacks([Progress(Console(file=screen, width=200))], lambda: now)
        callbacks.stage("prune", 6, done=2)
        for name in "ab":
            now += 1
            callbacks.block(name, resumed=True)
        now = 112.0
        callbacks.block("c", replace(BLOCK, seconds={"tune": 4.0}))
        now = 122.0
        callbacks.block("d", replace(BLOCK, seconds={"tune": 4.0}))
        text = screen.getvalue()
        assert "0:00:12 elapsed  0:00:30 left" in text
        assert "0:00:22 elapsed  0:00:20 left" in text

    @pytest.mark.parametrize("width", [60, 120])
    def test_display_is_one_line_and_names_what_runs(self, width: int) -> None:
        console = screen_of(width)
        run_of(Progress(console))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "2/2" in text
        assert "mean error 0.1000" in text
        assert ("hessian" in text) or width < 100
        assert "\x1b[1A" not in text, "cursor-up would mean that the line wrapped"

    def test_a_reader_of_stderr_that_leaves_ends_as_one_of_stdout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Left(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        monkeypatch.setattr("sys.stderr", Left())
        with pytest.raises(BrokenPipeError):
            run_of(make_progress())
