"""A model is looked at before the long work, and what was seen of it takes no memory afterwards."""

from __future__ import annotations

import weakref

import torch
from families import build, make_ids, stack_of

from optima.calibration.activations import map_tensors
from optima.calibration.capture import capture
from optima.calibration.probe import Given, agree


def test_values_that_were_compared_are_let_go() -> None:
    model = build("glm_moe_dsa")  # whose blocks return more than hidden states
    acts = capture(model, stack_of(model), [make_ids(4)])
    held: list[int] = []
    map_tensors(acts.probe.outputs, lambda tensor: held.append(tensor.untyped_storage().nbytes()))
    assert held
    assert max(held) <= 4
    assert acts.probe.outputs[0][0].shape[-1] == 32


def test_inputs_are_held_until_their_block_is_done() -> None:
    given, tensors = Given(), [torch.zeros(2, 4) for _ in range(2)]
    alive = [weakref.ref(tensor) for tensor in tensors]
    for tensor in tensors:
        given.add("q", tensor)
    given.add("k", tensors[0])
    del tensor, tensors
    assert all(ref() is not None for ref in alive)
    given.release()
    assert all(ref() is None for ref in alive)
    assert given.inputs["q"][0] == given.inputs["k"][0]
    again = torch.zeros(2, 4)
    given.add("v", again)
    given.release()
    given.add("o", again)
    assert given.inputs["v"] != given.inputs["o"]


def test_weights_may_be_coarser_than_a_residual_stream() -> None:
    stream = torch.linspace(-4, 4, 64)
    rounded = stream + 4 * torch.finfo(torch.bfloat16).eps
    assert agree(rounded, stream, torch.bfloat16)
    assert not agree(rounded, stream, torch.float32)
