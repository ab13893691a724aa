"""Where a model comes from, which class it has, and what is damaged: one clear error, at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import save_file
from tiny import WEIGHTS, save_model

import optima
from optima.errors import ModelError
from optima.models.load import Source, dtype_as_read, find_source, load_model
from optima.models.masks import MaskFiles
from optima.models.offload import open_weights
from optima.plan import skeleton

INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def edit(model: Path, **values: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", ["../other/model.safetensors", ""])
def test_an_index_that_is_none(model: Path, name: str) -> None:
    save_model(model.parent / "other")
    (model / WEIGHTS).rename(model / SHARD)
    (model / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}} if name else []))
    with pytest.raises(ModelError, match=r"the weights of .* cannot be read"):
        load_model(find_source(str(model)))


CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class XConfig(PreTrainedConfig):
    model_type = "x"

class XModel(PreTrainedModel):
    config_class = XConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.post_init()

class XForMaskedLM(PreTrainedModel):
    config_class = XConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model, self.head = XModel(config), nn.Linear(4, 9)
        self.post_init()
"""


class TestRemoteCode:
    @pytest.fixture
    def trusted(self, tmp_path: Path) -> Callable[..., Source]:
        """A checkpoint with code of its own, and what its configuration says of it."""

        def make(architectures: list[str], **auto_map: str) -> Source:
            code = {auto: f"code.{name}" for auto, name in {"AutoConfig": "XConfig", **auto_map}.items()}
            config = {"model_type": "x", "architectures": architectures, "auto_map": code}
            (tmp_path / "config.json").write_text(json.dumps(config))
            (tmp_path / "code.py").write_text(CODE)
            rows = {"model.layers.0.0": 4, "model.layers.1.0": 4, "head": 9}
            weights = {f"{name}.weight": torch.ones(count, 4) for name, count in rows.items()}
            biases = {f"{name}.bias": torch.ones(count) for name, count in rows.items()}
            save_file(weights | biases, tmp_path / WEIGHTS, {"format": "pt"})
            return find_source(str(tmp_path), True)

        return make

    def test_the_head_that_the_checkpoint_was_saved_with_is_kept(self, trusted: Callable[..., Source]) -> None:
        source = trusted(["XForMaskedLM"], AutoModel="XModel", AutoModelForMaskedLM="XForMaskedLM")
        structure = skeleton(source)
        model, weights = open_weights(source, structure, "auto")
        with weights.state(["head.weight"]) as state:
            assert torch.equal(state["head.weight"], torch.ones(9, 4))
        assert type(model).__name__ == type(structure).__name__ == "XForMaskedLM"

    def test_of_a_configuration_that_the_library_has(self, model: Path) -> None:
        """Code that is not trusted is not looked at."""
        (model / "code.py").write_text("import transformers\nclass Mine(transformers.LlamaForCausalLM): ...\n")
        edit(model, auto_map={"AutoModelForCausalLM": "code.Mine"}, architectures=["Mine"])
        assert type(skeleton(find_source(str(model), True))).__name__ == "Mine"
        assert type(skeleton(find_source(str(model)))).__name__ == "LlamaForCausalLM"


class TestHub:
    """The cache of the hub's client, filled by a download of ours."""

    @pytest.fixture
    def asked(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        snapshot = model.parent / "models--a--b" / "snapshots" / "0123abc"
        snapshot.parent.mkdir(parents=True)
        model.rename(snapshot)
        asked: list[tuple[Any, ...]] = []

        def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append((repo, revision, allow_patterns))
            return str(snapshot)

        monkeypatch.setattr("optima.models.load.snapshot_download", download)
        return asked

    def test_a_revision_is_downloaded_and_its_commit_known(self, asked: list[tuple[Any, ...]]) -> None:
        source = find_source("a/b@v1")
        assert (source.repo, source.commit) == ("a/b", "0123abc")
        load_model(source)
        ((repo, revision, patterns), weights) = asked
        assert (repo, revision, weights) == ("a/b", "v1", ("a/b", "0123abc", [WEIGHTS]))
        assert not [pattern for pattern in patterns if fnmatchcase(WEIGHTS, pattern)]
        for name in ("LICENSE.txt", "1_Pooling/config.json"):
            assert any(fnmatchcase(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize("name", ["~nosuchuser/model", "a" * 300, "a\0b"])
def test_a_path_that_cannot_be(name: str) -> None:
    for use in (find_source, MaskFiles, optima.compress, optima.restore):
        with pytest.raises(ModelError, match="cannot be used"):
            use(name)


def test_a_class_in_another_spelling(tmp_path: Path) -> None:
    """As PhiMoE was published."""
    families.build("phimoe").save_pretrained(tmp_path)
    edit(tmp_path, architectures=["PhiMoEForCausalLM"])
    assert type(skeleton(find_source(str(tmp_path)))).__name__ == "PhimoeForCausalLM"


def test_parts_of_a_model_that_sees(tmp_path: Path) -> None:
    """The dtype may be that of the language part alone; either part may be quantized."""
    model = families.build("gemma3_vision")
    model.config.dtype, model.config.text_config.dtype = None, torch.bfloat16
    assert dtype_as_read(model.config, "auto") == torch.bfloat16
    assert dtype_as_read(model.config, "float32") == torch.float32
    model.save_pretrained(tmp_path)
    edit(tmp_path, text_config=model.config.text_config.to_dict() | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ModelError, match="is quantized: prune the unquantized checkpoint"):
        skeleton(find_source(str(tmp_path)))
