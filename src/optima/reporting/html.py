"""The report as one HTML page; it needs no network.

``page/`` holds the template, one macro per section, the styles, and the script that draws from the embedded records.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic_core import to_json, to_jsonable_python

from optima.reporting.record import Report
from optima.reporting.summary import (
    NO_NOTES,
    by_kind,
    num_tuned,
    run_facts,
    stage_times,
    summary,
    tuning_rows,
    unit_rows,
)

PAGE = Path(__file__).parent / "page"
# A macro of sections.html and its title, in the page's order; a section without a body is left out.
SECTIONS = {
    "outcome": "Summary",
    "units": "What each block lost",
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


def render_html(report: Report) -> str:
    """The page of one report. All its texts are escaped, and the page forbids other scripts and all requests."""
    pages = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.lstrip_blocks = True
    pages.filters["prose"] = _prose
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    run = _view(report)
    data = to_json(run["data"], inf_nan_mode="strings").decode()
    return pages.get_template("report.html").render(
        run=run,
        data=Markup(data.replace("<", r"\u003c")),  # no "<" can end the script
        sections=SECTIONS,
        style=Markup(style),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _view(report: Report) -> dict[str, Any]:
    kinds = by_kind(report.linears)
    recipe = to_jsonable_python(report.run.recipe, inf_nan_mode="strings")
    number = {linear: i for i, members in enumerate(kinds.values()) for linear in members}
    return {
        "name": report.run.model,
        "certified": report.gap_max is not None,
        "tuned": num_tuned(report.linears) > 0,
        "summary": summary(report),
        "units": unit_rows(report),
        "tuning": tuning_rows(report),
        "stages": stage_times(report),
        "notes": report.run.notes or [NO_NOTES],
        "recipe": {key: _value(value) for key, value in recipe.items()},
        "facts": [*run_facts(report), *report.run.versions.items()],
        "data": {
            "gap": report.run.recipe.get("gap"),
            "kinds": list(kinds),
            "fields": ["kind", *DRAWN],
            "rows": [[number[one], *(getattr(one, key) for key in DRAWN)] for one in report.linears],
        },
    }


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _prose(markdown: str) -> Markup:
    """A line of the summary as HTML: strong text, code, powers of ten; all else is escaped."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(markdown)))
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"\b(\d\.\d)e-0?(\d+)\b", r"\1 × 10<sup>−\2</sup>", text)
    return Markup(re.sub(r"(?<![\w.])-(?=\d[\d.]*%)", "−", text))
