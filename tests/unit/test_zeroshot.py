"""Zero-shot accuracy agrees with lm-eval run as it is, and says what is wrong with its input."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import LINES, make_bert, make_llama, make_tokenizer

from optima.errors import CalibrationError, ModelError, NumericalError, OptimaError, RecipeError
from optima.evaluation.tasks import Tasks, find_files, load_tasks
from optima.evaluation.zeroshot import scored_positions, task_record, zero_shot

ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the eval extra")


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """Items of ARC, with choices of one token and of many, and labels that are letters or digits."""
    items = [
        {
            "id": str(i),
            "question": LINES[i % 2][: 10 + 7 * i],
            "choices": {"text": ["dog", "fox " * (i + 1), LINES[0][i:]], "label": list("ABC" if i % 2 else "123")},
            "answerKey": ("ABC" if i % 2 else "123")[i % 3],
        }
        for i in range(6)
    ]
    file = tmp_path / "arc.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


@needs_lm_eval
@pytest.mark.slow
def test_items_agree_with_lm_eval_run_as_it_is(arc: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = make_llama(), make_tokenizer(**ENDS)
    manager = TaskManager()
    definition = manager.task_index["arc_easy"].yaml_path
    (tmp_path / "plain.yaml").write_text(
        f"include: {definition}\ntask: plain\ndataset_path: json\ndataset_name: null\ndataset_kwargs:\n"
        f"  data_files: {{test: {arc}}}\ntraining_split: null\nvalidation_split: null\n"
    )
    plain = simple_evaluate(
        HFLM(pretrained=model, tokenizer=make_tokenizer(**ENDS)), tasks=[str(tmp_path / "plain.yaml")]
    )
    for batch_size in (1, 3, 20):
        (found,) = zero_shot(model, tokenizer, load_tasks({"arc_easy": arc}), batch_size=batch_size)
        assert (found.task, found.items) == ("arc_easy", 6)
        for metric in ("acc", "acc_norm"):
            items = sorted(plain["samples"]["plain"], key=lambda item: item["doc_id"])
            assert found.correct[metric] == "".join(str(int(item[metric])) for item in items)
            assert found.metrics[metric].value == plain["results"]["plain"][f"{metric},none"]
            assert found.metrics[metric].stderr == plain["results"]["plain"][f"{metric}_stderr,none"]


@needs_lm_eval
def test_likelihoods_agree_with_lm_eval_run_as_it_is(monkeypatch: pytest.MonkeyPatch, arc: Path) -> None:
    """Of choices of one token and of many, in batches of any size, and from a model without ``logits_to_keep``."""
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    texts = [LINES[0], LINES[1], LINES[0][:20], "a", "fox jumps"]
    pairs = [(text, more) for text in texts[:3] for more in (" dog", " a", " over the lazy dog", " " + LINES[1])]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    plain = huggingface.HFLM(pretrained=make_llama(), tokenizer=make_tokenizer(**ENDS)).loglikelihood(requests)
    seen = []

    class Seen(huggingface.HFLM):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            seen.append(self)

    monkeypatch.setattr(huggingface, "HFLM", Seen)
    whole = make_llama()
    forward = type(whole).forward
    monkeypatch.setattr(whole, "forward", lambda input_ids: forward(whole, input_ids), raising=False)
    for model, batch_size in ((make_llama(), 1), (make_llama(), 3), (make_llama(), 20), (whole, 8)):
        zero_shot(model, make_tokenizer(**ENDS), load_tasks({"arc_easy": arc}), limit=1, batch_size=batch_size)
        ours = seen[-1].loglikelihood(requests)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=1e-5)


@needs_lm_eval
def test_what_a_tokenizer_puts_behind_a_text_is_not_scored(arc: Path) -> None:
    """Choices would begin a token too late, and end with it."""
    tasks = load_tasks({"arc_easy": arc})
    without, behind = (zero_shot(make_llama(), make_tokenizer(name, **ENDS), tasks) for name in ("none", "eos"))
    assert without == behind


@needs_lm_eval
def test_prompts_that_do_not_fit_are_counted(arc: Path) -> None:
    tasks = load_tasks({"arc_easy": arc})
    (whole,) = zero_shot(make_llama(), make_tokenizer(**ENDS), tasks)
    assert whole.cut == 0
    (cut,) = zero_shot(make_llama(max_position_embeddings=24), make_tokenizer(**ENDS), tasks)
    assert cut.cut > 0
    with pytest.raises(ModelError, match=r"a choice of the tasks has \d+ tokens, and .* reads 3: leave that task out"):
        zero_shot(make_llama(max_position_embeddings=3), make_tokenizer(**ENDS), tasks)


@needs_lm_eval
@pytest.mark.parametrize("model", [make_bert, lambda: transformers.BertForMaskedLM(make_bert().config).eval()])
def test_encoders_answer_nothing(arc: Path, model: Callable[[], Any]) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        zero_shot(model(), make_tokenizer(**ENDS), load_tasks({"arc_easy": arc}))


@needs_lm_eval
def test_model_tokenizer_and_tasks_stay_as_they_were(arc: Path) -> None:
    model, tokenizer, tasks = make_llama().train(), make_tokenizer(**ENDS), load_tasks({"arc_easy": arc})
    model.config.tie_word_embeddings = True  # some checkpoints say so and have a head of their own
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = zero_shot(model, tokenizer, tasks, limit=5)
    assert found[0].items == 5
    assert model.training
    assert tokenizer.pad_token is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "tie_weights" not in vars(model)
    assert zero_shot(model, tokenizer, tasks, limit=5) == found
    (all_items,) = zero_shot(model, tokenizer, tasks)
    assert all_items.items == 6
    assert all_items.correct["acc"].startswith(found[0].correct["acc"])
    assert all_items.data_hash != found[0].data_hash


@needs_lm_eval
def test_a_group_is_its_tasks_together(arc: Path) -> None:
    one, other = load_tasks({"arc_easy": arc}), load_tasks({"arc_challenge": arc})
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc", filter_list=["none"])])
    children = one.loaded["tasks"] | other.loaded["tasks"]
    for task in children.values():
        group.add(task)
    loaded = {"tasks": children, "groups": {"both": group}, "group_map": {"both": group.child_names}}
    tasks = Tasks({"both": tuple(children)}, loaded)
    (found,) = zero_shot(make_llama(), make_tokenizer(**ENDS), tasks)
    (single,) = zero_shot(make_llama(), make_tokenizer(**ENDS), one)
    assert found.items == 12
    assert found.correct == {"acc": 2 * single.correct["acc"]}
    assert found.metrics["acc"].value == pytest.approx(single.metrics["acc"].value)


def test_a_mean_over_tasks_of_unequal_size_is_no_share_of_items() -> None:
    samples = {"a": [{"doc_id": 0, "doc_hash": "", "acc": 1.0}]}
    samples["b"] = [{"doc_id": i, "doc_hash": "", "acc": float(i == 0)} for i in range(3)]
    for accuracy, correct in ((0.5, {"acc": "1100"}), (2 / 3, {})):
        found = task_record("both", ("a", "b"), {"results": {"both": {"acc,none": accuracy}}, "samples": samples})
        assert found.metrics["acc"].value == accuracy
        assert found.correct == correct


@needs_lm_eval
def test_bad_input_is_named(arc: Path) -> None:
    model, tokenizer = make_llama(), make_tokenizer(**ENDS)
    with pytest.raises(CalibrationError, match=r"arc\.jsonl does not hold items of piqa"):
        load_tasks({"piqa": arc})
    with pytest.raises(RecipeError, match=r"no task arc_eazy \(did you mean arc_easy\?\)"):
        load_tasks({"arc_eazy": arc})
    with pytest.raises(RecipeError, match="mmlu is a group of tasks"):
        load_tasks({"mmlu": arc})
    with pytest.raises(CalibrationError, match=r"items of task piqa cannot be read from the hub.*--task-data"):
        load_tasks({"piqa": None})
    with pytest.raises(ModelError, match="neither a bos_token nor an eos_token"):
        zero_shot(model, make_tokenizer(), load_tasks({"arc_easy": arc}))
    with pytest.raises(RecipeError, match="at least 1"):
        zero_shot(model, tokenizer, load_tasks({"arc_easy": arc}), limit=0)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericalError, match="likelihood of a choice is NaN"):
        zero_shot(model, tokenizer, load_tasks({"arc_easy": arc}))


@needs_lm_eval
def test_a_damaged_item_is_named_before_any_is_answered(arc: Path) -> None:
    lines = arc.read_text().splitlines(keepends=True)
    for change, told in (
        ({"answerKey": "E"}, "'E' is not in list"),
        ({"choices": None}, "TypeError|UndefinedError"),
        ({"choices": {"text": ["a"], "label": ["1", "2"]}, "answerKey": "2"}, "its answer is 1, of 1 choices"),
    ):
        bad = json.dumps(json.loads(lines[3]) | change) + "\n"
        arc.write_text("".join([*lines[:3], bad, *lines[4:]]))
        with pytest.raises(CalibrationError, match=rf"item 4 of .*arc\.jsonl is none of task arc_easy \(.*({told})"):
            load_tasks({"arc_easy": arc})
    for content in ("".join(lines)[:-20], ""):
        arc.write_text(content)
        with pytest.raises(CalibrationError, match=r"items of task arc_easy in .*arc\.jsonl cannot be read"):
            load_tasks({"arc_easy": arc})


def test_the_name_of_a_file_tells_its_task(tmp_path: Path) -> None:
    for name in ("piqa_validation.jsonl", "arc_easy-test.parquet", "arc_challenge.json", "piqa.txt", "piqapiqa.jsonl"):
        (tmp_path / name).touch()
    found = find_files(["piqa", "arc_easy", "arc_challenge"], tmp_path)
    assert {name: file.name for name, file in found.items()} == {
        "piqa": "piqa_validation.jsonl",
        "arc_easy": "arc_easy-test.parquet",
        "arc_challenge": "arc_challenge.json",
    }
    (tmp_path / "piqa_test.jsonl").touch()
    with pytest.raises(CalibrationError, match=r"task piqa has piqa_test\.jsonl, piqa_validation\.jsonl in "):
        find_files(["piqa"], tmp_path)
    with pytest.raises(CalibrationError, match=r"task winogrande has no file in .*winogrande_SPLIT\.jsonl"):
        find_files(["winogrande"], tmp_path)
    with pytest.raises(CalibrationError, match=r"missing is no directory"):
        find_files(["piqa"], tmp_path / "missing")


def test_remedy_without_lm_eval(arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(OptimaError, match=r"pip install 'lm-eval>="):
        load_tasks({"arc_easy": arc})


def test_scored_positions_of_a_batch() -> None:
    wanted = {(1, 2, 3, 4): 2, (1, 2): 1, (5, 6): 2, (7, 0): 1}
    assert scored_positions(torch.tensor([[1, 2, 3, 4]]), {(1, 2, 3, 4): 2}) == 2
    assert scored_positions(torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), wanted) == 4
    assert scored_positions(torch.tensor([[1, 2, 0, 0]]), wanted) == 3
    assert scored_positions(torch.tensor([[7, 0, 0]]), wanted) == 2  # a token that is also what fills up
    assert scored_positions(torch.tensor([[1, 2, 3, 4]]), wanted) == 2  # a row that is the beginning of another
    assert scored_positions(torch.tensor([[9, 9, 8]]), wanted) == 3  # unknown: all


@needs_lm_eval
def test_batches_are_those_of_lm_eval_to_the_bit() -> None:
    """Of choices of any length, in batches of one size: bfloat16, which rounds much, shows any other batch."""
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    from optima.evaluation import zeroshot

    texts = [LINES[0], LINES[1], LINES[0][:20], "a", "fox jumps"]
    pairs = [(text, more) for text in texts for more in (" dog", " a", " over the lazy dog", " " + LINES[1], " a b")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    model = make_llama().to(torch.bfloat16)
    for size in (1, 3, 8):
        plain = huggingface.HFLM(
            pretrained=model, tokenizer=make_tokenizer(**ENDS), batch_size=size, softmax_dtype="float32"
        )
        ours = zeroshot.language_model(model, make_tokenizer(**ENDS), size)
        assert ours.loglikelihood(requests) == plain.loglikelihood(requests)


def test_the_answers_of_a_task_are_in_the_order_of_its_items() -> None:
    samples = [{"doc_id": i, "doc_hash": str(i), "acc": float(i == 0)} for i in (2, 0, 1)]
    found = task_record("a", ("a",), {"results": {"a": {"acc,none": 1 / 3}}, "samples": {"a": samples}})
    assert found.correct == {"acc": "100"}
