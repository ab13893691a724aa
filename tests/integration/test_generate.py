"""Self-generated calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from ranks import in_processes
from runs import raising
from tiny import make_bert, make_llama, make_tokenizer, save_model, weight_files
from torch import Tensor

from optima import Recipe, load_report, prune
from optima.cli import main
from optima.data.generate import generate_tokens
from optima.distributed import Ranks
from optima.errors import CalibrationError
from optima.plan import resolve_recipe

CPU = torch.device("cpu")
# BOS, then consecutive tokens: each sequence has its own.
READ_NL = torch.cat([torch.zeros(10, 1, dtype=torch.int64), torch.arange(1, 24) + 24 * torch.arange(10)[:, None]], 1)


def generate(model: Any, count: int = 40, read_NL: Tensor = READ_NL, **options: Any) -> Tensor:
    return generate_tokens(model, read_NL, count, 1, **{"seed": 0, "device": CPU, **options})


def test_sequences_are_full_and_those_of_the_seed() -> None:
    model = make_llama()
    state = torch.get_rng_state()
    model.generation_config.eos_token_id = 7  # which does not end them
    model.generation_config.top_k = 1
    tokens_NL = generate(model)
    assert tokens_NL.shape == (40, 24)
    assert (tokens_NL[:, 0] == 0).all(), "every text begins with BOS"
    assert len(tokens_NL[:, 4:].unique()) > 100, "tokens are sampled, not the likeliest taken"
    assert bool((tokens_NL[:, 4:-1] == 7).any())
    assert torch.equal(generate(model), tokens_NL)
    assert not torch.equal(generate(model, seed=1), tokens_NL)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.eos_token_id == 7
    for read_L, tokens_L in zip(READ_NL, tokens_NL, strict=False):  # each continues a piece of the text
        assert set(tokens_L[1:4].tolist()) <= set(read_L.tolist())
        assert (tokens_L[1:3] + 1 == tokens_L[2:4]).all()


def test_tokens_have_the_models_probabilities() -> None:
    """The first tokens after BOS and one more, against the softmax."""
    model = make_llama(vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight *= 20
        probability_V = model(torch.tensor([[0, 5]])).logits[0, 1].softmax(0)
    tokens_N = generate(model, 4000, torch.tensor([[0, 5, 5]]))[:, 2]
    share_V = tokens_N.bincount(minlength=300) / len(tokens_N)
    assert float((share_V - probability_V).abs().max()) < 0.04
    assert float(probability_V.max()) > 0.05


def test_fewer_at_a_time_generate_the_same() -> None:
    """Where the device runs out of memory. A draw on the boundary of two tokens may end one sequence otherwise."""
    model = make_llama()
    whole_NL = generate(model)

    def refuse(module: torch.nn.Module, given: tuple[Tensor]) -> None:
        if len(given[0]) > 10:
            raise torch.OutOfMemoryError

    model.model.layers[1].mlp.register_forward_pre_hook(refuse)
    assert int((generate(model) != whole_NL).any(dim=1).sum()) <= 1


def test_any_number_of_processes_generates_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optima.data.generate.BATCH", 16)  # for any number of processes: the same shapes and bits
    torch.set_num_threads(1)  # as in each process
    torch.save(generate(make_llama()), "alone")

    def work(ranks: Ranks) -> None:
        assert torch.equal(generate(make_llama(), ranks=ranks), torch.load("alone"))

    assert in_processes(2, work) == [0, 0]


def test_refusals() -> None:
    with pytest.raises(CalibrationError, match="does not generate"):
        generate(make_bert())
    with pytest.raises(CalibrationError, match="raise --max-seq-length"):
        generate(make_llama(), read_NL=READ_NL[:, :2])
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = torch.nan
    with pytest.raises(CalibrationError, match=r"logits of .* have NaN or Inf"):
        generate(model)


def test_a_share_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although there would be more to read; the same again, and what cannot be read is still refused."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    Path("some.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    size = ["--max-seq-length", "24", "--dataset", "some.txt", "--num-calibration-samples", "7"]
    for out, share, count in (("half", "0.5", 3), ("again", "0.5", 3), ("tenth", "0.1", 1)):  # at least one
        assert main(["prune", "model", "--output-dir", out, *size, "--self-generated", share]) == 0
        report = load_report(Path(out))
        assert report.run.num_tokens == 7 * 24
        assert f"self-generated calibration data: {count} of 7 sequences" in report.run.notes
    assert weight_files(Path("half")) == weight_files(Path("again"))
    many = ["--num-calibration-samples", "60", "--self-generated", "0.5", "--output-dir", "many"]
    assert main(["prune", "model", *size[:4], *many]) == 2


def test_a_recipe_with_it_serves_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(dataset=["a.txt"], self_generated=0.5, num_calibration_samples=4, max_seq_length=16)
    assert resolve_recipe(make_llama(), recipe, device=CPU).options.self_generated == 0.5
    plan = resolve_recipe(make_bert(), recipe, device=CPU)
    assert plan.options.self_generated == 0.0
    assert "does not generate" in plan.notes[-1]
    monkeypatch.setattr("optima.plan.MAIN_SHARE", 1e-12)
    plan = resolve_recipe(make_llama(), recipe, device=CPU)
    assert plan.options.self_generated == 0.0
    assert "of the main memory" in plan.notes[-1]
    model = make_llama()
    monkeypatch.setattr(model, "generate", raising(AssertionError("it generates")))
    report = prune(model, recipe, calibration=families.make_ids(4, 16), tokenizer=make_tokenizer())
    assert report.run.recipe["self_generated"] == 0.0
