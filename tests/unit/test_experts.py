"""Experts of fused parameters: they run as linears, and their Hessians are of the tokens routed to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close_in_norm
from families import build, make_ids, stack_of
from runs import on_call, raising
from tiny import weight_files
from torch import Tensor, nn
from torch.func import functional_call

from optima import Recipe, prune
from optima.calibration.activations import Activations, capture
from optima.calibration.hessians import observe
from optima.models.blocks import Block, Linear, find_stacks, select_linears
from optima.models.moe import FusedExperts, experts_of, linearized
from optima.models.save import Writer

# One of each form: gates, transposed with biases, no gate, all tokens for each expert.
FORMS = ["mixtral", "gpt_oss", "nemotron_h", "llama4"]
FUSED = [
    *("mixtral", "qwen3_moe", "deepseek_v3", "llama4", "phimoe", "gpt_oss", "gemma4_moe", "glm_moe_dsa", "deepseek_v4"),
    *("qwen3_next", "nemotron_h"),
]


def acts_of(model: nn.Module) -> tuple[Block, Activations]:
    """The first block with experts, and what enters it."""
    stack = stack_of(model)
    acts = capture(model, stack, list(make_ids(6, 16).split(2)), whole=True)
    for block in stack.blocks:
        if any(linear.expert for linear in block.linears):
            return block, acts
        acts.forward(block)
    raise AssertionError("no experts")


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, ...]]]:
    calls: list[tuple[Tensor, ...]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        calls.append(tuple(each.detach().clone() for each in (*args, *kwargs.values())))

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    yield calls
    handle.remove()


def calls_in(block: Block, acts: Activations) -> tuple[FusedExperts, list[tuple[Tensor, ...]]]:
    """The mixture of a block, and what it is called with in every batch."""
    experts = next(linear.expert.experts for linear in block.linears if linear.expert)
    with calls_of(experts.module) as calls, torch.no_grad():
        for batch in range(len(acts.hidden)):
            acts.run(block, batch)
    return experts, calls


@pytest.mark.parametrize("family", FUSED)
def test_linearized_experts_give_the_output_of_the_fused_module(family: str) -> None:
    model = build(family)
    (experts, *_), ids = experts_of(model, ""), make_ids(2, 16)
    own = vars(experts.module).get("forward")
    with torch.no_grad(), calls_of(experts.module) as calls:
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    with torch.no_grad():
        expected = experts.module(*calls[0])
        with linearized([experts]):
            found = experts.module(*calls[0])
    assert_close_in_norm(found, expected)
    assert vars(experts.module).get("forward") is own


@pytest.mark.parametrize("family", FORMS)
def test_the_fused_parameters_get_the_gradients_of_the_fused_module(family: str) -> None:
    """Also those that ``functional_call`` puts in their place, as block tuning does."""
    block, acts = acts_of(build(family))
    experts, (call, *_) = calls_in(block, acts)
    masters = {name: torch.randn_like(each).requires_grad_() for name, each in experts.module.named_parameters()}

    def gradients() -> tuple[Tensor, ...]:
        output = functional_call(experts.module, masters, call)
        return torch.autograd.grad(output.square().sum(), list(masters.values()))

    expected = gradients()
    with linearized([experts]):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        assert_close_in_norm(one, other)


def inputs_of(experts: FusedExperts, call: tuple[Tensor, ...], number: int) -> tuple[Tensor, Tensor]:
    """The tokens routed to an expert, by the router's choice, and its inputs."""
    if len(call) == 1:
        own_TD = call[0].reshape(experts.count, -1, call[0].shape[-1])[number]
        tokens_T = own_TD.ne(0).any(dim=1).nonzero()[:, 0]
        return tokens_T, own_TD[tokens_T]
    tokens_T = (call[1] == number).any(dim=1).nonzero()[:, 0]
    return tokens_T, call[0][tokens_T]


def inner_of(experts: FusedExperts, number: int, inputs_TD: Tensor) -> Tensor:
    """What an expert's second linear reads, written out."""
    module: Any = experts.module
    name = next(iter(experts.transposed))
    fused = getattr(module, name).detach()[number]
    up_TO = inputs_TD @ (fused if experts.transposed[name] else fused.mT)
    if hasattr(module, f"{name}_bias"):
        up_TO = up_TO + getattr(module, f"{name}_bias").detach()[number]
    if name == "up_proj":
        return module.act_fn(up_TO)
    if type(module).__name__ == "GptOssExperts":
        gate, up = up_TO[:, ::2].clamp(max=module.limit), up_TO[:, 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    gate, up = up_TO.chunk(2, dim=-1)
    return module.act_fn(gate) * up


@pytest.mark.parametrize("sink", [0.0, 0.5])
@pytest.mark.parametrize("family", FORMS)
def test_hessians_of_experts_by_the_definition(family: str, sink: float) -> None:
    """X^T S X of their own tokens, and as many of all as there are inputs."""
    block, acts = acts_of(build(family))
    experts, calls = calls_in(block, acts)
    weight_T = torch.ones(2, 16, dtype=torch.float64)
    weight_T[:, 0] = max(1.0, sink * 16)
    weight_T = weight_T.flatten()
    own: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in range(experts.count)}
    every: list[tuple[Tensor, Tensor]] = []
    for call in calls:
        for number, parts in own.items():
            tokens_T, inputs_TD = inputs_of(experts, call, number)
            parts.append((weight_T[tokens_T], inputs_TD))
        every += [parts[-1] for parts in own.values()] if len(call) == 1 else [(weight_T, call[0])]

    def mean_DD(parts: list[tuple[Tensor, Tensor]], number: int | None) -> Tensor:
        weights_T, rows_TD = (torch.cat(each) for each in zip(*parts, strict=True))
        inputs_TD = (rows_TD if number is None else inner_of(experts, number, rows_TD)).double()
        return (weights_T[:, None] * inputs_TD).mT @ inputs_TD / weights_T.sum()

    found = {each.linears[0].name: each for each in observe(block, acts, sink, 0.0) if each.linears[0].expert}
    assert len(found) == 2 * experts.count
    for name, each in found.items():
        _, parameter, expert = name.rsplit(".", 2)
        number = int(expert)
        inner = number if parameter == "down_proj" else None
        all_DD, count = mean_DD(every, inner), sum(len(rows) for _, rows in own[number])
        expected_DD = (count * mean_DD(own[number], inner) + len(all_DD) * all_DD) / (count + len(all_DD))
        assert each.hessian is not None
        assert each.hessian.tokens == count
        assert_close_in_norm(each.hessian.matrix_DD.float(), expected_DD, name=name)


def test_an_expert_without_tokens_is_pruned_and_named() -> None:
    model: Any = build("mixtral")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[2:] = 0.0
            layer.mlp.gate.top_k = 1  # so that the others are never chosen
    report = prune(model, Recipe(batch_size=2, allocation="uniform"), calibration=make_ids())
    tokens = {record.name: record.tokens for record in report.linears if ".experts." in record.name}
    unreached = [name for name, count in tokens.items() if not count]
    assert len(unreached) == 2 * 2 * 2
    assert all(record.sparsity == pytest.approx(0.5, abs=0.01) for record in report.linears)
    assert any(", none to" in note for note in report.run.notes)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow), "t5"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are split or kept fused on disk; a decoder's blocks come behind the encoder's in the journal."""
    recipe = Recipe(batch_size=2, tuning_epochs=1)
    whole = build(family)
    prune(whole, recipe, output_dir=tmp_path / "whole", calibration=make_ids())
    stopped = on_call(4 if family == "t5" else 2, Writer.commit, raising(KeyboardInterrupt()))
    with monkeypatch.context() as context:
        context.setattr(Writer, "commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            prune(build(family), recipe, output_dir=tmp_path / "out", calibration=make_ids())
    model = build(family)
    report = prune(model, recipe, output_dir=tmp_path / "out", calibration=make_ids(), resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert {record.block for record in report.linears} == set(range(4 if family == "t5" else 2))
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tuned_experts_keep_their_masks(family: str) -> None:
    model = build(family)
    report = prune(model, Recipe(pattern=["2:4"], tuning_epochs=2), calibration=make_ids(16))
    assert any(record.tuned and ".experts." in record.name for record in report.linears)
    (stack,) = select_linears(find_stacks(model), ["experts"], [])
    for linear in (linear for block in stack.blocks for linear in block.linears):
        assert bool(((linear.read() == 0).reshape(-1, 4).sum(dim=1) == 2).all())


def test_layouts_are_known_by_shapes_or_not_at_all() -> None:
    class Experts(nn.Module):
        def __init__(self, up: tuple[int, ...], down: tuple[int, ...]) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))

    (straight,) = experts_of(Experts((2, 12, 4), (2, 4, 6)), "m")
    assert straight.transposed == {"up_proj": False, "down_proj": False}
    (transposed,) = experts_of(Experts((2, 4, 12), (2, 6, 4)), "m")
    assert transposed.transposed == {"up_proj": True, "down_proj": True}
    assert Linear("up", transposed.up[0]).shape == (12, 4)
    assert experts_of(Experts((2, 4, 4), (2, 4, 4)), "m") == []  # either way round
