"""``optima eval`` from models, text and tasks to tables and records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny import LINES, POSITIONS, VOCAB, make_llama, make_tokenizer, prune_arguments, save_model, save_text

from optima.cli import main
from optima.errors import OptimaError
from optima.evaluation.compare import compare
from optima.evaluation.evaluate import evaluate
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.evaluation.record import load_evaluation

TEXT = ["--dataset", "text.txt", "--max-seq-length", "16", "--max-windows", "7"]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with two models and a text."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("model", "other")):
        model = make_llama(max_position_embeddings=2 * POSITIONS)
        torch.manual_seed(seed)
        model.lm_head.weight.data.normal_()
        save_model(Path(name), model)
        make_tokenizer(bos_token="<s>").save_pretrained(name)
    save_text(Path("text.txt"))
    return tmp_path


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "model", "other", *TEXT, "--divergence", "--batch-size", "3", "--output", "found.json"]) == 0
    output, message = capsys.readouterr()
    assert message.splitlines() == ["evaluating model (1 of 2)", "evaluating other (2 of 2)"]
    found = load_evaluation("found.json")
    windows_NL = evaluation_windows([Path("text.txt").read_text()], make_tokenizer(bos_token="<s>"), 16, 7)
    for record in found.models:
        model = hf.AutoModelForCausalLM.from_pretrained(record.model)
        assert record.perplexity is not None
        assert record.perplexity.perplexity == pytest.approx(perplexity(model, windows_NL), rel=1e-3)
        assert (record.perplexity.windows, record.perplexity.length) == (7, 16)
        assert f"{record.perplexity.perplexity:.3f}" in output
    first, second = found.models
    assert first.perplexity is not None
    assert second.perplexity is not None
    assert first.divergence is None
    assert second.divergence is not None
    assert f"{second.divergence.kl.value:.4f} ± " in output
    (comparison,) = found.comparisons
    assert comparison.loss_difference is not None
    assert comparison.loss_difference.value == pytest.approx(second.perplexity.loss.value - first.perplexity.loss.value)
    assert found.settings["divergence"] is True
    assert found.settings["models"] == ["model", "other"]


def test_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "model", "other", "--speed", "--output", "speed.json"]) == 0
    assert "prefill ratio" in capsys.readouterr().out
    for model in load_evaluation("speed.json").models:
        assert model.speed is not None
        assert model.speed.prefill > 0.0
        assert model.speed.decode is not None


def test_tasks(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="needs the eval extra", exc_type=ImportError)
    cuts = [slice(i, i + 8) for i in range(20)]
    items = [{"goal": LINES[2], "sol1": LINES[0][cut], "sol2": LINES[1][cut], "label": cut.start % 2} for cut in cuts]
    Path("piqa_validation.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    options = ["--tasks", "piqa,", "--task-data", ".", "--task-limit", "16", "--output", "found.json"]
    assert main(["eval", "model", "other", *options]) == 0
    output, _ = capfd.readouterr()
    found = load_evaluation("found.json")
    (one,), (two,) = (model.tasks for model in found.models)
    assert one.items == two.items == 16
    assert one.correct["acc"] != two.correct["acc"]
    for task in (one, two):
        assert f"{task.metrics['acc'].value:.2%} ± " in output
    (comparison,) = found.comparisons
    assert comparison.loss_difference is None
    assert comparison.tasks == tuple(compare(one, two))
    assert "perplexity" not in output
    assert "lm_eval" in found.versions


def test_report_shows_the_evaluation_in_its_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(prune_arguments("--selector", "wanda", "--objective", "sink")) == 0
    assert main(["eval", "model", "out", *TEXT, "--output", "out/evaluation.json"]) == 0
    capsys.readouterr()
    assert main(["report", "out"]) == 0
    assert "Δ loss" in capsys.readouterr().out.partition("## Evaluation\n")[2]


def test_no_file_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("text.txt").read_bytes()
    for output in ("text.txt", "missing/found.json", "model"):
        assert main(["eval", "model", *TEXT, "--output", output]) == 2
        assert output in capsys.readouterr().err
    assert Path("text.txt").read_bytes() == before
    assert main(["eval", "model", *TEXT, "--output", "found.json", "--protocol", "sparsegpt"]) == 0
    assert load_evaluation("found.json").settings["protocol"] == "sparsegpt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_llama(max_position_embeddings=15), "15 positions"),
        (lambda: make_llama(vocab_size=VOCAB + 4), f"{VOCAB} and {VOCAB + 4} tokens"),
    ],
    ids=["positions", "logits"],
)
def test_model_that_does_not_fit(
    make: Callable[[], hf.PreTrainedModel], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(Path("third"), make())
    assert main(["eval", "model", "third", *TEXT, "--divergence"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "missing.txt"},
        {"dataset": "text.txt", "max_windows": 0},
        {"dataset": "text.txt", "protocol": "sparsgpt"},
        {"dataset": "text.txt", "divergence": True},
    ],
    ids=str,
)
def test_bad_input(options: dict[str, object]) -> None:
    with pytest.raises(OptimaError):
        evaluate(**({"models": "model", "max_seq_length": 16} | options))  # type: ignore[arg-type]
