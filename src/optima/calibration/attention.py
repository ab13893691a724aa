"""Attention on a CPU without the work that torch's kernel wastes: on keys behind a mask, and on a single query.

The kernel takes 512 keys at a time, and of sequences below 768 tokens 64 queries at a time (or 32): of 512 tokens it
multiplies all by all, and masks half. Parts of the queries, each with the keys that it may see, take three quarters of
the time. A word that is written is one query, of which the kernel makes as much work as of 32: plain products take a
tenth of its time in bfloat16.

Shapes: B sequences, H heads, L queries and as many keys, P queries of a part, E size of a head. Of a single query: S
keys, K heads of keys, G heads of queries for each of them.
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


class AttentionOnCPU(TorchFunctionMode):
    """Inside this context attention is faster on a CPU: causal one of 65 to 767 tokens, and that of single queries.

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
    given, length = (query_BHLE, key_BHLE, value_BHLE), query_BHLE.shape[-2]
    plain = attn_mask is None and not dropout_p and query_BHLE.device.type == "cpu"
    if plain and length == 1 and not is_causal and query_BHLE.ndim == 4:
        return _of_one(*given, options.get("scale"))
    separable = plain and is_causal and length == key_BHLE.shape[-2]
    enough = query_BHLE.shape[:-2].numel() >= torch.get_num_threads()  # the kernel shares out sequences and heads
    if not (separable and enough and PART < length < LONG):
        return scaled_dot_product_attention(*given, attn_mask, dropout_p, is_causal, **options)
    parts = []
    for first in range(0, length, PART):
        query_BHPE = query_BHLE[..., first : first + PART, :]
        seen = first + query_BHPE.shape[-2]
        mask_PL = torch.ones(seen - first, seen, dtype=torch.bool).tril_(first)
        keys, values = key_BHLE[..., :seen, :], value_BHLE[..., :seen, :]
        parts.append(scaled_dot_product_attention(query_BHPE, keys, values, mask_PL, **options))
    return torch.cat(parts, dim=-2)


def _of_one(query_BH1E: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, scale: float | None) -> Tensor:
    """Of a query that sees all keys; heads of queries that share keys are multiplied together."""
    batch, heads, _, size = query_BH1E.shape
    query_NGE = query_BH1E.reshape(batch * key_BKSE.shape[1], -1, size)
    key_NSE, value_NSE = key_BKSE.flatten(0, 1), value_BKSE.flatten(0, 1)
    product_NGS = query_NGE @ key_NSE.mT
    score_NGS = product_NGS.float()
    if product_NGS.dtype != torch.float32:  # what was rounded off: sums are of float32, and large scores need all of it
        score_NGS += torch.baddbmm(product_NGS, query_NGE, key_NSE.mT, beta=-1)
    score_NGS *= size**-0.5 if scale is None else scale
    found_NGE = score_NGS.softmax(dim=-1).to(value_NSE.dtype) @ value_NSE
    return found_NGE.reshape(batch, heads, 1, -1)
