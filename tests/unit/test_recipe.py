"""A recipe is complete and valid, or there is none: wherever its values come from."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from optima import Recipe, load_recipe
from optima.build import build, pattern_table
from optima.core import SOLVERS, Auto, BatchedCholesky
from optima.errors import RecipeError
from optima.options import GROUPS, SELECTOR_NAMES, SINK_WEIGHT, SOLVER_NAMES
from optima.patterns import NM, PatternTable, Unstructured
from optima.recipe import recipe_from_dict
from optima.recipe_files import SHIPPED, recipe_text
from optima.selectors.base import SELECTORS
from optima.selectors.wanda import Wanda

FIELDS = [option.name for option in dataclasses.fields(Recipe)]


def read(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file)


def refused(tmp_path: Path, text: str) -> str:
    """The message with which a recipe file is refused; it names the file."""
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "run.yaml") in str(caught.value)
    return str(caught.value)


class TestYaml:
    @given(
        sparsity=st.none() | st.floats(0.01, 0.99),
        selector=st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
        solver=st.sampled_from(["auto", "low-rank-cg", "cholesky"]),
        gap=st.floats(1e-300, 1.0),
        damping=st.floats(0.0, 1.0),
        dataset=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=3),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_round_trip(self, tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
        recipe = Recipe(**values)
        file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
        recipe.save(file)
        assert load_recipe(file) == recipe

    def test_round_trip_of_a_pattern_and_lists(self, tmp_path: Path) -> None:
        recipe = Recipe(pattern=["mlp=2:4", "0.5"], targets=[r"layers\.\d+", "#x"], ignore=[])
        recipe.save(tmp_path / "r.yaml")
        assert load_recipe(tmp_path / "r.yaml") == recipe
        idle = {"sink_weight", "trust_remote_code"}
        assert list(yaml.safe_load((tmp_path / "r.yaml").read_text())) == [name for name in FIELDS if name not in idle]

    def test_a_file_does_not_name_what_does_nothing(self, tmp_path: Path) -> None:
        """A later version may have another default of it."""
        recipe = Recipe(tuning_epochs=0).resolved(scope="layer")
        recipe.save(tmp_path / "r.yaml")
        assert not {"learning_rate", "tuning_share"} & set(yaml.safe_load((tmp_path / "r.yaml").read_text()))
        assert load_recipe(tmp_path / "r.yaml") == recipe

    def test_missing_keys_take_their_defaults(self, tmp_path: Path) -> None:
        assert read(tmp_path, "sparsity: 0.6") == Recipe(sparsity=0.6)
        assert read(tmp_path, "sparsity: null\nrevision:") == Recipe()

    @pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0e-4", "'1e-4'"])
    def test_1e_4_is_a_number(self, tmp_path: Path, text: str) -> None:
        assert read(tmp_path, f"gap: {text}").gap == 1e-4

    def test_whole_number_for_a_number(self, tmp_path: Path) -> None:
        damping = read(tmp_path, "damping: 1").damping
        assert damping == 1.0
        assert isinstance(damping, float)

    def test_one_text_for_a_list(self, tmp_path: Path) -> None:
        recipe = read(tmp_path, "dataset: a.txt\ntargets: mlp")
        assert (recipe.dataset, recipe.targets) == (["a.txt"], ["mlp"])

    @pytest.mark.parametrize("text", ["2:4", "4:8", "1:2", "[2:4]", "['mlp=2:4', 1:4]"])
    def test_unquoted_pattern_says_to_quote_it(self, tmp_path: Path, text: str) -> None:
        assert 'quote the pattern, as in pattern: "2:4"' in refused(tmp_path, f"pattern: {text}")

    def test_quoted_pattern(self, tmp_path: Path) -> None:
        assert read(tmp_path, "pattern: '2:4'").pattern == ["2:4"]

    def test_pattern_as_a_list_a_number_or_nothing(self, tmp_path: Path) -> None:
        assert read(tmp_path, "pattern:\n  - mlp=2:4\n  - 0.6").pattern == ["mlp=2:4", "0.6"]
        assert read(tmp_path, "pattern: 0.6").pattern == ["0.6"]
        assert read(tmp_path, "pattern: null\nsparsity: 0.6") == Recipe(sparsity=0.6)

    def test_unknown_key_names_the_closest_and_lists_the_known(self, tmp_path: Path) -> None:
        message = refused(tmp_path, "sparsty: 0.5\nsparsity: 0.5")
        assert "unknown key 'sparsty' (did you mean sparsity?): known keys are " in message
        assert all(name in message for name in FIELDS)
        assert "unknown key '3'" in refused(tmp_path, "3: x")

    def test_hyphens_name_the_right_key(self, tmp_path: Path) -> None:
        assert "max-seq-length: write max_seq_length" in refused(tmp_path, "max-seq-length: 16")

    @pytest.mark.parametrize("text", ["gap: 1\nseed: 0\ngap: 2", "{gap: 1,\n\n gap: 2}"])
    def test_a_key_that_stands_twice(self, tmp_path: Path, text: str) -> None:
        assert "the key 'gap' stands in line 1 and in line 3: keep one" in refused(tmp_path, text)

    @pytest.mark.parametrize("text", ["targets: " + "[" * 5000 + "]" * 5000, "{a: " * 5000 + "1" + "}" * 5000])
    def test_depth_is_bounded(self, tmp_path: Path, text: str) -> None:
        assert "is nested too deeply" in refused(tmp_path, text)

    @pytest.mark.parametrize("text", ["? [a]\n: 1", "? {a: b}\n: 1"])
    def test_a_key_that_is_no_text(self, tmp_path: Path, text: str) -> None:
        assert "is not valid YAML" in refused(tmp_path, text)

    def test_a_value_that_aliases_blow_up_is_shown_in_short(self, tmp_path: Path) -> None:
        lines = ["x0: &x0 [a, b]"] + [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 9)]
        assert len(refused(tmp_path, "\n".join(lines).replace("x8: &x8", "targets: &x8"))) < 2000

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sparsity: half", "sparsity must be a number strictly between 0 and 1, such as 0.5, got 'half'"),
            ("sparsity: true", "sparsity must be a number strictly between 0 and 1, such as 0.5, got True"),
            ("sparsity: [0.5]", "sparsity must be a number strictly between 0 and 1, such as 0.5, got [0.5]"),
            ("gap: null", "gap must be a positive number, such as 0.0001, got None"),
            ("gap: .inf", "gap must be a positive number, such as 0.0001, got inf"),
            ("selector: 3", "selector must be a name, package.module:Class, or an object with"),
            ("selector: null", "selector must be a name"),
            ("solver: 3", "solver must be text, got 3"),
            ("pattern: 2.4", "sparsity must be strictly between 0 and 1, got 2.4"),
            ("pattern: {a: b}", "pattern must be a list of texts, got [{'a': 'b'}]"),
            ("seed: 1.5", "seed must be a whole number of at least 0 and below 2^63, such as 0, got 1.5"),
            ("batch_size: yes", "batch_size must be a whole number of at least 1, got True"),
            ("trust_remote_code: 1", "trust_remote_code must be true or false, got 1"),
            ("trust_remote_code: 'yes'", "trust_remote_code must be true or false, got 'yes'"),
            ("dataset: [a.txt, 3]", "dataset must be a list of names, none of them empty, got ['a.txt', 3]"),
            ("dataset: null", "dataset must be a list of names, none of them empty, got None"),
            ("targets: {a: b}", "targets must be a list of texts, got {'a': 'b'}"),
        ],
    )
    def test_wrong_type(self, tmp_path: Path, text: str, message: str) -> None:
        assert message in refused(tmp_path, text)

    @pytest.mark.parametrize("text", ["", "# only a comment", "- sparsity", "sparsity", "3"])
    def test_no_keys_and_values(self, tmp_path: Path, text: str) -> None:
        assert "must hold keys and values" in refused(tmp_path, text)

    def test_no_yaml(self, tmp_path: Path) -> None:
        message = refused(tmp_path, "seed: 0\nsparsity: [0.5")
        assert "is not valid YAML: line 2, column 15: expected ',' or ']'" in message
        assert "\n" not in message
        assert "is not valid YAML: unacceptable character #x0000" in refused(tmp_path, "sparsity: \0")

    def test_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RecipeError, match=r"cannot be read .*can't decode byte"):
            load_recipe(tmp_path / "run.yaml")
        with pytest.raises(RecipeError, match=r"cannot be read .*can't decode byte"):
            recipe_text(tmp_path / "run.yaml")

    @pytest.mark.parametrize("name", ["missing.yaml", "."])
    def test_no_file(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(RecipeError, match=r"cannot be read .(No such file|Is a directory)"):
            load_recipe(tmp_path / name)

    def test_yaml_runs_no_code(self, tmp_path: Path) -> None:
        refused(tmp_path, "!!python/object/apply:os.mkdir [here]")


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.0}, "sparsity must be a number strictly between 0 and 1, such as 0.5, got 0.0"),
    ({"sparsity": 1}, "sparsity must be a number strictly between 0 and 1, such as 0.5, got 1"),
    ({"sparsity": 1.5}, "sparsity must be a number strictly between 0 and 1, such as 0.5, got 1.5"),
    ({"sparsity": float("nan")}, "sparsity must be a number strictly between 0 and 1, such as 0.5, got nan"),
    ({"pattern": "2-4"}, "pattern '2-4' is not of the form n:m"),
    ({"pattern": "4:4"}, "needs 0 < n < m"),
    ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity or pattern, not both"),
    ({"sparsity": 0.5, "pattern": ["mlp=2:4"]}, "pattern mlp=2:4 0.5 prunes 0.5 where no other entry matches"),
    ({"pattern": "2:4", "scope": "row"}, "scope is for unstructured sparsity"),
    ({"pattern": ["a=2:4", "1:4"], "scope": "row"}, "scope is for unstructured sparsity"),
    ({"pattern": ["0.5", "(=2:4"]}, "pattern '(=2:4': '(' is not a regular expression"),
    ({"pattern": ["0.5", "0.6"]}, "pattern has two entries for all linears"),
    ({"scope": "column"}, "unknown scope 'column': known scopes are row, layer, group"),
    (
        {"selector": "wonda"},
        "unknown selector 'wonda' (did you mean wanda?): known selectors are magnitude, wanda, ria",
    ),
    ({"solver": "cg"}, "unknown solver 'cg': known solvers are "),
    ({"dtype": "int8"}, "unknown dtype 'int8': known dtypes are auto, float32, bfloat16, float16"),
    ({"gap": 0}, "gap must be a positive number, such as 0.0001, got 0"),
    ({"gap": -1e-4}, "gap must be a positive number"),
    ({"gap": float("nan")}, "gap must be a positive number"),
    ({"gap": 0, "solver": "none"}, "gap must be a positive number"),
    ({"gap": 1e-2, "solver": "none"}, "gap is for a solver: add that, or leave gap out"),
    ({"damping": 0.1, "selector": "wanda", "solver": "none"}, "damping is for a solver, or a selector that looks"),
    ({"sparsity": 0.5, "pattern": "2:4"}, "give either sparsity or pattern, not both"),
    ({"allocation": "loss", "solver": "none"}, "not plain, as with solver none unless it is named: say objective loss"),
    ({"memory_budget": "8"}, "memory_budget must be a size such as 8GiB, of 1MiB at least, got"),
    ({"damping": -0.1}, "damping must be a number from 0 to 1, such as 0.01, got -0.1"),
    ({"damping": 1.1}, "damping must be a number from 0 to 1"),
    ({"damping": float("nan")}, "damping must be a number from 0 to 1"),
    ({"sink_weight": 0.5}, "sink_weight is for objective sink"),
    ({"allocation": "loss", "objective": "sink"}, "allocation loss needs objective loss, not sink"),
    (
        {"swept_share": 0.5, "objective": "sink"},
        "swept_share is for objective loss: add that, or leave swept_share out",
    ),
    ({"swept_share": 0.5, "solver": "none"}, "swept_share is for objective loss"),
    ({"learning_rate": 1e-3, "tuning_epochs": 0}, "learning_rate is for tuning_epochs above 0"),
    ({"tuning_share": 0.25, "objective": "sink"}, "tuning_share is for tuning_epochs above 0"),
    ({"tuning_share": 0, "tuning_epochs": 1}, "tuning_share must be a number above 0 and at most 1"),
    ({"sink_weight": -0.1}, "sink_weight must be a number of at least 0, got -0.1"),
    ({"sink_weight": float("nan")}, "sink_weight must be a number of at least 0"),
    ({"sink_weight": float("inf")}, "sink_weight must be a number of at least 0"),
    (
        {"num_calibration_samples": 0},
        "num_calibration_samples must be a whole number of at least 1, got 0",
    ),
    ({"max_seq_length": -1}, "max_seq_length must be a whole number of at least 1"),
    ({"seed": 2**63}, "seed must be a whole number of at least 0 and below 2^63, such as 0, got 9223372036854775808"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ({"dataset": []}, "dataset is empty"),
    ({"dataset": ["a.txt", ""]}, "dataset must be a list of names, none of them empty"),
    ({"device": "mps"}, "device must be auto, cpu, cuda or cuda:N, got 'mps'"),
    ({"self_generated": 1.0}, "self_generated must be 0, or a number below 1"),
    ({"targets": ["("]}, "targets: '(' is not a regular expression"),
    ({"ignore": ["ok", "*"]}, "ignore: '*' is not a regular expression"),
    ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
    ({"scope": "row", "selector": "external", "mask_from": "m.safetensors"}, "scope needs to know the pattern"),
    ({"selector": "external"}, "selector external takes its masks from mask_from"),
    ({"mask_from": "m.safetensors"}, "mask_from is for selector external, not 'optima'"),
    ({"allocation": "error"}, "unknown allocation 'error': known allocations are uniform, loss"),
    ({"allocation": "loss", "pattern": "2:4"}, "shares out one unstructured sparsity, not pattern 2:4"),
    ({"selector": "somewhere:Mine"}, "selector somewhere:Mine loads and runs code: if you trust it, add --trust-"),
]


class TestValues:
    @pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=lambda item: str(item)[:40])
    def test_bad_value(self, values: dict[str, Any], message: str, tmp_path: Path) -> None:
        for make in (lambda: Recipe(**values), lambda: recipe_from_dict(values)):
            with pytest.raises(RecipeError) as caught:
                make()
            assert message in str(caught.value)
        assert message in refused(tmp_path, yaml.safe_dump(values))

    def test_one_text_for_a_list_in_python_too(self) -> None:
        """A text is a sequence of texts: its letters must not become patterns."""
        recipe = Recipe(targets="q_proj", ignore="up", dataset="a.txt")  # type: ignore[arg-type]
        assert (recipe.targets, recipe.ignore, recipe.dataset) == (["q_proj"], ["up"], ["a.txt"])
        assert Recipe(targets=("a", "b")).targets == ["a", "b"]  # type: ignore[arg-type]

    def test_what_does_nothing_may_spell_out_its_default(self) -> None:
        """As files do that are written for other values to be overridden."""
        for solver in ("auto", "none"):
            values = Recipe(solver=solver).resolved(scope="layer").to_dict()
            assert recipe_from_dict(values | {"learning_rate": "4.5e-3"}).solver == solver

    def test_is_frozen_and_shares_no_list(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Recipe().sparsity = 0.6  # type: ignore[misc]
        assert Recipe().targets is not Recipe().targets

    def test_every_field_is_documented_and_has_a_group(self) -> None:
        assert all(option.metadata["help"] for option in dataclasses.fields(Recipe))
        assert {option.metadata["group"] for option in dataclasses.fields(Recipe)} == set(GROUPS)

    def test_names_are_those_of_the_registries(self) -> None:
        assert (*SELECTORS, "external") == SELECTOR_NAMES
        assert (*SOLVERS, "none") == SOLVER_NAMES

    def test_nothing_is_imported_to_check_a_selector_of_ones_own(self, tmp_path: Path) -> None:
        """As a pickle would, its module can do anything."""
        (tmp_path / "evil.py").write_text("raise SystemExit('the code ran')")
        assert "trust_remote_code" in refused(tmp_path, "selector: evil:Mine")
        assert read(tmp_path, "selector: evil:Mine\ntrust_remote_code: true").selector == "evil:Mine"


class TestSelectorObject:
    def test_is_taken_as_it_is_and_named_by_its_class(self, tmp_path: Path) -> None:
        selector = Wanda()
        recipe = Recipe(selector=selector)
        assert build(recipe).selector is selector
        assert recipe.to_dict()["selector"] == "optima.selectors.wanda:Wanda"
        recipe.save(tmp_path / "r.yaml")
        with pytest.raises(RecipeError, match="loads and runs code"):
            load_recipe(tmp_path / "r.yaml")

    @pytest.mark.parametrize("wrong", [Wanda, object(), 3, None])
    def test_must_be_one(self, wrong: object) -> None:
        with pytest.raises(RecipeError, match="selector must be a name"):
            Recipe(selector=wrong)


class TestResolved:
    def test_open_defaults_are_filled_in_as_applied(self) -> None:
        values = Recipe().resolved(scope="row").to_dict()
        assert (values["sparsity"], values["scope"], values["objective"]) == (0.5, "row", "loss")

    @pytest.mark.parametrize("values", [{"pattern": "2:4"}, {"selector": "external", "mask_from": "m.safetensors"}])
    def test_what_does_not_apply_stays_open(self, values: dict[str, Any]) -> None:
        recipe = Recipe(**values).resolved(scope="row")
        assert (recipe.sparsity, recipe.scope) == (None, None)

    @pytest.mark.parametrize("values", [{}, {"pattern": "2:4"}, {"pattern": ["a=2:4", "0.3"]}, {"allocation": "loss"}])
    def test_twice_is_once_and_it_can_be_loaded(self, tmp_path: Path, values: dict[str, Any]) -> None:
        recipe = Recipe(**values).resolved(scope="row")
        assert recipe.resolved(scope="layer") == recipe
        recipe.save(tmp_path / "r.yaml")
        assert load_recipe(tmp_path / "r.yaml") == recipe

    def test_leave_to_run_code_is_not_handed_on(self, tmp_path: Path) -> None:
        """The file may be published: who loads it has not looked at the code."""
        Recipe(trust_remote_code=True).save(tmp_path / "r.yaml")
        assert not load_recipe(tmp_path / "r.yaml").trust_remote_code

    def test_wide_models_are_calibrated_on_more(self) -> None:
        assert Recipe().samples(2048) == 128
        assert Recipe().samples(28672) == 448
        assert Recipe(max_seq_length=512).samples(14336) == 896
        assert Recipe(num_calibration_samples=3).samples(28672) == 3

    def test_published_updates_are_left_as_published(self) -> None:
        """Tokens and rows have weights only where a solver finds the weights, or if that is asked for."""
        assert Recipe(solver="none").resolved(scope="row").objective == "plain"
        assert Recipe().resolved(scope="row").objective == "loss"
        for solver in ("none", "auto"):
            sink = Recipe(solver=solver, objective="sink")
            assert sink.resolved(scope="row").sink_weight == SINK_WEIGHT
            assert replace(sink, sink_weight=0.5).resolved(scope="row").sink_weight == 0.5


class TestMaking:
    @pytest.mark.parametrize(
        ("values", "pattern"),
        [
            ({}, Unstructured(0.5, "layer")),
            ({"sparsity": 0.6}, Unstructured(0.6, "layer")),
            ({"selector": "wanda"}, Unstructured(0.5, "layer")),
            ({"selector": "wanda", "solver": "none"}, Unstructured(0.5, "row")),
            ({"selector": "wanda", "objective": "sink"}, Unstructured(0.5, "row")),
            ({"objective": "sink"}, Unstructured(0.5, "row")),
            ({"selector": "magnitude", "objective": "sink"}, Unstructured(0.5, "layer")),
            ({"selector": "magnitude"}, Unstructured(0.5, "layer")),
            ({"selector": "sparsegpt"}, Unstructured(0.5, "group", 128)),
            ({"scope": "group"}, Unstructured(0.5, "group")),
            ({"selector": "sparsegpt", "scope": "row"}, Unstructured(0.5, "row")),
            ({"scope": "layer"}, Unstructured(0.5, "layer")),
            ({"pattern": "2:4"}, NM(2, 4)),
            ({"pattern": ["0.6"], "scope": "layer"}, Unstructured(0.6, "layer")),
        ],
        ids=str,
    )
    def test_rows_compete_by_the_loss_or_as_published(self, values: dict[str, Any], pattern: Unstructured | NM) -> None:
        recipe = Recipe(**values)
        assert pattern_table(recipe, build(recipe).selector) == PatternTable((), pattern)

    def test_pattern_for_each_target(self) -> None:
        recipe = Recipe(pattern=["mlp=2:4", "0.6"], scope="group")
        table = pattern_table(recipe, build(recipe).selector)
        up, q = table.assign({"layers.0.mlp.up_proj": 8, "layers.0.self_attn.q_proj": 8}).values()
        assert (up, q) == (NM(2, 4), Unstructured(0.6, "group"))

    def test_solver(self) -> None:
        assert build(Recipe(solver="none")).solver is None
        assert isinstance(build(Recipe(solver="cholesky")).solver, BatchedCholesky)
        solver = build(Recipe(gap=1e-6)).solver
        assert isinstance(solver, Auto)
        assert solver.gap == 1e-6


def test_ready_made_recipes_are_valid() -> None:
    files = list(SHIPPED.values())
    assert files
    for file in files:
        load_recipe(file)
