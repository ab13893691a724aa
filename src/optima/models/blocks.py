"""Find what can be pruned in any transformer of the library, by its structure rather than by a list of names.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from os.path import commonpath
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optima.errors import ModelError, RecipeError
from optima.models.moe import ExpertLinear, experts_of, linearized
from optima.models.routers import expert_counts, module_around, own_output, routers_of
from optima.names import kind

# Experts that are modules of their own, such as experts.3.up_proj or expert_3.wi; a shared one is none.
EXPERT = re.compile(r"(?<!shared_)experts?[._]\w*?\d")


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

        def hook(module: nn.Module, args: tuple[Tensor, ...], returned: Any) -> Tensor | None:
            tokens_T = getattr(module, "tokens_T", None)
            output = own_output(module, args[0], returned)
            if output is not None and output.requires_grad:
                output.register_hook(lambda gradient: see(gradient, tokens_T))
            elif output is returned and torch.is_grad_enabled():
                # Positions, or another stack's output: it does not depend on this one's hidden states.
                leaf: Tensor = output.detach().requires_grad_(True)
                leaf.register_hook(lambda gradient: see(gradient, tokens_T))
                return leaf.clone()
            return None

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
        left: linears that ``select_linears`` left out.
        shared: of the linears whose weight is also another parameter of the model, that one's name.
        common: names, inside the module, of parameters that are outside it too.
        unplaced: names, inside the module, of parameters that stay in main memory: tables that the model says are too
            large for a device, and looks up where they are (Qwen4-Exp: 95 GiB).
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[Linear, ...]
    routers: frozenset[str] = frozenset()
    left: tuple[Linear, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    common: frozenset[str] = frozenset()
    unplaced: frozenset[str] = frozenset()

    def linearized(self, only_hooked: bool = False) -> AbstractContextManager[None]:
        """See ``moe.linearized``: for all mixtures whose experts are among ``linears``."""
        return linearized((each.expert.experts for each in self.linears if each.expert is not None), only_hooked)

    @property
    def placed_parameters(self) -> int:
        """How many of its parameters a device holds while it works on the block."""
        kept = (self.module.get_parameter(name).numel() for name in self.unplaced)
        return count_parameters(self.module) - sum(kept)


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

    An encoder-decoder has two, in the order in which they run. Of a model that also sees or hears, it is that of its
    language. A list is a stack by its role: that its members are called in order with hidden states is for a probe to
    see (``optima.calibration.capture``). Their classes may differ, and some may have no linears.

    Raises:
        ModelError: if there is no such list.
    """
    if not isinstance(model, PreTrainedModel):
        return [_stack(model, model, "whole")]
    try:
        sees = model.config.get_text_config() is not model.config
    except ValueError as error:
        raise ModelError(
            f"the configuration of {type(model).__name__} holds several of text, and which of them is meant is not "
            "known here: load the language model alone"
        ) from error
    if model.config.is_encoder_decoder:
        return [
            _stack(model, _language(model.get_encoder()), "encoder"),
            _stack(model, model.get_decoder(), "decoder"),
        ]
    return [_stack(model, model.get_decoder() if sees else model, "whole")]


def _language(encoder: nn.Module) -> nn.Module:
    """What of an encoder reads text, where it sees too (T5Gemma 2)."""
    config: Any = getattr(encoder, "config", None)
    if not isinstance(encoder, PreTrainedModel) or config.get_text_config() is config:
        return encoder
    found: nn.Module = encoder.get_decoder()
    return found


def _stack(model: nn.Module, where: nn.Module, part: Literal["whole", "encoder", "decoder"]) -> Stack:
    """The largest list of blocks inside ``where``, a module of ``model``."""
    inside = set(where.modules())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and module in inside
    ]
    stacks = [(name, module) for name, module in lists if _may_be_stack(module)]
    if not stacks or (part != "whole" and where is model):
        raise ModelError(
            f"no stack of transformer blocks in {_described(model, part)}: its module lists, none of which has members "
            f"that contain linears, are {[f'{name} ({len(module)})' for name, module in lists] or 'none'}, "
            f"its children {[name for name, _ in model.named_children()]}"
        )
    own = [item for item in stacks if not _in_another(model, item[0])]
    name, members = max(own or stacks, key=lambda item: count_parameters(item[1]))
    counts = expert_counts(getattr(model, "config", None))
    owners = defaultdict(list)
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners[_memory(parameter)].append(owner.removesuffix(".weight"))
    tables = tuple(f".{each}" for each in getattr(model, "_no_placement_params", None) or ())
    blocks = []
    for index, module in enumerate(members):
        prefix = f"{name}.{index}" if name else str(index)
        linears = tuple(linears_of(module, prefix))
        routers = frozenset(f"{prefix}.{inner}" for inner in routers_of(module, counts))
        pairs = ((linear.name, other) for linear in linears for other in owners[_memory(linear.parameter)])
        # An expert's parameter is called like all of them.
        shared = {linear: other for linear, other in pairs if other not in (linear, linear.rpartition(".")[0])}
        common = frozenset(
            inner
            for inner, parameter in module.named_parameters()
            if not all(f"{other}.".startswith(f"{prefix}.") for other in owners[_memory(parameter)])
        )
        unplaced = frozenset(name for name, _ in module.named_parameters() if f".{name}".endswith(tables))
        blocks.append(Block(index, prefix, module, linears, routers, (), shared, common, unplaced))
    return Stack(tuple(blocks), part)


def _in_another(model: nn.Module, name: str) -> bool:
    """Whether a list lies in a model inside that is configured for other than text, as what sees is (GIT)."""
    if not isinstance(model, PreTrainedModel):
        return False
    known = {type(model.config), type(model.config.get_text_config())}
    around = (module for prefix, module in model.named_modules() if name.startswith(f"{prefix}."))
    return any(isinstance(module, PreTrainedModel) and type(module.config) not in known for module in around)


def _described(model: nn.Module, part: str) -> str:
    return type(model).__name__ if part == "whole" else f"the {part} of {type(model).__name__}"


def _memory(parameter: Tensor) -> int:
    """What tells a weight from others: two parameters may hold the same memory.

    On the meta device there is none: the address of what was cut out of another tensor is where it began there.
    """
    return id(parameter) if parameter.is_meta else parameter.data_ptr() or id(parameter)


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


def has_experts(linears: Iterable[Linear]) -> bool:
    """Whether some of them are experts, which are given the tokens routed to them alone."""
    return any(map(is_expert, linears))


def is_expert(linear: Linear) -> bool:
    """Whether a linear is an expert's, in a fused parameter or in a module of its own."""
    return linear.expert is not None or EXPERT.search(linear.name) is not None


def _may_be_stack(members: nn.ModuleList) -> bool:
    # A list of bare linears (experts, heads) is not a stack of blocks.
    bare = any(isinstance(module, (nn.Linear, Conv1D)) for module in members)
    return not bare and any(isinstance(m, (nn.Linear, Conv1D)) for block in members for m in block.modules())


def select_linears(stacks: Sequence[Stack], targets: Sequence[str], ignore: Sequence[str]) -> list[Stack]:
    """The stacks with only the linears whose full name matches a target and no ignored regex (``re.search``).

    A router is meant only by a target that does not match the module around it as well, as ``mlp`` and ``mlp.`` do.

    Raises:
        ModelError: if nothing is left (the message lists what was there), or two linears are one weight.
        RecipeError: if a target matches no linear.
    """
    names = [linear.name for stack in stacks for block in stack.blocks for linear in block.linears]
    there = f"the linears of the blocks are {', '.join(sorted(set(map(kind, names)))) or 'none'}"

    def wanted(name: str, routes: bool) -> bool:
        around = module_around(name)
        meant = (regex for regex in targets if not (routes and re.search(regex, around)))
        return any(re.search(regex, name) for regex in meant) and not any(re.search(regex, name) for regex in ignore)

    def select(block: Block) -> Block:
        linears = tuple(linear for linear in block.linears if wanted(linear.name, linear.name in block.routers))
        chosen = {linear.name for linear in linears}
        left = tuple(linear for linear in block.linears if linear.name not in chosen)
        return replace(block, linears=linears, left=left)

    selected = [replace(stack, blocks=tuple(select(block) for block in stack.blocks)) for stack in stacks]
    if not any(stack.needed for stack in selected):
        routers = sorted({kind(name) for stack in stacks for block in stack.blocks for name in block.routers})
        which = f"; {', '.join(routers)} need a target that does not match the module around them" if routers else ""
        raise ModelError(
            f"no linear matches targets {list(targets)} without matching ignore {list(ignore)}: {there}{which}"
        )
    if idle := [regex for regex in targets if not any(re.search(regex, name) for name in names)]:
        raise RecipeError(f"targets has {idle[0]!r}, which matches no linear: {there}")
    _check_own_weights(selected)
    return selected


def _check_own_weights(stacks: Sequence[Stack]) -> None:
    """A weight with two owners would be pruned twice, the second time for inputs that are no longer its own."""
    shared = [
        (linear.name, block.shared[linear.name], linear.name.removeprefix(f"{block.name}.").replace(".", "/"))
        for stack in stacks
        for block in stack.blocks
        for linear in block.linears
        if linear.name in block.shared
    ]
    if shared:
        name, other, _ = shared[0]
        parts: defaultdict[str, list[str]] = defaultdict(list)
        for _, _, within in shared:
            parts[within.partition("/")[0]].append(within)
        regexes = " ".join(f"'{re.escape(commonpath(each).replace('/', '.'))}'" for each in parts.values())
        linears = sum(len(block.linears) for stack in stacks for block in stack.blocks)
        remedy = "that is all, so this tool cannot prune it"
        if len(shared) < linears:
            remedy = f"leave them out with --ignore {regexes}"
        raise ModelError(
            f"{name} and {other} are one weight, which two inputs would prune differently ({len(shared)} of {linears} "
            f"linears share theirs): {remedy}"
        )


def count_parameters(module: nn.Module) -> int:
    """All of them, those in submodules too."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_by_place(model: nn.Module, blocks: Sequence[Block]) -> tuple[list[int], int]:
    """Parameters of each block of its stacks, and of all that is outside of them. Blocks may share theirs."""
    own = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    return [count_parameters(block.module) for block in blocks], outside
