"""Batches that a device has no memory for: run in halves, reported, and nothing counts twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import EPS, assert_close_in_norm
from families import make_ids, stack_of
from runs import on_call, raising
from tiny import make_llama, make_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima import Recipe, Report, prune
from optima.calibration.activations import capture
from optima.calibration.batch_size import BatchSize
from optima.calibration.fisher import fisher_weights
from optima.calibration.hessians import Found, observe
from optima.calibration.weights import FisherWeights
from optima.errors import DeviceMemoryError
from optima.models.save import Writer


@contextmanager
def little_memory(module: nn.Module, most: int, backward: bool = False) -> Iterator[None]:
    """Inside, no more than ``most`` rows go through the module, or back through it."""

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        rows = next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    if backward:
        handle = module.register_full_backward_pre_hook(refuse)
    else:
        handle = module.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def pruned(model: PreTrainedModel, batch_size: int, **options: Any) -> Report:
    recipe = Recipe(batch_size=batch_size, objective="sink", selector="wanda")
    return prune(model, recipe, calibration=make_ids(8, 16), progress=False, **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")], ids=repr)
def test_microbatches_cover_a_batch_in_order(error: RuntimeError) -> None:
    batch_size, tried = BatchSize(), []

    def work(rows: slice) -> list[int]:
        tried.append(rows.stop - rows.start)
        if tried[-1] > 2:
            raise error
        return list(range(rows.start, rows.stop))

    assert list(chain(*batch_size.map(7, work))) == list(range(7))
    assert (tried, batch_size.most) == ([7, 4, 2, 2, 2, 1], 2)
    tried.clear()
    assert list(chain(*batch_size.map(3, work))) == [0, 1, 2]
    assert tried == [2, 1], "it is remembered"
    assert "at most 2 sequences" in batch_size.agree([None])
    assert not batch_size.agree([None])


def test_one_sequence_is_the_least() -> None:
    with pytest.raises(DeviceMemoryError, match="lower --max-seq-length"):
        BatchSize().map(4, raising(torch.OutOfMemoryError()))


@pytest.mark.parametrize("place", ["embed_tokens", "layers.0.mlp", "layers.1.mlp.act_fn"])
def test_statistics_are_those_of_smaller_batches(place: str) -> None:
    """Whatever a pass had seen before it failed: sums, their tokens, heavier first tokens, samples."""

    def found(model: PreTrainedModel, size: int, batch_size: BatchSize) -> list[Found]:
        stack = stack_of(model)
        acts = capture(model, stack, make_tokens(8, 16).split(size), batch_size=batch_size)
        every = []
        for block in stack.blocks:
            every += list(observe(block, acts, 0.5, 0.01))
            acts.forward(block)
        return every

    model, batch_size = make_llama(), BatchSize()
    with little_memory(model.model.get_submodule(place), 2):
        parts = found(model, 8, batch_size)
    assert batch_size.most == 2
    for part, whole, small in zip(parts, found(model, 8, BatchSize()), found(model, 2, BatchSize()), strict=True):
        for other in (whole, small):
            assert part.hessian is not None and other.hessian is not None  # noqa: PT018
            assert part.hessian.tokens == other.hessian.tokens == 128
            # Refused by the embedding, all that follows runs in the shapes of small batches: the same bits.
            eps = 0.0 if other is small and place == "embed_tokens" else EPS
            assert_close_in_norm(part.hessian.matrix_DD.float(), other.hessian.matrix_DD.float(), eps)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("place", ["model.layers.0.mlp", "lm_head"])
def test_the_gradient_pass_finds_what_smaller_batches_find(place: str, backward: bool) -> None:
    def found(size: int, batch_size: BatchSize) -> FisherWeights:
        stack = stack_of(model)
        acts = capture(model, stack, make_tokens(8, 16).split(size), whole=True, batch_size=batch_size)
        return fisher_weights(model, stack, acts, seed=3, residual=True)

    model, batch_size = make_llama(), BatchSize()
    with little_memory(model.get_submodule(place), 2, backward):
        parts = found(8, batch_size)
    assert batch_size.most == 2
    whole = found(8, BatchSize())
    for kind in ("tokens", "rows", "residual"):
        one, other = getattr(parts, kind), getattr(whole, kind)
        assert one.keys() == other.keys()
        for name, value in one.items():
            every = [torch.cat(each) if isinstance(each, list) else each for each in (value, other[name])]
            assert_close_in_norm(*every, name=f"{kind} of {name}")


def test_a_run_is_that_of_smaller_batches() -> None:
    """To the last bit, where the first block had not been summed up over a larger one."""
    model = make_llama()
    small = copy.deepcopy(model)
    expected = pruned(small, 2)
    with little_memory(model.model.layers[0].input_layernorm, 2):
        report = pruned(model, 8)
    assert ["at most 2 sequences ran together" in note for note in report.run.notes if "out of memory" in note] == [
        True
    ]
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert [linear.tokens for linear in report.linears] == [linear.tokens for linear in expected.linears]


def test_outside_a_batch_it_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    full = raising(torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr("optima.pruning.prune_linear", full)
    with pytest.raises(DeviceMemoryError, match=r"CUDA out of memory.* Lower --batch-size"):
        pruned(make_llama(), 4)


def test_a_run_that_resumes_with_more_memory_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(most: int, out: str, **options: Any) -> dict[str, torch.Tensor]:
        model = make_llama()
        with little_memory(model.model.layers[0].input_layernorm, most):
            pruned(model, 8, output_dir=tmp_path / out, **options)
        return model.state_dict()

    whole = run(2, "whole")
    with monkeypatch.context() as context:
        context.setattr(Writer, "commit", on_call(2, Writer.commit, raising(KeyboardInterrupt())))
        with pytest.raises(KeyboardInterrupt):
            run(2, "out")
    again = run(8, "out", resume=True)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
