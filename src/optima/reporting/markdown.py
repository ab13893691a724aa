"""The report as Markdown: the answer first, then what to look at, then the tables behind it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import yaml

from optima.reporting.record import (
    LinearRecord,
    Report,
    geometric_mean,
    largest_gap,
    name_in_block,
    plain_values,
    weighted_sparsity,
)

NUM_WORST = 5
NUM_NAMED = 5
# Casting to bfloat16 costs about 2^-18 / 3 of an output's energy; beyond this a worse result is not the cast's doing.
CAST_ALLOWANCE = 1e-5

Linears = Sequence[LinearRecord]

READING = """\
How to read it: errors are relative reconstruction errors `||X (V - W)^T||^2 / ||X W^T||^2` on the calibration inputs,
in which the first token of a sequence weighs as much of it as the recipe's *sink_weight* says (0: as any other).
*mask* keeps the survivors at their dense values, *selector* has the selector's own update, *result* is as written, in
the checkpoint's dtype; *change* is result against selector. Means are geometric over linears. A row's *gap* is
a proven bound on how far it lies above the optimum of its damped problem, relative to that optimum, before the cast.
All of this is per linear, on calibration text: what the model lost as a whole, `optima eval` measures on other text."""


def render_markdown(report: Report) -> str:
    """The report as a Markdown document that is legible as plain text too."""
    linears = report.linears
    recipe = yaml.safe_dump(plain_values(report.run.recipe), sort_keys=False, allow_unicode=True)
    sections = {
        f"# Pruning report: {_code(report.run.model)}": _bullets(_headline(report) + _warnings(report)),
        "": _run_table(report),
        "## By kind of linear": f"{_kind_table(linears)}\n\n{READING}" if linears else "",
        "## Worst linears": _records_table(sorted(linears, key=_badness)[:NUM_WORST]),
        "## Notes": _bullets(report.run.notes) or "None: no linear was skipped and no setting was changed on the way.",
        "## Error of the result, block by block": _block_table(linears),
        "## Every linear": _records_table(linears),
        "## Recipe": f"```yaml\n{recipe}```",
        "## Versions": _bullets(f"{name} {version}" for name, version in report.run.versions.items()),
    }
    return "\n\n".join(f"{title}\n\n{body}".strip() for title, body in sections.items() if body) + "\n"


def render_summary(report: Report) -> str:
    """The first lines of the report, as plain text for a terminal."""
    return _bullets(_headline(report) + _warnings(report)).replace("**", "").replace("`", "")


def _headline(report: Report) -> list[str]:
    """What came out: sparsity and method, error, certificate."""
    linears, run = report.linears, report.run
    if not linears:
        return ["**Nothing was pruned.**"]
    solvers = sorted({name for linear in linears if _solved(linear) for name in linear.solver.split("+")})
    method = " + ".join([str(run.recipe.get("selector", "unnamed selector")), *solvers])
    patterns = sorted({linear.pattern for linear in linears})
    asked = sorted(linear.sparsity_asked for linear in linears)
    shown = f"pattern {', '.join(patterns)}"
    if len(patterns) > NUM_NAMED:
        shown = f"{len(patterns)} patterns, from {asked[0]:.1%} to {asked[-1]:.1%} a linear"
    share = f"{report.sparsity:.2%} of the weights of {len(linears)} linears pruned"
    lines = [f"**{share}** ({shown}) by **{method}**."]
    mask, selector, result = (_mean(linears, name) for name in ("error_mask", "error_selector", "error"))
    steps = [f"{_error(mask)} by the mask alone"]
    if any(map(_updated, linears)):
        steps.append(f"{_error(selector)} by the selector's own weights")
    change = f" ({_change(selector, result)} from the selector's)" if solvers and selector else ""
    lines.append(f"Mean relative error: {', '.join(steps)}, **{_error(result)} in the result**{change}.")
    return [*lines, _certificate(report)]


def _certificate(report: Report) -> str:
    gap, total, missed = report.gap_max, _rows_solved(report.linears), report.rows_not_converged
    if gap is None:
        return "No solver ran, so the weights are the selector's own and nothing is certified."
    asked = report.run.recipe.get("gap")
    target = f" to the asked gap of {_gap(asked)}" if isinstance(asked, int | float) else ""
    share = f"all {total:,} rows" if not missed else f"{total - missed:,} of {total:,} rows"
    largest = (
        f"the largest gap is **{_gap(gap)}**" if math.isfinite(gap) else "**some rows have no certificate at all**"
    )
    return f"Certified{target}: **{share}** that a solver worked on; {largest}."


def _warnings(report: Report) -> list[str]:
    """What must not be missed."""
    linears = report.linears
    missed = [linear for linear in linears if linear.rows_not_converged]
    worse = [linear for linear in linears if _solved(linear) and _lost(linear)]
    broken = [linear for linear in linears if not math.isfinite(linear.error)]
    found = {
        f"{report.rows_not_converged:,} rows did not converge and keep the best weights found": missed,
        "the result is worse than the selector's own weights": worse,
        "the error is not a finite number": broken,
    }
    return [f"**Warning:** {what}: {_names(where)}." for what, where in found.items() if where]


def _run_table(report: Report) -> str:
    run, linears = report.run, report.linears
    total = sum(math.prod(linear.shape) for linear in linears)
    return _table(
        ["run", " "],
        [
            ["weights pruned", f"{round(report.sparsity * total):,} of {total:,} in the pruned linears"],
            ["sparsity", f"{report.sparsity:.4%}, asked {report.sparsity_asked:.4%}"],
            ["calibration", f"{run.num_tokens:,} tokens, seed {run.seed}, hash {run.data_hash[:16]}"],
            ["device, dtype", f"{run.device}, {run.dtype}"],
            ["peak memory", _bytes(run.peak_memory_bytes)],
            ["time", f"{_time(run.seconds)}, {_time(sum(linear.seconds for linear in linears))} of it on linears"],
            ["finished", run.created],
        ],
        num_left=2,
    )


def _kind_table(linears: Linears) -> str:
    def row(title: str, members: Linears) -> list[str]:
        shapes = set(map(_shape, members))
        return [title, shapes.pop() if len(shapes) == 1 else "", f"{len(members)}", *_cells(members)]

    rows = [row(_code(kind), members) for kind, members in _by_kind(linears).items()]
    return _table(["kind", "shape", "linears", *_COLUMNS], [*rows, row("**all**", linears)])


def _records_table(linears: Linears) -> str:
    mixed = len({linear.solver for linear in linears}) > 1
    several = len({linear.pattern for linear in linears}) > 1

    def row(linear: LinearRecord) -> list[str]:
        what = [_code(linear.name), _shape(linear), linear.pattern if several else ""]
        rest = [_gap(linear.gap_median), f"{linear.damping:g}", linear.solver if mixed else ""]
        return [*what, *_cells([linear]), *rest]

    return _table(
        ["linear", "shape", "pattern", *_COLUMNS, "gap median", "damping", "solver"],
        [row(linear) for linear in linears],
    )


def _block_table(linears: Linears) -> str:
    """Blocks down, kinds across: where in the model the error sits."""
    kinds = _by_kind(linears)
    members: dict[int, list[LinearRecord]] = {}
    for linear in sorted(linears, key=lambda linear: linear.block):
        members.setdefault(linear.block, []).append(linear)

    def cell(block: int, kind: Linears) -> str:
        here = [linear for linear in kind if linear.block == block]
        return _error(_mean(here, "error")) if here else ""

    rows = [
        [f"{block}", *(cell(block, kind) for kind in kinds.values()), _error(_mean(here, "error"))]
        for block, here in members.items()
    ]
    return _table(["block", *map(_code, kinds), "mean"], rows, num_left=0)


def _by_kind(linears: Linears) -> dict[str, list[LinearRecord]]:
    """Linears that play the same part, in the order of the model.

    A kind is the name inside the block, numbers (experts) as ``*``, cut to its last part where that says as much.
    """
    names = {linear: re.sub(r"(?<=\.)\d+(?=\.)", "*", name_in_block(linear)) for linear in linears}
    lasts = Counter(name.rpartition(".")[2] for name in set(names.values()))
    kinds: dict[str, list[LinearRecord]] = {}
    for linear, name in names.items():
        last = name.rpartition(".")[2]
        kinds.setdefault(last if lasts[last] == 1 else name, []).append(linear)
    return kinds


def _shape(linear: LinearRecord) -> str:
    return "{} x {}".format(*linear.shape)


def _solved(linear: LinearRecord) -> bool:
    return linear.gap_max is not None


def _updated(linear: LinearRecord) -> bool:
    return linear.error_selector != linear.error_mask


def _lost(linear: LinearRecord) -> bool:
    return linear.error > linear.error_selector + CAST_ALLOWANCE


def _badness(linear: LinearRecord) -> float:
    """Sorts the worst first, NaN before all."""
    return -math.inf if math.isnan(linear.error) else -linear.error


def _rows_solved(linears: Linears) -> int:
    return sum(linear.rows for linear in linears if _solved(linear))


def _mean(linears: Linears, field: str) -> float:
    return geometric_mean(getattr(linear, field) for linear in linears)


def _iterations(linears: Linears) -> str:
    solved = [linear for linear in linears if _solved(linear)]
    rows = _rows_solved(linears)
    if not rows:
        return ""
    mean = sum(linear.iterations_mean * linear.rows for linear in solved) / rows
    return f"{mean:.1f} ({max(linear.iterations_max for linear in solved)})"


def _not_converged(linears: Linears) -> str:
    rows = _rows_solved(linears)
    missed = sum(linear.rows_not_converged for linear in linears)
    return f"{missed:,} of {rows:,}" if missed else "0" if rows else ""


def _change_of(linears: Linears) -> str:
    return _change(_mean(linears, "error_selector"), _mean(linears, "error")) if any(map(_solved, linears)) else ""


# Each cell speaks for one linear or for several; a column that is empty all the way down is left out.
_COLUMNS: dict[str, Callable[[Linears], str]] = {
    "sparsity": lambda linears: f"{weighted_sparsity(linears):.2%}",
    "mask": lambda linears: _error(_mean(linears, "error_mask")),
    "selector": lambda linears: _error(_mean(linears, "error_selector")) if any(map(_updated, linears)) else "",
    "result": lambda linears: _error(_mean(linears, "error")),
    "change": _change_of,
    "gap max": lambda linears: _gap(largest_gap(linears)),
    "iterations (max)": _iterations,
    "not converged": _not_converged,
    "seconds": lambda linears: f"{sum(linear.seconds for linear in linears):.2f}",
}


def _cells(linears: Linears) -> list[str]:
    return [column(linears) for column in _COLUMNS.values()]


def _error(error: float) -> str:
    return f"{error:.4f}" if error == 0 or error >= 1e-3 else f"{error:.1e}"


def _gap(gap: float | None) -> str:
    return "" if gap is None else f"{gap:.1e}" if math.isfinite(gap) else "none"


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _code(name: str) -> str:
    return f"`{name}`"


def _names(linears: Linears) -> str:
    shown = ", ".join(_code(linear.name) for linear in linears[:NUM_NAMED])
    return f"{shown} and {len(linears) - NUM_NAMED} more" if len(linears) > NUM_NAMED else shown


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {' '.join(item.split())}" for item in items)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
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
