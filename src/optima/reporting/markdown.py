"""The report as Markdown: the summary first, then the tables behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import yaml
from pydantic_core import to_jsonable_python

from optima.reporting.joined import JOINED, joined
from optima.reporting.record import LinearRecord, Report, gap_written, largest, weighted_mean
from optima.reporting.summary import (
    Linears,
    bullets,
    by_kind,
    change,
    code,
    duration,
    error,
    gap,
    mean,
    pattern_weights,
    rows_solved,
    run_facts,
    solved,
    stage_times,
    summary,
    updated,
    weighted,
)
from optima.runtimes import HEADING, table_rows

NUM_WORST = 5

READING = """\
How to read it: errors are relative reconstruction errors `||X (V - W)^T||^2 / ||X W^T||^2` on the calibration inputs.
In them tokens weigh as the recipe's *objective* says: as the model's loss feels them, by *sink_weight*, or all alike.
*mask* keeps the survivors at their dense values, *selector* has the update by the selector or the swaps, *result* is
as written, in the checkpoint's dtype. *tokens alike* is the result where every token counts the same: compare published
figures with it. *change* is result against selector. Means are geometric over linears.

A row's *gap* bounds how far it lies above the optimum of its damped problem, relative to that optimum: as solved
before the cast, and *written* after it. Where *written* says *tuned*, errors and gaps are from before. All of this is
per linear, on calibration text: what the model lost as a whole, `optima eval` measures on other text."""


def render_markdown(report: Report, evaluation: str = "") -> str:
    """The report as a Markdown document that is legible as plain text too; ``evaluation`` is a section's body."""
    linears = report.linears
    shown = joined(linears)
    worst = sorted(linears, key=lambda linear: math.inf if math.isnan(linear.error) else linear.error, reverse=True)
    plain = to_jsonable_python(report.run.recipe, inf_nan_mode="strings")
    recipe = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    sections = {
        f"# Pruning report: {code(report.run.model)}": bullets(summary(report)),
        "": _run_table(report),
        "## Evaluation": evaluation,
        "## What runs it": table(HEADING, table_rows(pattern_weights(linears)), num_left=5) if linears else "",
        "## By kind of linear": f"{_kind_table(linears)}\n\n{READING}" if linears else "",
        "## Worst linears": _records_table(worst[:NUM_WORST]),
        "## Notes": bullets(report.run.notes) or "None: no linear was skipped and no setting was changed on the way.",
        "## Where the time went": _time_table(report),
        "## Error of the result, block by block": _block_table(linears, lambda here: error(mean(here, "error"))),
        "## Sparsity, block by block": _block_table(linears, _COLUMNS["sparsity"]) if _is_shared_out(linears) else "",
        "## Every linear": _records_table(shown) + (f"\n\nNote: {JOINED.format('table')}." if shown != linears else ""),
        "## Recipe": f"```yaml\n{recipe}```",
        "## Versions": bullets(f"{name} {version}" for name, version in report.run.versions.items()),
    }
    return "\n\n".join(f"{title}\n\n{body}".strip() for title, body in sections.items() if body) + "\n"


def _run_table(report: Report) -> str:
    return table(["run", " "], run_facts(report), num_left=2)


def _time_table(report: Report) -> str:
    rows = [[name, duration(seconds), f"{share:.0%}"] for name, seconds, share in stage_times(report)]
    return table(["stage", "time", "share"], rows)


def _kind_table(linears: Linears) -> str:
    def row(title: str, members: Linears) -> list[str]:
        shapes = set(map(_shape, members))
        return [title, shapes.pop() if len(shapes) == 1 else "", f"{len(members)}", *_cells(members)]

    rows = [row(code(kind), members) for kind, members in by_kind(linears).items()]
    return table(["kind", "shape", "linears", *_COLUMNS], [*rows, row("**all**", linears)])


def _records_table(linears: Linears) -> str:
    mixed = len({linear.solver for linear in linears}) > 1
    several = len({linear.pattern for linear in linears}) > 1

    def row(linear: LinearRecord) -> list[str]:
        what = [code(linear.name), _shape(linear), linear.pattern if several else ""]
        rest = [gap(linear.gap_median), f"{linear.damping:g}", linear.solver if mixed else ""]
        return [*what, *_cells([linear]), *rest]

    header = ["linear", "shape", "pattern", *_COLUMNS, "gap median", "damping", "solver"]
    return table(header, [row(linear) for linear in linears])


def _is_shared_out(linears: Linears) -> bool:
    """Whether one sparsity became several: two patterns of one name may be two that were asked for."""
    return len({linear.pattern for linear in linears}) > len(by_kind(linears))


def _block_table(linears: Linears, text: Callable[[Linears], str]) -> str:
    """Blocks down, kinds across: where in the model something sits."""
    kinds = by_kind(linears)

    def cell(block: int, members: Linears) -> str:
        here = [linear for linear in members if linear.block == block]
        return text(here) if here else ""

    blocks = sorted({linear.block for linear in linears})
    rows = [[f"{block}", *(cell(block, members) for members in (*kinds.values(), linears))] for block in blocks]
    return table(["block", *map(code, kinds), "mean"], rows, num_left=0)


def _shape(linear: LinearRecord) -> str:
    return "{} x {}".format(*linear.shape)


def _iterations(linears: Linears) -> str:
    rows = rows_solved(linears)
    total = sum(linear.iterations_mean * linear.rows for linear in linears if solved(linear))
    return f"{total / rows:.1f} ({max(linear.iterations_max for linear in linears)})" if rows else ""


def _not_converged(linears: Linears) -> str:
    rows = rows_solved(linears)
    missed = sum(linear.rows_not_converged for linear in linears)
    return f"{missed:,} of {rows:,}" if missed else "0" if rows else ""


# Each cell speaks for one linear or for several; a column that is empty all the way down is left out.
_COLUMNS: dict[str, Callable[[Linears], str]] = {
    "sparsity": lambda linears: f"{weighted_mean(linears, 'sparsity'):.2%}",
    "mask": lambda linears: error(mean(linears, "error_mask")),
    "selector": lambda linears: error(mean(linears, "error_selector")) if any(map(updated, linears)) else "",
    "result": lambda linears: error(mean(linears, "error")),
    "tokens alike": lambda linears: error(mean(linears, "error_plain")) if weighted(linears) else "",
    "change": lambda linears: (
        change(mean(linears, "error_selector"), mean(linears, "error")) if any(map(solved, linears)) else ""
    ),
    "gap max": lambda linears: gap(largest(linear.gap_max for linear in linears)),
    "written": lambda linears: "tuned" if any(linear.tuned for linear in linears) else gap(gap_written(linears)),
    "iterations (max)": _iterations,
    "not converged": _not_converged,
    "seconds": lambda linears: f"{sum(linear.seconds for linear in linears):.2f}",
}


def _cells(linears: Linears) -> list[str]:
    return [column(linears) for column in _COLUMNS.values()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A Markdown table with aligned columns, the first ``num_left`` to the left; empty columns are left out."""
    if not rows:
        return ""
    columns = [[cell.replace("|", "\\|") for cell in column] for column in zip(header, *rows, strict=True)]
    aligned = []
    for i, (title, *cells) in enumerate(columns):
        if not any(cells):
            continue
        width = max(3, *map(len, (title, *cells)))
        left = i < num_left
        rule = "-" * width if left else "-" * (width - 1) + ":"
        aligned.append([cell.ljust(width) if left else cell.rjust(width) for cell in (title, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*aligned, strict=True))
