"""Block tuning: masks stay, held-out sequences decide, and the report says what is no longer certified."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close_in_norm
from families import build, make_ids, stack_of
from ranks import in_processes
from runs import raising
from tiny import make_llama, make_tokens

from optima import Recipe, prune
from optima.calibration.activations import Activations, Microbatch, capture
from optima.distributed import ALONE, Ranks
from optima.errors import ModelError
from optima.models.blocks import Block
from optima.reporting.summary import render_summary
from optima.tune import ONE_SEQUENCE, OUT_OF_MEMORY, BlockError, Tuned, Tuning, tune


def half_pruned(
    model: torch.nn.Module, sequences: int = 64, batch_size: int = 4, ranks: Ranks = ALONE
) -> tuple[Block, dict[str, torch.Tensor], Activations, list[torch.Tensor]]:
    """The first block, half of it pruned by magnitude; its masks, what enters it, and what it made of that before."""
    stack = stack_of(model)
    block = stack.blocks[0]
    tokens = make_tokens(sequences, 16)
    tokens[-1] = tokens[0]  # held out
    own = tokens[ranks.part(sequences)]
    acts = capture(model, stack, list(own.split(batch_size)), ranks=ranks)
    dense = acts.part()
    dense.forward(block)
    keeps = {}
    for linear in block.linears:
        weight_OD = linear.read().clone()
        keeps[linear.name] = weight_OD.abs() > weight_OD.abs().median()
        linear.write(weight_OD * keeps[linear.name])
    return block, keeps, acts, dense.hidden


def alike(targets: list[torch.Tensor]) -> BlockError:
    return BlockError(torch.eye(targets[0].shape[-1]))


def tuned(model: torch.nn.Module, learning_rate: float, sequences: int = 64, batch_size: int = 4) -> Tuned:
    """Prune half of the first block by magnitude and tune it towards what it was."""
    block, keeps, acts, targets = half_pruned(model, sequences, batch_size)
    with torch.no_grad():
        found = tune(block, keeps, acts, targets, alike(targets), Tuning(3, learning_rate))
    for linear in block.linears:
        assert bool((linear.read()[~keeps[linear.name]] == 0).all())
    return found


def test_tuning_starts_from_the_solution_before_it_was_rounded() -> None:
    first = []
    for given in (True, False):
        block, keeps, acts, targets = half_pruned(make_llama().bfloat16())
        solutions = {linear.name: 1.5 * linear.read().float() for linear in block.linears}
        for linear in block.linears if not given else ():
            linear.write(solutions[linear.name].bfloat16())
        options = (alike(targets), Tuning(1, 1e-3), solutions if given else None)
        with torch.no_grad():
            first.append(tune(block, keeps, acts, targets, *options).held_out[0])
        assert bool(solutions) != given, "what was used does not wait"
    assert first[0] == first[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_closer_to_the_dense_block(dtype: torch.dtype) -> None:
    model = make_llama().to(dtype)
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm  # its outputs would change too
    dense = copy.deepcopy(model)
    found = tuned(model, 2e-3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert found.best > 0
    assert found.held_out[found.best] == min(found.held_out) < 0.95 * found.held_out[0]
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    moved = [name for name, parameter in model.named_parameters() if not parameter.equal(dense.get_parameter(name))]
    assert any("norm" in name for name in moved)  # vectors are tuned too
    assert not any("embed" in name or "input_layernorm" in name for name in moved)


def test_what_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optima.tune.BACKTRACK", 0.0)  # no step after an epoch that is undone
    model, again = make_llama().eval(), make_llama().eval()
    before, worse, *after = tuned(model, 1e3).held_out
    assert not worse < before
    assert after == [before, before]
    assert tuned(again, 1e-30).held_out[0] == before
    assert all(own.equal(other) for own, other in zip(model.parameters(), again.parameters(), strict=True))


def test_the_size_of_batches_does_not_matter() -> None:
    weight_T = torch.rand(16 * 16, generator=torch.Generator().manual_seed(0)) ** 4
    found = []
    for size in (1, 4):
        block, keeps, acts, targets = half_pruned(make_llama().eval(), 16, size)
        cost = BlockError(torch.eye(32), list(weight_T.split(16 * size)))
        with torch.no_grad():
            found.append(tune(block, keeps, acts, targets, cost, Tuning(2, 1e-2)).held_out)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_block_without_gradients_is_refused() -> None:
    model = make_llama()
    layer = model.model.layers[0]
    layer.forward = torch.no_grad()(layer.forward)
    with pytest.raises(ModelError, match=r"layers\.0 cannot be tuned"):
        tuned(model, 2e-3)


def test_one_sequence_is_too_few() -> None:
    found = tuned(make_llama().eval(), 1e-2, sequences=1)
    assert found == Tuned((), 0, ONE_SEQUENCE)
    report = prune(make_llama(), Recipe(), calibration=make_tokens(1, 16))
    assert report.run.notes.count(ONE_SEQUENCE) == 1
    assert "Block tuning" not in render_summary(report)


@pytest.mark.parametrize(("share", "steps"), [(1.0, 14), (0.25, 3)])
def test_a_share_of_the_sequences_is_taken(share: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of eight is held out of them, and a step is one sequence."""
    monkeypatch.setattr("optima.calibration.fisher.LEAST_TUNED", 1)
    taken = []
    for epochs in (0, 1):
        model, calls = make_llama(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, own=calls: own.append(torch.is_grad_enabled()))
        recipe = Recipe(tuning_epochs=epochs, tuning_fraction=share, batch_size=4)
        prune(model, recipe, calibration=make_tokens(16, 16))
        taken.append(sum(calls))
    assert taken[1] - taken[0] == steps


def test_a_block_without_memory_for_it_keeps_its_certified_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_fails(block: Block, *more: Any) -> Tuned:
        if block.index:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tune(block, *more)

    monkeypatch.setattr("optima.tune.tune", second_fails)
    report = prune(make_llama(), Recipe(), calibration=make_tokens(16, 16))
    assert report.run.notes.count(OUT_OF_MEMORY) == 1
    assert [len(block.tuning) for block in report.blocks] == [3, 0]
    assert all(linear.gap_written_max is not None for linear in report.linears if linear.block)


def test_a_sequence_whose_gradients_overflow_is_left_out() -> None:
    model = make_llama().eval()
    block, keeps, acts, targets = half_pruned(model)
    targets[0] = targets[0].index_fill(0, torch.tensor(0), math.inf)
    found = tune(block, keeps, acts, targets, BlockError(torch.eye(targets[0].shape[-1])), Tuning(1, 2e-3))
    assert found.best == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_what_is_left_dense_keeps_its_biases() -> None:
    model = build("gpt_oss")
    with torch.no_grad():  # zeros stay zeros in tuning
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.01 * torch.randn_like(parameter)
    dense = copy.deepcopy(model)
    prune(model, Recipe(tuning_epochs=1, ignore=["lm_head", "self_attn"]), calibration=make_ids(16))
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(dense.get_parameter(name))}
    assert any("norm" in name for name in moved)
    assert not [name for name in moved if "self_attn" in name and "bias" in name]
    assert not [name for name in moved if "router" in name]


def test_large_hidden_states_do_not_stop_it() -> None:
    """The cost is relative to the energy of the outputs: its gradient falls as their size, and a float16 loses it."""
    gains, size = [], 30.0
    for dtype in (torch.float32, torch.float16):
        model = make_llama()
        with torch.no_grad():
            model.model.embed_tokens.weight *= size
            for block in model.model.layers:
                block.mlp.down_proj.weight *= size
                block.self_attn.o_proj.weight *= size
        found = tuned(model.eval().to(dtype), 2e-3)
        gains.append(found.held_out[found.best] / found.held_out[0])
    assert gains[0] < 0.95
    assert gains[1] == pytest.approx(gains[0], rel=0.05)


@pytest.mark.parametrize(("size", "batch_size", "sequences"), [(4, 1, 10), (2, 3, 20)])
def test_data_parallel_tuning_is_that_of_one_process(
    size: int, batch_size: int, sequences: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has the same sequences, whichever rank has them."""
    monkeypatch.chdir(tmp_path)

    def work(ranks: Ranks = ALONE) -> None:
        model = make_llama().eval()
        block, keeps, acts, targets = half_pruned(model, sequences, batch_size, ranks)
        cost = alike(targets)
        with torch.no_grad():
            found = tune(block, keeps, acts, targets, cost, Tuning(4, 1e-2))
        torch.save((found.held_out, found.best, model.state_dict()), f"{ranks.size}-{ranks.rank}.pt")

    work()
    assert in_processes(size, work) == [0] * size
    held_out, best, state = torch.load("1-0.pt")
    assert best > 0
    others = [torch.load(f"{size}-{rank}.pt") for rank in range(size)]
    for other_held_out, other_best, other_state in others:
        assert other_best == best
        assert other_held_out == pytest.approx(held_out, rel=1e-3)
        for name, tensor in state.items():
            assert_close_in_norm(other_state[name], tensor, 2.0**11, name)  # Adam magnifies gradients near zero
            assert other_state[name].equal(others[0][2][name])


def test_one_rank_without_memory_for_it_ends_tuning_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class FullError(BlockError):
        __call__ = raising(torch.OutOfMemoryError("CUDA out of memory."))  # type: ignore[assignment]

    def work(ranks: Ranks) -> None:
        model = make_llama().eval()
        block, keeps, acts, targets = half_pruned(model, 8, 1, ranks)
        cost = alike(targets)
        with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
            tune(block, keeps, acts, targets, FullError(cost.metric_EE) if ranks.rank else cost, Tuning(1, 1e-2))

    assert in_processes(2, work) == [0, 0]


def test_the_seed_orders_the_microbatches() -> None:
    found = []
    for seed in (0, 0, 1):
        block, keeps, acts, targets = half_pruned(make_llama().eval())
        with torch.no_grad():
            cost = alike(targets)
            found.append(tune(block, keeps, acts, targets, cost, Tuning(1, 1e-2, seed=seed)).held_out)
    assert found[0] == found[1] != found[2]


def test_the_report_says_what_is_no_longer_certified() -> None:
    report = prune(make_llama(), Recipe(sparsity=0.7, allocation="uniform"), calibration=make_tokens(64, 16))
    assert all(len(block.tuning) == 3 for block in report.blocks)
    moved = {block.index for block in report.blocks if block.tuning_epoch}
    assert moved
    for linear in report.linears:
        assert linear.tuned == (linear.block in moved)
        assert (linear.gap_written_max is None) == linear.tuned
        assert linear.gap_max is not None
        assert linear.sparsity == pytest.approx(0.7, abs=0.01)
    assert "tune" in report.run.stages


def test_a_change_costs_its_square_in_the_metric_times_its_tokens_weight() -> None:
    torch.manual_seed(0)
    root_EE, change_TE, weight_T = torch.randn(6, 6), torch.randn(10, 6), torch.rand(10)
    residual_EE = root_EE @ root_EE.mT
    cost = BlockError.by_loss(residual_EE, [weight_T])
    raised_EE = residual_EE + 0.1 * residual_EE.diagonal().diag()
    pull_TE = change_TE @ (raised_EE / raised_EE.diagonal().mean())
    found_TE = change_TE.clone().requires_grad_()
    error = cost(found_TE, torch.zeros_like(found_TE), Microbatch(0, slice(0, 1), 1))
    error.backward()
    assert float(error) == pytest.approx(float(((pull_TE * change_TE).sum(dim=1) * weight_T).mean()), rel=1e-4)
    assert found_TE.grad is not None
    assert_close_in_norm(found_TE.grad, 2.0 * pull_TE * weight_T[:, None] / 10)


def test_the_rate_is_relative_to_a_tensors_size() -> None:
    """The same function by weights of other sizes is tuned as far."""
    plain, scaled = make_llama().eval(), make_llama().eval()
    with torch.no_grad():
        scaled.model.layers[0].mlp.up_proj.weight *= 16
        scaled.model.layers[0].mlp.down_proj.weight /= 16
    assert tuned(scaled, 2e-3).held_out == pytest.approx(tuned(plain, 2e-3).held_out, rel=1e-2)
