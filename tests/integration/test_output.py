"""Nothing half-written: a disk that fills up, an output that cannot be had."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
from runs import on_call, raising
from tiny import make_llama, make_tokenizer, make_tokens, prune_arguments, save_model, save_text, snapshot

import optima
from optima.checkpointing import Journal
from optima.cli import main
from optima.errors import ModelError


@pytest.mark.parametrize(
    ("target", "call", "blocks"),
    [
        ("shutil.copyfile", 1, 0),
        ("shutil.copyfile", 2, 0),  # the tokenizer's files
        ("transformers.PreTrainedModel.save_pretrained", 1, 0),  # the configuration
        ("transformers.PreTrainedModel.save_pretrained", 3, 1),
        ("transformers.PreTrainedModel.save_pretrained", 4, 2),  # outside the blocks
        ("optima.reporting.record.Report.save", 1, 2),
        ("optima.recipe.Recipe.save", 1, 2),
    ],
)
def test_a_full_disk_is_a_named_error_and_what_was_done_is_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, call: int, blocks: int
) -> None:
    (root / "model" / "LICENSE").write_text("terms")
    before = snapshot(root)
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(target, on_call(call, resolve_name(target), full))
    assert main(prune_arguments()) == 2
    message = capsys.readouterr().err
    for part in ("optima: error: writing ", "No space left on device", "free some space"):
        assert part in message
    if blocks:
        assert len(Journal(root / ".out.optima-partial" / "journal.jsonl").blocks) == blocks
        assert not (root / "out").exists()
    else:
        assert snapshot(root) == before


def test_a_generation_config_that_contradicts_itself(tmp_path: Path) -> None:
    """It is refused before the long work."""
    model = make_llama()
    assert model.generation_config is not None
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="GenerationConfig is invalid"):
        optima.prune(model, output_dir=tmp_path / "out", calibration=make_tokens())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_the_disk_needs_what_is_written_and_no_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in bfloat16 takes two bytes a weight, whatever its skeleton is made in."""
    model = make_llama().bfloat16()
    save_model(root / "half", model)
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    for free, code in ((0.99, 2), (1.2, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free * size))
        assert main(prune_arguments(model="half")) == code


def test_a_tokenizer_is_copied_as_it_is_where_text_is_read(tmp_path: Path) -> None:
    """What this release of transformers would write of it, others may not know. A caller's own is saved."""
    model, text = save_model(tmp_path / "model"), save_text(tmp_path / "text.txt")
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of": "an older release"}))
    recipe = optima.Recipe(
        selector="wanda", objective="plain", dataset=[str(text)], num_calibration_samples=4, max_seq_length=16
    )
    optima.prune(model, recipe, output_dir=tmp_path / "out", progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    optima.prune(model, recipe, output_dir=tmp_path / "own", tokenizer=make_tokenizer("none"), progress=False)
    assert (tmp_path / "own" / "tokenizer.json").read_bytes() != (model / "tokenizer.json").read_bytes()
