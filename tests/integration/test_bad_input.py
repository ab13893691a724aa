"""Bad input: a clear error before the long work begins, exit status 2, and nothing written.

Cheap checks are tested on a checkpoint whose weights are garbage: had they been read first, that would be the error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny import (
    POSITIONS,
    TEXT,
    VOCAB,
    WEIGHTS,
    Refused,
    make_bert,
    make_llama,
    make_tokenizer,
    make_tokens,
    prune_arguments,
    save_model,
    save_text,
)

from optima import Callback, Recipe, hold_zeros, load_report, prune
from optima.cli import main
from optima.errors import CalibrationError, ModelError, OptimaError, RecipeError
from optima.reporting.record import BlockDone


class TestModel:
    @pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "a/b/c"])
    def test_no_such_directory(self, cheap: Refused, name: str) -> None:
        assert f"there is no directory {name}" in cheap(model=name)

    def test_unknown_on_the_hub(self, cheap: Refused) -> None:
        message = cheap(model="nobody/nothing")
        assert message.startswith("the model of nobody/nothing cannot be read")
        assert "check the spelling, the network" in message

    @pytest.mark.parametrize("name", ["./missing.gguf", "missing.gguf"])
    def test_no_such_gguf(self, cheap: Refused, name: str) -> None:
        assert f"there is no file {name}" in cheap(model=name)

    def test_gguf_that_is_none(self, cheap: Refused, root: Path) -> None:
        (root / "bad.gguf").write_bytes(b"garbage")
        assert "the model of bad.gguf cannot be read" in cheap(model="bad.gguf")

    def test_no_config(self, cheap: Refused, root: Path) -> None:
        (root / "model" / "config.json").unlink()
        assert "model has no config.json: it is not a Hugging Face model directory" in cheap()
        (root / "model" / "a.gguf").touch()
        assert "name the GGUF file itself (a.gguf)" in cheap()

    @pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "martian"}'])
    def test_config_that_is_none(self, cheap: Refused, root: Path, config: str) -> None:
        (root / "model" / "config.json").write_text(config)
        assert cheap().startswith("the model of model cannot be read")

    def test_class_that_the_library_lacks(self, cheap: Refused, root: Path) -> None:
        edit_config(root, architectures=["MartianForCausalLM"])
        assert "model is a MartianForCausalLM, which transformers" in cheap()

    def test_no_weights(self, cheap: Refused, root: Path) -> None:
        (root / "model" / WEIGHTS).unlink()
        assert cheap().startswith("model has no .safetensors weights")

    @pytest.mark.parametrize("command", ["prune", "eval"])
    def test_packed(self, cheap: Refused, root: Path, command: str) -> None:
        (root / "model" / WEIGHTS).rename(root / "model" / "model.packed.safetensors")
        arguments = prune_arguments() if command == "prune" else ["eval", "model", "--dataset", "text.txt"]
        assert cheap(arguments=arguments) == "model is packed: unpack it with optima unpack model"

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter.bin"])
    def test_pickle_only(self, cheap: Refused, root: Path, name: str) -> None:
        (root / "model" / WEIGHTS).rename(root / "model" / name)
        message = cheap()
        assert "no .safetensors weights: convert pickle files" in message

    def test_a_model_of_sounds(self, cheap: Refused, root: Path) -> None:
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = hf.WhisperConfig(vocab_size=VOCAB, d_model=24, encoder_layers=1, decoder_layers=1, **tokens)
        save_model(root / "sounds", hf.WhisperForConditionalGeneration(config))
        assert "WhisperForConditionalGeneration reads input_features, not text" in cheap(model="sounds")

    def test_model_of_images(self, cheap: Refused, root: Path) -> None:
        config = hf.ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        save_model(root / "vit", hf.ViTModel(config))
        message = cheap(model="vit")
        assert message.startswith("ViTModel reads pixel_values, not text: from Python, give ")
        assert cheap(arguments=["plan", "vit", "--max-seq-length", "16"]) == message

    def test_a_model_that_only_its_parts_can_run(self) -> None:
        class Whole(hf.LlamaPreTrainedModel):
            def __init__(self, config: hf.LlamaConfig) -> None:
                super().__init__(config)
                self.thinker = hf.LlamaForCausalLM(config)
                self.post_init()

        with pytest.raises(ModelError, match=r"Whole has no forward pass of its own: .* reads text \(thinker\)"):
            prune(Whole(make_llama().config), calibration=make_tokens())

    def test_positions_behind_the_paddings(self, late: Refused, root: Path) -> None:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = hf.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=POSITIONS, **sizes)
        save_model(root / "roberta", hf.RobertaModel(config))
        usable = POSITIONS - 2
        message = late("--max-seq-length", str(usable + 1), model="roberta")
        assert f"sequences of {usable + 1} tokens exceed the {usable} positions of RobertaModel" in message
        assert main(prune_arguments("--max-seq-length", str(usable), model="roberta")) == 0

    def test_remote_code_runs_only_if_asked(self, cheap: Refused, root: Path) -> None:
        edit_config(root, model_type="martian", auto_map={"AutoConfig": "martian.MartianConfig"})
        (root / "model" / "martian.py").write_text("raise SystemExit('the code ran')")
        assert "if you trust the code that comes with it, run it with --trust-remote-code" in cheap()

    def test_quantized(self, cheap: Refused, root: Path) -> None:
        edit_config(root, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        assert "model is quantized: prune the unquantized checkpoint" in cheap()

    def test_no_tokenizer(self, cheap: Refused, root: Path) -> None:
        for file in (root / "model").glob("tokenizer*"):
            file.unlink()
        assert "tokenizer" in cheap()


def edit_config(root: Path, **values: object) -> None:
    file = root / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class TestText:
    @pytest.mark.parametrize("text", ["", " \n\n\t"])
    def test_empty(self, cheap: Refused, root: Path, text: str) -> None:
        save_text(root / "text.txt", text)
        message = cheap()
        assert "text.txt" in message or " 0 tokens" in message

    def test_too_short(self, cheap: Refused, root: Path) -> None:
        save_text(root / "text.txt", "the fox")
        ids = make_tokenizer()("the fox\n\n", add_special_tokens=False)["input_ids"]
        message = cheap()
        assert f"has {len(ids)} tokens, but 4 samples of 16 tokens need 60" in message
        assert "--num-calibration-samples or --max-seq-length" in message

    @pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "nobody/nothing"])
    def test_no_such_dataset(self, cheap: Refused, name: str) -> None:
        assert f"dataset '{name}'" in cheap("--dataset", name)

    def test_wrong_column_lists_the_columns(self, cheap: Refused, root: Path) -> None:
        (root / "text.jsonl").write_text(json.dumps({"body": TEXT, "id": 3}) + "\n")
        assert "no text in the column 'text' or 'messages'. Its columns: body, id" in cheap("--dataset", "text.jsonl")

    def test_tokens_of_another_model(self, cheap: Refused, root: Path) -> None:
        edit_config(root, vocab_size=100)
        assert "but LlamaForCausalLM has a vocabulary of 100: use the tokenizer that was published" in cheap()

    def test_token_ids_given_in_python(self) -> None:
        with pytest.raises(CalibrationError, match=f"run from 0 to {VOCAB}, but .* has a vocabulary of {VOCAB}"):
            prune(make_llama(), calibration=torch.tensor([[0, VOCAB]]))
        with pytest.raises(CalibrationError, match="run from -1 to 0"):
            prune(make_llama(), calibration=torch.tensor([[0, -1]]))
        with pytest.raises(CalibrationError, match=r"shape \(samples, length\), got \(3,\)"):
            prune(make_llama(), calibration=torch.tensor([0, 1, 2]))
        with pytest.raises(CalibrationError, match="needs its tokenizer"):
            prune(make_llama(), Recipe(max_seq_length=8))
        for documents in ([1, 2, 3], [[1, 2], [3, 4]]):
            with pytest.raises(CalibrationError, match=r"documents must be texts, got .*: give token ids as a tensor"):
                prune(make_llama(), Recipe(max_seq_length=8), calibration=documents, tokenizer=make_tokenizer())  # type: ignore[arg-type]


class TestOptions:
    @pytest.mark.parametrize("sparsity", ["0", "1", "1.5", "-0.5", "nan"])
    def test_sparsity(self, cheap: Refused, sparsity: str) -> None:
        assert "sparsity: Input should be" in cheap("--sparsity", sparsity)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--sparsity", "0.5", "--pattern", "2:4"], "either sparsity or pattern, not both"),
            (["--pattern", "2/4"], "pattern '2/4' is not of the form n:m"),
            (["--pattern", "4:4"], "needs 0 < n < m"),
            (["--pattern", "mlp=2:4"], "no entry of pattern matches model.layers.0.self_attn.q_proj"),
            (["--pattern", "mlp=2:32", "0.5"], "divisible by 32, but model.layers.0.mlp.down_proj has 48"),
            (["--pattern", "mpl=2:4", "0.5"], "pattern entry 'mpl' decides nothing"),
            (["--pattern", "(=2:4", "0.5"], "'(' is not a regular expression"),
            (["--pattern", "0.5", "2:4"], "two entries for all linears"),
            (
                ["--allocation", "loss", "--pattern", "2:4"],
                "needs one unstructured sparsity: use",
            ),
            (["--allocation", "loss", "--pattern", "mlp=0.6", "0.5"], "needs one unstructured sparsity"),
            (["--allocation", "even"], "allocation: Input should be 'uniform' or 'loss', got 'even'"),
            # All other linears have 32 inputs.
            (["--pattern", "2:32"], "divisible by 32, but model.layers.0.mlp.down_proj has 48"),
            (["--selector", "wonda"], "choose magnitude, wanda, ria"),
            (["--solver", "cg"], "solver: Input should be 'auto', "),
            (["--dtype", "int8"], "dtype: Input should be 'auto', 'float32', "),
            (["--device", "gpu"], "got 'gpu'"),
            (["--device", "cuda:99"], "device 'cuda:99' is not there"),
            (["--device", "meta"], "got 'meta'"),
            (["--dataset", ""], "dataset.0: "),
            (["--pattern"], "argument --pattern: expected at least one argument"),
            (["--selector", "./own.py:X", "--trust-remote-code"], "selector ./own.py:X cannot be loaded"),
            (["--gap", "0"], "gap: Input should be greater than 0, got '0'"),
            (["--gap", "inf"], "gap: "),
            (["--damping", "2"], "damping: Input should be less than or equal to 1"),
            (["--batch-size", "0"], "batch_size: "),
            (["--targets", "("], "'(' is not a regular expression"),
            (
                ["--max-seq-length", "65"],
                f"exceed the {POSITIONS} positions of LlamaForCausalLM: use --max-seq-length {POSITIONS}",
            ),
            (["--max-seq-length", "1"], "no room for text besides the tokenizer's special tokens (1)"),
            (["--recipe", "missing.yaml"], "recipe missing.yaml cannot be read"),
        ],
        ids=lambda item: " ".join(item) if isinstance(item, list) else "",
    )
    def test_refused(self, cheap: Refused, options: list[str], message: str) -> None:
        assert message in cheap(*options)

    @pytest.mark.parametrize("options", [["--targets", "q_porj"], ["--ignore", "layers"]], ids=" ".join)
    def test_nothing_matches_lists_what_is_there(self, cheap: Refused, options: list[str]) -> None:
        message = cheap(*options)
        assert "no linear matches targets" in message
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            assert name in message

    def test_a_target_that_matches_nothing(self, cheap: Refused) -> None:
        message = cheap("--targets", "q_proj", "kproj")
        assert message.startswith("targets has 'kproj', which matches no linear: the linears of the blocks are model.")

    def test_an_ignore_that_matches_nothing_is_told(self, root: Path) -> None:
        assert main(prune_arguments("--ignore", "lm_head", r"layer\.1", r"layers\.1\.", "--selector", "magnitude")) == 0
        notes = [note for note in load_report("out").run.notes if note.startswith("ignore ")]
        assert notes == [r"ignore 'layer\\.1' matches no linear"]

    def test_unknown_key_of_a_recipe(self, cheap: Refused, root: Path) -> None:
        (root / "run.yaml").write_text("sparsty: 0.5")
        message = cheap("--recipe", "run.yaml")
        assert message == "recipe run.yaml: unknown key 'sparsty': did you mean sparsity?"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--sparsity", "half"], "got 'half'"),
            (["--sparsity", "50%"], "got '50%'"),
            (["--seed", "1.5"], "seed: Input should be a valid integer"),
            (["--sparsty", "1"], "unknown argument --sparsty (did you mean --sparsity?)\nsee optima prune --help"),
            (["--max_seq_length=8"], "unknown argument --max_seq_length (did you mean --max-seq-length?)\nsee optima"),
            (["--reci", "x"], "unknown argument --reci (did you mean --recipe?)\nsee optima prune --help"),
            (["--qqq"], "unknown argument --qqq\nsee optima prune --help"),
            (["--seed"], "argument --seed: expected one argument\nsee optima prune --help"),
            (["--selector", "nothere:X"], "selector nothere:X runs code"),
            (["--selector", "nothere:X", "--trust-remote-code"], "selector nothere:X cannot be loaded"),
            (["--targets", "a:smile:b"], "no linear matches targets ['a:smile:b']"),
        ],
    )
    def test_one_error_and_no_page_of_usage(self, cheap: Refused, options: list[str], message: str) -> None:
        found = cheap(*options)
        assert found.startswith(message) or message in found
        assert len(found.splitlines()) <= 2
        assert "usage" not in found

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["prune", "model"], "arguments are required: --output-dir"),
            (["prune"], "the following arguments are required: MODEL"),
            (
                ["plan", "--pattern", "2:4", "model"],
                "put it first, before options that take several values\nsee",
            ),
            (["unpack"], "the following arguments are required: DIR\nsee optima unpack --help"),
            (["prun", "model"], "invalid choice: 'prun'"),
        ],
        ids=str,
    )
    def test_what_is_missing(self, cheap: Refused, arguments: list[str], message: str) -> None:
        assert message in cheap(arguments=arguments)

    def test_a_selector_of_ones_own_runs_only_if_trusted(self, cheap: Refused, root: Path) -> None:
        (root / "evil.py").write_text("raise SystemExit('the code ran')")
        (root / "run.yaml").write_text("selector: evil:Mine")
        assert "runs code: if you trust it, add --trust-remote-code" in cheap("--recipe", "run.yaml")
        with pytest.raises(SystemExit, match="the code ran"):
            main(prune_arguments("--recipe", "run.yaml", "--trust-remote-code"))

    def test_python_only(self, root: Path) -> None:
        with pytest.raises(RecipeError, match="output_dir is missing"):
            prune("model")


class TestWeights:
    def test_garbage(self, cheap: Refused) -> None:
        assert cheap().startswith("model/model.safetensors cannot be opened")

    def test_a_shard_is_missing(self, late: Refused, root: Path) -> None:
        make_llama().save_pretrained(root / "sharded", max_shard_size="20KB")
        make_tokenizer().save_pretrained(root / "sharded")
        shards = sorted((root / "sharded").glob("*.safetensors"))
        assert len(shards) > 1
        shards[1].unlink()
        assert late(model="sharded").startswith("the weights of sharded cannot be read")

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
    def test_a_weight_is_missing(self, late: Refused, root: Path, name: str) -> None:
        edit_weights(root, lambda tensors: tensors.pop(name))
        assert f"the checkpoint model lacks weights of LlamaForCausalLM ({name})" in late()

    def test_weights_that_have_no_place(self, late: Refused, root: Path) -> None:
        """Without the name of its class a model loses its head, which must not happen in silence."""
        edit_config(root, architectures=None)
        message = late()
        assert "model has weights that LlamaModel has no place for (lm_head.weight): name its architecture" in message

    def test_extra_weights_are_left_out_and_said(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        edit_weights(root, lambda tensors: tensors.update(extra=torch.zeros(3)))
        assert main(prune_arguments()) == 0
        assert "has no place for (extra): they are left out" in caplog.text

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_codes_that_the_configuration_does_not_name(self, late: Refused, root: Path, dtype: torch.dtype) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        edit_weights(root, lambda tensors: tensors.update({name: tensors[name].mul(50).to(dtype)}))
        assert f"model is quantized ({name} is {str(dtype).removeprefix('torch.')}): prune the unquantized" in late()

    def test_biases_that_the_configuration_denies(self, root: Path) -> None:
        edit_weights(root, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
        assert main(prune_arguments()) == 0
        notes = load_report(root / "out").run.notes
        assert any("has no place for (model.layers.0.self_attn.q_proj.bias): they are not in" in note for note in notes)

    def test_wrong_shape(self, late: Refused, root: Path) -> None:
        edit_config(root, intermediate_size=40)
        message = late()
        assert "layers.0.mlp.down_proj.weight of model is of shape (32, 48), and by config.json of (32, 40)" in message
        assert late(arguments=["eval", "model", "--dataset", "text.txt", "--max-seq-length", "16"]) == message

    def test_encoder_without_its_pooler_is_complete(self, root: Path) -> None:
        bert = make_bert()
        save_model(root / "bert", bert, "bert")
        tensors = {name: t for name, t in bert.state_dict().items() if "pooler" not in name}
        save_file(tensors, root / "bert" / WEIGHTS, metadata={"format": "pt"})
        assert main(prune_arguments(model="bert")) == 0

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
    def test_bad_weight_names_the_linear(self, late: Refused, root: Path, bad: float) -> None:
        name = "model.layers.1.mlp.up_proj"
        edit_weights(root, lambda tensors: tensors[f"{name}.weight"][3].fill_(bad))
        assert f"model/model.safetensors: tensor {name}.weight has NaN or Inf" in late()

    @pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
    def test_bad_weight_outside_the_blocks(self, late: Refused, root: Path, name: str) -> None:
        edit_weights(root, lambda tensors: tensors[name][3].fill_(torch.nan))
        assert f"model/model.safetensors: tensor {name} has NaN or Inf" in late()

    def test_overflow_names_the_linear(self, late: Refused, root: Path) -> None:
        edit_weights(root, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e30))
        assert "the inputs of model.layers.0.mlp.down_proj contain NaN or Inf" in late()

    def test_bad_embedding_names_the_linear_that_reads_it(self, late: Refused, root: Path) -> None:
        tokenizer = make_tokenizer()
        (bad,) = tokenizer("~", add_special_tokens=False)["input_ids"]
        (plain,) = tokenizer("Q", add_special_tokens=False)["input_ids"]
        assert plain != bad
        # Windows of a BOS and 15 tokens; 35 is in the third, in the second batch of two.
        save_text(root / "text.txt", "Q" * 35 + "~" + "Q" * 100)
        edit_weights(root, lambda tensors: tensors["model.embed_tokens.weight"][bad].fill_(torch.nan))
        message = late("--num-calibration-samples", "5")
        assert "the inputs of model.layers.0.self_attn.q_proj contain NaN or Inf" in message


def edit_weights(root: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(root / "model" / WEIGHTS)
    edit(tensors)
    save_file(tensors, root / "model" / WEIGHTS, metadata={"format": "pt"})


class TestOtherCommands:
    def test_plan(self, cheap: Refused) -> None:
        assert "there is no directory ./missing" in cheap(arguments=["plan", "./missing"])
        assert f"exceed the {POSITIONS} positions of LlamaForCausalLM" in cheap(arguments=["plan", "model"])
        options = ["--max-seq-length", "16", "--targets", "nothing"]
        assert "no linear matches" in cheap(arguments=["plan", "model", *options])

    def test_report(self, cheap: Refused) -> None:
        assert "cannot read model/report.json" in cheap(arguments=["report", "model"])
        assert "cannot read text.txt" in cheap(arguments=["report", "text.txt"])


def test_arguments_of_other_types() -> None:
    def refused(message: str, **given: object) -> None:
        with pytest.raises(OptimaError, match=message):
            prune(make_llama(), Recipe(), **({"calibration": make_tokens()} | given))  # type: ignore[arg-type]

    refused("tokenizer must be one of transformers, got int", tokenizer=5)
    refused("output_dir must be a path, got int", output_dir=5)
    refused("calibration must be token ids", calibration=make_tokens() > 100)
    refused("whole numbers", calibration=[make_tokens() > 100])
    with pytest.raises(ModelError, match="has zeros to hold"):
        hold_zeros(make_llama(), {})
    with pytest.raises(RecipeError, match="must be a bool tensor"):
        hold_zeros(make_llama(), {"model.layers.0.mlp.up_proj": torch.ones(48, 32, dtype=torch.bool).numpy()})  # type: ignore[dict-item]


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "cut"])
def test_a_shard_that_went_away_while_the_run_went_on(root: Path, gone: bool) -> None:
    class Cleaner(Callback):
        def on_block(self, done: BlockDone) -> None:
            for shard in Path(".out.optima-partial/model").glob("*.safetensors"):
                shard.unlink() if gone else os.truncate(shard, shard.stat().st_size - 100)

    recipe = Recipe(selector="wanda", solver="none", objective="plain", num_calibration_samples=4, max_seq_length=16)
    with pytest.raises(ModelError, match="is gone or damaged: start it again with --resume"):
        prune("model", recipe.replace(dataset=["text.txt"]), output_dir="out", callbacks=[Cleaner()])
    assert not Path("out").exists()
    prune("model", recipe.replace(dataset=["text.txt"]), output_dir="out", resume=True)
    assert load_report("out").sparsity == pytest.approx(0.5, abs=1e-3)
