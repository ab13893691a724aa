"""Packed checkpoints: every bit comes back, sizes are as computed, damage is refused, memory stays flat."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import blocks_of, make_llama, save_model, snapshot
from torch import Tensor
from transformers import AutoModelForCausalLM

import optima
from optima.cli import main
from optima.errors import ModelError

PAGE = Path(__file__).parents[2] / "docs" / "packing.md"


def sparse(*shape: int, kept: float = 0.5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    survives = torch.rand(shape, generator=generator) < kept
    return torch.where(survives, torch.randn(shape, generator=generator), 0.0).to(dtype)


def every_bfloat16() -> Tensor:
    """All bit patterns, negative zero and every NaN among them, and as many zeros."""
    return torch.from_numpy(np.arange(-(2**15), 2**16, dtype=np.int32).clip(0).astype(np.uint16)).view(torch.bfloat16)


def odd_tensors() -> dict[str, Tensor]:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    tensors = {f"sparse.{dtype}": sparse(7, 13, kept=0.3, dtype=dtype) for dtype in dtypes}
    return tensors | {
        "all": every_bfloat16(),
        "dense": torch.randn(11, 9, dtype=torch.bfloat16),
        "random": torch.arange(-300, 300, dtype=torch.int16).view(torch.bfloat16),
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


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A packed checkpoint of one small file."""
    (tmp_path / "odd").mkdir()
    save_file({"first": sparse(8, 24), "second": sparse(40)}, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    optima.pack(tmp_path / "odd", tmp_path / "packed")
    return tmp_path / "packed" / "model.packed.safetensors"


def test_every_file_of_a_checkpoint_comes_back(model: Path) -> None:
    before = snapshot(model)
    size = optima.pack(model)
    packed = model.with_name("model-packed")
    assert size.sparse == 2 * 7
    assert size.after == sum(file.stat().st_size for file in packed.glob("*.packed.safetensors"))
    assert optima.unpack(packed) == size.before
    optima.pack(model, overwrite=True)
    unpacked = snapshot(packed.with_name("model-packed-unpacked"))
    unpacked.pop(".optima.json")
    assert unpacked == snapshot(model) == before


def test_every_bit_comes_back_and_to_the_reader_of_the_docs(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    original = tmp_path / "odd" / "model.safetensors"
    save_file(odd_tensors(), original, {"format": "pt", "by": "nobody"})
    optima.pack(tmp_path / "odd", tmp_path / "packed")
    optima.unpack(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == original.read_bytes()
    (code,) = re.findall(r"^```python\n(import hashlib\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    reader: dict[str, Callable[[Path], bytes]] = {}
    exec(code, reader)
    assert "optima" not in code
    assert reader["restore"](tmp_path / "packed" / "model.packed.safetensors") == original.read_bytes()


@pytest.mark.parametrize(("kept", "share"), [(0.5, 0.5625), (0.3, 0.3625)])
def test_sizes_are_as_computed(tmp_path: Path, kept: float, share: float) -> None:
    (tmp_path / "model").mkdir()
    tensor = sparse(256, 256, kept=kept)
    save_file({"pruned": tensor, "dense": torch.ones(256, 256)}, tmp_path / "model" / "model.safetensors")
    size = optima.pack(tmp_path / "model")
    assert size.sparse == 1
    assert size.sparse_before == 2 * tensor.numel()
    assert size.sparse_after == tensor.numel() // 8 + 2 * int((tensor != 0).sum())
    assert size.sparse_after / size.sparse_before == pytest.approx(share, abs=0.01)


def test_a_flipped_bit_is_refused_or_changes_nothing(packed: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    original = (tmp_path / "odd" / "model.safetensors").read_bytes()
    refused = 0
    for position in range(0, len(whole), 29):
        packed.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        again = tmp_path / f"again{position}"
        try:
            optima.unpack(packed.parent, again)
        except ModelError:
            refused += 1
        else:
            assert (again / "model.safetensors").read_bytes() == original, position
    assert refused > 0.9 * len(whole) / 29


@pytest.mark.parametrize("length", [5, -1])
def test_a_file_cut_short_is_refused(packed: Path, tmp_path: Path, length: int) -> None:
    packed.write_bytes(packed.read_bytes()[:length])
    before = snapshot(tmp_path)
    with pytest.raises(ModelError, match=r"model\.packed\.safetensors is no whole safetensors file"):
        optima.unpack(packed.parent, tmp_path / "again")
    assert snapshot(tmp_path) == before


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    assert main(["pack", "model"]) == 0
    said = capsys.readouterr().out
    assert " MB -> " in said
    assert said.endswith(f"{tmp_path / 'model-packed'}\n")
    assert main(["unpack", "model-packed", "--output-dir", "again"]) == 0
    assert "every checksum right: again" in capsys.readouterr().out
    Path("link").symlink_to("model")
    assert main(["pack", "link"]) == 0
    assert Path("link-packed").is_dir()
    AutoModelForCausalLM.from_pretrained("again")


def test_what_cannot_be_packed_is_refused(model: Path, tmp_path: Path) -> None:
    def refused(call: Callable[..., object], *arguments: Path, match: str) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(ModelError, match=match):
            call(*arguments)
        assert snapshot(tmp_path) == before

    refused(optima.pack, tmp_path / "nowhere", match="nowhere holds no .safetensors files")
    refused(optima.unpack, model, match="holds no .packed.safetensors files")
    refused(optima.pack, model, model / "inside", match="is inside .*, which is read")
    optima.pack(model)
    refused(optima.pack, model, match="model-packed exists")
    refused(optima.pack, tmp_path / "model-packed", match="is packed already: unpack it")
    (tmp_path / "parts").mkdir()
    save_file({"a": torch.ones(2), "a.values": torch.ones(2)}, tmp_path / "parts" / "model.safetensors")
    refused(optima.pack, tmp_path / "parts", match=r"a\.values is called like a part of a packed tensor")
    (tmp_path / "parts" / "model.safetensors").write_bytes(b"garbage")
    refused(optima.pack, tmp_path / "parts", match="is no whole safetensors file")


def test_a_checkpoint_that_lacks_a_shard_is_refused(model: Path, tmp_path: Path) -> None:
    optima.pack(model, tmp_path / "packed")
    for directory, call in ((model, optima.pack), (tmp_path / "packed", optima.unpack)):
        shard = sorted(directory.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(ModelError, match=rf"is not complete: .*index\.json names {shard.name}, which is not there"):
            call(directory, tmp_path / "out")
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        optima.pack(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "notes").symlink_to(tmp_path / "secret")
    for message in ("notes cannot be read: .* where its link leads", "notes is a link out of the checkpoint"):
        with pytest.raises(ModelError, match=message):
            optima.pack(model, tmp_path / "out")
        (tmp_path / "secret").touch()
    assert not (tmp_path / "out").exists()


def test_exchanged_shards_are_refused(model: Path, tmp_path: Path) -> None:
    optima.pack(model, tmp_path / "packed")
    first, second, *_ = sorted((tmp_path / "packed").glob("*.packed.safetensors"))
    (aside := tmp_path / "aside").write_bytes(first.read_bytes())
    second.rename(first)
    aside.rename(second)
    with pytest.raises(ModelError, match="where the index has it"):
        optima.unpack(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()
