"""Accuracy on tasks: real lm-eval runs, checked against likelihoods computed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import LINES, make_bert, make_llama, make_tokenizer
from torch import Tensor

from optima.errors import CalibrationError, ModelError, NumericalError, RecipeError
from optima.evaluation.tasks import find_items, load_tasks, zero_shot

pytest.importorskip("lm_eval.models.huggingface", reason="needs the eval extra", exc_type=ImportError)

ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
ITEMS = [
    {"goal": LINES[i % 2][: 10 + i], "sol1": LINES[0][i : i + 9], "sol2": LINES[1][2 * i : 2 * i + 4], "label": i % 2}
    for i in range(12)
]


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    file = tmp_path / "piqa_validation.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return file


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, prompt: str, choice: str) -> float:
    """Of the choice after the prompt, summed over its tokens."""
    tokenizer = make_tokenizer(**ENDS)
    before, both = (tokenizer(text)["input_ids"] for text in (prompt, prompt + choice))
    logits_LV: Tensor = model(torch.tensor([both])).logits[0].double().log_softmax(-1)
    return sum(logits_LV[i - 1, both[i]].item() for i in range(len(before), len(both)))


def test_equals_the_definition_of_the_task(piqa: Path) -> None:
    model = make_llama(max_position_embeddings=128)
    (found,) = zero_shot(model, make_tokenizer(**ENDS), load_tasks({"piqa": piqa}), batch_size=5)
    right = {"acc": "", "acc_norm": ""}
    for item in ITEMS:
        prompt, choices = f"Question: {item['goal']}\nAnswer:", [item["sol1"], item["sol2"]]
        scores = [log_likelihood(model, prompt, f" {choice}") for choice in choices]
        for metric, lengths in (("acc", [1, 1]), ("acc_norm", [len(choice) for choice in choices])):
            best = max((0, 1), key=lambda i: scores[i] / lengths[i])
            right[metric] += str(int(best == item["label"]))
    assert found.task == "piqa"
    assert found.items == len(ITEMS)
    assert found.correct == right
    for metric, answers in right.items():
        share = answers.count("1") / len(ITEMS)
        assert found.metrics[metric].value == pytest.approx(share)
        assert found.metrics[metric].stderr == pytest.approx((share * (1 - share) / (len(ITEMS) - 1)) ** 0.5)


def test_bad_input_is_named(piqa: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(**ENDS)
    for tasks in ({"arc_easy": piqa}, {"no_such_task": None}, {"mmlu": piqa}, {"piqa": tmp_path / "missing.jsonl"}):
        with pytest.raises(RecipeError, match=next(iter(tasks))):
            load_tasks(tasks)
    with pytest.raises(ModelError, match="eos_token"):
        zero_shot(make_llama(), make_tokenizer(), load_tasks({"piqa": piqa}))
    with pytest.raises(ModelError, match="not a causal language model"):
        zero_shot(make_bert(), tokenizer, load_tasks({"piqa": piqa}))
    model = make_llama(max_position_embeddings=128)
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(NumericalError, match="piqa"):
        zero_shot(model, tokenizer, load_tasks({"piqa": piqa}))


def test_file_name_says_which_task_it_is_for(tmp_path: Path) -> None:
    names = ["piqa_validation.jsonl", "arc_easy-test.parquet", "arc_challenge.json", "piqa.txt", "piqapiqa.jsonl"]
    for name in names:
        (tmp_path / name).touch()
    found = find_items(["piqa", "arc_easy", "arc_challenge"], tmp_path)
    assert [file.name for file in found.values()] == names[:3]
    (tmp_path / "piqa_test.jsonl").touch()
    for name, place in (("piqa", tmp_path), ("winogrande", tmp_path), ("piqa", tmp_path / "missing")):
        with pytest.raises(CalibrationError, match=name):
            find_items([name], place)
