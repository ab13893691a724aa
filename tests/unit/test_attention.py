"""Attention on a CPU: causal by parts, without keys that no query of a part may see, and of single queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hessian_accumulation import streams_into
from tiny import make_llama, make_tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.overrides import TorchFunctionMode

from optima.calibration.attention import LONG, PART, AttentionOnCPU


class Keys(TorchFunctionMode):
    """Notes how many keys each call of the kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is attention:
            self.given.append(args[1].shape[-2])
        return function(*args, **(kwargs or {}))


def inputs(length: int, heads: int = 4, of_keys: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = [(2, count, length, 16) for count in (heads, of_keys, of_keys)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def in_parts(*given: Tensor, **options: Any) -> tuple[Tensor, list[int]]:
    with Keys() as keys, AttentionOnCPU(), torch.no_grad():
        return attention(*given, **options), keys.given


@pytest.mark.parametrize("length", [PART + 1, 2 * PART, 200, LONG - 1])
@pytest.mark.parametrize(("of_keys", "options"), [(4, {}), (2, {"enable_gqa": True, "scale": 0.3})])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_it_is_the_attention_of_the_whole(
    length: int, of_keys: int, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    given = inputs(length, of_keys=of_keys, dtype=dtype)
    found, keys = in_parts(*given, is_causal=True, **options)
    expected = attention(*(each.double() for each in given), is_causal=True, **options)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert keys == [*range(PART, length, PART), length]


def test_attention_of_another_kind_is_left_as_it_is() -> None:
    query, key, value = inputs(100)
    mask = torch.ones(100, 100, dtype=torch.bool).tril()
    for options in ({}, {"attn_mask": mask}, {"is_causal": True, "dropout_p": 1e-9}):
        assert in_parts(query, key, value, **options)[1] == [100]
    assert in_parts(query[:, :, :70], key, value, is_causal=True)[1] == [100], "aligned with the first keys"
    for length in (PART, LONG):
        assert in_parts(*inputs(length), is_causal=True)[1] == [length]
    assert in_parts(*(each.to("meta") for each in (query, key, value)), is_causal=True)[1] == [100]


@pytest.mark.parametrize(("of_keys", "options"), [(4, {}), (2, {"enable_gqa": True, "scale": 0.3})])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_of_a_single_query(of_keys: int, options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = inputs(100, of_keys=of_keys, dtype=dtype)
    value = torch.cat([value, value[..., :3]], dim=-1)  # heads of values may be of another size
    found, keys = in_parts(query[:, :, 7:8], key, value, **options)
    expected = attention(*(each.double() for each in (query[:, :, 7:8], key, value)), **options)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert keys == [], "by plain products"
    mask = torch.rand(1, 1, 1, 100, generator=torch.Generator().manual_seed(0)) < 0.5
    masked, keys = in_parts(query[:, :, 7:8], key, value, attn_mask=mask, **options)
    assert keys == [100]
    assert not torch.equal(masked, found)


def test_too_few_heads_for_the_threads_are_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert in_parts(*inputs(100), is_causal=True)[1] == [100]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert in_parts(*inputs(100), is_causal=True)[1] == [64, 100]


def test_gradients_are_those_of_the_whole() -> None:
    given = [each.requires_grad_() for each in inputs(100)]
    with Keys() as keys, AttentionOnCPU():
        found = attention(*given, is_causal=True)
    assert keys.given == [100]
    assert found.requires_grad


def test_forward_passes_of_blocks_take_parts() -> None:
    model, tokens = make_llama(), make_tokens(2, 100)
    block, streams = streams_into(model, [tokens])
    hidden = streams.hidden[0].clone()
    with Keys() as keys:
        streams.advance(block)
    assert keys.given == [64, 100]
    with torch.no_grad():
        args, kwargs = streams.calls[block.index][0]
        expected = block.module(hidden, *args, **kwargs)
    assert torch.allclose(streams.hidden[0], expected, rtol=1e-5, atol=1e-5)


def test_large_scores_of_a_single_query_are_as_exact_as_the_kernels() -> None:
    """Products in bfloat16 round a score of 30 by up to a sixteenth, of which the softmax makes as much."""
    query, key, value = inputs(100, dtype=torch.bfloat16)
    query = 8.0 * query[:, :, 7:8]
    expected = attention(query.double(), key.double(), value.double())
    found, kernels = in_parts(query, key, value)[0], attention(query, key, value)
    error, kernels_error = ((each.double() - expected).norm() for each in (found, kernels))
    assert error < 1.5 * kernels_error
