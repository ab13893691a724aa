"""The tables of an evaluation in a narrow terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from optima.evaluation.record import (
    ComparisonRecord,
    Estimate,
    Evaluation,
    ModelRecord,
    PairedRecord,
    PerplexityRecord,
    TaskRecord,
)
from optima.evaluation.table import headlines, print_tables

ACCURACY = Estimate(0.5181, 0.0103)


def evaluation(*names: str) -> Evaluation:
    tasks = [
        TaskRecord(task, 2376, dict.fromkeys(("acc", "acc_norm"), ACCURACY), {}, "") for task in ("arc_easy", "piqa")
    ]
    models = tuple(ModelRecord(name, None, "", "bfloat16", 1.0, tasks=tuple(tasks)) for name in names)
    paired = tuple(
        PairedRecord(task, metric, -0.1006, -0.1187, -0.0825, 370, 131, 2e-27)
        for task in ("arc_easy", "piqa")
        for metric in ("acc", "acc_norm")
    )
    comparisons = tuple(ComparisonRecord(name, None, paired) for name in names[1:])
    return Evaluation({}, {}, "cpu", "", models, comparisons)


def lines(found: Evaluation) -> list[str]:
    file = io.StringIO()
    print_tables(found, Console(file=file, width=80))
    return file.getvalue().splitlines()


def test_long_names_of_models_leave_tasks_and_figures_whole() -> None:
    name = "/a/long/path/to/the/models/that/were/made/model-with-a-long-name"
    for others in (1, 3):
        printed = lines(evaluation("dense-model-with-a-long-name", *(f"{name}-{i}" for i in range(others))))
        words = {word for line in printed for word in line.split()}
        assert {"arc_easy", "acc_norm", "-10.06", "-11.87", "-8.25", "370", "131", "2e-27"} <= words
        tables = [line for line in printed if not line.startswith(("zero-shot", "percentage", "against", name))]
        assert max(map(len, tables)) <= 80


def test_one_comparison_names_its_model_below_and_several_in_a_column() -> None:
    one, several = (" ".join(lines(evaluation(*names))) for names in (("dense", "a"), ("dense", "a", "b")))
    assert "a against dense:" in one
    assert " against dense:" in several
    assert several.count("2e-27") == 2 * one.count("2e-27")


def test_a_model_whose_tasks_are_not_done_has_empty_cells() -> None:
    found = evaluation("dense", "pruned")
    found = replace(found, models=(found.models[0], replace(found.models[1], tasks=())))
    found = replace(found, comparisons=(replace(found.comparisons[0], tasks=()),))
    assert sum("51.81" in line for line in lines(found)) == 4


def test_what_does_not_compare_is_told() -> None:
    found = evaluation("dense", "a")
    text = PerplexityRecord(10.0, Estimate(2.3, 0.1), "windows", 2, 16, "of one")
    for data_hash, expected in (("of one", False), ("of another", True)):
        other = replace(text, data_hash=data_hash)
        models = tuple(replace(model, perplexity=own) for model, own in zip(found.models, (text, other), strict=True))
        note = " ".join(lines(replace(found, models=models)))
        assert ("a: other tokens than those of dense, so do not compare" in note) == expected


def test_a_report_has_the_perplexity_of_its_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = evaluation("dense", "a", "b")
    text = [PerplexityRecord(value, Estimate(0.0, 0.0), "windows", 2, 16, "") for value in (10.0, 20.0, 30.0)]
    models = tuple(replace(model, perplexity=own) for model, own in zip(found.models, text, strict=True))
    found = replace(found, models=models)

    def headline(place: str, of: str | None = None) -> list[tuple[str, str, str]]:
        return headlines({Path(place): found}, {Path(place): of}).get(Path(place), [])

    for name, expected in (("a", "20.00"), ("b", "30.00")):
        assert headline(name) == [("perplexity", expected, "10.00 of dense")]
        assert headline(f"moved/{name}") == headline(name)
    assert headline("dense") == [("perplexity", "10.00", "")]
    assert headline("c") == []
    # Made of the first, whose name it has in another place: known by its weights.
    named = replace(models[1], model="out/dense", fingerprint="other")
    found = replace(found, models=(models[0], named), comparisons=found.comparisons[:1])
    assert headline("elsewhere/dense", models[0].fingerprint) == [("perplexity", "20.00", "10.00 of dense")]


def test_figures_on_different_texts_are_told_apart() -> None:
    def found(text: str) -> Evaluation:
        own = PerplexityRecord(20.0, Estimate(3.0, 0.1), "windows", 2, 16, text)
        one = evaluation("dense")
        return replace(one, models=(replace(one.models[0], perplexity=own),))

    places = {Path("a", "dense"): "0123456789", Path("b", "dense"): "0123456789", Path("c", "dense"): "fedcba9876"}
    same = dict(list(places.items())[:2])
    of = dict.fromkeys(places)
    figures = headlines({place: found(text) for place, text in same.items()}, of)
    assert list(figures.values()) == [[("perplexity", "20.00", "")]] * 2
    figures = headlines({place: found(text) for place, text in places.items()}, of)
    labels = [label for ((label, _, _),) in figures.values()]
    assert labels[0] == labels[1] == "perplexity, windows 012345"
    assert labels[2] == "perplexity, windows fedcba"


def test_error_of_a_perplexity() -> None:
    assert PerplexityRecord(20.0, Estimate(3.0, 0.1), "windows", 2, 16, "").stderr == pytest.approx(2.0)
    assert PerplexityRecord(20.0, Estimate(3.0, None), "windows", 1, 16, "").stderr is None
