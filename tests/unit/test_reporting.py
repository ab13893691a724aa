import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from records import RUN, linear, report, unsolved
from rich.console import Console
from tiny import make_llama, make_tokens

from optima import Recipe, prune
from optima.errors import OptimaError
from optima.reporting.callbacks import Listeners, RunStart
from optima.reporting.markdown import render_markdown
from optima.reporting.progress import Progress, make_progress
from optima.reporting.record import (
    SCHEMA_VERSION,
    BlockRecord,
    Report,
    geometric_mean,
    library_versions,
    load_report,
    weighted_mean,
)
from optima.reporting.summary import duration, num_bytes, render_summary


def section(text: str, title: str) -> list[str]:
    """Lines under ``## title`` up to the next heading."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip().splitlines()


class TestRecord:
    def test_directory_round_trip(self, tmp_path: Path) -> None:
        original = report(linear(), unsolved(block=1), notes=("one", "two"))
        assert original.save(tmp_path) == tmp_path / "report.json"
        assert load_report(tmp_path) == original
        assert load_report(str(tmp_path)) == original, "a text names a directory too"
        assert load_report(tmp_path / "report.json") == original
        assert [file.name for file in tmp_path.iterdir()] == ["report.json"]

    def test_file_round_trip(self, tmp_path: Path) -> None:
        file = tmp_path / "other.json"
        assert report().save(file) == file
        assert load_report(file) == report()

    def test_what_is_no_path_is_refused(self) -> None:
        with pytest.raises(OptimaError, match="is 3, not a path"):
            load_report(3)  # type: ignore[arg-type]

    def test_numbers_that_json_cannot_hold_survive(self, tmp_path: Path) -> None:
        original = report(linear(gap_max=math.inf, error=math.nan, error_mask=-math.inf))
        text = original.save(tmp_path).read_text()

        def refuse(constant: str) -> float:
            raise AssertionError(f"{constant} is not JSON")

        json.loads(text, parse_constant=refuse)
        loaded = load_report(tmp_path).linears[0]
        assert loaded.gap_max == math.inf
        assert loaded.error_mask == -math.inf
        assert math.isnan(loaded.error)

    def test_recipe_is_stored_as_plain_values(self, tmp_path: Path) -> None:
        report(recipe={"path": Path("a") / "b", "pair": (1, 2.5), "none": None}).save(tmp_path)
        assert load_report(tmp_path).run.recipe == {"path": str(Path("a") / "b"), "pair": [1, 2.5], "none": None}
        report(recipe={"limit": math.inf}).save(tmp_path)
        assert load_report(tmp_path).run.recipe == {"limit": "Infinity"}

    def test_failed_save_leaves_the_old_report_alone(self, tmp_path: Path) -> None:
        report().save(tmp_path)
        with pytest.raises(ValueError, match="object"):
            report(recipe={"bad": object()}).save(tmp_path)
        assert load_report(tmp_path) == report()
        assert len(list(tmp_path.iterdir())) == 1

    def test_totals(self) -> None:
        big = linear(block=1, shape=(8, 12), sparsity=0.75, error=0.4, gap_max=2e-4, rows_not_converged=3)
        totals = report(linear(), big, unsolved(block=2, error=0.0, shape=(8, 8), sparsity=0.0))
        assert totals.sparsity == pytest.approx((0.5 * 32 + 0.75 * 96) / (32 + 96 + 64))
        assert totals.error_geomean == pytest.approx(math.sqrt(0.1 * 0.4))
        assert totals.gap_max == 2e-4
        assert totals.rows_not_converged == 3

    def test_totals_of_nothing(self) -> None:
        empty = Report(RUN, ())
        assert (empty.sparsity, empty.error_geomean, empty.gap_max, empty.rows_not_converged) == (0.0, 0.0, None, 0)
        assert report(unsolved()).gap_max is None
        assert report(unsolved()).gap_written_max is None
        assert report(linear(), linear(gap_written_max=0.5)).gap_written_max == 0.5
        assert report(linear(), linear(gap_written_max=None, tuned=True)).gap_written_max is None

    @pytest.mark.parametrize("gaps", [(math.nan, 1.0), (1.0, math.nan)])
    def test_a_gap_that_is_not_a_number_is_not_hidden(self, gaps: tuple[float, float]) -> None:
        assert math.isnan(report(*(linear(gap_max=gap) for gap in gaps)).gap_max)

    def test_geometric_mean(self) -> None:
        assert geometric_mean([1e-300, 1e300]) == pytest.approx(1.0)
        assert geometric_mean([0.0]) == 0.0
        assert geometric_mean([math.inf, 1.0]) == math.inf
        assert math.isnan(geometric_mean([math.nan, 1.0]))

    def test_library_versions(self) -> None:
        versions = library_versions()
        assert list(versions) == ["optima", "python", "torch", "transformers", "safetensors"]
        assert all(versions.values())


class TestLoadErrors:
    @staticmethod
    def edited(folder: Path, edit: object) -> Path:
        file = report().save(folder)
        content = json.loads(file.read_text())
        edit(content)  # type: ignore[operator]
        file.write_text(json.dumps(content))
        return folder

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(OptimaError, match=r"cannot read the report .*output directory"):
            load_report(tmp_path)

    @pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
    def test_not_json(self, tmp_path: Path, text: bytes) -> None:
        (tmp_path / "report.json").write_bytes(text)
        with pytest.raises(OptimaError, match="is not JSON"):
            load_report(tmp_path)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 1}', '{"schema_version": true}', "3"])
    def test_other_schema(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(OptimaError, match=f"reads {SCHEMA_VERSION}"):
            load_report(tmp_path)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda c: c["run"].pop("seed"), r"report\.run\.seed: Field required"),
            (lambda c: c["run"].update(extra=1), r"report\.run\.extra: Unexpected"),
            (lambda c: c["run"].update(notes="text"), r"report\.run\.notes: .* valid tuple"),
            (lambda c: c["run"].update(seed=True), r"report\.run\.seed: .* valid integer, got 'True'"),
            (lambda c: c["run"].update(versions={"torch": 2}), r"report\.run\.versions\.torch: .* valid string"),
            (lambda c: c.update(run=None), r"report\.run: "),
            (lambda c: c["linears"][0].update(error=None), r"report\.linears\[0\]\.error: .* valid number"),
            (lambda c: c["linears"][0].update(error="big"), r"report\.linears\[0\]\.error: .*got 'big'"),
            (lambda c: c["linears"][0].update(shape=[1, 2, 3]), r"report\.linears\[0\]\.shape: "),
            (lambda c: c["blocks"][0].update(seconds={"solve": None}), r"report\.blocks\[0\]\.seconds\.solve: "),
        ],
    )
    def test_malformed_content_names_the_field(self, tmp_path: Path, edit: object, message: str) -> None:
        with pytest.raises(OptimaError, match=message):
            load_report(self.edited(tmp_path, edit))

    def test_whole_numbers_are_floats_too(self, tmp_path: Path) -> None:
        loaded = load_report(self.edited(tmp_path, lambda content: content["linears"][0].update(error=0)))
        assert loaded.linears[0].error == 0.0
        assert isinstance(loaded.linears[0].error, float)


class TestMarkdown:
    def test_headline_of_a_certified_run(self) -> None:
        text = render_markdown(report(linear(), linear(block=1)))
        assert text.startswith("# Pruning report: `tiny/model`\n")
        assert (
            "**50.00% of the weights of 2 linears pruned** (pattern 0.5 per row) by **wanda + shared-inverse-cg**"
            in text
        )
        assert "0.2000 by the mask alone, **0.1000 in the result** (-50.0% from the selector's)" in text
        assert (
            "gap of 1.0e-04 before the cast: **all 16 rows** that a solver worked on; the largest gap is **5.0e-05**"
            in text
        )
        assert "As written (float32): the largest gap of a row is **2.0e-03**, all rows of a linear together" in text
        assert "at most **1.0e-03** above the optimum" in text
        assert "Warning" not in text
        assert section(text, "Notes") == ["None: no linear was skipped and no setting was changed on the way."]

    def test_patterns_and_the_sparsity_asked(self) -> None:
        asked = linear("mlp.down_proj", pattern="1:4", sparsity_asked=0.75, sparsity=0.7)
        text = render_markdown(report(linear(), asked))
        assert "(pattern 0.5 per row, 1:4)" in text
        assert "60.0000%, asked 62.5000%" in text
        assert "pattern" in section(text, "Every linear")[0]
        assert " 1:4 |" in section(text, "Every linear")[3]
        assert "pattern" not in section(render_markdown(report()), "Every linear")[0]
        many = [linear(block=i, pattern=f"0.{i + 1} per row", sparsity_asked=(i + 1) / 10) for i in range(7)]
        assert "(7 patterns, from 10.0% to 70.0% a linear)" in render_markdown(report(*many))

    def test_rows_that_did_not_converge_come_first(self) -> None:
        text = render_markdown(report(linear(), linear("mlp.down_proj", rows_not_converged=3, gap_max=2e-3)))
        opening = text.split("\n## ")[0]
        assert "**13 of 16 rows**" in opening
        assert "**Warning:** 3 rows did not converge" in opening
        assert "`model.layers.0.mlp.down_proj`." in opening

    def test_no_certificate(self) -> None:
        assert "**some rows have no certificate at all**" in render_markdown(report(linear(gap_max=math.inf)))

    def test_a_solver_that_did_worse_is_called_out(self) -> None:
        worse = linear(error_selector=0.09)
        assert "worse than the selector's own weights: `model.layers.0.mlp.up_proj`" in render_markdown(report(worse))
        assert "Warning" not in render_markdown(report(linear(error_selector=0.1 - 1e-6)))

    def test_errors_that_are_not_finite_lead(self) -> None:
        text = render_markdown(report(linear(error=0.5), linear(block=1, error=math.nan)))
        assert "**Warning:** the error is not a finite number: `model.layers.1.mlp.up_proj`" in text
        assert "model.layers.1" in section(text, "Worst linears")[2]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"error_mask": 0.0, "error_selector": 0.0, "error": 0.0}, "nothing was measured, the mask costs nothing"),
            ({"sparsity": 1.0}, "every weight is pruned"),
            ({"sparsity": 0.0}, "no weight is pruned"),
            ({"sparsity": 0.1}, "the sparsity as written is not the one asked for"),
            ({"tokens": 15}, "little calibration text, fewer than 4 tokens for each input"),
        ],
        ids=str,
    )
    def test_warnings(self, changes: dict[str, object], message: str) -> None:
        found = f"Warning: {message}"
        assert any(line.startswith(f"- {found}") for line in render_summary(report(linear(**changes))).splitlines())
        assert render_summary(report(linear(**changes))).count("Warning") == 1
        assert found not in render_summary(report(linear()))

    def test_counts_that_had_to_be_rounded_are_no_warning(self) -> None:
        assert "Warning" not in render_summary(report(linear(shape=(8, 5), sparsity=0.4)))

    def test_one_metric_for_published_and_solved(self) -> None:
        """The column is there where some token weighs more than others."""
        assert "tokens alike" not in section(render_markdown(report()), "Every linear")[0]
        text = render_markdown(report(linear(error_plain=0.3)))
        assert "**0.1000 in the result** (-50.0% from the selector's); 0.3000 with every token alike." in text
        assert "tokens alike" in section(text, "Every linear")[0]

    def test_where_the_time_went(self) -> None:
        lines = section(render_markdown(report(stages={"forward": 31.0, "solve": 15.5})), "Where the time went")
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert cells[2:] == [
            ["forward", "31.0 s", "50%"],
            ["solve", "15.5 s", "25%"],
            ["everything else", "15.5 s", "25%"],
        ]
        assert "Where the time went" not in render_markdown(report())

    def test_seconds_of_several_processes_are_no_part_of_the_run(self) -> None:
        assert "of it on linears" in render_markdown(report())
        assert "of it on linears" not in render_markdown(report(processes=2))

    def test_where_model_and_text_came_from(self) -> None:
        text = render_markdown(report(model_revision="abc", dataset_revision="def"))
        assert "revision abc" in text
        assert "hash abc, revision def" in text

    def test_selector_alone_claims_nothing(self) -> None:
        text = render_markdown(report(unsolved(), recipe={"selector": "sparsegpt", "solver": "none", "gap": 1e-4}))
        assert "by **sparsegpt**." in text
        assert "nothing is certified" in text
        header = section(text, "By kind of linear")[0]
        assert "mask" in header
        for column in ("gap", "iterations", "change", "not converged"):
            assert column not in header

    def test_selector_column_is_there_if_the_selector_moves_weights(self) -> None:
        assert "selector" not in section(render_markdown(report()), "Every linear")[0]
        moved = render_markdown(report(linear(error_selector=0.15)))
        assert "selector" in section(moved, "Every linear")[0]
        assert "0.1500 by the selector's own weights" in moved

    def test_swaps_are_named_and_counted(self) -> None:
        text = render_markdown(report(linear(error_selector=0.15, swaps=1234, rows_swap_optimal=5)))
        assert "by **wanda + swaps + shared-inverse-cg**." in text
        assert "0.1500 by the swaps' weights" in text
        assert "1,234 made; 5 of 8 rows are at a 1-swap local optimum" in text
        assert "1-swap" not in render_markdown(report())

    def test_a_run_that_lost_nothing_has_no_change_to_state(self) -> None:
        text = render_markdown(report(linear(error_mask=0.0, error_selector=0.0, error=0.0)))
        assert "**0.0000 in the result**." in text

    def test_nothing_pruned(self) -> None:
        text = render_markdown(Report(RUN, ()))
        assert "**Nothing was pruned.**" in text
        assert "Worst linears" not in text

    def test_kinds_are_short_names_where_those_are_unique(self) -> None:
        names = [
            "attention.self.query",
            "attention.output.dense",
            "output.dense",
            "mlp.experts.0.up",
            "mlp.experts.1.up",
        ]
        text = render_markdown(report(*(linear(name, block) for block in (0, 1) for name in names)))
        kinds = [line.split("|")[1].strip() for line in section(text, "By kind of linear") if line.startswith("| `")]
        assert kinds == ["`query`", "`attention.output.dense`", "`output.dense`", "`up`"]

    def test_worst_linears_are_sorted(self) -> None:
        text = render_markdown(report(*(linear(block=block, error=0.01 * (block + 1)) for block in range(9))))
        lines = section(text, "Worst linears")[2:]
        assert [line.split("`")[1].split(".")[2] for line in lines] == ["8", "7", "6", "5", "4"]

    def test_block_table_has_a_line_a_block_and_blanks_where_a_kind_is_absent(self) -> None:
        text = render_markdown(report(linear(), linear("mlp.down_proj", 7, error=0.4)))
        lines = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in section(text, "Error of the result, block by block")
        ]
        assert lines[0] == ["block", "`up_proj`", "`down_proj`", "mean"]
        assert lines[2:] == [["0", "0.1000", "", "0.1000"], ["7", "", "0.4000", "0.4000"]]

    def test_sparsity_that_was_shared_out_is_told_block_by_block(self) -> None:
        shares = [("mlp.up_proj", 0, 0.4), ("mlp.up_proj", 1, 0.5), ("mlp.down_proj", 1, 0.6)]
        linears = [linear(name, block, sparsity=share, pattern=f"{share} per layer") for name, block, share in shares]
        lines = section(render_markdown(report(*linears)), "Sparsity, block by block")
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert cells[2:] == [["0", "40.00%", "", "40.00%"], ["1", "50.00%", "60.00%", "55.00%"]]
        assert "Sparsity, block by block" not in render_markdown(report(linear(), linear(block=1)))

    def test_tables_are_rectangular_and_aligned(self) -> None:
        text = render_markdown(report(linear(), linear("mlp.a|b", 12, rows_not_converged=1), unsolved(block=3)))
        tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
        assert len(tables) == 6
        for lines in tables:
            assert len({len(line) for line in lines}) == 1
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1

    def test_recipe_can_be_run_again(self) -> None:
        text = render_markdown(report())
        fenced = "\n".join(section(text, "Recipe")).removeprefix("```yaml\n").removesuffix("```")
        assert yaml.safe_load(fenced) == RUN.recipe

    def test_notes_stay_one_line_each(self) -> None:
        assert section(render_markdown(report(notes=("a\nb", "c"))), "Notes") == ["- a b", "- c"]


def run_of(progress: Progress, blocks: int = 2) -> None:
    with Listeners([progress]) as listeners:
        listeners.begin(RunStart("tiny", None, "cpu", {}, blocks, 2 * blocks, samples=8, length=16))
        listeners.start(blocks, 2)
        for block in range(blocks):
            listeners.linear(linear(block=block))
            listeners.block(f"block.{block}")


class TestProgress:
    def test_without_a_console_nothing_is_shown(self, capfd: pytest.CaptureFixture[str]) -> None:
        run_of(Progress())
        assert capfd.readouterr() == ("", "")

    def test_lines_where_stderr_is_not_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        progress = make_progress()
        progress.reading("tiny")
        run_of(progress)
        output, lines = capsys.readouterr()
        assert output == ""
        assert lines.splitlines() == [
            "reading tiny and the calibration text",
            "pruning 4 linears in 2 blocks on cpu, by 8 x 16 tokens",
            "2 blocks, one after another; a line when each is done",
            *(f"block {block}/2  error 0.1000  0:00:00 elapsed  0:00:00 left" for block in (1, 2)),
        ]

    def test_of_a_model_in_memory_the_text_is_read(self, capsys: pytest.CaptureFixture[str]) -> None:
        make_progress().reading(None)
        assert capsys.readouterr().err == "reading the calibration text\n"

    @pytest.mark.parametrize(
        ("variables", "terminal"),
        [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "FORCE_COLOR": "1"}, False)],
    )
    def test_only_a_terminal_that_can_draw_is_drawn_on(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool
    ) -> None:
        """Colours may be forced where there is no terminal at all."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        screen = io.StringIO()
        screen.isatty = lambda: "FORCE_COLOR" not in variables  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stderr", screen)
        run_of(make_progress())
        assert ("\x1b[?25l" in screen.getvalue()) == terminal
        assert screen.getvalue().count("0:00:00 elapsed") == (0 if terminal else 2)

    def test_time_left_counts_blocks_from_where_the_run_began(self) -> None:
        """Blocks of an earlier run are replayed quickly: they say nothing of the others."""
        now, screen = 100.0, io.StringIO()
        listeners = Listeners([Progress(Console(file=screen))], lambda: now)
        listeners.start(6, 1, done=2)
        for name in "ab":
            now += 1
            listeners.block(name, resumed=[linear()] if name == "a" else [])
        now = 112.0
        listeners.block("c")
        now = 7302.0
        listeners.block("d")
        assert screen.getvalue().splitlines() == [
            "going on: 2 of 6 blocks are done",
            "block 3/6  error 0.1000  0:00:12 elapsed  0:00:30 left",
            "block 4/6  error 0.1000  2:00:02 elapsed  2:00:00 left",
        ]

    def test_what_comes_before_is_named(self) -> None:
        screen = io.StringIO()
        listeners = Listeners([Progress(Console(file=screen))], lambda: 0.0)
        listeners.start(8, 1, stage="write")
        listeners.share(1.0)
        listeners.start(2, 1, stage="sweep")
        listeners.share(1.0)
        listeners.start(2, 1, stage="survey")
        listeners.block("a")
        assert screen.getvalue().splitlines() == [
            "the model writes 8 sequences of text",
            "sweep over 2 blocks: what the loss feels",
            "survey of 2 blocks: how much of each can go",
            "survey: block 1/2  error -  0:00:00 elapsed  0:00:00 left",
        ]

    def test_a_long_sweep_tells_once_a_minute(self) -> None:
        now, screen = 0.0, io.StringIO()
        listeners = Listeners([Progress(Console(file=screen))], lambda: now)
        listeners.start(2, 1, stage="sweep")
        for second in range(20, 200, 20):
            now = float(second)
            listeners.share(second / 200)
        assert screen.getvalue().splitlines()[1:] == [
            "sweep: 30%  0:01:00 elapsed  0:02:20 left",
            "sweep: 60%  0:02:00 elapsed  0:01:20 left",
            "sweep: 90%  0:03:00 elapsed  0:00:20 left",
        ]

    @pytest.mark.parametrize(("stage", "unit"), [("sweep", "block"), ("write", "sequence")])
    def test_display_moves_with_a_walk_that_tells_of_shares(self, stage: str, unit: str) -> None:
        screen = io.StringIO()
        with Listeners([Progress(Console(file=screen, force_terminal=True, width=120, color_system=None))]) as shown:
            shown.start(8, 1, stage=stage)
            shown.share(0.6)
        assert re.search(rf"{unit} +4/8", screen.getvalue())

    @pytest.mark.parametrize("width", [60, 120])
    def test_display_is_one_line(self, width: int) -> None:
        screen = io.StringIO()
        run_of(Progress(Console(file=screen, force_terminal=True, width=width, color_system=None)))
        text = screen.getvalue()
        assert "2/2" in text
        assert "error 0.1000" in text
        assert "done" in text
        # Cursor-up would mean that the line wrapped.
        assert "\x1b[1A" not in text

    def test_display_does_not_go_back_where_blocks_are_replayed(self) -> None:
        screen = io.StringIO()
        with Listeners([Progress(Console(file=screen, force_terminal=True, width=120, color_system=None))]) as shown:
            shown.start(4, 1, done=2)
            shown.block("a", resumed=[])
            shown.block("b", resumed=[])
            shown.block("c")
        assert set(re.findall(r"(\d)/4", screen.getvalue())) == {"2", "3"}

    def test_a_reader_of_stderr_that_leaves_ends_as_one_of_stdout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Left(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        monkeypatch.setattr("sys.stderr", Left())
        with pytest.raises(BrokenPipeError):
            run_of(make_progress())

    def test_interrupt_restores_the_cursor_and_does_not_claim_to_be_done(self) -> None:
        screen = io.StringIO()
        progress = Progress(Console(file=screen, force_terminal=True, width=100, color_system=None))

        def interrupted() -> None:
            with Listeners([progress]) as listeners:
                listeners.start(2, 1)
                listeners.block("a")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        text = screen.getvalue()
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
        assert "done" not in text
        progress.close(None)


def test_both_errors_are_those_of_cast_weights() -> None:
    """In bfloat16 the cast costs more than a good selector is from the optimum: compare like with like."""
    recipe = Recipe(selector="alps", sparsity=0.5, solver="none", device="cpu")
    report = prune(make_llama().bfloat16(), recipe, calibration=make_tokens())
    assert [linear.error_selector for linear in report.linears] == [linear.error for linear in report.linears]
    assert all(linear.error < linear.error_mask for linear in report.linears)


def test_tuning_says_what_it_won_and_what_is_no_longer_certified() -> None:
    linears = (linear(block=0), linear(block=1, tuned=True, gap_written_max=None))
    blocks = (BlockRecord(0, "b.0", {}, (2.0, 2.5), 0), BlockRecord(1, "b.1", {}, (2.0, 0.5), 1))
    text = render_summary(replace(report(*linears), blocks=blocks))
    assert "Tuned: 1 of 2 blocks are closer to the dense ones on held-out sequences (cost -50.0% on average)" in text
    assert "errors and gaps of 1 linears are from before it" in text
    assert "0.1000 before tuning (-50.0% from the selector's)" in text
    assert "As written" not in text, "of what tuning moved it is not known"
    rows = section(render_markdown(report(*linears)), "Every linear")[2:]
    assert [" tuned " in row for row in sorted(rows)] == [False, True], rows


def test_times_and_sizes_are_rounded_within_their_unit() -> None:
    times = {59.94: "59.9 s", 59.97: "1 min 0 s", 119.6: "2 min 0 s", 61.4: "1 min 1 s", 3599.7: "1 h 0 min"}
    assert {seconds: duration(seconds) for seconds in times} == times
    assert num_bytes(2**30 - 1) == "1.00 GiB"
    assert num_bytes(1000 * 2**20) == "1000 MiB"


def test_the_largest_excess_of_all_linears_is_told() -> None:
    found = report(linear(loss_written=1e-3), linear(block=1, loss_written=5e-3))
    assert "at most **5.0e-03** above the optimum" in render_markdown(found)


def test_text_is_thin_by_the_inputs_of_a_linear() -> None:
    assert "Warning" not in render_summary(report(linear(tokens=16)))


def test_totals_of_a_kind_weigh_linears_by_their_sizes() -> None:
    found = weighted_mean([linear(sparsity=0.5), linear(shape=(8, 12), sparsity=0.75)], "sparsity")
    assert found == pytest.approx((0.5 * 32 + 0.75 * 96) / 128)
