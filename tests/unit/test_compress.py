"""Compressed checkpoints: every bit comes back, sizes are as computed, damage is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import blocks_of, make_llama, save_model, snapshot
from torch import Tensor

import optima
from optima.cli import main
from optima.errors import ModelError

PAGE = Path(__file__).parents[2] / "docs" / "compress.md"


def sparse(*shape: int, kept: float = 0.5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    survives = torch.rand(shape, generator=generator) < kept
    return torch.where(survives, torch.randn(shape, generator=generator), 0.0).to(dtype)


def odd_tensors() -> dict[str, Tensor]:
    """Every bit pattern of bfloat16 is among them, negative zero and every NaN too, and as many zeros."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    every = np.arange(-(2**15), 2**16, dtype=np.int32).clip(0).astype(np.uint16)
    return {f"sparse.{dtype}": sparse(7, 13, kept=0.3, dtype=dtype) for dtype in dtypes} | {
        "all": torch.from_numpy(every).view(torch.bfloat16),
        "dense": torch.randn(11, 9, dtype=torch.bfloat16),
        "zero": torch.zeros(5, 5),
        "negative": -torch.zeros(6, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "ünïcode": sparse(9),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded sparse checkpoint with a directory of its own inside."""
    network = make_llama().bfloat16()
    for block in blocks_of(network):
        for linear in block.linears:
            linear.write(sparse(*linear.shape))
    directory = tmp_path / "model"
    network.save_pretrained(directory, max_shard_size="30KB")
    (directory / "1_Dense").mkdir()
    save_file({"linear": sparse(4, 4)}, directory / "1_Dense" / "model.safetensors")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def one_file(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint of one file; returns the file."""
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt", "by": "nobody"})
    return directory / "model.safetensors"


def test_every_file_of_a_checkpoint_comes_back(model: Path) -> None:
    before = snapshot(model)
    done = optima.compress(model)
    assert done.path == model.with_name("model-compressed")
    assert done.after == sum(file.stat().st_size for file in done.path.glob("*.compressed.safetensors"))
    again = optima.restore(done.path)
    assert (again.before, again.after) == (done.after, done.before)
    assert snapshot(again.path) == snapshot(model) == before


def test_every_bit_comes_back_and_to_the_reader_of_the_docs(tmp_path: Path) -> None:
    original = one_file(tmp_path / "odd", odd_tensors())
    optima.compress(tmp_path / "odd", tmp_path / "small")
    optima.restore(tmp_path / "small", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == original.read_bytes()
    (code,) = re.findall(r"^```python\n(import hashlib\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    reader: dict[str, Callable[[Path], bytes]] = {}
    exec(code, reader)
    assert "optima" not in code
    assert reader["restore"](tmp_path / "small" / "model.compressed.safetensors") == original.read_bytes()


def test_a_bit_a_weight_and_the_kept_weights_are_stored(tmp_path: Path) -> None:
    one_file(tmp_path / "model", {"pruned": sparse(256, 256, kept=0.3)})
    done = optima.compress(tmp_path / "model")
    assert done.after / done.before == pytest.approx(0.3 + 1 / 16, abs=0.01)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    original = one_file(tmp_path / "odd", {"first": sparse(8, 24), "second": sparse(40)}).read_bytes()
    optima.compress(tmp_path / "odd", tmp_path / "small")
    file = tmp_path / "small" / "model.compressed.safetensors"
    whole, refused = file.read_bytes(), 0
    for position in range(0, len(whole), 29):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        again = tmp_path / f"again{position}"
        try:
            optima.restore(file.parent, again)
        except ModelError:
            refused += 1
        else:
            assert (again / "model.safetensors").read_bytes() == original, position
    assert refused > 0.9 * len(whole) / 29


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    assert main(["compress", "model"]) == 0
    said = capsys.readouterr().out
    assert " MB -> " in said
    assert said.endswith(f"{tmp_path / 'model-compressed'}\n")
    assert main(["restore", "model-compressed", "--output-dir", "again"]) == 0
    assert Path("again/model.safetensors").read_bytes() == Path("model/model.safetensors").read_bytes()


def test_what_cannot_be_converted_is_refused(model: Path, tmp_path: Path) -> None:
    def refused(call: Callable[..., object], *arguments: Path, match: str) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(ModelError, match=match):
            call(*arguments)
        assert snapshot(tmp_path) == before

    refused(optima.compress, tmp_path / "nowhere", match="there is no directory .*nowhere")
    refused(optima.restore, model, match="holds no .compressed.safetensors files")
    small = optima.compress(model).path
    refused(optima.compress, model, match="model-compressed exists")
    refused(optima.compress, small, match="is compressed already: restore it")
    for directory, call in ((model, optima.compress), (small, optima.restore)):
        shard = sorted(directory.glob("*.safetensors"))[1]
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1])
        refused(call, directory, tmp_path / "out", match=shard.name)
        shard.unlink()
        refused(call, directory, tmp_path / "out", match=shard.name)


@pytest.mark.parametrize("aim", ["..", "../model", "../../elsewhere", "link"])
def test_links_to_other_places_are_refused(aim: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("secret")
    link = model / "1_Dense" / "link"
    link.symlink_to(aim)
    with pytest.raises(ModelError, match=f"{link} is a link"):
        optima.compress(model)
    assert not (tmp_path / "model-compressed").exists()


def test_a_snapshot_of_the_hubs_cache_consists_of_links(model: Path, tmp_path: Path) -> None:
    before, snapshots, blobs = snapshot(model), tmp_path / "snapshots" / "commit", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(file for file in sorted(model.rglob("*")) if file.is_file()):
        link = snapshots / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    small = optima.compress(snapshots, tmp_path / "small").path
    assert snapshot(optima.restore(small).path) == before


def test_exchanged_shards_are_refused(model: Path) -> None:
    for directory, call in ((optima.compress(model).path, optima.restore), (model, optima.compress)):
        first, second = sorted(directory.glob("model-*.safetensors"))[:2]
        contents = first.read_bytes(), second.read_bytes()
        second.write_bytes(contents[0])
        first.write_bytes(contents[1])
        with pytest.raises(ModelError, match=first.name):
            call(directory, model.with_name("out"))
