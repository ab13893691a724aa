"""Stacks, blocks, linears and routers of any transformer of the library, found by structure, not by lists of names.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optima.errors import ModelError, RecipeError
from optima.models.inspect import head_of
from optima.models.moe import ExpertLinear, experts_of, linearized
from optima.names import kind

# Experts that are modules of their own, such as experts.3.up_proj or expert_3.wi; a shared expert is none.
EXPERT = re.compile(r"(?<!shared_)experts?[._]\w*?\d")
# What configurations call the number of experts: num_experts, n_routed_experts, num_local_experts, moe_num_experts ...
EXPERT_COUNT = re.compile(r"(\w*_)?(num|n)_((routed|local)_)?experts")
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

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Tensor | None:
            tokens_T = getattr(module, "tokens_T", None)
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():  # Llama 4's router returns a tuple
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

    def linearized(self, only_hooked: bool = False) -> AbstractContextManager[None]:
        """See ``moe.linearized``: for all mixtures whose experts are among ``linears``."""
        return linearized((each.expert.experts for each in self.linears if each.expert is not None), only_hooked)


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
    try:
        multimodal = model.config.get_text_config() is not model.config
    except ValueError as error:
        raise ModelError(
            f"the configuration of {type(model).__name__} holds several text models: load one of them alone"
        ) from error
    if model.config.is_encoder_decoder:
        encoder: Any = model.get_encoder()
        config: Any = getattr(encoder, "config", None)
        if isinstance(encoder, PreTrainedModel) and config.get_text_config() is not config:  # T5Gemma 2
            encoder = encoder.get_decoder()
        return [_stack(model, encoder, "encoder"), _stack(model, model.get_decoder(), "decoder")]
    return [_stack(model, model.get_decoder() if multimodal else model, "whole")]


def _stack(model: nn.Module, root: nn.Module, part: Literal["whole", "encoder", "decoder"]) -> Stack:
    """The largest list of blocks inside ``root``, a module of ``model``."""
    inside = set(root.modules())
    named = [(name, module) for name, module in model.named_modules() if module in inside]
    lists = [(name, module) for name, module in named if isinstance(module, nn.ModuleList)]
    stacks = [(name, module) for name, module in lists if _may_be_stack(module)]
    where = type(model).__name__ if part == "whole" else f"the {part} of {type(model).__name__}"
    if not stacks or (part != "whole" and root is model):
        raise ModelError(
            f"no stack of transformer blocks in {where}: its module lists, none of which has "
            f"members that contain linears, are {[f'{name} ({len(module)})' for name, module in lists] or 'none'}, "
            f"its children {[name for name, _ in model.named_children()]}"
        )
    own = [item for item in stacks if not _in_other_model(model, item[0])]
    name, members = max(own or stacks, key=lambda item: count_parameters(item[1]))
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = [value for key, value in vars(config or object).items() if EXPERT_COUNT.fullmatch(key)]
    counts = {value for value in numbers if isinstance(value, int) and value > 1}
    owners = defaultdict(list)
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners[_memory(parameter)].append(owner.removesuffix(".weight"))
    return Stack(tuple(_block(index, name, module, counts, owners) for index, module in enumerate(members)), part)


def _may_be_stack(members: nn.ModuleList) -> bool:
    # A list of bare linears (experts, heads) is not a stack of blocks.
    bare = any(isinstance(module, (nn.Linear, Conv1D)) for module in members)
    return not bare and any(isinstance(m, (nn.Linear, Conv1D)) for block in members for m in block.modules())


def _in_other_model(model: nn.Module, name: str) -> bool:
    """Whether a list is inside a model that is configured for another thing than text, as an image encoder (GIT)."""
    if not isinstance(model, PreTrainedModel):
        return False
    known = {type(model.config), type(model.config.get_text_config())}
    around = (module for prefix, module in model.named_modules() if name.startswith(f"{prefix}."))
    return any(isinstance(module, PreTrainedModel) and type(module.config) not in known for module in around)


def _block(index: int, stack: str, module: nn.Module, counts: set[int], owners: Mapping[int, list[str]]) -> Block:
    """``owners``: the names of each parameter of the model."""
    prefix = f"{stack}.{index}" if stack else str(index)
    linears = tuple(linears_of(module, prefix))
    routers = frozenset(f"{prefix}.{inner}" for inner in routers_of(module, counts))
    pairs = ((linear.name, other) for linear in linears for other in owners[_memory(linear.parameter)])
    # The parameter of an expert is named like that of all experts.
    shared = {linear: other for linear, other in pairs if other not in (linear, linear.rpartition(".")[0])}
    common = frozenset(
        inner
        for inner, parameter in module.named_parameters()
        if not all(f"{other}.".startswith(f"{prefix}.") for other in owners[_memory(parameter)])
    )
    return Block(index, prefix, module, linears, routers, (), shared, common)


def _memory(parameter: Tensor) -> int:
    """An identity of the weight: two parameters may be one memory, which those on the meta device do not have."""
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


def is_expert(linear: Linear) -> bool:
    """Whether a linear is an expert's, in a fused parameter or in a module of its own."""
    return linear.expert is not None or EXPERT.search(linear.name) is not None


def has_experts(linears: Iterable[Linear]) -> bool:
    """Whether some of them are experts, which read the tokens routed to them alone."""
    return any(map(is_expert, linears))


def routers_of(block: nn.Module, counts: set[int]) -> Iterator[str]:
    """Names inside the block of the linears that route tokens to experts, or choose those that attention sees.

    One output is a gate. Otherwise the name says so (router), or a neighbour holds experts and either the name (gate,
    wg) or the number of outputs does. The gate of an ordinary MLP is called gate_proj, and has no experts near it.
    """
    modules = dict(block.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        around = [modules[".".join(parts[:-up])] for up in (1, 2) if up <= len(parts)]
        near = [
            any("expert" in child for child, _ in (*up.named_children(), *up.named_parameters(recurse=False)))
            for up in around
        ]
        near_experts = any(near)
        named = (
            INDEXER in parts
            or any(ROUTER in part for part in parts)
            or (near_experts and bool(ROUTERS & set(parts[-2:])))
        )
        # A shared expert may have as many channels as there are experts, and so may attention, one module further away.
        by_count = near[0] and module.out_features in counts and not any("expert" in part for part in parts[:-1])
        if module.out_features == 1 or named or by_count:
            yield name


def module_around(router: str) -> str:
    """The name of the module that holds a router, with a dot after it; the router may be a module of several parts."""
    *around, last, _ = ["", *router.split(".")]
    names_router = ROUTER in last or last in {*ROUTERS, INDEXER}
    return ".".join([*around, *([] if names_router else [last])][1:]) + "."


def select_linears(stacks: Sequence[Stack], targets: Sequence[str], ignore: Sequence[str]) -> list[Stack]:
    """The stacks with only the linears whose full name matches a target and no ignored regex (``re.search``).

    A router is meant only by a target that does not match the module around it as well, as ``mlp`` and ``mlp.`` do.

    Raises:
        ModelError: if nothing is left (the message lists what was there), or two linears are one weight.
        RecipeError: if a target matches no linear.
    """
    names = [linear.name for stack in stacks for block in stack.blocks for linear in block.linears]
    present = f"the linears of the blocks are {', '.join(sorted(set(map(kind, names)))) or 'none'}"

    def wanted(name: str, routes: bool) -> bool:
        around = module_around(name)
        meant = (regex for regex in targets if not (routes and re.search(regex, around)))
        return any(re.search(regex, name) for regex in meant) and not any(re.search(regex, name) for regex in ignore)

    def select(block: Block) -> Block:
        linears = tuple(linear for linear in block.linears if wanted(linear.name, linear.name in block.routers))
        chosen = {linear.name for linear in linears}
        excluded = tuple(linear for linear in block.linears if linear.name not in chosen)
        return replace(block, linears=linears, excluded=excluded)

    selected = [replace(stack, blocks=tuple(select(block) for block in stack.blocks)) for stack in stacks]
    if not any(stack.needed for stack in selected):
        routers = sorted({kind(name) for stack in stacks for block in stack.blocks for name in block.routers})
        which = f"; {', '.join(routers)} need a target that does not match the module around them" if routers else ""
        raise ModelError(
            f"no linear matches targets {list(targets)} without matching ignore {list(ignore)}: {present}{which}"
        )
    if idle := [regex for regex in targets if not any(re.search(regex, name) for name in names)]:
        raise RecipeError(f"targets has {idle[0]!r}, which matches no linear: {present}")
    _check_shared(selected)
    return selected


def _check_shared(stacks: Sequence[Stack]) -> None:
    """A weight in two places would be pruned twice, the second time for inputs of another place."""
    blocks = [block for stack in stacks for block in stack.blocks]
    shared = {linear.name: block for block in blocks for linear in block.linears if linear.name in block.shared}
    if shared:
        name, block = next(iter(shared.items()))
        inner = dict.fromkeys(re.escape(each.removeprefix(f"{own.name}.")) for each, own in shared.items())
        raise ModelError(
            f"{name} and {block.shared[name]} are one weight, which cannot be pruned for the inputs of both: "
            "exclude it with --ignore " + " ".join(f"'{each}'" for each in inner)
        )


def count_parameters(module: nn.Module) -> int:
    """All of them, those in submodules too."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_by_place(model: nn.Module, blocks: Sequence[Block]) -> tuple[list[int], int]:
    """Parameters of each block of its stacks, and of all that is outside of them. Blocks may share theirs."""
    own = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    return [count_parameters(block.module) for block in blocks], outside


def dense_notes(model: nn.Module, stacks: Sequence[Stack]) -> list[str]:
    """What stays dense, one note a kind, so that nothing is excluded silently; embeddings and the head need none."""
    blocks, head = [block for stack in stacks for block in stack.blocks], head_of(model)
    other, outside = Counter[str](), Counter[str]()
    covered = {id(linear.parameter) for block in blocks for linear in (*block.linears, *block.excluded)}
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    named = (module for module in model.modules() if isinstance(module, nn.Embedding) or module is head)
    covered |= {id(parameter) for module in named for parameter in module.parameters()} - inside
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith("bias") and id(parameter) not in covered:  # gpt-oss has 2-D biases
            (other if id(parameter) in inside else outside)[kind(name.removesuffix(".weight"))] += 1
    excluded, routers, pruned = Counter[str](), Counter[str](), Counter[str]()
    for block in blocks:
        for linear in block.excluded:
            (routers if linear.name in block.routers else excluded)[kind(linear.name)] += 1
        pruned.update(kind(linear.name) for linear in block.linears if linear.name in block.routers)
    notes = [f"{_places(other)} is no plain linear and stays dense"] if other else []
    notes += [f"{_places(routers)} routes tokens and stays dense"] if routers else []
    notes += [f"{_places(pruned)} routes tokens, and is pruned as targets ask"] if pruned else []
    notes += [f"excluded by targets and ignore: {_places(excluded)}"] if excluded else []
    return notes + ([f"outside the blocks, and dense: {_places(outside)}"] if outside else [])


def _places(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({'one place' if count == 1 else f'{count} places'})" for name, count in counts.items())
