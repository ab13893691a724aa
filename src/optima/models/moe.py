"""Mixtures of experts: each expert of a fused parameter runs as a linear of its own.

transformers keeps the experts of a mixture in parameters of three dimensions, (experts, outputs, inputs), or (experts,
inputs, outputs) where they are transposed, and multiplies all of them in one kernel. Inside ``linearized`` the module
calls an ``ExpertLinear`` for each expert instead, on the tokens routed to it, so that hooks see inputs, outputs and
gradients as on any linear. Weights are views of the fused parameter: there is nothing to fuse again, a checkpoint has
the same tensors, and ``torch.func.functional_call`` with another fused parameter reaches the experts.

Shapes: O outputs, D inputs, T tokens of the module or of an expert, K experts of a token, E experts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from optima.device import forward_replaced

UPS, DOWN = ("gate_up_proj", "up_proj"), "down_proj"  # what transformers calls the fused parameters


class ExpertLinear(nn.Module):
    """One expert of a fused parameter, as a linear without parameters of its own.

    Attributes:
        experts: the mixture.
        parameter: name of the fused parameter in its module.
        expert: number of the expert.
        tokens_T: the tokens of the module's input that the last call read.
    """

    def __init__(self, experts: FusedExperts, parameter: str, expert: int) -> None:
        super().__init__()
        self.experts, self.parameter, self.expert = experts, parameter, expert
        self.tokens_T = torch.zeros(0, dtype=torch.int64)

    @property
    def weight(self) -> Tensor:
        """weight_OD, a view."""
        return self.experts.orient(self.parameter, self.expert, self.experts.parameter(self.parameter))

    @property
    def hooked(self) -> bool:
        """Whether anybody looks at its calls."""
        return bool(self._forward_pre_hooks or self._forward_hooks)

    def forward(self, inputs_TD: Tensor) -> Tensor:
        """inputs_TD @ weight_OD^T, and the bias if there is one."""
        bias = getattr(self.experts.module, f"{self.parameter}_bias", None)
        return nn.functional.linear(inputs_TD, self.weight, None if bias is None else bias[self.expert])


class FusedExperts:
    """The experts of one module.

    Args:
        name: full name of the module in the model.
        module: holds the fused parameters.
        transposed: of each fused parameter by its name in the module, whether inputs come before outputs.
    """

    def __init__(self, name: str, module: nn.Module, transposed: dict[str, bool]) -> None:
        self.name, self.module, self.transposed = name, module, transposed
        self.up, self.down = (
            [ExpertLinear(self, parameter, expert) for expert in range(self.count)] for parameter in transposed
        )

    @property
    def count(self) -> int:
        """How many experts."""
        return len(self.parameter(DOWN))

    @property
    def routed(self) -> bool:
        """Whether the module is called with each token's experts; else with all tokens for each expert (Llama 4)."""
        return _is_routed(self.module)

    def parameter(self, name: str) -> Tensor:
        """A fused parameter."""
        found: Tensor = getattr(self.module, name)
        return found

    def orient(self, name: str, expert: int, stored: Tensor) -> Tensor:
        """An expert's part of a tensor like the parameter ``name``, outputs x inputs: a view."""
        return stored[expert].mT if self.transposed[name] else stored[expert]

    def hidden(self, expert: int, inputs_TD: Tensor) -> Tensor:
        """What an expert's second linear reads where its first one reads ``inputs_TD``."""
        module: Any = self.module
        found = self.up[expert](inputs_TD)
        if self.up[expert].parameter == "up_proj":
            activated: Tensor = module.act_fn(found)
            return activated
        if hasattr(module, "_apply_gate"):
            gated: Tensor = module._apply_gate(found)
            return gated
        gate, up = found.chunk(2, dim=-1)
        product: Tensor = module.act_fn(gate) * up
        return product

    def forward(self, only: Collection[int] | None, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward pass, expert by expert; experts that are not in ``only`` add nothing."""
        bound = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs)
        hidden, *routing = list(bound.arguments.values())[1:]
        wanted = range(self.count) if only is None else only
        return self._routed(hidden, routing[0], routing[1], wanted) if routing else self._scaled(hidden, wanted)

    def _routed(self, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, wanted: Collection[int]) -> Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        for expert in expert_TK.unique().tolist():
            if expert in wanted:  # what is masked has the number after the last
                place_T, tokens_T = (expert_TK.mT == expert).nonzero(as_tuple=True)
                found_TD = self._run(expert, hidden_TD[tokens_T], tokens_T)
                if getattr(self.module, "has_post_expert_norm", False):
                    found_TD = self.module.post_expert_norm(found_TD)  # type: ignore[operator]
                found_TD = found_TD * weight_TK[tokens_T, place_T, None]
                output_TD.index_add_(0, tokens_T, found_TD.to(output_TD.dtype))
        return output_TD

    def _scaled(self, hidden_TD: Tensor, wanted: Collection[int]) -> Tensor:
        """Of all tokens for one expert after another, scaled by the router; zeros are routed elsewhere."""
        found = []
        for expert, own_TD in enumerate(hidden_TD.view(self.count, -1, hidden_TD.shape[-1])):
            output_TD = torch.zeros_like(own_TD)
            tokens_T = own_TD.ne(0).any(dim=1).nonzero()[:, 0]
            if expert in wanted and len(tokens_T):
                output_TD = output_TD.index_copy(0, tokens_T, self._run(expert, own_TD[tokens_T], tokens_T))
            found.append(output_TD)
        return torch.cat(found)

    def _run(self, expert: int, inputs_TD: Tensor, tokens_T: Tensor) -> Tensor:
        up, down = self.up[expert], self.down[expert]
        up.tokens_T = down.tokens_T = tokens_T
        output: Tensor = down(self.hidden(expert, inputs_TD))
        return output


@contextmanager
def linearized(experts: Iterable[FusedExperts], only_hooked: bool = False) -> Iterator[None]:
    """Inside, the forward pass of these modules calls a linear for each expert that has tokens.

    ``only_hooked``: experts without hooks on entry add nothing to the output, at no cost.
    """
    with ExitStack() as stack:
        for each in set(experts):
            hooked = {linear.expert for linear in (*each.up, *each.down) if linear.hooked} if only_hooked else None
            stack.enter_context(forward_replaced(each.module, partial(each.forward, hooked)))
        yield


def experts_of(module: nn.Module, prefix: str) -> list[FusedExperts]:
    """The mixtures inside ``module``, whose full name is ``prefix``, that keep experts in fused parameters."""
    found = []
    for name, child in module.named_modules():
        if transposed := _layout(child):
            found.append(FusedExperts(f"{prefix}.{name}".strip("."), child, transposed))
    return found


def _layout(module: nn.Module) -> dict[str, bool]:
    """Of both fused parameters whether inputs come first; empty if there are none, or their shapes do not say.

    The first leads from the hidden size to another, the last one back; the same size stands at both ends.
    """
    fused = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    first, last = next((fused[name] for name in UPS if name in fused), None), fused.get(DOWN)
    if first is None or last is None or len(fused) != 2 or len(first) != len(last):
        return {}
    ways = [False] * (first.shape[2] == last.shape[1]) + [True] * (first.shape[1] == last.shape[2])
    stated = getattr(module, "is_transposed", None)
    if stated in ways:
        return dict.fromkeys(fused, bool(stated))
    return dict.fromkeys(fused, ways[0]) if len(ways) == 1 else {}


def _is_routed(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) > 2


def split_on_disk(model: PreTrainedModel, linears: Iterable[nn.Module]) -> int:
    """Weights of the experts among ``linears`` whose fused parameter transformers writes in parts.

    A writer keeps a whole copy until the end.
    """
    converters = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]
    fused = [target for each in converters for target in each.target_patterns]
    experts = [each for each in linears if isinstance(each, ExpertLinear)]
    names = [f"{each.experts.name}.{each.parameter}" for each in experts]
    split = [any(target in name for target in fused) for name in names]
    return sum(math.prod(each.weight.shape) for each, yes in zip(experts, split, strict=True) if yes)
