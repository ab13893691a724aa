"""The model card: a head that the hub understands, a body without paths of this machine, results that are replaced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from records import RUN, linear, report

from optima.errors import ModelError
from optima.evaluation.card import update_card
from optima.evaluation.record import (
    ComparisonRecord,
    Estimate,
    Evaluation,
    ModelRecord,
    PerplexityRecord,
    TaskRecord,
)
from optima.models.weights import LEFT_OUT
from optima.reporting.model_card import BEGIN, CARD_NAME, NOT_YET, write_card
from optima.reporting.record import GIVEN_NOTE

HEAD = "---\nlicense: gemma\nlicense_name: terms\nlanguage: en\ntags: [chat]\nbase_model: a/base\n---\n"


def card_of(directory: Path) -> ModelCard:
    return ModelCard((directory / CARD_NAME).read_text(encoding="utf-8"))


def evaluation(*models: str, perplexity: float = 20.0, dataset: str = "wikitext") -> Evaluation:
    text = PerplexityRecord(perplexity, Estimate(3.0, 0.1), "windows", 8, 16, "hash")
    task = TaskRecord("piqa", 10, {"acc": Estimate(0.7, 0.1), "acc_norm": Estimate(0.6, 0.1)}, {"acc": "1" * 10}, "h")
    records = tuple(ModelRecord(name, None, "print", "bfloat16", 1.0, text, tasks=(task,)) for name in models)
    settings = {"dataset": [dataset], "split": "test"}
    comparisons = tuple(ComparisonRecord(name, None, ()) for name in models[1:])
    return Evaluation(settings, {}, "cpu", "2025-01-01", records, comparisons)


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
    def test_says_how_it_was_made_and_what_runs_it(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["GemmaForCausalLM"]}')
        recipe = RUN.recipe | {"dataset": ["allenai/c4"], "self_generated": 0.5}
        write_card(tmp_path, report(linear(), recipe=recipe), None)
        text = card_of(tmp_path).text
        assert "AutoModelForCausalLM.from_pretrained" in text
        assert "Certified to the asked gap of 1.0e-04" in text
        assert "| selector         | wanda" in text
        assert "| allenai/c4" in text
        assert "self_generated" in text
        assert "MACKO" in text
        assert NOT_YET in text

    def test_names_weights_that_are_not_in_it(self, tmp_path: Path) -> None:
        write_card(tmp_path, report(notes=("/secret/model has weights that Llama " + "mtp.0".join(LEFT_OUT),)), None)
        text = card_of(tmp_path).text
        assert "shapes of the dense one, without weights that transformers has no place for: mtp.0.\n" in text
        assert "secret" not in text
        write_card(tmp_path, report(), None)
        assert "shapes of the dense one.\n" in card_of(tmp_path).text

    def test_loads_a_tokenizer_that_is_there(self, tmp_path: Path) -> None:
        write_card(tmp_path, report(), None)
        assert "AutoTokenizer" not in card_of(tmp_path).text
        assert "take the dense model's" in card_of(tmp_path).text
        (tmp_path / "tokenizer.json").write_text("{}")
        write_card(tmp_path, report(), None)
        assert "tokenizer = AutoTokenizer.from_pretrained(" in card_of(tmp_path).text
        assert "take the dense model's" not in card_of(tmp_path).text

    def test_names_no_path_of_this_machine(self, tmp_path: Path) -> None:
        data = tmp_path / "secret" / "mine.jsonl"
        data.parent.mkdir()
        data.touch()
        (tmp_path / "secret" / "model").mkdir()
        recipe = RUN.recipe | {"dataset": [str(data)]}
        write_card(tmp_path, report(linear(), model=str(tmp_path / "secret" / "model"), recipe=recipe), None)
        text = (tmp_path / CARD_NAME).read_text()
        assert "# model, 50% sparse" in text
        assert "mine.jsonl" in text
        assert "secret" not in text

    def test_a_class_that_transformers_does_not_know(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["TheirModel"]}')
        write_card(tmp_path, report(), None)
        assert "AutoModel.from_pretrained" in card_of(tmp_path).text

    def test_code_of_its_own_under_a_name_of_its_own(self, tmp_path: Path) -> None:
        auto_map = {"AutoConfig": "their.Config", "AutoModelForCausalLM": "their.LMHeadModel"}
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LMHeadModel"], "auto_map": auto_map}))
        write_card(tmp_path, report(), None)
        assert "AutoModelForCausalLM.from_pretrained" in card_of(tmp_path).text

    def test_code_of_its_own_has_to_be_trusted(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "theirs.Theirs"}}')
        (tmp_path / "tokenizer.json").write_text("{}")
        write_card(tmp_path, report(recipe=RUN.recipe | {"damping": 0.0, "swaps": 0}), None)
        text = card_of(tmp_path).text
        assert text.count(", trust_remote_code=True)") == 2
        assert "| damping " in text, "which is not the default"
        assert "| swaps " not in text

    @pytest.mark.parametrize("tuned", [True, False])
    def test_settings_of_tuning_are_told_of_what_was_tuned(self, tuned: bool, tmp_path: Path) -> None:
        made = report(recipe=RUN.recipe | {"tuning_epochs": 1, "tuning_share": 0.25})  # asked for, at least
        blocks = tuple(replace(block, tuning=(2.0, 1.0) if tuned else ()) for block in made.blocks)
        write_card(tmp_path, replace(made, blocks=blocks), None)
        assert [f"| {name} " in card_of(tmp_path).text for name in ("tuning_epochs", "tuning_share")] == [tuned] * 2

    def test_settings_of_what_did_not_run_are_left_out(self, tmp_path: Path) -> None:
        recipe = RUN.recipe | {"solver": "none", "objective": "sink", "sink_weight": 0.04, "gap": 1e-4}
        write_card(tmp_path, report(recipe=recipe), None)
        assert "| gap " not in card_of(tmp_path).text
        assert "| sink_weight " in card_of(tmp_path).text

    @pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BertForMaskedLM", "T5EncoderModel", "BertModel"])
    def test_the_class_that_auto_model_might_not_choose(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(f'{{"architectures": ["{name}"]}}')
        (tmp_path / "tokenizer.json").write_text("{}")
        write_card(tmp_path, report(), None)
        assert f"import AutoTokenizer, {name}\n" in card_of(tmp_path).text
        assert f"{name}.from_pretrained" in card_of(tmp_path).text

    def test_names_no_text_that_was_not_read(self, tmp_path: Path) -> None:
        recipe = RUN.recipe | {"dataset": ["allenai/c4"], "keep_dense": 0.1}
        write_card(tmp_path, report(linear(), recipe=recipe, notes=(GIVEN_NOTE,)), None)
        text = card_of(tmp_path).text
        assert "allenai/c4" not in text
        assert "given by the caller" in text
        assert "on the same calibration text" in text
        assert "keep_dense" in text
        write_card(tmp_path, report(linear(), recipe=recipe), None)
        assert "gives the same run again." in card_of(tmp_path).text


class TestResults:
    def test_in_head_and_text_and_replaced_by_later_ones(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        write_card(out, report(), None)
        assert update_card(out, evaluation("owner/dense", str(out)), str(out))
        assert update_card(out, evaluation("owner/dense", str(out), perplexity=19.5), str(out))
        card = card_of(out)
        found = {(each.dataset_type, each.metric_type): each.metric_value for each in card.data.eval_results}
        assert found == {("wikitext", "perplexity"): 19.5, ("piqa", "acc"): 0.7, ("piqa", "acc_norm"): 0.6}
        assert card.data.model_name == "out"
        assert NOT_YET not in card.text
        assert card.text.count("19.500") == 2, "two models, one table"
        assert str(tmp_path) not in card.content
        update_card(out, evaluation(str(out), dataset="c4"), str(out))
        assert {each.dataset_type for each in card_of(out).data.eval_results} == {"wikitext", "c4", "piqa"}

    def test_the_text_of_whoever_took_the_marks_away_stays(self, tmp_path: Path) -> None:
        write_card(tmp_path, report(), None)
        file = tmp_path / CARD_NAME
        file.write_text(file.read_text().replace(BEGIN, "my own words"))
        text = card_of(tmp_path).text
        assert update_card(tmp_path, evaluation("model"), "model")
        assert card_of(tmp_path).text == text
        assert card_of(tmp_path).data.eval_results

    def test_no_card(self, tmp_path: Path) -> None:
        assert not update_card(tmp_path, evaluation("model"), "model")

    @pytest.mark.parametrize("head", ["- a", "license: [mit"])
    def test_a_head_that_cannot_be_read(self, head: str, tmp_path: Path) -> None:
        (tmp_path / CARD_NAME).write_text(f"---\n{head}\n---\n")
        with pytest.raises(ModelError, match="cannot be read"):
            update_card(tmp_path, evaluation("model"), "model")

    def test_only_text(self, tmp_path: Path) -> None:
        write_card(tmp_path, report(), None)
        found = evaluation("model")
        found = replace(found, models=(replace(found.models[0], perplexity=None),))
        assert update_card(tmp_path, found, "model")
        assert {each.dataset_type for each in card_of(tmp_path).data.eval_results} == {"piqa"}
