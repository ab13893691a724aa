"""Bad input: a clear error before the long work begins, exit status 2, and nothing written.

Cheap checks are tested on a checkpoint whose weights are garbage: had they been read first, that would be the error.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import build
from safetensors.torch import load_file, save_file
from tiny import (
    POSITIONS,
    TEXT,
    VOCAB,
    WEIGHTS,
    Refused,
    make_llama,
    make_tokenizer,
    make_tokens,
    prune_arguments,
    save_model,
)

from optima import Recipe, load_report, prune
from optima.cli import main
from optima.errors import OptimaError

MODEL = Path("model")
UP = "model.layers.1.mlp.up_proj.weight"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
Edit = Callable[[], object]  # of the model, before the command


def edit_config(**values: object) -> None:
    file = MODEL / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write(file: str, content: str) -> None:
    Path(file).write_text(content)


def rename_weights(name: str) -> None:
    (MODEL / WEIGHTS).rename(MODEL / name)


def remove_tokenizer() -> None:
    for file in MODEL.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("model", "edit", "message"),
    [
        ("./missing", int, "there is no directory ./missing"),
        ("nobody/nothing", int, "the model of nobody/nothing cannot be read"),
        ("bad.gguf", partial(write, "bad.gguf", "garbage"), "the model of bad.gguf cannot be read"),
        ("model", (MODEL / "config.json").unlink, "model has no config.json"),
        ("model", partial(write, "model/config.json", "[]"), "the model of model cannot be read"),
        ("model", partial(edit_config, model_type="martian"), "the model of model cannot be read"),
        ("model", (MODEL / WEIGHTS).unlink, "model has no .safetensors weights"),
        ("model", partial(rename_weights, "pytorch_model.bin"), "no .safetensors weights: convert pickle files"),
        ("model", partial(rename_weights, "model.compressed.safetensors"), "optima restore model"),
        ("sounds", lambda: save_model(Path("sounds"), build("whisper")), "reads input_features, not text"),
        ("vit", lambda: save_model(Path("vit"), hf.ViTModel(hf.ViTConfig(**SMALL))), "ViTModel reads pixel_values"),
        ("model", partial(edit_config, quantization_config={"quant_method": "bitsandbytes"}), "model is quantized"),
        ("model", remove_tokenizer, "tokenizer"),
        ("model", partial(edit_config, vocab_size=100), "LlamaForCausalLM has a vocabulary of 100"),
        ("model", partial(write, "text.txt", ""), "text.txt"),
        ("model", partial(write, "text.txt", "fox"), "4 samples of 16 tokens need 60"),
        ("model", int, "model/model.safetensors cannot be opened"),
    ],
)
def test_models_and_texts(cheap: Refused, model: str, edit: Edit, message: str) -> None:
    edit()
    assert message in cheap(model=model)


def test_positions_behind_the_paddings(late: Refused, root: Path) -> None:
    config = hf.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS, **SMALL)
    save_model(root / "roberta", hf.RobertaModel(config))
    usable = POSITIONS - 2
    message = late("--max-seq-length", str(usable + 1), model="roberta")
    assert f"sequences of {usable + 1} tokens exceed the {usable} positions of RobertaModel" in message
    assert main(prune_arguments("--max-seq-length", str(usable), model="roberta")) == 0


def test_code_of_others_runs_only_if_trusted(cheap: Refused) -> None:
    write("evil.py", "raise SystemExit('the code ran')")
    write("run.yaml", "selector: evil:Mine")
    assert "add --trust-remote-code" in cheap("--recipe", "run.yaml")
    with pytest.raises(SystemExit, match="the code ran"):
        main(prune_arguments("--recipe", "run.yaml", "--trust-remote-code"))
    edit_config(model_type="martian", auto_map={"AutoConfig": "martian.MartianConfig"})
    write("model/martian.py", "raise SystemExit('the code ran')")
    assert "trust_remote_code" in cheap()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sparsity 1.5", "sparsity: Input should be"),
        ("--sparsity 50%", "got '50%'"),
        ("--pattern mlp=2:4", "no entry of pattern matches model.layers.0.self_attn.q_proj"),
        ("--pattern mlp=2:32 0.5", "divisible by 32, but model.layers.0.mlp.down_proj has 48"),
        ("--pattern", "argument --pattern: expected at least one argument"),
        ("--selector nothere:X", "selector nothere:X runs code"),
        ("--selector ./own.py:X --trust-remote-code", "selector ./own.py:X cannot be loaded"),
        ("--output-dir model", "choose another --output-dir"),
        ("--device gpu", "got 'gpu'"),
        ("--device cuda:99", "device 'cuda:99' is not there"),
        ("--dataset missing.jsonl", "dataset 'missing.jsonl'"),
        ("--dataset nobody/nothing", "dataset 'nobody/nothing'"),
        ("--dataset other.jsonl", "Its columns: body, id"),
        (f"--max-seq-length {POSITIONS + 1}", f"use --max-seq-length {POSITIONS}"),
        ("--max-seq-length 1", "the tokenizer's special tokens (1)"),
        ("--targets q_porj", "model.layers.*.mlp.down_proj"),
        ("--ignore layers", "model.layers.*.mlp.down_proj"),
        ("--targets a:smile:b", "no linear matches targets ['a:smile:b']"),
        ("--targets q_proj kproj", "targets has 'kproj', which matches no linear"),
        ("--recipe missing.yaml", "recipe missing.yaml cannot be read"),
        ("--recipe run.yaml", "recipe run.yaml: unknown key 'sparsty'"),
        ("--seed", "argument --seed: expected one argument\nsee optima prune --help"),
        ("--sparsty 1", "unknown argument --sparsty 1\nsee optima prune --help"),
    ],
)
def test_options(cheap: Refused, options: str, message: str) -> None:
    write("run.yaml", "sparsty: 0.5")
    write("other.jsonl", json.dumps({"body": TEXT, "id": 3}) + "\n")
    found = cheap(*shlex.split(options))
    assert message in found
    assert len(found.splitlines()) <= 2
    assert "usage" not in found


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prune model", "arguments are required: --output-dir"),
        ("prune", "the following arguments are required: MODEL"),
        ("plan --pattern 2:4 model", "put it first, before options that take several values\nsee"),
        ("prun model", "invalid choice: 'prun'"),
        ("plan model", f"exceed the {POSITIONS} positions of LlamaForCausalLM"),
        ("eval model --dataset text.txt --max-seq-length 16", "the weights of model cannot be read"),
        ("report model", "cannot read model/report.json"),
        ("report text.txt", "cannot read text.txt"),
    ],
)
def test_commands(cheap: Refused, command: str, message: str) -> None:
    assert message in cheap(arguments=command.split())


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(MODEL / WEIGHTS)
    edit(tensors)
    save_file(tensors, MODEL / WEIGHTS, metadata={"format": "pt"})


def fill(name: str, value: float) -> Edit:
    return partial(edit_weights, lambda tensors: tensors[name][3:].fill_(value))


def drop(name: str) -> Edit:
    return partial(edit_weights, lambda tensors: tensors.pop(name))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(UP), f"the checkpoint model lacks weights of LlamaForCausalLM ({UP})"),
        (drop("lm_head.weight"), "the checkpoint model lacks weights of LlamaForCausalLM (lm_head.weight)"),
        (partial(edit_config, intermediate_size=40), "is of shape (32, 48), and by config.json of (32, 40)"),
        (fill(UP, torch.nan), f"model/model.safetensors: tensor {UP} has NaN or Inf"),
        (fill("model.norm.weight", torch.inf), "model/model.safetensors: tensor model.norm.weight has NaN or Inf"),
        (fill("model.layers.0.mlp.up_proj.weight", 1e30), "inputs of model.layers.0.mlp.down_proj contain NaN or Inf"),
    ],
)
def test_weights(late: Refused, edit: Edit, message: str) -> None:
    edit()
    assert message in late()


def test_a_shard_is_missing(late: Refused) -> None:
    make_llama().save_pretrained("sharded", max_shard_size="20KB")
    make_tokenizer().save_pretrained("sharded")
    sorted(Path("sharded").glob("*.safetensors"))[1].unlink()
    assert late(model="sharded").startswith("the weights of sharded cannot be read")


def test_weights_without_a_place_are_noted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(lambda tensors: tensors.update({"ext\n\x1b[31mra": torch.zeros(3), bias: torch.ones(32)}))
    assert main(prune_arguments("--ignore", "lm_head", r"layer\.1", r"layers\.1\.")) == 0
    assert "has no place for (ext [31mra, " in caplog.text
    notes = load_report("out").run.notes
    assert any(bias in note for note in notes)
    assert [note for note in notes if note.startswith("ignore ")] == [r"ignore 'layer\\.1' matches no linear"]


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("output_dir is missing", {"model": "model"}),
        ("resume needs the output_dir", {"resume": True}),
        ("model must be a path, a hub id or a model of transformers, got Linear", {"model": torch.nn.Linear(2, 2)}),
        ("recipe must be a Recipe, got dict", {"recipe": {"sparsity": 0.5}}),
        ("calibration must be token ids", {"calibration": make_tokens() > 100}),
        ("calibration must be token ids", {"calibration": torch.zeros(8, dtype=torch.int64)}),
        (f"run from 0 to {VOCAB}, but .* has a vocabulary of {VOCAB}", {"calibration": torch.tensor([[0, VOCAB]])}),
        ("run from -1 to 0", {"calibration": torch.tensor([[0, -1]])}),
        ("needs its tokenizer", {"calibration": None}),
        ("documents must be texts, got Tensor", {"calibration": [make_tokens()], "tokenizer": make_tokenizer()}),
    ],
)
def test_arguments_in_python(root: Path, message: str, options: dict[str, object]) -> None:
    defaults = {"model": make_llama(), "recipe": Recipe(max_seq_length=8), "calibration": make_tokens()}
    with pytest.raises(OptimaError, match=message):
        prune(**defaults | options)  # type: ignore[arg-type]
