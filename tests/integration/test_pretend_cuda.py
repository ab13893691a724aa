"""Runs on a device that says it is CUDA's, where no tensor of main memory may meet one of the device."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from families import build, make_ids, stack_of
from pretend_cuda import PretendError, on_cuda, pretend_cuda
from runs import raising
from tiny import load_weights, save_model

from optima import Recipe, prune
from optima.calibration.capture import capture
from optima.calibration.halving import Halving
from optima.calibration.probe import forward
from optima.calibration.streams import map_tensors
from optima.data.batches import arguments
from optima.models.skeleton import skeleton
from optima.models.source import find_source
from optima.models.stacks import find_stacks
from optima.models.weights import Resident, Weights, open_weights
from optima.reporting.record import load_report

SLOW = pytest.mark.slow
TUNED = {"allocation": "loss", "tuning_epochs": 1}


@pytest.mark.parametrize(
    ("family", "dtype", "settings"),
    [
        ("llama", torch.bfloat16, {}),
        ("llama", torch.float32, {"pattern": ["2:4"], "keep_dense": 0.2, "selector": "sparsegpt"}),
        pytest.param("mixtral", torch.float32, TUNED, marks=SLOW),
        pytest.param("llama", torch.bfloat16, TUNED, marks=SLOW),
        pytest.param("llama", torch.float16, {"selector": "wanda", "true_sequential": True}, marks=SLOW),
        pytest.param("gemma4", torch.bfloat16, TUNED, marks=SLOW),
        ("qwen4_exp", torch.bfloat16, TUNED),
        pytest.param("t5", torch.float32, TUNED, marks=SLOW),
        pytest.param("bert", torch.float32, TUNED, marks=SLOW),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else None,
)
def test_a_run_stays_on_its_device(family: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    model, here = build(family).to(dtype), build(family).to(dtype)
    with pretend_cuda():
        report = prune(model, Recipe(device="cuda", batch_size=2, **settings), calibration=make_ids(4), progress=False)
    assert report.run.device.startswith("cuda")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters()), "the model came back"
    on_cpu = prune(here, Recipe(device="cpu", batch_size=2, **settings), calibration=make_ids(4), progress=False)
    assert report.error_geomean == pytest.approx(on_cpu.error_geomean, rel=0.05)


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_table_that_no_device_is_to_hold_stays_in_main_memory(streamed: bool, tmp_path: Path) -> None:
    model, name = build("qwen4_exp"), "ple.ple_embedding.ngram_embedding.weight"
    weights: Weights = Resident(model)
    if streamed:
        model.save_pretrained(tmp_path)
        source = find_source(str(tmp_path))
        model, weights = open_weights(source, skeleton(source)[0], "auto")
    block, before = stack_of(model).blocks[0], list(model.state_dict())
    assert block.unplaced == {name}
    with pretend_cuda(), weights.on(block, torch.device("cuda", 0)):
        found = {each: parameter.device.type for each, parameter in block.module.named_parameters()}
        assert {each for each, kind in found.items() if kind == "cpu"} == {name}
    assert list(model.state_dict()) == before


def test_weights_that_are_given_up_take_no_way_back(tmp_path: Path) -> None:
    """It would take as long as the way there. Buffers, which no checkpoint may have, come back."""
    source = find_source(str(save_model(tmp_path / "dense")))
    with pretend_cuda():
        model, weights = open_weights(source, skeleton(source)[0], "auto")
        (block, *_) = find_stacks(model)[0].blocks
        block.module.register_buffer("own", torch.ones(2), persistent=False)
        with weights.on(block, torch.device("cuda")):
            there = dict(block.module.named_parameters())
            assert all(on_cuda(tensor) for tensor in (*there.values(), block.module.own))
        assert all(on_cuda(parameter) for parameter in there.values())
        assert all(parameter.is_meta for parameter in block.module.parameters())
        assert not on_cuda(block.module.own)


def test_a_run_from_disk(tmp_path: Path) -> None:
    dense, errors = save_model(tmp_path / "dense"), []
    for device in ("cuda", "cpu"):
        recipe, output = Recipe(device=device, batch_size=2, selector="wanda"), tmp_path / device
        with pretend_cuda() if device == "cuda" else nullcontext():
            prune(dense, recipe, output_dir=output, calibration=make_ids(4), progress=False)
        report = load_report(output)
        assert report.run.device.startswith(device)
        errors.append(report.error_geomean)
        written = load_weights(output)
        zeros = [float((written[f"{linear.name}.weight"] == 0).float().mean()) for linear in report.linears]
        assert zeros == pytest.approx([linear.sparsity for linear in report.linears])
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_whole_pass_on_the_device(family: str, streamed: bool, tmp_path: Path) -> None:
    model, tokens = build(family), make_ids(2)
    expected = model(**arguments(model, tokens)).logits.detach()
    weights: Weights = Resident(model)
    if streamed:
        model.save_pretrained(tmp_path)
        source = find_source(str(tmp_path))
        model, weights = open_weights(source, skeleton(source)[0], "auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    with pretend_cuda():
        cuda = torch.device("cuda", 0)
        with torch.no_grad(), weights.outside(cuda):
            logits = forward(model, tokens).logits
            assert logits.device == cuda
            assert all(buffer.device == cuda for buffer in model.buffers() if buffer.numel())
        with pytest.raises(KeyboardInterrupt), weights.outside(cuda):
            raise KeyboardInterrupt
        assert all(tensor.device != cuda for tensor in chain(model.parameters(), model.buffers()))
        logits = logits.cpu()
    torch.testing.assert_close(logits, expected)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[name])


def test_a_weight_for_which_there_is_no_room_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path)
    source = find_source(str(tmp_path))
    model, weights = open_weights(source, skeleton(source)[0], "auto")
    with pretend_cuda():
        cuda = torch.device("cuda", 0)
        with torch.no_grad(), weights.outside(cuda):
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "to", raising(torch.OutOfMemoryError("no room")))
                with pytest.raises(torch.OutOfMemoryError):
                    assert model.lm_head.weight.device == cuda
            assert model.lm_head.weight.device == cuda


def test_the_head_stays_on_the_cpu_where_its_device_has_no_room() -> None:
    with pretend_cuda(), mock.patch.object(torch.cuda, "mem_get_info", return_value=(2**20, 2**30)):
        found = prune(build("llama"), Recipe(device="cuda"), calibration=make_ids(2), progress=False)
    assert any(note.startswith("the head ran on the CPU: cuda") for note in found.run.notes)


def test_what_it_refuses() -> None:
    with pretend_cuda():
        mine, other = torch.ones(3, device="cuda"), torch.ones(3)
        assert (mine.device.type, other.device.type, (mine * 2).cpu().device.type) == ("cuda", "cpu", "cpu")
        with pytest.raises(PretendError, match="same device"):
            mine + other
        with pytest.raises(PretendError, match="numpy"):
            mine.numpy()
        with pytest.raises(PretendError, match="not implemented"):
            torch.linalg.cholesky(torch.eye(3, device="cuda").bfloat16())


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_keys_and_values_for_later_blocks_wait_in_main_memory(family: str) -> None:
    model = build(family)
    stack = stack_of(model)
    waiting: list[torch.Tensor] = []
    with pretend_cuda(), torch.no_grad():
        cuda, weights = torch.device("cuda", 0), Resident(model)
        streams = capture(model, stack, [make_ids(2)], whole=True, halving=Halving(cuda))
        for block in stack.blocks:
            with weights.on(block, cuda):
                known = [dict(state) for state in streams.states(block, 0)]
                streams.run(block, 0, looks=True)
                assert known == [dict(state) for state in streams.states(block, 0)]
                streams.advance(block)
            for state in streams.states(block, 0):
                map_tensors(list(state.values()), waiting.append)
        assert waiting
        assert not any(on_cuda(tensor) for tensor in waiting)
