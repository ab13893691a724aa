"""One Hessian for each distinct input, equal to X^T X / T of inputs captured independently."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close_in_norm
from tiny import blocks_of, make_llama, make_tokens
from torch import Tensor, nn

from optima import Recipe, prune
from optima.calibration.activations import Activations, capture
from optima.calibration.hessians import Accumulator, Found, observe
from optima.calibration.weights import FisherWeights
from optima.errors import CalibrationError
from optima.models.blocks import Block, Linear, find_stacks, select_linears

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


class Host(nn.Module):
    """A model of one block that is given rows of a table."""

    def __init__(self, block: nn.Module, table_VD: Tensor) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding.from_pretrained(table_VD), nn.ModuleList([block])
        self.config = SimpleNamespace()

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.blocks[0](self.table(input_ids))
        return hidden


class Calls(nn.Module):
    """A block that does what ``forward`` says with its linears, and returns its input."""

    def __init__(self, forward: Callable[[Calls, Tensor], object], **linears: nn.Module) -> None:
        super().__init__()
        self.use = forward
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, hidden: Tensor) -> Tensor:
        self.use(self, hidden)
        return hidden


def first_block(model: nn.Module, batches: tuple[Tensor, ...]) -> tuple[Block, Activations]:
    """The first block, and what enters it."""
    (stack,) = select_linears(find_stacks(model), [".*"], [])
    return stack.blocks[0], capture(model, stack, batches)


def collect(model: nn.Module, batches: tuple[Tensor, ...]) -> list[Found]:
    block, acts = first_block(model, batches)
    return list(observe(block, acts, 0.0, damping=0.01))


def names(found: list[Found]) -> list[list[str]]:
    return [[linear.name.partition(".0.")[2] for linear in group.linears] for group in found]


def hessian_DD(found: Found) -> Tensor:
    assert found.hessian is not None
    assert found.hessian.requested_damping == 0.01
    return found.hessian.matrix_DD.float()  # as exact as its products


def captured_inputs(model: nn.Module, linears: tuple[Linear, ...], batches: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inputs of every linear over all batches, (T, D) float64."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for linear in linears:
        model.get_submodule(linear.name).register_forward_hook(
            lambda module, args, output, name=linear.name: seen[name].append(args[0].double().flatten(0, -2))
        )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    return {name: torch.cat(tensors) for name, tensors in seen.items()}


@pytest.mark.parametrize("weights", [0.0, 1 / 32, 0.5, "fisher"])
@pytest.mark.parametrize("batch_size", [1, 2])  # 2 leaves a last batch of one
def test_equals_the_definition(batch_size: int, weights: float | str) -> None:
    """X^T S X / tr S: tokens weigh alike, as first tokens do, or as the gradient pass found."""
    model, batches = make_llama(), make_tokens(5, 16).split(batch_size)
    block, acts = first_block(model, batches)
    fisher, weight_NL = None, torch.ones(5, 16)
    if isinstance(weights, float):
        weight_NL[:, 0] = max(1.0, weights * 16)
    else:
        weight_NL = torch.rand(5, 16, generator=torch.Generator().manual_seed(4)) ** 2
        own = [own_NL.flatten() for own_NL in weight_NL.split(batch_size)]
        fisher = FisherWeights("", {group[0].name: own for group in acts.groups(block)})
    collected = list(observe(block, acts, weights if isinstance(weights, float) else 0.0, 0.01, None, fisher))
    assert names(collected) == GROUPS
    inputs = captured_inputs(model, blocks_of(model)[0].linears, batches)
    weight_T1 = weight_NL.double().reshape(-1, 1)
    for found in collected:
        assert found.hessian is not None
        assert found.hessian.tokens == 80
        for linear in found.linears:
            expected_DD = (weight_T1 * inputs[linear.name]).T @ inputs[linear.name] / weight_T1.sum()
            assert_close_in_norm(hessian_DD(found), expected_DD, name=linear.name)


TABLE_VD = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(40, (6, 12), generator=torch.Generator().manual_seed(1))


def test_the_same_tensor_is_shared_and_an_equal_one_is_not() -> None:
    def forward(block: Calls, hidden: Tensor) -> None:
        hidden = hidden * 1
        result = block.first(hidden) + block.same(hidden) + block.view(hidden[:]) + block.equal(hidden.clone())
        hidden.mul_(3)  # from now on another input
        block.changed(hidden)
        del hidden  # a new tensor may now take its place in memory
        block.other(result * 2)

    linears = {name: nn.Linear(4, 4) for name in ("first", "same", "view", "equal", "changed", "other")}
    first, equal, changed, other = collected = collect(Host(Calls(forward, **linears), TABLE_VD), IDS.split(4))
    assert names(collected) == [["first", "same", "view"], ["equal"], ["changed"], ["other"]]
    assert torch.equal(hessian_DD(first), hessian_DD(equal))
    assert_close_in_norm(hessian_DD(first) * 9, hessian_DD(changed))
    assert not torch.allclose(hessian_DD(first), hessian_DD(other))


@pytest.mark.parametrize("bad", [float("nan"), 1e30], ids=str)
@pytest.mark.parametrize("sample", [0, 4])
def test_bad_input_is_named(bad: float, sample: int) -> None:
    """1e30 is finite, but its square is not, in float32."""
    table_VD, ids = TABLE_VD.clone(), IDS[:5].clone()
    table_VD[39, 1] = bad
    ids[ids == 39] = 0
    ids[sample, 9] = 39
    model = Host(Calls(lambda block, hidden: block.linear(hidden), linear=nn.Linear(4, 2)), table_VD)
    with pytest.raises(CalibrationError, match=r"inputs of blocks\.0\.linear contain NaN or Inf"):
        collect(model, ids.split(2))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# A product in bfloat16 is off by 2^16 eps of float32; the root of a weight is rounded to bfloat16.
@pytest.mark.parametrize(("weighted", "eps"), [(False, 256.0), (True, 2.0**14)])
@pytest.mark.parametrize("size", [48, 160])  # below and above what oneDNN multiplies
def test_bfloat16_inputs_lose_nothing_by_fast_products(size: int, weighted: bool, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(2048, size, generator=generator).bfloat16()
    weight_T = torch.rand(2048, generator=generator) + 0.1 if weighted else None
    settings = [getattr(backend, "matmul", None) for backend in (torch.backends.mkldnn, torch.backends.cuda)]
    before = [getattr(setting, "fp32_precision", None) for setting in settings]
    accumulator = Accumulator(size, torch.device("cpu"))
    accumulator.add(inputs_TD, weight_T)
    assert [getattr(setting, "fp32_precision", None) for setting in settings] == before
    exact_TD = inputs_TD.double() * (1.0 if weight_T is None else weight_T.double().sqrt()[:, None])
    expected_DD = exact_TD.mT @ exact_TD / (2048 if weight_T is None else float(weight_T.double().sum()))
    assert_close_in_norm(accumulator.mean().float(), expected_DD, eps)


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
def test_a_run_leaves_a_linear_that_is_never_called_and_says_so(allocation: str) -> None:
    model = make_llama()
    model.model.layers[1].adapter = nn.Linear(32, 8)
    before = model.model.layers[1].adapter.weight.detach().clone()
    report = prune(model, Recipe(allocation=allocation), calibration=make_tokens())
    assert torch.equal(model.model.layers[1].adapter.weight, before)
    assert sum("model.layers.1.adapter was not pruned" in note for note in report.run.notes) == 1
    assert "model.layers.1.adapter" not in {linear.name for linear in report.linears}
