"""config.json as releases before transformers 5 read it: what rotary embeddings and the dtype are called there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import make_bert, make_llama, save_model

from optima.models.source import find_source
from optima.models.writer import prepare

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def written(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def test_the_sources_own_are_kept(tmp_path: Path, out: Path) -> None:
    source = save_model(tmp_path / "model")
    old = written(source)
    del old["rope_parameters"], old["dtype"]
    old |= {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(old))
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype="bfloat16")
    prepare(model, None, find_source(str(source)), out)
    new = written(out)
    assert {key: new[key] for key in ("rope_theta", "rope_scaling")} == {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    assert new["torch_dtype"] == new["dtype"] == "bfloat16"
    read = transformers.AutoConfig.from_pretrained(out)
    assert read.rope_parameters == model.config.rope_parameters == LLAMA3 | {"rope_theta": 500000.0}


def test_inside_a_model_that_sees(tmp_path: Path, out: Path) -> None:
    """Names of its own, for layers of two kinds."""
    text = transformers.Gemma3TextConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=48
    )
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision)
    config.save_pretrained(tmp_path)
    old = written(tmp_path)
    del old["text_config"]["rope_parameters"]
    names = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    old["text_config"] |= names
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").touch()
    config = transformers.Gemma3Config.from_pretrained(tmp_path)
    prepare(transformers.Gemma3ForConditionalGeneration(config), None, find_source(str(tmp_path)), out)
    new = written(out)["text_config"]
    assert {key: new[key] for key in names} == names
    read = transformers.Gemma3Config.from_pretrained(out).text_config
    assert read.rope_parameters == config.text_config.rope_parameters


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3])
def test_of_a_model_in_memory_they_are_derived(out: Path, rope: dict[str, Any]) -> None:
    model = make_llama(rope_parameters=rope | {"rope_theta": 1e6})
    prepare(model, None, None, out)
    new = written(out)
    assert new["rope_theta"] == 1e6
    assert new["torch_dtype"] == new["dtype"]
    assert new.get("rope_scaling") == (rope if rope is LLAMA3 else None)
    assert transformers.AutoConfig.from_pretrained(out).rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 8.0}])
def test_of_layers_of_two_kinds_in_memory(out: Path, rope: dict[str, Any] | None, caplog: Any) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    layers: dict[str, Any] = {"vocab_size": 300, "num_hidden_layers": 2}
    names = {"rope_theta": 5e5, "rope_local_base_freq": 2e4}
    config = transformers.Gemma3TextConfig(**sizes, **layers, **names, head_dim=8, rope_scaling=rope)
    prepare(transformers.Gemma3ForCausalLM(config), None, None, out)
    new = written(out)
    assert {key: new[key] for key in names} == names
    assert new.get("rope_scaling") == rope
    assert transformers.Gemma3TextConfig.from_pretrained(out).rope_parameters == config.rope_parameters
    assert not caplog.text
    bert = transformers.ModernBertConfig(**sizes, **layers, pad_token_id=0)
    prepare(transformers.ModernBertForMaskedLM(bert), None, None, out)
    assert "rope_theta" not in written(out)
    assert "older ones read them wrongly" in caplog.text
    caplog.clear()
    bert.save_pretrained(out)
    older = written(out) | {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (out / "model.safetensors").touch()
    (out / "new").mkdir()
    for published in (older, {key: value for key, value in older.items() if key != "rope_parameters"}, written(out)):
        (out / "config.json").write_text(json.dumps(published))
        prepare(transformers.ModernBertForMaskedLM(bert), None, find_source(str(out)), out / "new")
        assert ("local_rope_theta" in written(out / "new")) is (published.keys() >= older.keys() - {"rope_parameters"})
    assert not caplog.text, "the source has others, or none either"


def test_what_would_be_read_as_another_model_is_left_out(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("optima.models.older_names.with_older", lambda saved, raw: saved | {"rope_scaling": LLAMA3})
    prepare(make_llama(), None, None, out)
    assert "rope_scaling" not in written(out)
    assert "older ones read them wrongly" in caplog.text


def test_a_flat_source_whose_text_is_written_apart(tmp_path: Path, out: Path) -> None:
    """Qwen2.5-VL as it is published, with a longer context as its authors advise."""
    text = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    scaling = {"type": "yarn", "mrope_section": [1, 1, 2], "factor": 4, "original_max_position_embeddings": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    raw = text | {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    raw |= {"rope_theta": 1e6, "rope_scaling": scaling, "torch_dtype": "float32", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").touch()
    config = transformers.Qwen2_5_VLConfig.from_pretrained(tmp_path)
    prepare(transformers.Qwen2_5_VLForConditionalGeneration(config), None, find_source(str(tmp_path)), out)
    new = written(out)
    assert "rope_theta" not in new
    assert new["torch_dtype"] == "float32"
    assert new["text_config"]["rope_theta"] == 1e6
    assert new["text_config"]["rope_scaling"]["mrope_section"] == [1, 1, 2]
    read = transformers.Qwen2_5_VLConfig.from_pretrained(out).text_config
    assert read.rope_parameters == config.text_config.rope_parameters


def test_without_rotary_embeddings_nothing_is_added(out: Path) -> None:
    prepare(make_bert(), None, None, out)
    assert not [key for key in written(out) if "rope" in key]
