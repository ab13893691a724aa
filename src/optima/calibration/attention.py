"""Causal attention on a CPU without the products that its mask throws away.

torch's kernel for CPUs takes 512 keys at a time, and of sequences below 768 tokens 64 queries at a time (or 32): of 512
tokens it multiplies all by all, and masks half. Parts of the queries, each with the keys that it may see, take three
quarters of the time.

Shapes: B sequences, H heads, L queries and as many keys, P queries of a part, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# Queries of a part: what the kernel takes at a time.
PART = 64
# From this length on it takes 256 of them, for which parts would be too small.
LONG = 768


class CausalByParts(TorchFunctionMode):
    """Inside this context causal attention is by parts where that is faster: on a CPU, of 65 to 767 tokens.

    Sums of the softmax are in another order then, as they are at another length; not for gradients.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is scaled_dot_product_attention and not torch.is_grad_enabled():
            return _attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attention(
    query_BHLE: Tensor,
    key_BHLE: Tensor,
    value_BHLE: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """As ``scaled_dot_product_attention``."""
    length = query_BHLE.shape[-2]
    separable = is_causal and attn_mask is None and not dropout_p and length == key_BHLE.shape[-2]
    enough = query_BHLE.shape[:-2].numel() >= torch.get_num_threads()  # the kernel shares out sequences and heads
    if not (separable and enough and query_BHLE.device.type == "cpu" and PART < length < LONG):
        return scaled_dot_product_attention(
            query_BHLE, key_BHLE, value_BHLE, attn_mask, dropout_p, is_causal, **options
        )
    parts = []
    for first in range(0, length, PART):
        query_BHPE = query_BHLE[..., first : first + PART, :]
        seen = first + query_BHPE.shape[-2]
        mask_PL = torch.ones(seen - first, seen, dtype=torch.bool).tril_(first)
        keys, values = key_BHLE[..., :seen, :], value_BHLE[..., :seen, :]
        parts.append(scaled_dot_product_attention(query_BHPE, keys, values, mask_PL, **options))
    return torch.cat(parts, dim=-2)
