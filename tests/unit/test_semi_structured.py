"""Which linears can run on sparse tensor cores, and what is refused without them."""

from __future__ import annotations

import pytest
import torch
from tiny import make_llama
from torch import nn

import optima
from optima.errors import ModelError
from optima.extras.semi_structured import check_device, is_two_of_four


def two_of_four(outputs: int = 32, inputs: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight_OD = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight_OD[:, 0::4] = 0
    weight_OD[:, 3::4] = 0
    return weight_OD


def test_one_weight_too_many() -> None:
    weight_OD = two_of_four()
    assert is_two_of_four(weight_OD)
    weight_OD[17, 8] = 1.0
    assert not is_two_of_four(weight_OD)
    assert not is_two_of_four(torch.zeros(2, 6))


def test_a_model_on_the_cpu_is_refused_and_stays_as_it_is() -> None:
    model = make_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="the model is on cpu"):
        optima.accelerate(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Old")
    with pytest.raises(ModelError, match="Old has no sparse tensor cores"):
        check_device(torch.device("cuda", 0))


def test_only_what_fits_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.extras.semi_structured.check_device", lambda device: None)
    monkeypatch.setattr("optima.extras.semi_structured.to_sparse_semi_structured", lambda weight_OD: -weight_OD)
    weights = [two_of_four(*options) for options in ((), (32, 64, torch.float32), (16, 64), (32, 96))]
    weights.append(torch.ones(32, 64, dtype=torch.bfloat16))
    model = nn.Sequential(*(nn.Linear(*reversed(weight_OD.shape), bias=False) for weight_OD in weights))
    for linear, weight_OD in zip(model, weights, strict=True):
        linear.weight = nn.Parameter(weight_OD)
    done = optima.accelerate(model)
    assert done.linears == ("0",)
    reasons = ["load the model in bfloat16", "16 x 64", "32 x 96", "not 2:4"]
    assert all(part in reason for part, reason in zip(reasons, done.skipped.values(), strict=True))
    assert torch.equal(model[0].weight, -two_of_four())
    with pytest.raises(ModelError, match="no linear of this Sequential can run"):
        optima.accelerate(model[1:])
