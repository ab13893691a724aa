"""The shards hold what transformers itself would have written, whatever order the blocks come in."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny import blocks_of, load_weights, make_tokenizer, save_model
from transformers import PreTrainedModel

from optima.checkpointing import Journal
from optima.models.load import find_source
from optima.models.save import Writer, prepare

MODELS = ["llama tied", "mixtral", "deepseek_v3", "qwen3_moe", "gpt2", "bert", "gemma3_vision"]


def begun(directory: Path) -> Journal:
    journal = Journal(directory / "journal.jsonl")
    journal.begin({})
    return journal


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    family, *tied = name.split()
    return families.build(family, **({"tie_word_embeddings": True} if tied else {})).to(dtype)


def write(model: PreTrainedModel, directory: Path, committed: int | None = None) -> Writer:
    """Commit the first blocks, the last of them first, and publish."""
    (directory / "out").mkdir(parents=True)
    blocks = blocks_of(model)
    prepare(model, None, None, directory / "out")
    journal = begun(directory)
    writer = Writer(model, [block.name for block in blocks], directory / "out", journal)
    for block in blocks[:committed][::-1]:
        writer.commit(block.name, block.module.state_dict(prefix=f"{block.name}."), {"index": block.index})
    writer.publish()
    return writer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_names_and_bits_are_those_of_transformers(tmp_path: Path, name: str, loaded: bool) -> None:
    """And what was committed can be read back."""
    model = build(name, torch.bfloat16)
    if loaded:
        model.save_pretrained(tmp_path / "source")
        model = type(model).from_pretrained(tmp_path / "source", dtype="auto").eval()
    model.save_pretrained(tmp_path / "whole")
    write(model, tmp_path)
    found, expected = load_weights(tmp_path / "out"), load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)
    for file in ("config.json", "generation_config.json"):
        if (tmp_path / "whole" / file).exists():
            ours, theirs = (json.loads((tmp_path / place / file).read_text()) for place in ("out", "whole"))
            assert ours == theirs
    writer = reopen(model, tmp_path)
    for block in blocks_of(model):
        state, read = block.module.state_dict(prefix=f"{block.name}."), writer.read(block.name)
        assert read.keys() == state.keys()
        assert all(read[key].dtype == state[key].dtype and read[key].equal(state[key]) for key in state)


def test_blocks_that_were_not_committed_are_written_at_the_end(tmp_path: Path) -> None:
    model = build("llama")
    writer = write(model, tmp_path, committed=1)
    assert set(writer.done) == {"model.layers.0"}
    found = load_weights(tmp_path / "out")
    assert found.keys() == model.state_dict().keys()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def reopen(model: PreTrainedModel, directory: Path) -> Writer:
    names = [block.name for block in blocks_of(model)]
    return Writer(model, names, directory / "out", begun(directory))


@pytest.mark.parametrize("damage", [b"", b"x"])
def test_a_second_writer_finds_what_is_whole(tmp_path: Path, damage: bytes) -> None:
    model = build("llama")
    write(model, tmp_path)
    # The last was committed first.
    first, *others = (block.name for block in blocks_of(model))
    assert list(reopen(model, tmp_path).done) == [*others[::-1], first]
    with (tmp_path / "journal.jsonl").open("a") as opened:
        opened.write('{"block": "torn')
    (shard,) = (tmp_path / "out").glob("model-00001-*")
    shard.write_bytes(damage * shard.stat().st_size)
    writer = reopen(model, tmp_path)
    assert list(writer.done) == others[::-1]
    assert shard.name in writer.notes[-1]
    assert reopen(model, tmp_path).notes == [*writer.notes, f"resumed after {others[0]}"]


class TestAuxiliaryFiles:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return save_model(tmp_path / "source")

    def copied(self, source: Path, trust: bool = False) -> set[str]:
        out = source.parent / "out"
        out.mkdir()
        prepare(build("llama"), make_tokenizer(), find_source(str(source), trust), out)
        return {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}

    def test_what_is_known_by_name(self, source: Path) -> None:
        known = {"LICENSE", "NOTICE.txt", "USE_POLICY.md", "tokenizer.model", "chat_template.jinja", "vocab.txt"}
        known |= {"1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool_use.jinja"}
        for name in known | {"preprocessor_config.json"}:
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_text("{}")
        others = ("train.json", "token.txt", "notes.py", ".hidden.json", "2_Dense/x.bin")
        for name in (*others, "additional_chat_templates/x.txt"):
            (source / name).write_text("x")
        (source / "checkpoint-5").mkdir()
        (source / "checkpoint-5" / "config.json").write_text("{}")
        own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        # The tokenizer has no template: the one copied stays.
        assert self.copied(source) == known | own | {"preprocessor_config.json"}

    def test_code_that_was_not_trusted_is_not_named(self, source: Path) -> None:
        """transformers has the class itself; where remote code is allowed it would look for that of the source."""
        code = {"AutoConfig": "mine.MineConfig", "AutoTokenizer": ["mine.Mine", None]}
        for name in ("config.json", "tokenizer_config.json"):
            content = json.loads((source / name).read_text())
            (source / name).write_text(json.dumps(content | {"auto_map": code}))
        model, out = hf.LlamaForCausalLM.from_pretrained(source), source.parent / "out"
        out.mkdir()
        prepare(model, hf.AutoTokenizer.from_pretrained(source), find_source(str(source)), out)
        assert not list(out.glob("*.py"))
        assert type(hf.AutoConfig.from_pretrained(out, trust_remote_code=True)) is hf.LlamaConfig
        assert hf.AutoTokenizer.from_pretrained(out, trust_remote_code=True)("a")["input_ids"]

    def test_custom_code_comes_only_if_trusted(self, tmp_path: Path) -> None:
        source = save_model(tmp_path / "source")
        (source / "mine.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
            "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
        )
        config = json.loads((source / "config.json").read_text())
        auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
        config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": auto_map}
        (source / "config.json").write_text(json.dumps(config))
        model = hf.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
        (tmp_path / "out").mkdir()
        prepare(model, None, find_source(str(source), True), tmp_path / "out")
        assert (tmp_path / "out" / "mine.py").exists()
        assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == auto_map
