"""A run as a whole: what is refused before it, and what its report and saved recipe tell of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_ids
from tiny import TEXT, make_llama, make_tokenizer, make_tokens, save_model, save_text

from optima import Recipe, load_recipe, load_report, prune
from optima.cli import main
from optima.errors import CalibrationError, ModelError, RecipeError
from optima.models.load import find_source
from optima.plan import make_plan
from optima.selectors.scores import RIA


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(3),
        torch.zeros(2, 8),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(8, dtype=torch.int64),
        7,
        "text",
    ],
    ids=["scalar", "floats", "empty", "one sequence", "number", "one text"],
)
def test_calibration_that_is_none(given: object) -> None:
    with pytest.raises(CalibrationError, match="calibration"):
        prune(make_llama(), calibration=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["2:4", {"sparsity": 0.5}], ids=["text", "dict"])
def test_a_recipe_that_is_none(recipe: object) -> None:
    with pytest.raises(RecipeError, match="recipe must be a Recipe, got"):
        prune(make_llama(), recipe, calibration=make_tokens())  # type: ignore[arg-type]


def test_a_model_that_is_none() -> None:
    with pytest.raises(ModelError, match="model must be a path, a hub id or a model of transformers, got Linear"):
        prune(torch.nn.Linear(2, 2), calibration=make_tokens())  # type: ignore[arg-type]


def test_the_report_tells_what_was_run(tmp_path: Path) -> None:
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


def test_a_plan_for_a_device_that_is_elsewhere(tmp_path: Path) -> None:
    save_model(tmp_path)
    assert make_plan(find_source(str(tmp_path)), Recipe(max_seq_length=16), "cuda:7").device.index == 7


@pytest.mark.parametrize("form", ["tensor", "batches", "documents"])
def test_the_recipe_says_how_much_text_was_read(tmp_path: Path, form: str) -> None:
    tokens_NL, recipe = make_tokens(20, 16), Recipe()
    given: Any = tokens_NL
    if form == "batches":
        given = list(tokens_NL.split(4))
    elif form == "documents":
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


def test_the_settings_of_a_selector_object_are_told(root: Path) -> None:
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
