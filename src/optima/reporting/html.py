"""The report as one HTML page, of one run or of several beside each other: it opens offline and asks no network.

``page/`` holds its parts: report.html the frame, sections.html a macro a section. report.js draws the plots and the
table from the record's own numbers, which the page carries as JSON.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic_core import from_json, to_json

from optima.reporting.joined import JOINED, MOST_SHOWN, joined
from optima.reporting.record import BlockRecord, LinearRecord, Report, name_in_block
from optima.reporting.summary import (
    by_kind,
    change,
    duration,
    error,
    gap,
    mean,
    num_bytes,
    on_linears,
    pattern_weights,
    run_facts,
    solved,
    stage_times,
    summary,
)
from optima.runtimes import table_rows

PAGE = Path(__file__).parent / "page"
# A macro of sections.html and its title, in the page's order; what a macro leaves empty is left out.
# To add one: a line here, the macro, and, if something is drawn, a function in DRAW of report.js.
SECTIONS = {
    "outcome": "What came out",
    "differences": "How the runs differ",
    "map": "Error, block by block",
    "spread": "Certificates and iterations",
    "tuning": "What tuning won, block by block",
    "times": "Where the time went",
    "linears": "Every linear",
    "runtimes": "What runs it",
    "notes": "Notes",
    "origin": "Recipe and environment",
}
View = dict[str, Any]  # of a run: all that the templates show
Figure = tuple[str, str, str]  # of the headline: a label, a value and a detail


def render_html(reports: Mapping[str, Report], more: Sequence[Sequence[Figure]] = ()) -> str:
    """The page of one report, or of several to compare with the first, each under the name that it shall have.

    Whatever a record holds is untrusted: it is escaped, and the page forbids all scripts but its own and all requests.

    Args:
        reports: by the names that they have on the page, at least one.
        more: figures for each report's headline that its record does not hold, such as a perplexity.
    """
    pages = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.lstrip_blocks = True
    pages.filters["prose"] = _prose
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    runs = [_view(name, report, list(reports)) for name, report in reports.items()]
    for run, figures in zip(runs, more or [()] * len(runs), strict=True):
        run["figures"][2:2] = figures
    return pages.get_template("report.html").render(
        runs=runs,
        # No "<", no end of the script; JSON has another way to write it.
        data=Markup(to_json([run["data"] for run in runs], inf_nan_mode="strings").decode().replace("<", r"\u003c")),
        headlines=_headlines(runs),
        differing=_differences(runs) if len(runs) > 1 else {},
        sections=SECTIONS,
        style=Markup(style),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _view(name: str, report: Report, names: Sequence[str]) -> View:
    recipe = from_json(to_json(report.run.recipe, inf_nan_mode="strings"))
    return {
        "name": name,
        "figures": _figures(report),
        "certified": report.gap_max is not None,
        "summary": summary(report),
        "stages": [(stage, duration(seconds), f"{share:.1%}") for stage, seconds, share in stage_times(report)],
        "tuning": [
            (
                f"block {block.index}" + ", by words" * block.words,
                change(block.tuning[0], block.tuning[block.tuning_epoch]),
                _left(block),
            )
            for block in report.blocks
            if block.tuning_epoch
        ],
        "errors": {kind: mean(linears, "error") for kind, linears in by_kind(report.linears).items()},
        "runtimes": _runtimes(report),
        "notes": (*report.run.notes, *([JOINED.format("page")] if len(report.linears) > MOST_SHOWN else [])),
        "recipe": {key: _value(value) for key, value in recipe.items()},
        "facts": [*run_facts(report), *report.run.versions.items()],
        "data": _data(name, report, names),
    }


def _runtimes(report: Report) -> tuple[tuple[str, ...], ...]:
    """Rows of a table; addresses are text, for the page leads nowhere."""
    rows = table_rows(pattern_weights(report.linears)) if report.linears else []
    return tuple(tuple(cell.replace("https://", "") for cell in row) for row in rows)


def _left(block: BlockRecord) -> str:
    """What tuning left of a block's cost."""
    return f"{block.tuning[block.tuning_epoch] / block.tuning[0]:.1%}"


def _figures(report: Report) -> list[Figure]:
    run, linears = report.run, report.linears
    by = change(mean(linears, "error_selector"), mean(linears, "error")) if any(map(solved, linears)) else ""
    certified = gap(report.gap_written_max)
    since = "before the cast" if certified else "before tuning"
    what = ", ".join(
        [f"{by} from the selector’s"] * bool(by) + ["before tuning"] * any(linear.tuned for linear in linears)
    )
    return [
        ("sparsity as written", f"{report.sparsity:.2%}", f"asked {report.sparsity_asked:.2%}"),
        ("mean error", error(report.error_geomean), what),
        (
            "largest gap as written",
            certified or "–",
            f"{gap(report.gap_max)} {since}" if report.gap_max is not None else "",
        ),
        ("time", duration(run.seconds), on_linears(report, "on linears")),
        ("peak memory", num_bytes(run.peak_memory_bytes), run.device),
    ]


def _headlines(runs: Sequence[View]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Labels, and the figures of each run under them: one that was not evaluated has fewer, or on another text."""
    places: dict[str, int] = {}
    for run in runs:
        for place, (label, _, _) in enumerate(run["figures"]):
            places[label] = max(place, places.get(label, 0))
    labels = sorted(places, key=lambda label: places[label])
    found = [(run["name"], {label: value for label, value, _ in run["figures"]}) for run in runs]
    return labels, [(name, [values.get(label, "–") for label in labels]) for name, values in found]


def _value(value: Any) -> str:
    """A value of a recipe as a reader would write it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _differences(runs: Sequence[View]) -> dict[str, list[tuple[str, list[str]]]]:
    """Options that differ, and the mean error of each kind of linear with its change from the first run's."""

    def cell(run: View, kind: str) -> str:
        found, first = run["errors"].get(kind), runs[0]["errors"].get(kind, 0.0)
        return "–" if found is None else error(found) if run is runs[0] else f"{error(found)} {change(first, found)}"

    options, kinds = (dict.fromkeys(key for run in runs for key in run[part]) for part in ("recipe", "errors"))
    values = [(key, [run["recipe"].get(key, "–") for run in runs]) for key in options]
    return {
        "option": [(key, cells) for key, cells in values if len(set(cells)) > 1],
        "mean error of": [(kind, [cell(run, kind) for run in runs]) for kind in kinds],
    }


def _short(name: str, names: Sequence[str]) -> str:
    """What tells a run from the others where there is little room: the directories that all are in are left out."""
    directories = [each.split("/")[:-1] for each in names]
    alike = (len(names) > 1 and len({*parts}) == 1 for parts in zip(*directories, strict=False))
    shared = sum(takewhile(bool, alike))
    return "/".join(name.split("/")[shared:])


def _data(name: str, report: Report, names: Sequence[str]) -> View:
    """What report.js draws from: the records of the linears as rows, with the kind of each by its number."""
    shown = joined(report.linears)
    kinds = by_kind(shown)
    number = {linear: i for i, members in enumerate(kinds.values()) for linear in members}
    keys = [field.name for field in fields(LinearRecord)]
    rows = [[number[linear], name_in_block(linear), *(getattr(linear, key) for key in keys)] for linear in shown]
    asked = report.run.recipe.get("gap")
    title = _short(name, names)
    return {"title": title, "gap": asked, "kinds": list(kinds), "fields": ["kind", "part", *keys], "rows": rows}


def _prose(markdown: str) -> Markup:
    """A line of the summary: strong words, code, powers of ten, links within the page; all else is escaped."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(markdown)))
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\[([^]]+)\]\((#[a-z-]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\b(\d\.\d)e-0?(\d+)\b", r"\1 × 10<sup>−\2</sup>", text)
    return Markup(re.sub(r"(?<![\w.])-(?=\d[\d.]*%)", "−", text))
