"""Experts of a mixture as linears of their own.

transformers keeps the experts of a mixture in parameters of three dimensions, (experts, outputs, inputs), or (experts,
inputs, outputs) where they are transposed, and multiplies all of them in one kernel. Inside ``linearized`` the module
calls an ``ExpertLinear`` for each expert instead, on the tokens routed to it, so that hooks see inputs, outputs and
gradients as on any linear. Weights are views of the fused parameter, so that nothing has to be fused again.

Shapes: O outputs, D inputs, T tokens of a module or of an expert, K experts of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optima.models.forward import forward_replaced

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

    def forward(self, inputs_TD: Tensor) -> Tensor:
        """inputs_TD @ weight_OD^T, and the bias if there is one."""
        weight_OD = self.experts.orient(self.parameter, self.expert, self.experts.parameter(self.parameter))
        bias = getattr(self.experts.module, f"{self.parameter}_bias", None)
        return nn.functional.linear(inputs_TD, weight_OD, None if bias is None else bias[self.expert])


class FusedExperts:
    """The experts of one module.

    Args:
        name: full name of the module in the model.
        module: holds the fused parameters.
        transposed: of each fused parameter by its name in the module, whether inputs come before outputs.

    Attributes:
        up, down: the linears of each expert.
        routed: whether the module is called with each token's experts; else with all tokens for each expert (Llama 4).
    """

    def __init__(self, name: str, module: nn.Module, transposed: dict[str, bool]) -> None:
        self.name, self.module, self.transposed = name, module, transposed
        self.count = len(self.parameter(DOWN))
        self.routed = len(inspect.signature(type(module).forward).parameters) > 2
        self.up, self.down = (
            [ExpertLinear(self, parameter, expert) for expert in range(self.count)] for parameter in transposed
        )

    def parameter(self, name: str) -> Tensor:
        """A fused parameter."""
        found: Tensor = getattr(self.module, name)
        return found

    def orient(self, name: str, expert: int, stored: Tensor) -> Tensor:
        """An expert's part of a tensor like the parameter ``name``, outputs x inputs: a view."""
        return stored[expert].mT if self.transposed[name] else stored[expert]

    def hidden(self, expert: int, inputs_TD: Tensor) -> Tensor:
        """The inputs of an expert's second linear, from those of its first."""
        module: Any = self.module
        found: Tensor = self.up[expert](inputs_TD)
        if self.up[expert].parameter == "up_proj":
            return module.act_fn(found)  # type: ignore[no-any-return]
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(found)  # type: ignore[no-any-return]
        gate, up = found.chunk(2, dim=-1)
        return module.act_fn(gate) * up  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward pass, expert by expert."""
        bound = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs)
        _, hidden, *routing = bound.arguments.values()
        return self._routed(hidden, routing[0], routing[1]) if routing else self._scaled(hidden)

    def _routed(self, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        for expert in expert_TK.unique().tolist():
            if expert < self.count:  # what is masked has the number after the last
                place_T, tokens_T = (expert_TK.mT == expert).nonzero(as_tuple=True)
                found_TD = self._run(expert, hidden_TD[tokens_T], tokens_T)
                found_TD = found_TD * weight_TK[tokens_T, place_T, None]
                output_TD.index_add_(0, tokens_T, found_TD.to(output_TD.dtype))
        return output_TD

    def _scaled(self, hidden_TD: Tensor) -> Tensor:
        """The output for all tokens, scaled by the router, expert after expert; zeros are routed elsewhere."""
        found = []
        for expert, own_TD in enumerate(hidden_TD.view(self.count, -1, hidden_TD.shape[-1])):
            output_TD = torch.zeros_like(own_TD)
            tokens_T = own_TD.ne(0).any(dim=1).nonzero()[:, 0]
            if len(tokens_T):
                output_TD = output_TD.index_copy(0, tokens_T, self._run(expert, own_TD[tokens_T], tokens_T))
            found.append(output_TD)
        return torch.cat(found)

    def _run(self, expert: int, inputs_TD: Tensor, tokens_T: Tensor) -> Tensor:
        self.up[expert].tokens_T = self.down[expert].tokens_T = tokens_T
        return self.down[expert](self.hidden(expert, inputs_TD))  # type: ignore[no-any-return]


@contextmanager
def linearized(experts: Iterable[FusedExperts]) -> Iterator[None]:
    """Inside, the forward pass of these modules calls a linear for each expert that has tokens."""
    with ExitStack() as stack:
        for each in set(experts):
            stack.enter_context(forward_replaced(each.module, each.forward))
        yield


def experts_of(module: nn.Module, prefix: str) -> list[FusedExperts]:
    """The mixtures inside ``module``, whose full name is ``prefix``, that keep experts in fused parameters."""
    return [
        FusedExperts(f"{prefix}.{name}".strip("."), child, transposed)
        for name, child in module.named_modules()
        if (transposed := _layout(child))
    ]


def _layout(module: nn.Module) -> dict[str, bool]:
    """Whether inputs come first in each fused parameter; empty if there are none, or shapes do not say.

    The first leads from the hidden size to another, the last one back; the same size stands at both ends.
    """
    fused = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    first, last = next((fused[name] for name in UPS if name in fused), None), fused.get(DOWN)
    if first is None or last is None or len(fused) != 2 or len(first) != len(last):
        return {}
    ways = [False] * (first.shape[2] == last.shape[1]) + [True] * (first.shape[1] == last.shape[2])
    stated = getattr(module, "is_transposed", None)
    if stated in ways:
        ways = [bool(stated)]
    return dict.fromkeys(fused, ways[0]) if len(ways) == 1 else {}
