"""``optima eval`` with tasks, from files of items to tables and records."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import LINES, make_llama, make_tokenizer, save_model

from optima.cli import main
from optima.evaluation.comparison import compare
from optima.evaluation.record import load_evaluation

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the eval extra")


def test_two_models_on_the_same_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for name, seed in (("first", 0), ("second", 5)):
        model = make_llama()
        torch.manual_seed(seed)
        model.lm_head.weight.data.normal_()
        save_model(Path(name), model)
        make_tokenizer(bos_token="<s>").save_pretrained(name)
    cuts = [slice(i, i + 8) for i in range(20)]
    items = [{"goal": LINES[2], "sol1": LINES[0][cut], "sol2": LINES[1][cut], "label": cut.start % 2} for cut in cuts]
    Path("piqa_validation.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))

    options = ["--tasks", "piqa,", "--task-data", ".", "--task-limit", "16", "--output", "found.json"]
    assert main(["eval", "first", "second", *options]) == 0
    output, _ = capfd.readouterr()
    found = load_evaluation("found.json")
    (one,), (two,) = (model.tasks for model in found.models)
    assert one.items == two.items == 16
    assert one.correct["acc"] != two.correct["acc"]
    for task in (one, two):
        for metric, correct in task.correct.items():
            assert task.metrics[metric].value == correct.count("1") / 16
            assert f"{100 * task.metrics[metric].value:.2f} ± " in output
    (comparison,) = found.comparisons
    assert comparison.loss_difference is None
    assert comparison.tasks == tuple(compare(one, two, seed=0))
    assert "second against first: percentage points, with a 95% bootstrap interval over items" in output
    assert "perplexity" not in output
    assert found.settings["tasks"] == ["piqa"]
    assert "lm_eval" in found.versions
