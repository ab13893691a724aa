"""Experts of fused parameters: what each is given, how few tokens are made up for, and what their gradients are."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, make_ids, stack_of
from tiny import weight_files
from torch import Tensor, nn

from optima import Recipe, prune
from optima.calibration import expert_statistics
from optima.calibration.accumulator import Accumulator, Found, sampled
from optima.calibration.capture import capture
from optima.calibration.expert_statistics import Common, mixed, routing_notes, thinned
from optima.calibration.fisher import FisherWeights, fisher_weights
from optima.calibration.routed import Recorded, recorders
from optima.calibration.statistics import observe
from optima.calibration.streams import Streams
from optima.errors import ModelError
from optima.linalg.statistics import sampling_step
from optima.models.blocks import Block, find_stacks, select_linears
from optima.models.moe import Call, ExpertLinear, FusedExperts, experts_of
from optima.models.save import Writer

LOOPS = ["mixtral", "gpt_oss", "nemotron_h"]
FORMS = [*LOOPS, "llama4"]


def streams_of(model: nn.Module) -> tuple[Block, Streams]:
    """A block with experts, and what enters it."""
    stack = stack_of(model)
    streams = capture(model, stack, list(make_ids(6, 16).split(2)), whole=True)
    for block in stack.blocks:
        if any(isinstance(linear, ExpertLinear) for linear in block.linears):
            return block, streams
        streams.advance(block)
    raise AssertionError("no experts")


def found_at(block: Block, streams: Streams, sink: float = 0.0, loss: FisherWeights | None = None) -> dict[str, Found]:
    found = observe(block, streams, sink, 0.0, None, loss)
    return {each.linears[0].name: each for each in found if isinstance(each.linears[0], ExpertLinear)}


def given(block: Block, streams: Streams) -> dict[str, list[Tensor]]:
    """The inputs of every expert by the definition: all tokens through each, of which its own are picked."""
    inputs: dict[str, list[Tensor]] = {}
    experts = next(linear.experts for linear in block.linears if isinstance(linear, ExpertLinear))
    module: Any = experts.module
    first, last = (list(experts.transposed)[place] for place in (0, -1))
    handle = module.register_forward_pre_hook(lambda module, args: calls.append(args))
    calls: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for batch in range(len(streams.hidden)):
            streams.run(block, batch)
    handle.remove()
    for args in calls:
        for number in range(experts.count):
            if len(args) == 1:
                own = args[0].reshape(experts.count, -1, args[0].shape[-1])[number]
                own = own[own.ne(0).any(dim=1)]
            else:
                own = args[0][(args[1] == number).any(dim=1)]
            up = own @ experts.orient(first, number, experts.parameter(first)).mT
            up = up + getattr(module, "gate_up_proj_bias", torch.zeros(experts.count, 1))[number]
            if hasattr(module, "_apply_gate") and first != "up_proj":
                inner = module._apply_gate(up)
            elif first == "up_proj":
                inner = module.act_fn(up)
            else:
                gate, up = up.chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
            for within, rows in ((first, own), (last, inner)):
                inputs.setdefault(f"{experts.name}.{within}.{number}", []).append(rows.detach())
    return inputs


@pytest.mark.parametrize("family", FORMS)
def test_hessians_are_of_the_tokens_that_are_routed(family: str) -> None:
    block, streams = streams_of(build(family))
    found, inputs = found_at(block, streams), given(block, streams)
    assert found.keys() == inputs.keys()
    for name, rows in inputs.items():
        rows_TD = torch.cat(rows).double()
        statistics = found[name].statistics
        assert statistics is not None
        assert statistics.tokens == len(rows_TD)
        size = rows_TD.shape[1]
        # What is left of the hessian when the share of all tokens is taken off.
        common_DD = (len(rows_TD) + size) * statistics.hessian.matrix_DD.double() - rows_TD.mT @ rows_TD
        assert torch.linalg.eigvalsh(common_DD).min() > -1e-4 * common_DD.diagonal().mean()
        assert statistics.sample_ND is None, "no token is weighed"


@pytest.mark.parametrize("family", FORMS)
def test_common_tokens_go_through_the_expert_itself(family: str) -> None:
    """Where all tokens are routed to an expert, its own hessian and the common one are the same."""
    block, streams = streams_of(build(family))
    recorded = record(block, streams)
    hidden_ND = torch.randn(24, recorded.groups[0][0].shape[1])
    seen: dict[str, Tensor] = {}
    last = list(recorded.experts.transposed)[-1]
    handle = recorded.experts.add((last, 1), lambda call: seen.update(inner=call.inputs_TD))
    with torch.no_grad():
        recorded.run_all(hidden_ND, 1)
    handle.remove()
    assert seen["inner"].shape == (24, recorded.experts.orient(last, 1, recorded.experts.parameter(last)).shape[1])
    assert "forward" not in vars(recorded.experts.module)


def record(block: Block, streams: Streams) -> Recorded:
    (recorded,) = recorders(block, streams)
    for batch, (samples, _) in enumerate(streams.sizes):
        note = partial(recorded.note, batch, slice(samples))
        handle = recorded.experts.module.register_forward_pre_hook(
            lambda module, args, kwargs, note=note: note(args, kwargs), with_kwargs=True
        )
        with torch.no_grad():
            streams.run(block, batch)
        handle.remove()
    return recorded


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_portions_do_not_matter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, streams = streams_of(build(family))
    whole = found_at(block, streams)
    monkeypatch.setattr(expert_statistics, "EXPERT_BYTES", 1)
    parts = found_at(block, streams)
    assert whole.keys() == parts.keys()
    for name, each in whole.items():
        assert each.statistics is not None and parts[name].statistics is not None  # noqa: PT018
        assert torch.equal(each.statistics.hessian.matrix_DD, parts[name].statistics.hessian.matrix_DD)  # type: ignore[union-attr]


def test_few_tokens_are_mixed_with_all() -> None:
    torch.manual_seed(0)
    rows_TD, common_DD = torch.randn(6, 8), torch.eye(8, dtype=torch.float64)
    own = Accumulator()
    own.sample.append(rows_TD)
    own.add(rows_TD)
    statistics = mixed(own, Common(common_DD, rows_TD), 0.0)
    expected_DD = (rows_TD.double().mT @ rows_TD.double() + 8 * common_DD) / 14
    assert torch.allclose(statistics.hessian.matrix_DD.double(), expected_DD, rtol=1e-5, atol=1e-6)
    assert statistics.tokens == 6
    assert statistics.sample_ND is not None
    assert mixed(own, Common(common_DD, rows_TD), 0.0, weighed=False).sample_ND is None
    alone = mixed(Accumulator(), Common(common_DD, rows_TD), 0.0)
    assert alone.tokens == 0
    assert torch.equal(alone.hessian.matrix_DD.double(), common_DD)


def test_notes_of_few_tokens() -> None:
    tokens = {"e.up.0": 0, "e.up.1": 3, "e.up.2": 90}
    none, few = routing_notes("b", tokens, 10)
    assert "no token was routed to 1 (e.up.0) of 3" in none
    assert "fewer than 10 tokens were routed to 1 (e.up.1) of 3" in few
    assert routing_notes("b", {"e.up.2": 90}, 10) == []


def test_an_expert_without_tokens_is_pruned_and_named() -> None:
    model: Any = build("mixtral")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[2:] = 0.0
            layer.mlp.gate.top_k = 1  # so that the others are never chosen
    report = prune(model, Recipe(batch_size=2, expert_tokens=1, allocation="uniform"), calibration=make_ids())
    tokens = {record.name: record.tokens for record in report.linears if ".experts." in record.name}
    unreached = [name for name, count in tokens.items() if not count]
    assert len(unreached) == 3 * 2 * 2
    assert all(record.sparsity == pytest.approx(0.5, abs=0.01) for record in report.linears)
    assert any("no token was routed to" in note for note in report.run.notes)


def test_gradients_are_those_of_each_expert() -> None:
    """The sum over an expert's tokens of gradient times input is the gradient of its weight."""
    model: Any = build("mixtral")
    stack = stack_of(model)
    batches = list(make_ids(4, 16).split(2))
    streams = capture(model, stack, batches, whole=True)
    found = fisher_weights(model, stack, streams, seed=0)
    sizes = [size[0] * size[1] for size in streams.sizes]
    total = torch.zeros(sum(sizes))
    for number in range(4):
        name = f"model.layers.1.mlp.experts.down_proj.{number}"
        pairs = found.routed[name]
        assert [len(tokens) == len(squares) for tokens, squares in pairs] == [True, True]
        assert float(found.rows[name].sum()) * sum(sizes) == pytest.approx(
            sum(float(squares.sum()) for _, squares in pairs), rel=1e-4
        )
        weights = [found.of_routed(name, batch, size) for batch, size in enumerate(sizes)]
        chosen = torch.cat([weight_T[tokens_T] for weight_T, (tokens_T, _) in zip(weights, pairs, strict=True)])  # type: ignore[index]
        assert float(chosen.mean()) == pytest.approx(1.0, rel=1e-4)
        offset = 0
        for size, (tokens_T, _) in zip(sizes, pairs, strict=True):
            total[offset + tokens_T] += 1
            offset += size
    assert bool((total == 2).all())  # each token went to two experts


def test_samples_have_no_more_first_tokens_than_the_text() -> None:
    tokens, length = 128 * 2048, 2048
    step = sampling_step(tokens, 2048)
    for place_N in (
        torch.cat([sampled(torch.arange(length), length * before, step) for before in range(128)]),
        torch.cat([thinned(torch.arange(length), 16, turn) for turn in range(128)]),
    ):
        assert len(place_N) == pytest.approx(2048, rel=0.02)
        assert int((place_N == 0).sum()) <= 2
        assert int((place_N < length // 2).sum()) == pytest.approx(len(place_N) / 2, rel=0.02)
    whole_N = sampled(torch.arange(tokens), 0, step)
    parts = [sampled(part, int(part[0]), step) for part in torch.arange(tokens).split(3000)]
    assert torch.cat(parts).equal(whole_N), "it does not depend on batches"


@pytest.mark.parametrize("family", FORMS)
def test_a_sweep_holds_no_product_of_an_expert_when_it_is_over(family: str) -> None:
    model = build(family)
    stack = stack_of(model)
    fisher_weights(model, stack, capture(model, stack, list(make_ids(4).split(2)), whole=True), seed=0)
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Call]


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_common_tokens_are_as_many_as_asked_for(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 gives all experts every token: zeros where it is routed to another."""
    block, streams = streams_of(build(family))
    sizes, run_all = set(), Recorded.run_all
    monkeypatch.setattr(expert_statistics, "COMMON_TOKENS", 24)
    monkeypatch.setattr(Recorded, "run_all", lambda *args: (sizes.add(len(args[1])), run_all(*args))[1])
    found_at(block, streams)
    (size,) = sizes
    assert 18 <= size <= 24


def test_token_weights_reach_the_experts() -> None:
    block, streams = streams_of(build("mixtral"))
    plain, sink = found_at(block, streams), found_at(block, streams, sink=0.5)
    assert all(found.told for found in sink.values())
    assert any(
        not torch.equal(plain[name].statistics.hessian.matrix_DD, sink[name].statistics.hessian.matrix_DD)  # type: ignore[union-attr]
        for name in plain
    )


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_token_weights_reach_the_hessian_of_all_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 gives each expert all tokens, zeros for those that go elsewhere."""
    means: list[Tensor] = []

    def keep(mean_DD: Tensor, sample_ND: Tensor) -> Common:
        means.append(mean_DD)
        return Common(mean_DD, sample_ND)

    monkeypatch.setattr(expert_statistics, "Common", keep)
    block, streams = streams_of(build(family))
    for sink in (0.0, 0.9):
        found_at(block, streams, sink=sink)
    plain_DD, sink_DD = means[0], means[len(means) // 2]
    assert float((plain_DD - sink_DD).norm() / plain_DD.norm()) > 0.1


@pytest.mark.parametrize("family", ["switch", "mixtral"])
def test_experts_of_few_tokens_are_named_whatever_form_they_have(family: str) -> None:
    report = prune(build(family), Recipe(batch_size=2, expert_tokens=10**6, tuning_epochs=0), calibration=make_ids())
    assert any("tokens were routed to" in note for note in report.run.notes)


def test_a_watch_leaves_nothing_behind() -> None:
    module: Any = build("mixtral").model.layers[0].mlp.experts  # type: ignore[union-attr]
    own = module.forward
    module.forward = own  # as accelerate does
    (experts,) = experts_of(module, "experts")
    handles = [experts.add(("down_proj", number), lambda call: None) for number in range(2)]
    assert module.forward != own
    for handle in handles:
        handle.remove()
    assert module.forward == own


def test_a_layout_is_told_by_shapes_or_not_at_all() -> None:
    class Experts(nn.Module):
        def __init__(self, up: tuple[int, ...], down: tuple[int, ...]) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))

    (straight,) = experts_of(Experts((2, 12, 4), (2, 4, 6)), "m")
    assert straight.transposed == {"up": False, "down": False}
    (turned,) = experts_of(Experts((2, 4, 12), (2, 6, 4)), "m")
    assert turned.transposed == {"up": True, "down": True}
    assert turned.linears()[0].shape == (12, 4)
    assert experts_of(Experts((2, 4, 4), (2, 4, 4)), "m") == []  # either way round


def test_products_that_cannot_be_watched_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedExperts, "find", lambda *args: None)
    with pytest.raises(ModelError, match=r"mlp\.experts was not called, or does not show .* --ignore 'mlp"):
        prune(build("mixtral"), Recipe(), calibration=make_ids())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "t5"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are split or kept fused on disk; a decoder's blocks come behind the encoder's in the journal."""
    recipe = Recipe(batch_size=2, tuning_epochs=1)
    whole = build(family)
    prune(whole, recipe, output_dir=tmp_path / "whole", calibration=make_ids())
    commit, done = Writer.commit, iter(range(2 if family != "t5" else 4))

    def stopping(self: Writer, *args: Any) -> None:
        if next(done, None) is None:
            raise KeyboardInterrupt
        commit(self, *args)

    with monkeypatch.context() as context:
        context.setattr(Writer, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            prune(build(family), recipe, output_dir=tmp_path / "out", calibration=make_ids())
    model = build(family)
    report = prune(model, recipe, output_dir=tmp_path / "out", calibration=make_ids(), resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert {record.block for record in report.linears} == set(range(6 if family == "t5" else 3))
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tuned_experts_keep_their_masks(family: str) -> None:
    model = build(family)
    report = prune(model, Recipe(pattern=["2:4"], tuning_epochs=2), calibration=make_ids(16))
    assert any(record.tuned and ".experts." in record.name for record in report.linears)
    (stack,) = select_linears(find_stacks(model), ["experts"], [])
    for linear in (linear for block in stack.blocks for linear in block.linears):
        assert bool(((linear.read() == 0).reshape(-1, 4).sum(dim=1) == 2).all())


def test_hessians_of_experts_by_the_definition() -> None:
    """Their own tokens, and as many of all as there are inputs, each times what it weighs."""
    block, streams = streams_of(build("mixtral"))
    module: Any = block.module.mlp.experts  # type: ignore[union-attr]
    calls: list[Any] = []
    handle = module.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        for batch in range(len(streams.hidden)):
            streams.run(block, batch)
    handle.remove()
    hidden_TD, chosen_TK = (torch.cat([call[place] for call in calls]) for place in (0, 1))
    weight_T = torch.ones(6, 16).index_fill(1, torch.tensor([0]), 8.0).flatten().double()

    def mean_DD(inputs_TD: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
        inputs_TD = inputs_TD.double()
        return (weight_T[:, None] * inputs_TD).mT @ inputs_TD / weight_T.sum()

    for found in observe(block, streams, 0.5, 0.0):
        name, _, number = found.linears[0].name.rpartition(".")
        if not name.startswith(f"{block.name}.mlp.experts"):
            continue
        gate_TI, up_TI = (hidden_TD @ module.gate_up_proj[int(number)].mT).chunk(2, dim=-1)
        inputs_TD = hidden_TD if name.endswith("gate_up_proj") else (module.act_fn(gate_TI) * up_TI).detach()
        own_T = (chosen_TK == int(number)).any(dim=1)
        count, size = int(own_T.sum()), inputs_TD.shape[1]
        parts = count * mean_DD(inputs_TD[own_T], weight_T[own_T]) + size * mean_DD(inputs_TD, weight_T)
        assert found.statistics is not None
        expected_DD = parts / (count + size)
        torch.testing.assert_close(
            found.statistics.hessian.matrix_DD, expected_DD, rtol=1e-4, atol=1e-5 * float(expected_DD.max())
        )


def test_tokens_given_to_all_experts_in_turn_keep_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    block, streams = streams_of(build("llama4"))
    module = next(each.experts.module for each in block.linears if isinstance(each, ExpertLinear))
    calls: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: calls.append(args[0].detach()))
    with torch.no_grad():
        for batch in range(len(streams.hidden)):
            streams.run(block, batch)
    handle.remove()
    weight_T = torch.ones(2, 16, dtype=torch.float64).index_fill(1, torch.tensor([0]), 0.9 * 16).flatten()
    sum_DD, total = torch.zeros(calls[0].shape[-1], calls[0].shape[-1], dtype=torch.float64), 0.0
    for inputs in calls:
        for hidden_TD in inputs.double().reshape(-1, len(weight_T), inputs.shape[-1]):  # of each expert
            sum_DD += (weight_T[:, None] * hidden_TD).mT @ hidden_TD
            total += float(weight_T[hidden_TD.ne(0).any(dim=1)].sum())
    means: list[Tensor] = []
    monkeypatch.setattr(expert_statistics, "Common", lambda *given: means.append(given[0]) or Common(*given))
    found_at(block, streams, sink=0.9)
    torch.testing.assert_close(means[0].double(), sum_DD / total, rtol=1e-4, atol=1e-5 * float((sum_DD / total).max()))
