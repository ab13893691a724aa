"""Stacks, blocks, linears, routers and experts of any transformer of the library, found by structure.

transformers keeps the experts of a mixture in parameters of three dimensions, (experts, outputs, inputs), or (experts,
inputs, outputs) where they are transposed, and multiplies all of them in one kernel. Inside ``Block.linearized`` the
module calls an ``ExpertLinear`` for each expert instead, on the tokens routed to it, so that hooks see inputs, outputs
and gradients as on any linear. Weights are views of the fused parameter, so that nothing has to be fused again.

Shapes: O outputs, D inputs, T tokens of a module or of an expert, K experts of a token.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optima.device import forward_replaced
from optima.errors import ModelError, RecipeError
from optima.models.inspect import head_of
from optima.names import kind

# Experts that are modules of their own, such as experts.3.up_proj or expert_3.wi; a shared expert is none.
EXPERT = re.compile(r"(?<!shared_)experts?[._]\w*?\d")
ROUTER, ROUTERS = "router", {"gate", "wg"}
INDEXER = "indexer"  # holds linears that choose the tokens that attention sees (DeepSeek-V3.2, GLM-5)
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
        """Of all tokens for one expert after another, scaled by the router; zeros are routed elsewhere."""
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
        ways = [bool(stated)]
    return dict.fromkeys(fused, ways[0]) if len(ways) == 1 else {}


@dataclass(frozen=True)
class Linear:
    """Something prunable inside a block.

    Attributes:
        name: full name of the module in the model; of an expert that of the fused parameter, and the expert's number.
        module: ``nn.Linear``, GPT-2's ``Conv1D``, which stores its weight as inputs x outputs, or an ``ExpertLinear``.
    """

    name: str
    module: nn.Module

    @property
    def expert(self) -> ExpertLinear | None:
        """The module, if the weight is part of a fused parameter."""
        return self.module if isinstance(self.module, ExpertLinear) else None

    @property
    def parameter(self) -> Tensor:
        """The parameter that holds the weight, as the model stores it; of an expert that of all experts."""
        expert = self.expert
        if expert is not None:
            return expert.experts.parameter(expert.parameter)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D)."""
        outputs, inputs = self.read().shape
        return int(outputs), int(inputs)

    def orient(self, stored: Tensor) -> Tensor:
        """This linear's part of a tensor like ``parameter`` (a mask, a gradient) as outputs x inputs: a view."""
        expert = self.expert
        if expert is not None:
            return expert.experts.orient(expert.parameter, expert.expert, stored)
        return stored.mT if isinstance(self.module, Conv1D) else stored

    def read(self) -> Tensor:
        """weight_OD: a view of the parameter, without gradient."""
        return self.orient(self.parameter.detach())

    def write(self, weight_OD: Tensor) -> None:
        """Replace the weight, cast to the parameter's dtype and device."""
        # A tensor made in inference mode changes in inference mode alone.
        with torch.inference_mode(self.parameter.is_inference()), torch.no_grad():
            self.read().copy_(weight_OD)

    def observe(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``see`` with the inputs of every call, (..., D), before it is computed, until the handle's ``remove()``.

        Experts are called inside ``linearized`` alone.
        """
        return self.module.register_forward_pre_hook(lambda module, args: see(args[0]))

    def watch(self, see: Callable[[Tensor, Tensor | None], None]) -> RemovableHandle:
        """Call ``see`` with the gradient at the outputs of every call, (..., O), until the handle's ``remove()``.

        And with the tokens, (T,), that an expert's call read; None for other linears.
        """

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            tokens_T = getattr(module, "tokens_T", None)
            if not torch.is_grad_enabled():
                return None
            # Positions, or another stack's output, do not depend on this stack's hidden states.
            seen = output if output.requires_grad else output.detach().requires_grad_(True)
            seen.register_hook(lambda gradient: see(gradient, tokens_T))
            return None if seen is output else seen.clone()

        return self.module.register_forward_hook(hook)


@dataclass(frozen=True)
class Block:
    """One decoder or encoder layer of the model: a member of a stack.

    Attributes:
        index: place in the stack.
        name: full name of the module in the model.
        module: the module.
        linears: those to prune, in the order they are defined.
        routers: names of the linears that send tokens to experts, or weigh an expert's output.
        excluded: linears that ``select_linears`` left out.
        shared: of the linears whose weight is also another parameter of the model, that one's name.
        common: names, inside the module, of parameters that are outside it too.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[Linear, ...]
    routers: frozenset[str] = frozenset()
    excluded: tuple[Linear, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    common: frozenset[str] = frozenset()

    def linearized(self) -> AbstractContextManager[None]:
        """``linearized`` for all mixtures whose experts are among ``linears``."""
        return linearized(each.expert.experts for each in self.linears if each.expert is not None)


@dataclass(frozen=True)
class Stack:
    """Blocks that hidden states pass through, in order.

    Attributes:
        blocks: its members.
        part: what it is of the model.
    """

    blocks: tuple[Block, ...]
    part: Literal["whole", "encoder", "decoder"] = "whole"

    @property
    def needed(self) -> int:
        """How many of the first blocks must run: up to the last one with linears to prune."""
        return max((block.index + 1 for block in self.blocks if block.linears), default=0)


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks of blocks: the largest list of modules some of which contain linears.

    An encoder-decoder has two, in the order in which they run; of a multimodal model it is that of the language model.
    That the members are called in order on hidden states is for a probe to check.

    Raises:
        ModelError: if there is no such list.
    """
    if not isinstance(model, PreTrainedModel):
        return [_stack(model, model, "whole")]
    if model.config.is_encoder_decoder:
        return [_stack(model, model.get_encoder(), "encoder"), _stack(model, model.get_decoder(), "decoder")]
    multimodal = model.config.get_text_config() is not model.config
    return [_stack(model, model.get_decoder() if multimodal else model, "whole")]


def _stack(model: nn.Module, root: nn.Module, part: Literal["whole", "encoder", "decoder"]) -> Stack:
    """The largest list of blocks inside ``root``, a module of ``model``."""
    inside = set(root.modules())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.ModuleList) and _may_be_stack(module)
    ]
    if not lists:
        raise ModelError(
            f"no stack of transformer blocks in {type(model).__name__}: no module list has members that contain "
            f"linears, and its children are {[name for name, _ in model.named_children()]}"
        )
    name, members = max(lists, key=lambda item: count_parameters(item[1]))
    owners = defaultdict(list)
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(owner.removesuffix(".weight"))
    prefix = f"{name}." if name else ""
    blocks = (_block(index, f"{prefix}{index}", module, owners) for index, module in enumerate(members))
    return Stack(tuple(blocks), part)


def _may_be_stack(members: nn.ModuleList) -> bool:
    # A list of bare linears (experts, heads) is not a stack of blocks.
    bare = any(isinstance(module, nn.Linear | Conv1D) for module in members)
    return not bare and any(isinstance(module, nn.Linear | Conv1D) for module in members.modules())


def _block(index: int, name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> Block:
    """``owners``: the names of each parameter of the model."""
    linears = tuple(linears_of(module, name))
    pairs = ((linear.name, other) for linear in linears for other in owners[id(linear.parameter)])
    return Block(
        index,
        name,
        module,
        linears,
        routers=frozenset(f"{name}.{inner}" for inner in routers_of(module)),
        # The parameter of an expert is named like that of all experts.
        shared={linear: other for linear, other in pairs if other not in (linear, linear.rpartition(".")[0])},
        common=frozenset(
            inner
            for inner, parameter in module.named_parameters()
            if not all(f"{other}.".startswith(f"{name}.") for other in owners[id(parameter)])
        ),
    )


def linears_of(module: nn.Module, prefix: str) -> list[Linear]:
    """Every linear inside ``module``, whose full name is ``prefix``; after them the experts of fused parameters."""
    modules = [
        Linear(f"{prefix}.{name}".strip("."), child)
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, Conv1D))
        and not hasattr(child, "n_groups")  # DeepSeek-V4: rows that read a slice of the inputs each share no Hessian
    ]
    return modules + [
        Linear(f"{experts.name}.{linear.parameter}.{linear.expert}", linear)
        for experts in experts_of(module, prefix)
        for linear in (*experts.up, *experts.down)
    ]


def is_expert(linear: Linear) -> bool:
    """Whether a linear is an expert's, in a fused parameter or in a module of its own."""
    return linear.expert is not None or EXPERT.search(linear.name) is not None


def routers_of(block: nn.Module) -> Iterator[str]:
    """Names inside the block of the linears that route tokens to experts, or choose those that attention sees.

    One output is a gate. Otherwise the name says so: router, or gate and wg near experts. The gate of an ordinary MLP
    is called gate_proj, and has no experts near it.
    """
    modules = dict(block.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        around = [modules[".".join(parts[:-up])] for up in (1, 2) if up <= len(parts)]
        near = (child for up in around for child, _ in (*up.named_children(), *up.named_parameters(recurse=False)))
        near_experts = any("expert" in child for child in near)
        named = INDEXER in parts or any(ROUTER in part for part in parts)
        if module.out_features == 1 or named or (near_experts and ROUTERS & set(parts[-2:])):
            yield name


def routing_module(router: str) -> str:
    """The name of the module of a router, which may have several parts: that of the linear, or of one around it."""
    parts = router.split(".")
    last = next((i for i, part in enumerate(parts) if ROUTER in part or part in {*ROUTERS, INDEXER}), len(parts) - 1)
    return ".".join(parts[: last + 1])


def select_linears(stacks: Sequence[Stack], targets: Sequence[str], ignore: Sequence[str]) -> list[Stack]:
    """The stacks with only the linears whose full name matches a target and no ignored regex (``re.search``).

    Routers stay dense.

    Raises:
        ModelError: if nothing is left (the message lists what was there), or two linears are one weight.
        RecipeError: if a target matches no linear.
    """
    names = [name for name, block in _linears(stacks) if name not in block.routers]
    present = f"the linears of the blocks are {', '.join(sorted(set(map(kind, names)))) or 'none'}"

    def matches(name: str, regexes: Sequence[str]) -> bool:
        return any(re.search(regex, name) for regex in regexes)

    def select(block: Block) -> Block:
        parts: tuple[list[Linear], list[Linear]] = [], []  # excluded, chosen
        for linear in block.linears:
            wanted = matches(linear.name, targets) and not matches(linear.name, ignore)
            parts[wanted and linear.name not in block.routers].append(linear)
        return replace(block, linears=tuple(parts[1]), excluded=tuple(parts[0]))

    selected = [replace(stack, blocks=tuple(select(block) for block in stack.blocks)) for stack in stacks]
    if not any(stack.needed for stack in selected):
        raise ModelError(f"no linear matches targets {list(targets)} without matching ignore {list(ignore)}: {present}")
    if idle := [regex for regex in targets if not any(matches(name, [regex]) for name in names)]:
        raise RecipeError(f"targets has {idle[0]!r}, which matches no linear: {present}")
    _check_shared(selected)
    return selected


def _check_shared(stacks: Sequence[Stack]) -> None:
    """A weight in two places would be pruned twice, the second time for inputs of another place."""
    shared = {name: (block, block.shared[name]) for name, block in _linears(stacks) if name in block.shared}
    if shared:
        name, (_, other) = next(iter(shared.items()))
        regexes = dict.fromkeys(re.escape(each.removeprefix(f"{own.name}.")) for each, (own, _) in shared.items())
        raise ModelError(
            f"{name} and {other} are one weight, which cannot be pruned for the inputs of both: exclude it with "
            "--ignore " + " ".join(f"'{each}'" for each in regexes)
        )


def _linears(stacks: Sequence[Stack]) -> Iterator[tuple[str, Block]]:
    return ((linear.name, block) for stack in stacks for block in stack.blocks for linear in block.linears)


def count_parameters(module: nn.Module) -> int:
    """All of them, those in submodules too."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_outside(model: nn.Module, blocks: Sequence[Block]) -> int:
    """Parameters of ``model`` that are in none of the blocks of its stacks."""
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)


def dense_notes(model: nn.Module, stacks: Sequence[Stack]) -> list[str]:
    """What stays dense, one note a reason; embeddings and the LM head need none."""
    blocks = [block for stack in stacks for block in stack.blocks]
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    known = {id(linear.parameter) for block in blocks for linear in (*block.linears, *block.excluded)}
    head = head_of(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is head:
            known |= {id(parameter) for parameter in module.parameters()} - inside
    found: dict[str, Counter[str]] = {
        "{} is no plain linear and stays dense": Counter(),
        "{} routes tokens and stays dense": Counter(),
        "excluded by targets and ignore: {}": Counter(),
        "outside the blocks, and dense: {}": Counter(),
    }
    other, routers, excluded, outside = found.values()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in known:  # gpt-oss has 2-D biases
            (other if id(parameter) in inside else outside)[kind(name.removesuffix(".weight"))] += 1
    for block in blocks:
        for linear in block.excluded:
            (routers if linear.name in block.routers else excluded)[kind(linear.name)] += 1
    return [note.format(_places(counts)) for note, counts in found.items() if counts]


def _places(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({'one place' if count == 1 else f'{count} places'})" for name, count in counts.items())
