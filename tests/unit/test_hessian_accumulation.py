"""One Hessian for each distinct input, equal to X^T X / T of inputs captured independently."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from tiny import make_llama, make_tokens
from torch import Tensor, nn

from optima import Recipe, prune
from optima.calibration.statistics import HessianCollector, SharedInputs
from optima.errors import CalibrationError
from optima.models.stacks import Block, Linear, find_blocks, linears_of
from optima.qp import Hessian

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def captured_inputs(model: nn.Module, linears: tuple[Linear, ...], batches: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inputs of every linear over all batches, (T, D) float64."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for linear in linears:
        linear.module.register_forward_hook(
            lambda module, args, output, name=linear.name: seen[name].append(args[0].double().flatten(0, -2))
        )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    return {name: torch.cat(tensors) for name, tensors in seen.items()}


def collect(
    model: nn.Module, linears: tuple[Linear, ...], batches: tuple[Tensor, ...], sink_weight: float = 0.0
) -> list[tuple[Hessian | None, list[Linear]]]:
    collector = HessianCollector(linears, sink_weight)
    for batch in batches:
        with collector.batch(*batch.shape[:2]), torch.no_grad():
            model(batch)
    return list(collector.finish(damping=0.01))


def first_block() -> tuple[nn.Module, Block]:
    model = make_llama()
    return model, find_blocks(model)[0]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])  # 2 leaves a last batch of one
def test_equals_the_definition(batch_size: int) -> None:
    model, block = first_block()
    batches = make_tokens(5, 16).split(batch_size)
    collected = collect(model, block.linears, batches)
    assert [[linear.name.removeprefix(f"{block.name}.") for linear in linears] for _, linears in collected] == GROUPS
    inputs = captured_inputs(model, block.linears, batches)
    for hessian, linears in collected:
        assert hessian is not None
        assert hessian.requested_damping == 0.01
        for linear in linears:
            inputs_TD = inputs[linear.name]
            assert len(inputs_TD) == 5 * 16
            expected_DD = inputs_TD.T @ inputs_TD / len(inputs_TD)
            torch.testing.assert_close(hessian.matrix_DD, expected_DD, rtol=1e-5, atol=1e-6 * float(expected_DD.max()))


@pytest.mark.parametrize(
    ("sink_weight", "counts_as"), [(0.0, 1.0), (1 / 32, 1.0), (1 / 16, 1.0), (0.5, 8.0), (3, 48.0)]
)
def test_first_tokens_weigh_more(sink_weight: float, counts_as: float) -> None:
    model, block = first_block()
    batches = make_tokens(5, 16).split(2)
    inputs = captured_inputs(model, block.linears, batches)
    weight_T1 = torch.ones(5, 16, dtype=torch.float64)
    weight_T1[:, 0] = counts_as
    weight_T1 = weight_T1.reshape(-1, 1)
    for hessian, linears in collect(model, block.linears, batches, sink_weight):
        assert hessian is not None
        inputs_TD = inputs[linears[0].name]
        expected_DD = (weight_T1 * inputs_TD).T @ inputs_TD / weight_T1.sum()
        torch.testing.assert_close(hessian.matrix_DD, expected_DD, rtol=1e-5, atol=1e-6 * float(expected_DD.max()))


def test_first_tokens_of_flattened_inputs_are_found() -> None:
    """As in OPT, whose MLP is given (B * L, D)."""
    linear = Linear("x", nn.Linear(4, 2))
    inputs_BLD = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    hessians = []
    for inputs in (inputs_BLD, inputs_BLD.flatten(0, 1)):
        collector = HessianCollector([linear], sink_weight=1.0)
        with collector.batch(samples=3, length=5):
            linear.module(inputs)
        assert not collector.without_sinks
        hessians += [hessian for hessian, _ in collector.finish(0.01)]
    assert torch.equal(hessians[0].matrix_DD, hessians[1].matrix_DD)


def test_first_tokens_that_cannot_be_told_weigh_as_the_others_and_it_is_said() -> None:
    linear = Linear("block.expert", nn.Linear(4, 2))
    inputs_TD = torch.rand(7, 4, generator=torch.Generator().manual_seed(0))
    collector = HessianCollector([linear], sink_weight=1.0)
    with collector.batch(samples=2, length=6):
        linear.module(inputs_TD)
    assert collector.without_sinks == ["block.expert"]
    ((hessian, _),) = collector.finish(0.01)
    torch.testing.assert_close(hessian.matrix_DD, inputs_TD.double().mT @ inputs_TD.double() / 7, rtol=1e-5, atol=1e-6)


def test_only_the_linears_asked_for_are_observed() -> None:
    model, block = first_block()
    linears = tuple(linear for linear in block.linears if linear.name.endswith(("k_proj", "v_proj", "up_proj")))
    collected = collect(model, linears, make_tokens().split(2))
    assert [[linear.name[-6:] for linear in linears] for _, linears in collected] == [["k_proj", "v_proj"], ["p_proj"]]
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks are gone"


def test_hooks_are_gone_after_an_error() -> None:
    model, block = first_block()
    collector = HessianCollector(block.linears)
    with pytest.raises(KeyboardInterrupt), collector.batch(samples=1, length=2):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in model.modules())


class Widths(nn.Module):
    """Linears of one width whose inputs may or may not be the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.view, self.equal, self.other = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = nn.functional.one_hot(input_ids, 4).float()
        result = self.first(hidden) + self.same(hidden) + self.view(hidden[:]) + self.equal(hidden.clone())
        del hidden  # a new tensor may now take its place in memory
        return self.other(result * 2)


def test_the_same_tensor_is_shared_and_an_equal_one_is_not() -> None:
    model = Widths()
    batches = torch.randint(4, (6, 3), generator=torch.Generator().manual_seed(0)).split(4)
    collected = collect(model, tuple(linears_of(model, "m")), batches)
    assert [[linear.name for linear in linears] for _, linears in collected] == [
        ["m.first", "m.same", "m.view"],
        ["m.equal"],
        ["m.other"],
    ]
    first, equal, other = (hessian for hessian, _ in collected)
    assert first is not None
    assert equal is not None
    assert other is not None
    assert torch.equal(first.matrix_DD, equal.matrix_DD)
    assert not torch.allclose(first.matrix_DD, other.matrix_DD)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("sample", [0, 3, 4])
def test_bad_input_is_named(bad: float, sample: int) -> None:
    """1e30 is finite, but its square is not, in float32."""
    linear = Linear("block.linear", nn.Linear(4, 2))
    inputs = torch.rand(5, 6, 4)
    inputs[sample, 2, 1] = bad
    with pytest.raises(CalibrationError, match=rf"inputs of block\.linear .* \(first in calibration sample {sample}\)"):
        collect(linear.module, (linear,), inputs.split(2))


def test_bad_input_of_a_routed_linear_names_the_samples_of_its_batch() -> None:
    """An expert is given some tokens of the batch; which sample they came from is not known any more."""
    linear = Linear("block.expert", nn.Linear(4, 2))
    collector = HessianCollector([linear])
    with collector.batch(samples=2, length=6):
        linear.module(torch.rand(7, 4))
    with (
        pytest.raises(CalibrationError, match=r"inputs of block\.expert .* in calibration samples 2 to 3"),
        collector.batch(samples=2, length=6),
    ):
        linear.module(torch.full((5, 4), torch.nan))


def test_low_precision_inputs_are_accumulated_in_more() -> None:
    """Ten thousand equal products: a bfloat16 sum would stop growing at 256."""
    linear = Linear("x", nn.Linear(1, 1, bias=False, dtype=torch.bfloat16))
    collector = HessianCollector([linear])
    for _ in range(10):
        with collector.batch(samples=1, length=1000), torch.no_grad():
            linear.module(torch.ones(1000, 1, dtype=torch.bfloat16))
    ((hessian, _),) = collector.finish(0.01)
    assert hessian is not None
    assert hessian.matrix_DD.tolist() == [[1.0]]


def test_linear_that_is_never_called_has_none() -> None:
    model, block = first_block()
    unused = Linear("unused", nn.Linear(4, 4))
    *_, (hessian, linears) = collect(model, (*block.linears, unused), make_tokens().split(2))
    assert hessian is None
    assert linears == [unused]


def test_linear_that_is_given_no_token_has_none() -> None:
    linear = Linear("x", nn.Linear(4, 2))
    collector = HessianCollector([linear])
    with collector.batch(samples=1, length=2):
        linear.module(torch.zeros(0, 4))
    ((hessian, _),) = collector.finish(0.01)
    assert hessian is None


def test_linear_that_is_called_twice_sees_all_its_tokens() -> None:
    linear = Linear("x", nn.Linear(2, 2))
    collector = HessianCollector([linear])
    with collector.batch(samples=1, length=2):
        linear.module(torch.tensor([[2.0, 0.0]]))
        linear.module(torch.tensor([[0.0, 2.0]]))
    ((hessian, _),) = collector.finish(0.01)
    assert hessian is not None
    assert hessian.matrix_DD.tolist() == [[2.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_pipeline_leaves_a_linear_that_is_never_called_and_says_so(allocation: str) -> None:
    model = make_llama()
    model.model.layers[1].adapter = nn.Linear(32, 8)
    before = model.model.layers[1].adapter.weight.detach().clone()
    report = prune(model, Recipe(allocation=allocation), calibration=make_tokens())
    assert torch.equal(model.model.layers[1].adapter.weight, before)
    assert sum("model.layers.1.adapter was not pruned" in note for note in report.run.notes) == 1
    assert "model.layers.1.adapter" not in {linear.name for linear in report.linears}


def test_a_tensor_changed_in_place_is_another_input() -> None:
    shared, inputs = SharedInputs(), torch.ones(2, 3)
    assert shared.find("a", inputs) == "a"
    assert shared.find("b", inputs) == "a"
    inputs.mul_(3)
    assert shared.find("c", inputs) == "c"


class Routed(nn.Module):
    """An MLP with two linears that are given some of the tokens, the same ones."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.expert, self.twin = mlp, nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        some_BLD = hidden_BLD[:, 1:]
        return self.mlp(hidden_BLD) + nn.functional.pad(self.expert(some_BLD) + self.twin(some_BLD), (0, 0, 1, 0))


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
@pytest.mark.parametrize("sink_weight", [None, 0])
def test_pipeline_says_where_the_sink_weight_does_not_count(allocation: str, sink_weight: float | None) -> None:
    model = make_llama()
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    report = prune(model, Recipe(allocation=allocation, sink_weight=sink_weight), calibration=make_tokens(4, 64))
    about = [note for note in report.run.notes if "sink_weight" in note]
    assert len(about) == (sink_weight is None)
    assert all("layers.1" in note and "model.layers.1.mlp.expert, model.layers.1.mlp.twin:" in note for note in about)
    assert "model.layers.1.mlp.expert" in {linear.name for linear in report.linears}
