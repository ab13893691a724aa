"""Mean and spread over seeds of what accuracy.py found, with the ratio to a baseline.

    python benchmarks/seeds.py results/objective.json [MORE.json ...] --baseline alps

One row a model, size of the calibration text, method and what is unusual in its settings, or differs between results of
one seed; one column a pattern. A cell has the perplexity of the evaluation text / of held-out calibration text, each
the mean over seeds ± their standard deviation. In brackets stands the ratio to the baseline at the same model, size and
pattern, of both, seed by seed where both have it: again mean ± standard deviation. The baseline's settings must be the
usual ones (or tempered rows, as the row's own, if it was so measured). Both must have been calibrated and measured on
the same text. Results of equal settings are taken once, from the file named first. ``--ignore`` names settings that
are not compared: draws that older and newer versions measured are draws of one row then. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from optima.reporting.markdown import table

NOT_PRUNED = "-"  # the pattern of a model that was not pruned
TEXTS = ("perplexity", "perplexity_held_out")
UNRELATED = {"tasks", "task_limit"}  # settings that no perplexity depends on
OF_SEED = {"seed", "calibration_hash"}  # and settings that differ with the seed
MEASURED = ("evaluation_hash", "held_out_hash", "windows", "dtype")  # settings that perplexities cannot differ in
USUAL = {
    "swept_share": 1.0,
    "tuning_epochs": 4,
    "tuning_share": 1.0,
    "damping": 0.01,
    "own_samples": 0,
    "coupling": False,
    "sensitivity_share": 1.0,
    "tempered_rows": False,
    "words": False,
}
Texts = tuple[Any, ...]  # those that a result was measured on, and calibrated on
Cell = dict[int, tuple[tuple[float, ...], Texts]]  # perplexities by seed
Row = tuple[str, str, str, str]  # model, tokens, method, unusual settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="written by accuracy.py --output")
    parser.add_argument("--baseline", default="alps", help="the method that others are compared with")
    parser.add_argument("--ignore", nargs="+", default=[], help="settings that tell no results apart")
    options = parser.parse_args()
    results = [result for file in options.results for result in json.loads(file.read_text(encoding="utf-8"))]
    for result in results:
        result["settings"] = {name: value for name, value in result["settings"].items() if name not in options.ignore}
    varied = varied_settings(results)
    rows: dict[Row, dict[str, Cell]] = {}
    for result in results:
        cell = rows.setdefault(row_of(result, varied), {}).setdefault(result["pattern"], {})
        found = tuple(float(result[text]) for text in TEXTS if text in result)
        cell.setdefault(seed_of(result), (found, texts_of(result)))
    patterns = sorted({pattern for row in rows.values() for pattern in row} - {NOT_PRUNED})
    printed = []
    for row, cells in sorted(rows.items(), key=lambda item: (item[0][0], len(item[0][1]), *item[0])):
        baseline = {} if row[2] == options.baseline else baseline_of(row, rows, options.baseline)
        if NOT_PRUNED in cells:
            cells = dict.fromkeys(patterns, cells[NOT_PRUNED])
        texts = [shown(cells[p]) + ratio(cells[p], baseline.get(p, {})) if p in cells else "" for p in patterns]
        printed.append([*row, *texts])
    print(table(["model", "tokens", "method", "settings", *patterns], printed, num_left=4))


def baseline_of(row: Row, rows: Mapping[Row, dict[str, Cell]], name: str) -> dict[str, Cell]:
    """The cells of the baseline at the row's model and size: as the row, where rows are tempered, or else as usual."""
    model, tokens, _, settings = row
    tempered = "tempered_rows True"
    found = rows.get((model, tokens, name, tempered), {}) if tempered in settings.split(", ") else {}
    return rows.get((model, tokens, name, ""), {}) | found


def seed_of(result: dict[str, Any]) -> int:
    return int(result["settings"].get("seed", 0))  # a model that was not pruned has none


def texts_of(result: dict[str, Any]) -> Texts:
    """The text measured on and, unless some is generated, the hash of the calibration text."""
    settings = result["settings"]
    own = settings.get("own_samples") or result["pattern"] == NOT_PRUNED
    return *(str(settings.get(name)) for name in MEASURED), None if own else settings.get("calibration_hash")


def method_of(result: dict[str, Any]) -> tuple[str, str, str]:
    """Model, tokens that were read, method."""
    settings = result["settings"]
    samples, *length = settings.get("calibration", [0])
    size = " x ".join(map(str, [samples - settings.get("own_samples", 0), *length])) if length else ""
    return settings["model"], size, result["method"]


def varied_settings(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], set[str]]:
    """By method, names of the settings in which results of one pattern differ but for the seed's own."""
    alike: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        alike[method_of(result), result["pattern"]].append(result["settings"])
    varied: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for (method, _), same in alike.items():
        for first, other in combinations(same, 2):
            own = OF_SEED if first.get("seed") != other.get("seed") else set()
            if first.get("own_samples") != other.get("own_samples"):  # which the row says
                own = own | {"calibration", "calibration_hash"}
            own = own | {"fingerprint"} - (first.keys() & other.keys())  # older results do not have it
            names = (first.keys() | other.keys()) - own
            varied[method] |= {name for name in names if first.get(name) != other.get(name)}
    return varied


def row_of(result: dict[str, Any], varied: Mapping[tuple[str, str, str], set[str]]) -> Row:
    settings, method = result["settings"], method_of(result)
    unusual = {name: settings[name] for name, usual in USUAL.items() if settings.get(name, usual) != usual}
    unusual |= {name: settings.get(name) for name in sorted(varied[method] - USUAL.keys() - UNRELATED)}
    return *method, ", ".join(f"{name} {str(value)[:12]}" for name, value in unusual.items())


def shown(cell: Cell) -> str:
    """The mean over seeds on each text, and its spread."""
    columns = zip(*(found for found, _ in cell.values()), strict=True)
    return " / ".join(with_spread(column, ",.1f") for column in columns)


def with_spread(values: Sequence[float], form: str) -> str:
    """Their mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def same(first: Texts, other: Texts) -> bool:
    """None agrees with any."""
    return all(None in pair or pair[0] == pair[1] for pair in zip(first, other, strict=True))


def ratio(cell: Cell, baseline: Cell) -> str:
    """By which each text's perplexity is that of the baseline, over the seeds of both that had the same text."""
    seeds = [seed for seed in cell.keys() & baseline.keys() if same(cell[seed][1], baseline[seed][1])]
    if not seeds:
        return ""
    pairs = (zip(cell[seed][0], baseline[seed][0], strict=True) for seed in seeds)
    ratios = zip(*([own / other for own, other in pair] for pair in pairs), strict=True)
    return f" ({' / '.join(with_spread(each, '.2f') for each in ratios)})"


if __name__ == "__main__":
    main()
