"""A model whose weights stay on disk ends as one that is held in memory, bit for bit, and is never there whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close_in_norm
from families import build
from safetensors.torch import load_file, save_file
from tiny import WEIGHTS, load_weights, make_llama, make_tokenizer, make_tokens, snapshot
from transformers import PreTrainedModel

import optima
import optima.plan
from optima.models.load import find_source, skeleton
from optima.models.offload import Streamed, open_weights

REPORTS = ("report.json", "report.md", "report.html")
CHEAP = {"selector": "wanda", "objective": "sink"}
EVERYTHING = {"tuning_epochs": 1, "allocation": "loss"}


def pruned(model: Path, out: Path, **options: Any) -> dict[str, bytes | None]:
    """Every file that a run writes but the reports, which tell its time."""
    recipe = optima.Recipe(batch_size=2, **options)
    tokens = make_tokens(4).clamp_max(100)
    optima.prune(model, recipe, output_dir=out, tokenizer=make_tokenizer(), calibration=tokens)
    return {name: content for name, content in snapshot(out).items() if name not in REPORTS}


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Runs hold the whole model in memory until this is undone."""
    monkeypatch.setattr("optima.plan.open_weights", lambda *args: open_weights(*args[:3], whole=""))
    return monkeypatch


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", EVERYTHING),
        ("mixtral", CHEAP),
        ("gpt2", CHEAP),
        pytest.param("bart", CHEAP, marks=pytest.mark.slow),
        pytest.param("t5", {}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", CHEAP, marks=pytest.mark.slow),
    ],
)
def test_equals_a_resident_run(
    family: str, options: dict[str, Any], tmp_path: Path, resident: pytest.MonkeyPatch
) -> None:
    build(family).bfloat16().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    expected = pruned(tmp_path / "model", tmp_path / "resident", **options)
    resident.undo()
    found = pruned(tmp_path / "model", tmp_path / "streamed", **options)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    notes = [set(optima.load_report(tmp_path / name).run.notes) for name in ("resident", "streamed")]
    assert notes[0] - notes[1] == {"the whole model was held in main memory: "}
    assert not notes[1] - notes[0]


def streamed(model: PreTrainedModel, directory: Path) -> tuple[PreTrainedModel, Streamed]:
    model.save_pretrained(directory)
    source = find_source(str(directory))
    found, weights = open_weights(source, skeleton(source), "auto")
    assert isinstance(weights, Streamed)
    return found, weights


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a batch that finds it there does not ask for it again."""
    seen: list[set[str]] = []
    read = Streamed.read

    def note(self: Streamed, names: list[str]) -> list[str]:
        found = read(self, names)
        seen.append({name for name, tensor in self.model.state_dict().items() if not tensor.is_meta})
        return found

    monkeypatch.setattr(Streamed, "read", note)
    make_llama(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    pruned(tmp_path / "model", tmp_path / "out", **EVERYTHING)
    blocks = [{name.split(".")[2] for name in names if name.startswith("model.layers.")} for names in seen]
    assert {len(now) for now in blocks} == {0, 1}
    # Of the third, the last of all, the head comes too.
    last = [names for names, now in zip(seen, blocks, strict=True) if now == {"1"}][-1]
    assert not {name for name in last if "embed" in name or "lm_head" in name}


@pytest.mark.parametrize("same", [True, False])
def test_weights_that_were_saved_twice_stay_as_they_are(same: bool, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if same else 1)
    save_file(tensors, tmp_path / "model" / WEIGHTS, {"format": "pt"})
    pruned(tmp_path / "model", tmp_path / "out", **CHEAP)
    reloaded = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(reloaded[name], tensors[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))


def test_a_weight_is_read_when_it_is_asked_for_and_given_up_behind_the_phase(tmp_path: Path) -> None:
    model, weights = streamed(make_llama(tie_word_embeddings=True), tmp_path)
    tokens = make_tokens(1)
    with torch.no_grad(), weights.outside():
        logits = model(tokens).logits
        assert not model.lm_head.weight.is_meta
        assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert_close_in_norm(logits, make_llama(tie_word_embeddings=True)(tokens).logits)
    assert dict(model.named_parameters())["model.embed_tokens.weight"].is_meta
    assert not model.model.norm.weight.is_meta


def test_a_block_that_was_replaced_is_read_as_it_is_now(tmp_path: Path) -> None:
    model, weights = streamed(make_llama(), tmp_path)
    (block, *_) = optima.models.blocks.find_stacks(model)[0].blocks
    name = block.linears[0].name + ".weight"
    weights.replaced(block, lambda: {name: torch.zeros_like(block.linears[0].parameter)})
    for context in (weights.on(block, torch.device("cpu")), weights.state([name])):
        with context:
            assert not block.linears[0].read().any()
            assert block.linears[1].read().any()


EXTRA = {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}


def test_what_the_model_has_no_place_for_is_noted(tmp_path: Path) -> None:
    """Of the block for multi-token prediction transformers says nothing, for the class of Qwen3-Next expects it."""
    build("qwen3_next").save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS) | EXTRA, tmp_path / WEIGHTS, {"format": "pt"})
    source = find_source(str(tmp_path))
    _, weights = open_weights(source, skeleton(source), "auto")
    assert weights.left_out == tuple(EXTRA)
    assert any("mtp.fc.weight, mtp.layers.0.mlp.up_proj.weight" in note for note in weights.notes)


def test_what_a_checkpoint_lacks_its_output_lacks_too(tmp_path: Path) -> None:
    """A sentence encoder without the pooler of its class, which transformers fills with other numbers each time."""
    build("bert").save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, tmp_path / "model" / WEIGHTS, {"format": "pt"})
    pruned(tmp_path / "model", tmp_path / "out", selector="wanda", objective="plain")
    assert load_weights(tmp_path / "out").keys() == kept.keys()
    notes = optima.load_report(tmp_path / "out").run.notes
    assert any("(pooler.dense.bias, pooler.dense.weight): the output does too" in note for note in notes)


def test_memory_left_changes_where_activations_wait_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_llama().bfloat16().save_pretrained(tmp_path / "model")
    expected = pruned(tmp_path / "model", tmp_path / "free", **EVERYTHING)
    monkeypatch.setattr("optima.calibration.store.SMALLEST_MAPPED", 0)
    monkeypatch.setattr("optima.calibration.store.available_memory", lambda: 0)
    assert pruned(tmp_path / "model", tmp_path / "kept", **EVERYTHING) == expected
    notes = optima.load_report(tmp_path / "kept").run.notes
    assert any(note.startswith("activations exceeded main memory") for note in notes)


def test_a_default_run_reads_each_block_five_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the probe, the gradient pass (forward and backward), the sensitivity pass and the solve."""
    build("llama").save_pretrained(tmp_path / "model")
    counts: Counter[str] = Counter()
    read = Streamed.read

    def counting(self: Streamed, names: list[str]) -> list[str]:
        found = read(self, names)
        counts.update({name.split("self_attn")[0] for name in found if "self_attn" in name})
        return found

    monkeypatch.setattr(Streamed, "read", counting)
    pruned(tmp_path / "model", tmp_path / "out")
    assert counts == {f"model.layers.{index}.": 5 for index in range(2)}
