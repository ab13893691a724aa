"""optima shrink: the smaller model is what its report says, whatever family, stop or number of processes."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from closeness import assert_close_in_norm
from families import build, make_ids
from ranks import finish_ranks, said, start_ranks
from runs import finish, start, stop_at_sync
from tiny import Refused, load_weights, make_llama, make_tokenizer, make_tokens, save_model, save_text, snapshot
from torch import nn

import optima
from optima.cli import main
from optima.errors import OptimaError

SIZE = {"neurons": 0.25, "multiple": 4}
FLAGS = ("--neurons", "0.25", "--multiple", "4", "--blocks", "1")
TIMED = ("report.json", "report.md", "report.html")
DEEP: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_layer": 4},
}


def shrunk(model: transformers.PreTrainedModel, **options: Any) -> optima.Report:
    ids = make_ids(8, 16)
    return optima.shrink(model, optima.Shrink(**SIZE | options), calibration=ids, progress=False)


def test_logits_are_those_of_the_dense_model_without_these_structures() -> None:
    dense, tokens = make_llama(num_hidden_layers=4), make_tokens(8, 16)
    small = copy.deepcopy(dense)
    options = optima.Shrink(**SIZE, blocks=1, tuning_epochs=0)
    report = optima.shrink(small, options, calibration=tokens, progress=False)
    gone = {unit.block for unit in report.units if unit.unit == "block"}
    kept = [layer for index, layer in enumerate(dense.model.layers) if index not in gone]
    assert len(gone) == 1
    assert not gone & {0, 3}, "the first and the last block stay"
    for layer, other in zip(kept, small.model.layers, strict=True):
        assert other.mlp.down_proj.in_features == 36
        places = (layer.mlp.up_proj.weight[:, None] == other.mlp.up_proj.weight).all(dim=2)
        assert places.sum(dim=0).tolist() == [1] * 36
        weight_OD = torch.zeros_like(layer.mlp.down_proj.weight)
        weight_OD[:, places.float().argmax(dim=0)] = other.mlp.down_proj.weight
        layer.mlp.down_proj.weight = nn.Parameter(weight_OD)
    for index in gone:  # a block that adds nothing to its input
        dense.model.layers[index].self_attn.o_proj.weight.data.zero_()
        dense.model.layers[index].mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        assert_close_in_norm(small(tokens).logits, dense(tokens).logits)
        generated = small.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 20), "caches are numbered anew"


def test_the_report_is_true_of_the_model() -> None:
    dense = make_llama(num_hidden_layers=4)
    small = copy.deepcopy(dense)
    report = shrunk(small, blocks=1)
    for model, size in zip((dense, small), report.sizes, strict=True):
        assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    neurons = [unit for unit in report.units if unit.unit == "neurons"]
    assert [(unit.kept, unit.of) for unit in neurons] == [(36, 48)] * 3
    assert all(0.0 < (unit.energy or 0.0) < 0.25 and (unit.gap or 1.0) < 1e-9 for unit in neurons)
    assert all(block.tuning_epoch == 0 or block.tuning[block.tuning_epoch] < block.tuning[0] for block in report.blocks)


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "bert", "roberta", "modernbert", "falcon_h1"]
)
def test_families_shrink_load_and_run(family: str, tmp_path: Path) -> None:
    model = build(family, **DEEP.get(family, {"num_hidden_layers": 4}))
    model.save_pretrained(tmp_path / "model")
    options = optima.Shrink(**SIZE, blocks=1, tuning_epochs=1)
    report = optima.shrink(
        str(tmp_path / "model"),
        options,
        output_dir=tmp_path / "out",
        tokenizer=make_tokenizer(),
        calibration=make_ids(8, 16),
        progress=False,
    )
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert sum(each.numel() for each in loaded.parameters()) == report.sizes[1].parameters
    with torch.no_grad():
        found = loaded.eval()(make_ids(2, 16))[0]
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("bloom", {}, "BloomForCausalLM"),
        ("mixtral", {}, "mixture of experts"),
        ("llama4", {"neurons": None, "blocks": 1}, "Llama4ForCausalLM"),
        ("t5", {}, "T5ForConditionalGeneration"),
        ("mamba", {}, "layers.0"),
        ("llama", {"blocks": 1}, "blocks must be at most 0"),
        ("llama", {"multiple": 64}, "--multiple"),
    ],
)
def test_what_cannot_be_said_is_refused(family: str, options: dict[str, Any], named: str) -> None:
    model = build(family, num_hidden_layers=4) if family == "llama4" else build(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimaError, match=named):
        shrunk(model, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"neurons": 1.0}, {"neurons": 0.0}, {"blocks": 0}])
def test_amounts_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptimaError):
        optima.Shrink(**options)


@pytest.fixture
def deep(root: Path) -> Path:
    save_model(root / "model", make_llama(num_hidden_layers=4).bfloat16())
    return root


def files(out: str) -> dict[str, bytes | None]:
    return {name: content for name, content in snapshot(Path(out)).items() if name not in TIMED}


def test_a_killed_run_resumes_to_the_same_bits(deep: Path) -> None:
    assert finish(start("whole", *FLAGS, verb="shrink")) == 0
    generator, killed = random.Random(0), 0
    for number in range(3):
        out = f"out{number}"
        while finish(start(out, *FLAGS, "--resume", verb="shrink", prepare=stop_at_sync(generator.randrange(4, 40)))):
            killed += 1
        assert files(out) == files("whole")
    assert killed > 0


def test_two_ranks_shrink_as_one(deep: Path) -> None:
    assert finish(start("one", *FLAGS, verb="shrink")) == 0
    assert finish_ranks(start_ranks(2, "two", *FLAGS, verb="shrink")) == [0, 0], said(2)
    one, two = load_weights(Path("one")), load_weights(Path("two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close_in_norm(two[name], tensor, eps=8.0, name=name)


def test_a_shrunk_model_is_pruned_and_planned(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_text(Path("text.txt"))
    assert main(["plan", "model", *FLAGS, "--max-seq-length", "16"]) == 0
    assert "1 of 4 blocks" in capsys.readouterr().out
    assert finish(start("small", *FLAGS, verb="shrink")) == 0
    assert finish(start("sparse", "--selector", "wanda", "--objective", "sink", model="small")) == 0
    assert optima.load_report("sparse").sparsity == pytest.approx(0.5, abs=0.01)


def test_bad_amounts_are_refused_before_weights_are_read(cheap: Refused) -> None:
    size = ["--output-dir", "out", "--dataset", "text.txt"]
    assert "--multiple" in cheap(arguments=["shrink", "model", *size, "--neurons", "0.25"])
    assert "nothing to remove" in cheap(arguments=["shrink", "model", *size])
