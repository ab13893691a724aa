"""The model card: a head that the hub understands, a body without paths of this machine, results that are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from records import RUN, linear, report

from optima.reporting.model_card import CARD_NAME, write_card

HEAD = "---\nlicense: gemma\nlicense_name: terms\nlanguage: en\ntags: [chat]\nbase_model: a/base\n---\n"


def card_of(directory: Path) -> ModelCard:
    return ModelCard((directory / CARD_NAME).read_text(encoding="utf-8"))


class TestHead:
    def test_takes_over_what_is_true_of_both(self, tmp_path: Path) -> None:
        (tmp_path / CARD_NAME).write_text(HEAD)
        write_card(tmp_path, report(linear(pattern="2:4")), "owner/dense")
        data = card_of(tmp_path).data.to_dict()
        assert (data["license"], data["license_name"], data["language"]) == ("gemma", "terms", "en")
        assert data["base_model"] == "owner/dense"
        assert data["base_model_relation"] == "finetune"
        assert data["library_name"] == "transformers"
        assert data["tags"] == ["chat", "pruning", "sparse", "optima", "2:4"]

    def test_a_local_model_has_its_own_base_or_none(self, tmp_path: Path) -> None:
        write_card(tmp_path, report(), None)
        assert "base_model" not in card_of(tmp_path).data.to_dict()
        (tmp_path / CARD_NAME).write_text(HEAD)
        write_card(tmp_path, report(), None)
        data = card_of(tmp_path).data.to_dict()
        assert data["base_model"] == "a/base"
        assert "base_model_relation" not in data


class TestBody:
    def test_says_how_it_was_made(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["GemmaForCausalLM"]}')
        recipe = RUN.recipe | {"dataset": ["allenai/c4"], "damping": 0.0, "scope": None}
        write_card(tmp_path, report(linear(), recipe=recipe), None)
        text = card_of(tmp_path).text
        assert "AutoModelForCausalLM.from_pretrained" in text
        for part in ("all 8 rows", "| selector ", "| damping ", "| allenai/c4", "MACKO"):
            assert part in text
        assert "| scope " not in text
        assert "repeats the run." in text

    def test_names_what_is_missing_or_was_passed_by_the_caller(self, tmp_path: Path) -> None:
        recipe = RUN.recipe | {"dataset": ["allenai/c4"]}
        changes = {"weights_left_out": ("mtp.0",), "calibration_given": True, "selector_is_object": True}
        write_card(tmp_path, report(recipe=recipe, **changes), None)
        text = card_of(tmp_path).text
        assert "without weights that transformers has no place for: `mtp.0`." in text
        assert "allenai/c4" not in text
        assert "passed by the caller" in text
        assert "repeats the run on the same calibration data and with the selector's settings" in text

    def test_names_no_path_of_this_machine_and_no_control_characters(self, tmp_path: Path) -> None:
        data, model = tmp_path / "secret" / "mine.jsonl", tmp_path / "secret" / "mo\x1b[31m\n<b>del"
        model.mkdir(parents=True)
        data.touch()
        write_card(tmp_path, report(model=str(model), recipe=RUN.recipe | {"dataset": [str(data)]}), None)
        text = (tmp_path / CARD_NAME).read_text()
        assert "# mo[31m &lt;b>del, 50% sparse" in text
        assert "mine.jsonl" in text
        assert "secret" not in text
        assert "\x1b" not in text

    @pytest.mark.parametrize(
        ("config", "loader"),
        [
            ({"architectures": ["TheirModel"]}, "AutoModel"),
            ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
            ({"architectures": ["X"], "auto_map": {"AutoModelForCausalLM": "x.X"}}, "AutoModelForCausalLM"),
        ],
    )
    def test_loads_the_class_and_a_tokenizer_that_is_there(
        self, config: dict[str, object], loader: str, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        write_card(tmp_path, report(), None)
        assert f"model = {loader}.from_pretrained" in card_of(tmp_path).text
        assert "tokenizer is not included" in card_of(tmp_path).text
        (tmp_path / "tokenizer.json").write_text("{}")
        write_card(tmp_path, report(), None)
        text = card_of(tmp_path).text
        assert f"import AutoTokenizer, {loader}\n" in text
        assert text.count(", trust_remote_code=True)") == (2 if "auto_map" in config else 0)
