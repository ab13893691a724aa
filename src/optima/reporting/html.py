"""The report as one HTML page, of one run or of several compared; it needs no network.

``page/`` holds the template, one macro per section, the styles, and the script that draws from the embedded records.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic_core import to_json, to_jsonable_python

from optima.reporting.record import Report
from optima.reporting.summary import (
    NO_NOTES,
    Figure,
    by_kind,
    change,
    error,
    figures,
    mean,
    num_tuned,
    run_facts,
    stage_times,
    summary,
    tuning_rows,
)

PAGE = Path(__file__).parent / "page"
# A macro of sections.html and its title, in the page's order; a section without a body is left out.
SECTIONS = {
    "outcome": "Summary",
    "differences": "Differences",
    "map": "Error by block",
    "spread": "Certificates and iterations",
    "tuning": "Block tuning",
    "times": "Time",
    "linears": "Every linear layer",
    "notes": "Notes",
    "origin": "Recipe and environment",
}
# Fields of a linear that report.js reads.
DRAWN = (
    *("part", "name", "block", "shape", "pattern", "sparsity", "error_mask", "error_selector", "error", "gap_max"),
    *("seconds", "gap_written_max", "tuned", "iterations_mean", "iterations_max", "rows_not_converged"),
)
View = dict[str, Any]  # what the templates show of a run


def render_html(reports: Mapping[str, Report], more: Sequence[Sequence[Figure]] = ()) -> str:
    """The page of one report, or of several compared with the first.

    All texts of a record are escaped, and the page's policy forbids other scripts and all requests.

    Args:
        reports: at least one, by the names they have on the page.
        more: figures for each report's headline that its record does not hold, such as a perplexity.
    """
    pages = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.lstrip_blocks = True
    pages.filters["prose"] = _prose
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    runs = [_view(name, report) for name, report in reports.items()]
    several = len(runs) > 1
    for run, found in zip(runs, more or [()] * len(runs), strict=True):
        run["figures"][1:1] = found
    dense = {(report.run.model, report.run.model_revision) for report in reports.values()}
    data = to_json([run["data"] for run in runs], inf_nan_mode="strings").decode()
    return pages.get_template("report.html").render(
        runs=runs,
        data=Markup(data.replace("<", r"\u003c")),  # no "<" can end the script
        headlines=_headlines(runs),
        differing=_differences(runs) if several else {},
        mixed=several and len(dense) > 1,
        sections=SECTIONS,
        style=Markup(style),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _view(name: str, report: Report) -> View:
    kinds = by_kind(report.linears)
    recipe = to_jsonable_python(report.run.recipe, inf_nan_mode="strings")
    number = {linear: i for i, members in enumerate(kinds.values()) for linear in members}
    return {
        "name": name,
        "figures": figures(report),
        "certified": report.gap_max is not None,
        "tuned": num_tuned(report.linears) > 0,
        "summary": summary(report),
        "tuning": tuning_rows(report),
        "stages": stage_times(report),
        "errors": {kind: mean(members, "error") for kind, members in kinds.items()},
        "notes": report.run.notes or [NO_NOTES],
        "recipe": {key: _value(value) for key, value in recipe.items()},
        "facts": [*run_facts(report), *report.run.versions.items()],
        "data": {
            "title": name,
            "gap": report.run.recipe.get("gap"),
            "kinds": list(kinds),
            "fields": ["kind", *DRAWN],
            "rows": [[number[one], *(getattr(one, key) for key in DRAWN)] for one in report.linears],
        },
    }


def _headlines(runs: Sequence[View]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Labels, and each run's figures under them; runs may have different figures."""
    labels = list(dict.fromkeys(label for run in runs for label, _, _ in run["figures"]))
    found = [(run["name"], {label: value for label, value, _ in run["figures"]}) for run in runs]
    return labels, [(name, [values.get(label, "–") for label in labels]) for name, values in found]


def _value(value: Any) -> str:
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


def _prose(markdown: str) -> Markup:
    """A line of the summary as HTML: strong text, code, powers of ten; all else is escaped."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(markdown)))
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\b(\d\.\d)e-0?(\d+)\b", r"\1 × 10<sup>−\2</sup>", text)
    return Markup(re.sub(r"(?<![\w.])-(?=\d[\d.]*%)", "−", text))
