"""Mean and spread over seeds of what accuracy.py found, with the ratio to a baseline.

    python benchmarks/seeds.py results/objective.json [MORE.json ...] --baseline alps

One row a model, size of the calibration text, method and what is unusual in its settings; one column a pattern. A cell
has the perplexity of the evaluation text / of held-out calibration text, each the mean over seeds ± their standard
deviation. In brackets stands the ratio to the baseline at the same model, size and pattern, of both, over the seeds
that both have. Results of equal settings are taken once, from the file named first. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from optima.reporting.markdown import table

DENSE = "-"  # the pattern of a model that was not pruned
TEXTS = ("perplexity", "perplexity_held_out")
USUAL = {"swept_share": 1.0, "tuning_epochs": 4, "damping": 0.01}
Cell = dict[int, tuple[float, ...]]  # perplexities by seed
Row = tuple[str, str, str, str]  # model, tokens, method, unusual settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="written by accuracy.py --output")
    parser.add_argument("--baseline", default="alps", help="the method that others are compared with")
    options = parser.parse_args()
    rows: dict[Row, dict[str, Cell]] = {}
    for result in (result for file in options.results for result in json.loads(file.read_text(encoding="utf-8"))):
        cell = rows.setdefault(row_of(result), {}).setdefault(result["pattern"], {})
        cell.setdefault(
            result["settings"].get("seed", 0), tuple(float(result[text]) for text in TEXTS if text in result)
        )
    patterns = sorted({pattern for row in rows.values() for pattern in row} - {DENSE})
    printed = []
    for row, cells in sorted(rows.items(), key=lambda item: (item[0][0], len(item[0][1]), *item[0])):
        model, tokens, method, _ = row
        baseline = rows.get((model, tokens, options.baseline, ""), {}) if method != options.baseline else {}
        if DENSE in cells:
            cells = dict.fromkeys(patterns, cells[DENSE])
        texts = [shown(cells[p]) + ratio(cells[p], baseline.get(p, {})) if p in cells else "" for p in patterns]
        printed.append([*row, *texts])
    print(table(["model", "tokens", "method", "besides", *patterns], printed, num_left=4))


def row_of(result: dict[str, Any]) -> Row:
    settings = result["settings"]
    size = " x ".join(map(str, settings.get("calibration", [])))
    others = [f"{name} {settings[name]:g}" for name, usual in USUAL.items() if settings.get(name, usual) != usual]
    return settings["model"], size, result["method"], ", ".join(others)


def shown(cell: Cell) -> str:
    """The mean over seeds on each text, and its spread."""
    columns = list(zip(*cell.values(), strict=True))
    spreads = [f" ± {statistics.stdev(column):.1f}" if len(column) > 1 else "" for column in columns]
    return " / ".join(
        f"{statistics.mean(column):,.1f}{spread}" for column, spread in zip(columns, spreads, strict=True)
    )


def ratio(cell: Cell, baseline: Cell) -> str:
    """By which each text's perplexity is that of the baseline, over the seeds of both."""
    seeds = cell.keys() & baseline.keys()
    if not seeds:
        return ""
    totals = [[sum(column) for column in zip(*(of[seed] for seed in seeds), strict=True)] for of in (cell, baseline)]
    return f" ({' / '.join(f'{own / other:.2f}' for own, other in zip(*totals, strict=True))})"


if __name__ == "__main__":
    main()
