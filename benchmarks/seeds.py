"""Mean and spread over calibration samples of what accuracy.py found, with the ratio to a baseline.

    python benchmarks/seeds.py results/objective.json [MORE.json ...] --baseline alps

There is one row for each model, size of the calibration text, method and settings, and one column for each pattern.
The settings are those in which results of a method differ. A cell has the perplexity of the evaluation text / of
held-out calibration text, each the mean over samples ± their standard deviation, and in brackets the ratio of the means
to the baseline at the same model, size and pattern. Of equal results, the first counts. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optima.reporting.markdown import table

NOT_PRUNED = "-"  # the pattern of a model that was not pruned
# Settings by which samples differ, or which no perplexity depends on, or which earlier results lack.
UNRELATED = {"model", "calibration", "seed", "calibration_hash", "tasks", "task_limit", "fingerprint", "pattern"}
Row = tuple[str, str, str, str]  # model, tokens, method, settings
Cell = dict[Any, tuple[float, ...]]  # perplexities by sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="written by accuracy.py --output")
    parser.add_argument("--baseline", default="alps", help="the method that others are compared with")
    parser.add_argument("--ignore", nargs="+", default=[], help="settings that are not compared")
    options = parser.parse_args()
    results = [result for file in options.results for result in json.loads(file.read_text(encoding="utf-8"))]
    rows: dict[Row, dict[str, Cell]] = defaultdict(lambda: defaultdict(dict))
    for result, row in zip(results, rows_of(results, UNRELATED.union(options.ignore)), strict=True):
        settings = result["settings"]
        found = tuple(float(result[text]) for text in ("perplexity", "perplexity_held_out") if text in result)
        sample = settings.get("seed"), settings.get("calibration_hash")
        rows[row][result["pattern"]].setdefault(sample, found)
    baselines = {row[:2]: cells for row, cells in reversed(sorted(rows.items())) if row[2] == options.baseline}
    patterns = sorted({pattern for cells in rows.values() for pattern in cells} - {NOT_PRUNED})
    lines = []
    for row, cells in sorted(rows.items()):
        baseline = {} if row[2] == options.baseline else baselines.get(row[:2], {})
        if NOT_PRUNED in cells:
            cells = dict.fromkeys(patterns, cells[NOT_PRUNED])
        lines.append([*row, *(shown(cells[p], baseline.get(p)) if p in cells else "" for p in patterns)])
    print(table(["model", "tokens", "method", "settings", *patterns], lines, num_left=4))


def rows_of(results: list[dict[str, Any]], ignored: set[str]) -> list[Row]:
    """The row of each result; its settings are those in which results of one method and pattern differ."""
    methods: list[tuple[str, str, str]] = []
    alike: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        settings = result["settings"]
        methods.append((settings["model"], " x ".join(map(str, settings.get("calibration", []))), result["method"]))
        alike[methods[-1], result["pattern"]].append(settings)
    varied: dict[Any, set[str]] = defaultdict(set)
    for (method, _), group in alike.items():
        names = {name for settings in group for name in settings} - ignored
        varied[method] |= {name for name in names if any(one.get(name) != group[0].get(name) for one in group)}
    rows = []
    for method, result in zip(methods, results, strict=True):
        settings = result["settings"]
        rows.append((*method, ", ".join(f"{n} {settings[n]}" for n in sorted(varied[method]) if settings.get(n))))
    return rows


def shown(cell: Cell, baseline: Cell | None) -> str:
    own = means(cell.values())
    spreads = [statistics.stdev(column) if len(cell) > 1 else 0.0 for column in zip(*cell.values(), strict=True)]
    text = " / ".join(
        f"{mean:,.1f}" + f" ± {spread:.1f}" * (len(cell) > 1) for mean, spread in zip(own, spreads, strict=True)
    )
    if not baseline:
        return text
    ratios = (mean / other for mean, other in zip(own, means(baseline.values()), strict=False))
    return f"{text} ({' / '.join(f'{ratio:.2f}' for ratio in ratios)})"


def means(found: Iterable[tuple[float, ...]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
