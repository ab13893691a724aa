"""The report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import yaml
from pydantic_core import to_jsonable_python

from optima.console import printable
from optima.reporting.record import LinearRecord, Report
from optima.reporting.summary import (
    COLUMNS,
    NO_NOTES,
    Linears,
    bullets,
    by_kind,
    code,
    duration,
    error,
    gap,
    mean,
    run_facts,
    stage_times,
    summary,
    tuning_rows,
)

NUM_WORST = 5
MOST_ROWS = 500  # of the table of every linear

READING = """\
Errors are relative reconstruction errors `||X (V - W)^T||^2 / ||X W^T||^2` on the calibration inputs, with the token
weights of the *objective*; *uniform* is the result with uniform token weights, which published figures use.
*mask* keeps the surviving weights at their dense values, *selector* has the selector's own update, *result* is the
solution as written. *change* compares result and selector. Means are geometric over linear layers.

A row's *gap* bounds its distance from the optimum of its damped problem, relative to that optimum: *gap* before the
cast, *gap written* after it. Layers marked *tuned* were changed after the solve: their errors and gaps were measured
before tuning. `optima eval` measures the whole model on held-out text."""


def render_markdown(report: Report, evaluation: str = "", full: bool = True) -> str:
    """The report as a Markdown document, legible as plain text too.

    Args:
        report: of a run.
        evaluation: body of the section on evaluation.
        full: with the tables of every block and linear, the recipe and the versions.
    """
    linears = report.linears
    worst = sorted(linears, key=lambda linear: math.inf if math.isnan(linear.error) else linear.error, reverse=True)
    plain = to_jsonable_python(report.run.recipe, inf_nan_mode="strings")
    recipe = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    times = [[name, duration(seconds), f"{share:.0%}"] for name, seconds, share in stage_times(report)]
    sections = {
        f"# Pruning report: {code(report.run.model)}": bullets(summary(report)),
        "": table(["run", " "], run_facts(report), num_left=2),
        "## Evaluation": evaluation,
        "## By kind of linear layer": f"{_kind_table(linears)}\n\n{READING}" if linears else "",
        "## Largest errors": _records_table(worst[:NUM_WORST]),
        "## Notes": bullets(report.run.notes or [NO_NOTES]),
        "## Time": table(["stage", "time", "share"], times),
    }
    shown, more = list(linears), ""
    if len(linears) > MOST_ROWS:
        shown = worst[:MOST_ROWS]
        more = f"\n\nThe {MOST_ROWS} largest errors of {len(linears):,} linear layers; report.json has all."
    sections |= {
        "## Block tuning": table(["block", "held-out loss", "change"], tuning_rows(report), num_left=1),
        "## Error by block": _block_table(linears, lambda here: error(mean(here, "error"))),
        "## Sparsity by block": _block_table(linears, COLUMNS["sparsity"]) if _is_allocated(linears) else "",
        "## Every linear layer": _records_table(shown) + more,
        "## Recipe": f"```yaml\n{recipe}```",
        "## Versions": bullets(f"{name} {version}" for name, version in report.run.versions.items()),
    } if full else {}  # fmt: skip
    text = "\n\n".join(f"{title}\n\n{body}".strip() for title, body in sections.items() if body)
    return printable(text) + "\n"


def _kind_table(linears: Linears) -> str:
    def row(title: str, members: Linears) -> list[str]:
        shapes = set(map(_shape, members))
        return [title, shapes.pop() if len(shapes) == 1 else "", f"{len(members)}", *_cells(members)]

    rows = [row(code(kind), members) for kind, members in by_kind(linears).items()]
    return table(["kind", "shape", "layers", *COLUMNS], [*rows, row("**all**", linears)])


def _records_table(linears: Linears) -> str:
    mixed = len({linear.solver for linear in linears}) > 1
    several = len({linear.pattern for linear in linears}) > 1

    def row(linear: LinearRecord) -> list[str]:
        what = [code(linear.name), _shape(linear), linear.pattern if several else ""]
        rest = [gap(linear.gap_median), f"{linear.damping:g}", linear.solver if mixed else ""]
        return [*what, *_cells([linear]), *rest]

    header = ["linear", "shape", "pattern", *COLUMNS, "gap median", "damping", "solver"]
    return table(header, [row(linear) for linear in linears])


def _is_allocated(linears: Linears) -> bool:
    return len({linear.pattern for linear in linears}) > len(by_kind(linears))


def _block_table(linears: Linears, text: Callable[[Linears], str]) -> str:
    """Blocks down, kinds across."""
    kinds = by_kind(linears)
    here: dict[tuple[str, int], list[LinearRecord]] = {}
    for name, members in {**kinds, "": linears}.items():
        for linear in members:
            here.setdefault((name, linear.block), []).append(linear)
    blocks = sorted({linear.block for linear in linears})
    rows = [
        [f"{block}", *(text(here[key]) if (key := (name, block)) in here else "" for name in (*kinds, ""))]
        for block in blocks
    ]
    return table(["block", *map(code, kinds), "mean"], rows, num_left=0)


def _shape(linear: LinearRecord) -> str:
    return "{} x {}".format(*linear.shape)


def _cells(linears: Linears) -> list[str]:
    return [column(linears) for column in COLUMNS.values()]


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
