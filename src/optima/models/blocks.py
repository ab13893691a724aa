"""Stacks, blocks, linears and routers of any transformer of the library, found by structure.

Shapes: O outputs, D inputs, T tokens of an expert.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optima.errors import ModelError, RecipeError
from optima.models.inspect import head_of
from optima.models.moe import ExpertLinear, experts_of, linearized
from optima.patterns import kind

# Experts that are modules of their own, such as experts.3.up_proj or expert_3.wi; a shared expert is none.
EXPERT = re.compile(r"(?<!shared_)experts?[._]\w*?\d")
ROUTER, ROUTERS = "router", {"gate", "wg"}
INDEXER = "indexer"  # holds linears that choose the tokens that attention sees (DeepSeek-V3.2, GLM-5)


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
