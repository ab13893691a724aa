"""A run as a whole: its report and its saved recipe say what was done."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from families import build, make_ids
from tiny import TEXT, make_llama, make_tokenizer, make_tokens, save_model, save_text

from optima import Recipe, load_recipe, load_report, prune
from optima.cli import main
from optima.models.load import find_source
from optima.plan import make_plan
from optima.selectors.scores import RIA


def test_the_report_says_what_was_run(tmp_path: Path) -> None:
    source, text = save_model(tmp_path / "model"), save_text(tmp_path / "text.txt")
    recipe = Recipe(dataset=[str(text)], num_calibration_samples=4, max_seq_length=16)
    prune(str(source), recipe, output_dir=tmp_path / "out")
    run = load_report(str(tmp_path / "out")).run
    assert {"forward", "gradients", "hessian", "select", "solve", "round", "write"} <= run.stages.keys()
    assert sum(run.stages.values()) <= run.seconds
    saved = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (saved.sparsity, saved.scope, saved.objective, saved.batch_size) == (0.5, "layer", "loss", 128)
    assert run.recipe == saved.to_dict()


def test_blocks_are_timed_and_the_last_forward_is_left_out() -> None:
    report = prune(make_llama(), Recipe(), calibration=make_tokens())
    assert report.run.calibration_given, "the recipe names a data set all the same"
    assert [block.index for block in report.blocks] == list(range(len(report.blocks)))
    assert all({"read", "forward", "solve"} <= block.seconds.keys() for block in report.blocks)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_plan_of_fused_experts(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.bfloat16().save_pretrained(tmp_path)
    plan = make_plan(find_source(str(tmp_path)), Recipe(max_seq_length=32))
    report = prune(model, Recipe(), calibration=make_ids())
    planned = {linear.name for linear in plan.linears}
    assert {linear.name for linear in report.linears} == planned
    assert any("experts" in name for name in planned)


@pytest.mark.parametrize("form", ["tensor", "documents"])
def test_the_recipe_says_how_much_text_was_read(tmp_path: Path, form: str) -> None:
    tokens_NL, recipe = make_tokens(20, 16), Recipe()
    given: Any = tokens_NL
    if form == "documents":
        given, recipe = [TEXT] * 20, Recipe(num_calibration_samples=5, max_seq_length=16)
    tokenizer = make_tokenizer()
    report = prune(make_llama(), recipe, output_dir=tmp_path / "out", tokenizer=tokenizer, calibration=given)
    saved = load_recipe(tmp_path / "out" / "recipe.yaml")
    expected = (5 if form == "documents" else 20, 16)
    assert (saved.num_calibration_samples, saved.max_seq_length) == expected
    assert math.prod(expected) == report.run.num_tokens


def test_a_name_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "llama[final]" / "[" / "old]")
    save_text(tmp_path / "text.txt")
    arguments = ["--dataset", str(tmp_path / "text.txt"), "--num-calibration-samples", "4", "--max-seq-length", "16"]
    assert main(["prune", str(model), "--output-dir", str(tmp_path / "out"), *arguments]) == 0
    assert "llama[final]/[/old]" in capsys.readouterr().err.replace("\n", "")


def test_the_settings_of_a_selector_object_are_noted(root: Path) -> None:
    options = {"solver": "none", "max_seq_length": 16, "num_calibration_samples": 4}
    recipe = Recipe(selector=RIA(power=1.0), dataset=["text.txt"], **options)
    prune("model", recipe, output_dir="out", progress=False)
    assert load_report("out").run.selector_is_object
    assert any("RIA(power=1.0" in note for note in load_report("out").run.notes)
    assert "with the selector's settings from `report.json`" in Path("out/README.md").read_text()


def test_settings_reach_the_work() -> None:
    run = prune(make_llama(), Recipe(damping=0.1, objective="sink"), calibration=make_tokens())
    assert {linear.damping for linear in run.linears} == {0.1}
    run = prune(build("mixtral"), Recipe(objective="sink"), calibration=make_ids())
    assert any("fewer than 256 tokens" in note for note in run.run.notes)
