"""What experiments/ holds does what it says, on models of a few thousand weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import load_weights, make_llama, make_tokens, save_model, save_text
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[2] / "experiments" / "permute_channels.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("permute_channels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def permuted(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    def permuted(model: Path, output: Path) -> None:
        options = ["--num-calibration-samples", "8", "--max-seq-length", "32"]
        text = str(save_text(tmp_path / "text.txt"))
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, str(model), str(output), "--calibration", text, *options])
        script.main()

    return permuted


def test_a_permuted_model_is_the_same_function_and_loses_less(
    permuted: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With grouped queries, and with biases, which move with their channels."""
    dense = make_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model, output = save_model(tmp_path / "model", dense), tmp_path / "permuted"
    permuted(model, output)
    left = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if "2:4 loses" in line]
    assert len(left) == 4  # an MLP and an attention in each of two blocks
    assert max(left) <= 1.0, left
    assert min(left) < 0.95, left
    tokens = make_tokens()
    with torch.no_grad():
        before, after = dense(tokens).logits, AutoModelForCausalLM.from_pretrained(output)(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    old, new = load_weights(model), load_weights(output)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name.split(".")[-2] for name in changed} == {"gate_proj", "up_proj", "down_proj", "v_proj", "o_proj"}
    permuted(model, tmp_path / "again")
    assert all(torch.equal(new[name], tensor) for name, tensor in load_weights(tmp_path / "again").items())


def test_an_output_is_not_overwritten(
    permuted: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(SystemExit):
        permuted(model, model)
    assert "exists: name a directory that does not" in capsys.readouterr().err


def test_channels_that_matter_are_spread_over_groups(script: ModuleType) -> None:
    """Half of all channels matter, in whole groups: in a better order nothing is lost."""
    worth_RC = torch.zeros(3, 16)
    worth_RC[:, :8] = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) + 1.0
    order_C = script.order(worth_RC, 10, torch.Generator().manual_seed(0))
    assert order_C.sort().values.tolist() == list(range(16))
    assert float(script.lost(worth_RC[:, order_C].unflatten(1, (-1, 4))).sum()) == 0.0


def test_lost_is_the_sum_of_the_two_smallest(script: ModuleType) -> None:
    worth = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(script.lost(worth), worth.sort(dim=1).values[:, :2].sum(dim=1))


def test_order_loses_no_more_the_longer_it_looks(script: ModuleType) -> None:
    worth_RC = torch.rand(20, 32, generator=torch.Generator().manual_seed(1)).square()
    lost = [
        float(
            script.lost(
                worth_RC[:, script.order(worth_RC, sweeps, torch.Generator().manual_seed(2))].unflatten(1, (-1, 4))
            ).sum()
        )
        for sweeps in (0, 5, 50)
    ]
    assert lost[0] > lost[1] > lost[2], lost
