"""Linears that route: those that send tokens to experts, weigh an expert's output, or choose what attention sees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# What configurations call the number of experts: num_experts, n_routed_experts, num_local_experts, moe_num_experts ...
EXPERT_COUNT = re.compile(r"(\w*_)?(num|n)_((routed|local)_)?experts")
# And of those that a token is sent to: num_experts_per_tok, moe_topk, moe_k, experts_per_token ...
EXPERTS_EACH = re.compile(r"(?!index_)((\w*_)?experts_per_tok(en)?|(\w*_)?top_?k(_experts)?|moe_k)")
ROUTER, ROUTERS = "router", {"gate", "wg"}
INDEXER = "indexer"  # holds linears that choose the tokens that attention sees (DeepSeek-V3.2, GLM-5)


def expert_counts(config: Any) -> set[int]:
    """How many experts the mixtures of a model have, as its configuration says."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = [value for name, value in vars(config or object).items() if EXPERT_COUNT.fullmatch(name)]
    return {value for value in values if isinstance(value, int) and value > 1}


def routed_share(config: Any) -> float:
    """Of the experts of a mixture, the share that a token is sent to; 1 where the configuration does not say."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = expert_counts(config)
    each = [value for name, value in vars(config or object).items() if EXPERTS_EACH.fullmatch(name)]
    known = [value for value in each if isinstance(value, int) and value > 0]
    return min(max(known) / min(counts), 1.0) if known and counts else 1.0


def routers_of(block: nn.Module, counts: set[int]) -> Iterator[str]:
    """Names inside the block of the linears that route tokens to experts, or choose those that attention sees.

    One output is a gate. Otherwise the name says so (router), or a neighbour holds experts and either the name (gate,
    wg) or the number of outputs does. The gate of an ordinary MLP is called gate_proj, and has no experts beside it.
    """
    modules = dict(block.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        around = [modules[".".join(parts[:-up])] for up in (1, 2) if up <= len(parts)]
        beside = [
            any("expert" in child for child, _ in (*up.named_children(), *up.named_parameters(recurse=False)))
            for up in around
        ]
        beside_experts = any(beside)
        named = (
            INDEXER in parts
            or any(ROUTER in part for part in parts)
            or (beside_experts and bool(ROUTERS & set(parts[-2:])))
        )
        # A shared expert may have as many channels as there are experts, and so may attention, one module further away.
        by_count = beside[0] and module.out_features in counts and not any("expert" in part for part in parts[:-1])
        if module.out_features == 1 or named or by_count:
            yield name


@torch.no_grad()
def own_output(linear: nn.Module, inputs: Tensor, returned: Any) -> Tensor | None:
    """A linear's output: what its module returned, or, of a router that chooses too (Llama 4), a part of it."""
    if isinstance(returned, Tensor):
        return returned
    own = nn.functional.linear(inputs, linear.weight, linear.bias)  # type: ignore[arg-type]
    return next((each for each in returned if isinstance(each, Tensor) and torch.equal(each, own)), None)


def module_around(router: str) -> str:
    """The name of the module that holds a router, with a dot behind; the router may be a module of several parts."""
    *around, last, _ = ["", *router.split(".")]
    names_router = ROUTER in last or last in {*ROUTERS, INDEXER}
    return ".".join([*around, *([] if names_router else [last])][1:]) + "."
