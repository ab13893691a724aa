"""The report as Markdown, without what report.html and report.json have of every linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import yaml
from pydantic_core import to_jsonable_python

from optima.console import one_line, printable
from optima.reporting.record import Report, largest, weighted_mean
from optima.reporting.summary import (
    NO_NOTES,
    Linears,
    bullets,
    by_kind,
    change,
    code,
    error,
    gap,
    mean,
    num_tuned,
    rows_solved,
    run_facts,
    stage_times,
    summary,
    tuning_rows,
    unit_rows,
)

NUM_WORST = 10

READING = """\
Errors are relative reconstruction errors `||X (V - W)^T||^2 / ||X W^T||^2` on the calibration inputs, with the token
weights of the *objective*. *mask* keeps the surviving weights at their dense values, *selector* has the selector's own
update, *result* is the solution as written. *change* compares result and selector. Means are geometric over linear
layers.

A row's *gap* bounds its distance from the optimum of its damped problem, relative to that optimum: *gap* before the
cast, *gap written* after it. Layers marked *tuned* were changed after the solve: their errors and gaps were measured
before tuning. `optima eval` measures the whole model on held-out text."""


def _shape(linears: Linears) -> str:
    shapes = {"{} x {}".format(*linear.shape) for linear in linears}
    return shapes.pop() if len(shapes) == 1 else ""


def _selector(linears: Linears) -> str:
    differs = any(linear.error_selector != linear.error_mask for linear in linears)
    return error(mean(linears, "error_selector")) if differs else ""


def _gap_written(linears: Linears) -> str:
    return "tuned" if num_tuned(linears) else gap(largest(linear.gap_written_max for linear in linears))


# Columns of the tables; each cell describes one linear or several. Empty columns are left out.
COLUMNS: dict[str, Callable[[Linears], str]] = {
    "shape": _shape,
    "layers": lambda ls: str(len(ls)) if len(ls) > 1 else "",
    "sparsity": lambda ls: f"{weighted_mean(ls, 'sparsity'):.2%}",
    "mask": lambda ls: error(mean(ls, "error_mask")),
    "selector": _selector,
    "result": lambda ls: error(mean(ls, "error")),
    "change": lambda ls: change(mean(ls, "error_selector"), mean(ls, "error")) if rows_solved(ls) else "",
    "gap": lambda ls: gap(largest(linear.gap_max for linear in ls)),
    "gap written": _gap_written,
    "seconds": lambda ls: f"{sum(linear.seconds for linear in ls):.2f}",
}


def render_markdown(report: Report, evaluation: str = "") -> str:
    """The report as a Markdown document, legible as plain text too.

    Args:
        report: of a run.
        evaluation: body of the section on evaluation.
    """
    linears = report.linears
    kinds = {code(name): members for name, members in by_kind(linears).items()} | {"**all**": linears}
    worst = sorted(linears, key=lambda linear: math.inf if math.isnan(linear.error) else linear.error, reverse=True)
    recipe = to_jsonable_python(report.run.recipe, inf_nan_mode="strings")
    sections = {
        f"# Pruning report: {code(report.run.model)}": bullets(summary(report)),
        "": table(["run", " "], run_facts(report), num_left=2),
        "## Evaluation": evaluation,
        "## What each block lost": table(["block", "stays", "energy removed", "error"], unit_rows(report), num_left=2),
        "## By kind of linear layer": f"{_linears_table('kind', kinds)}\n\n{READING}" if linears else "",
        "## Largest errors": _linears_table("linear", {code(one.name): [one] for one in worst[:NUM_WORST]})
        if linears
        else "",
        "## Notes": bullets(report.run.notes or [NO_NOTES]),
        "## Time": table(["stage", "time", "share"], stage_times(report)),
        "## Block tuning": table(["block", "held-out loss", "change"], tuning_rows(report)),
        "## Recipe": f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```",
        "## Versions": bullets(f"{name} {version}" for name, version in report.run.versions.items()),
    }
    text = "\n\n".join(f"{title}\n\n{body}".strip() for title, body in sections.items() if body)
    return printable(text) + "\n"


def _linears_table(title: str, rows: Mapping[str, Linears]) -> str:
    return table([title, *COLUMNS], [[name, *(cell(ls) for cell in COLUMNS.values())] for name, ls in rows.items()])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A Markdown table with aligned columns, the first ``num_left`` to the left; empty columns are left out."""
    columns = [[one_line(cell).replace("|", "\\|") for cell in column] for column in zip(header, *rows, strict=True)]
    aligned = []
    for i, (title, *cells) in enumerate(columns):
        if any(cells):
            width = max(3, *map(len, (title, *cells)))
            rule = "-" * width if i < num_left else "-" * (width - 1) + ":"
            aligned.append([f"{cell:{'<' if i < num_left else '>'}{width}}" for cell in (title, rule, *cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*aligned, strict=True))
