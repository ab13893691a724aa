"""Which linears can run on sparse tensor cores, and what is refused without them."""

from __future__ import annotations

import families
import pytest
import torch
from tiny import make_llama
from torch import nn

import optima
from optima.errors import ModelError
from optima.extras.semi_structured import accelerate, is_two_of_four, why_not


def two_of_four(outputs: int = 32, inputs: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight_OD = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight_OD[:, 0::4] = 0
    weight_OD[:, 3::4] = 0
    return weight_OD


class TestWhichLinears:
    def test_what_fits(self) -> None:
        assert why_not(two_of_four()) is None
        assert why_not(two_of_four(64, 192, torch.float16)) is None

    @pytest.mark.parametrize(
        ("weight_OD", "reason"),
        [
            (two_of_four(dtype=torch.float32), "is torch.float32"),
            (two_of_four(16, 64), "is 16 x 64"),
            (two_of_four(32, 96), "is 32 x 96"),
            (torch.ones(32, 64, dtype=torch.bfloat16), "is not 2:4"),
        ],
    )
    def test_what_does_not(self, weight_OD: torch.Tensor, reason: str) -> None:
        assert str(why_not(weight_OD)).startswith(reason)

    def test_one_weight_too_many(self) -> None:
        weight_OD = two_of_four()
        assert is_two_of_four(weight_OD)
        weight_OD[17, 8] = 1.0
        assert not is_two_of_four(weight_OD)
        assert not is_two_of_four(torch.zeros(2, 6))
        assert is_two_of_four(torch.zeros(2, 8))


class TestWithoutTheDevice:
    def test_a_model_on_the_cpu_is_refused_and_stays_as_it_is(self) -> None:
        model = make_llama()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ModelError, match="sparse tensor cores are on a CUDA device and the model is on cpu"):
            optima.accelerate(model)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_an_old_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Old")
        with pytest.raises(ModelError, match=r"Old has compute capability 7\.5"):
            accelerate(_OnCuda(nn.Linear(64, 32)))

    def test_experts_in_one_parameter_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("optima.extras.semi_structured.check_device", lambda parameter: None)
        monkeypatch.setattr("optima.extras.semi_structured.to_sparse_semi_structured", lambda weight_OD: -weight_OD)
        model = families.build("qwen3_moe").bfloat16()
        with pytest.raises(ModelError, match=r"the kernels take multiples .*experts.* is no nn.Linear"):
            accelerate(model)
        model.lm_head.weight = nn.Parameter(two_of_four(64, 64))
        done = accelerate(model)
        assert done.linears == ("lm_head",)
        assert sum("experts" in name for name in done.skipped) > 2

    def test_only_what_fits_is_converted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("optima.extras.semi_structured.check_device", lambda parameter: None)
        monkeypatch.setattr("optima.extras.semi_structured.to_sparse_semi_structured", lambda weight_OD: -weight_OD)
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(64, 64)).bfloat16()
        model[0].weight = nn.Parameter(two_of_four())
        done = accelerate(model)
        assert done.linears == ("0",)
        assert done.skipped.keys() == {"1", "2"}
        assert torch.equal(model[0].weight, -two_of_four())
        assert not model[0].weight.requires_grad
        assert str(done) == "1 linears on sparse tensor cores, 2 stay dense"


class _OnCuda(nn.Module):
    """Says that its weights are there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
        yield type("Parameter", (), {"device": torch.device("cuda", 0)})()
