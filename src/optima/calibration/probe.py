"""What one forward pass of the model over a few tokens shows of a stack: call order, outputs, shared inputs.

Shapes: L tokens, D inputs, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optima.errors import ModelError
from optima.models.stacks import Block, Linear, Stack
from optima.names import NUMBER, kind

PROBE_LENGTH = 8  # tokens on which a model is looked at before the long work
Place = tuple[int, int]  # a block, and a place in the tuple that it returns


@dataclass(frozen=True)
class Probe:
    """A stack as it runs.

    Attributes:
        groups: of each block, its linears to prune by the input that they share.
        outputs: what each block returned.
        carried: of each block, its arguments (a position behind the hidden states, or a name) that an earlier block
            returned: T5's position bias.
        sample_dim: dimension of the hidden states that counts sequences.
        sequence_first: True if tokens are counted before it, as in XLNet.
        routed: names of the linears that are not given every token (experts).
    """

    groups: list[list[tuple[Linear, ...]]]
    outputs: list[Any]
    carried: list[dict[int | str, Place]]
    sample_dim: int
    sequence_first: bool
    routed: frozenset[str]

    def wanted_from(self, block: int) -> set[int]:
        """Places in the tuple that ``block`` returns which later blocks are called with."""
        return {place for own in self.carried for source, place in own.values() if source == block}

    def first_tokens(self, inputs: Tensor, name: str, samples: int, length: int) -> Tensor | None:
        """The inputs (B, D) of each sequence's first token among those of the linear ``name``; None if unknown."""
        counts = inputs.shape[:-1]
        order = (length, samples) if self.sequence_first else (samples, length)
        flat = len(counts) == 1 and counts[0] == samples * length and name not in self.routed
        if not flat and (len(counts) < 2 or _without_ones(counts) != _without_ones(order)):
            return None
        inputs_TD = inputs.reshape(-1, inputs.shape[-1])
        return inputs_TD[:samples] if self.sequence_first else inputs_TD[::length]


def _without_ones(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(count for count in counts if count != 1)


@dataclass
class _Seen:
    """What hooks saw. Holding the tensors keeps their addresses from being used again."""

    blocks: list[tuple[int, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    inputs: dict[str, list[object]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    def block(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.blocks.append((index, args, kwargs, output))

        return hook

    def linear(self, name: str) -> Callable[[Tensor], None]:
        def see(inputs: Tensor) -> None:
            if inputs.numel():
                self.held.append(inputs)
                self.inputs.setdefault(name, []).append(identity(inputs))
                self.rows[name] = self.rows.get(name, 0) + inputs.numel() // inputs.shape[-1]

        return see


def identity(tensor: Tensor) -> object:
    """Equal for tensors that are the same numbers at the same place; one that was changed in place since is another."""
    version = 0 if tensor.is_inference() else tensor._version  # inference tensors have none
    address = tensor.data_ptr() or id(tensor)
    return (tensor.device, address, tensor.dtype, tuple(tensor.shape), tensor.stride(), version)


def forward(model: nn.Module, tokens: Tensor) -> None:
    """The model's own forward pass on (B, L) token ids, where its embedding is.

    Raises:
        ModelError: if the model asks for something else than tokens.
    """
    device = next(model.parameters()).device  # the embedding is the first parameter of every model of the library
    options = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    try:
        model(input_ids=tokens.to(device), **options)
    except (TypeError, ValueError) as error:  # what the library raises where other inputs are missing
        raise ModelError(f"{type(model).__name__} cannot run on token ids alone: {error}") from error


@torch.inference_mode(False)  # inside it, tensors do not count their changes
@torch.no_grad()
def look(model: nn.Module, stack: Stack, tokens_1L: Tensor) -> Probe:
    """Run the whole model once, as it is, and watch ``stack``.

    Raises:
        ModelError: if it does not call the blocks once each, in order, on hidden states.
    """
    seen = _Seen()
    with ExitStack() as hooks:
        for block in stack.blocks:
            handle = block.module.register_forward_hook(seen.block(block.index), with_kwargs=True)
            hooks.callback(handle.remove)
            for linear in block.linears:
                hooks.callback(linear.observe(seen.linear(linear.name)).remove)
        forward(model, tokens_1L.clone())
    if [index for index, *_ in seen.blocks] != list(range(len(stack.blocks))):
        raise ModelError(
            f"{type(model).__name__} does not call each of {stack.blocks[0].name} .. {stack.blocks[-1].name} exactly "
            "once, in order, in a forward pass (shared or skipped blocks), which this tool cannot prune"
        )
    outputs = [output for *_, output in seen.blocks]
    layout = _layout(model, hidden_of(outputs[0]), tokens_1L.shape[1])
    groups, routed = _groups(stack, seen, tokens_1L.shape[1])
    return Probe(groups, outputs, _carried(seen), *layout, routed)


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returned, bare or in front of others."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _layout(model: nn.Module, hidden: object, length: int) -> tuple[int, bool]:
    """``sample_dim`` and ``sequence_first``."""
    counts = tuple(hidden.shape[:-1]) if isinstance(hidden, Tensor) else ()
    if counts == (1, length):
        return 0, False
    if counts == (length, 1):
        return 1, True
    if counts[1:] == (1, length):  # Gemma 3n: several versions of the hidden states in front
        return 1, False
    shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    raise ModelError(f"the blocks of {type(model).__name__} return {shape}, not the hidden states of {length} tokens")


def _carried(seen: _Seen) -> list[dict[int | str, Place]]:
    """Arguments that are, as objects, what an earlier block returned besides hidden states."""
    returned: dict[int, Place] = {}
    carried: list[dict[int | str, Place]] = []
    for index, args, kwargs, output in seen.blocks:
        named: list[tuple[int | str, Any]] = [*enumerate(args[1:] if args else ()), *kwargs.items()]
        carried.append({key: returned[id(value)] for key, value in named if id(value) in returned})
        for place, item in enumerate(output if isinstance(output, (tuple, list)) else ()):
            if place and isinstance(item, Tensor):
                returned.setdefault(id(item), (index, place))
    return carried


def _groups(stack: Stack, seen: _Seen, length: int) -> tuple[list[list[tuple[Linear, ...]]], frozenset[str]]:
    """Linears that were given the same tensors; one that was not reached is grouped as another of its kind."""
    leaders: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, inputs in seen.inputs.items():
        leaders[name] = first.setdefault(tuple(inputs), name)
    reached = {kind(name): name for name in leaders}
    linears = [linear for block in stack.blocks for linear in block.linears]
    routed_kinds = {kind(linear.name) for linear in linears if seen.rows.get(linear.name) != length}
    names = {linear.name for linear in linears}
    return (
        [_group(block, leaders, reached, names) for block in stack.blocks],
        frozenset(name for name in names if kind(name) in routed_kinds),
    )


def _group(block: Block, leaders: dict[str, str], reached: dict[str, str], names: set[str]) -> list[tuple[Linear, ...]]:
    groups: dict[str, list[Linear]] = {}
    for linear in block.linears:
        leader = leaders.get(linear.name) or _leader_by_kind(linear.name, leaders, reached, names)
        groups.setdefault(leader, []).append(linear)
    return [tuple(group) for group in groups.values()]


def _leader_by_kind(name: str, leaders: dict[str, str], reached: dict[str, str], names: set[str]) -> str:
    """The linear that stands to ``name`` as the leader of its reached sibling stands to that one; else itself."""
    sibling = reached.get(kind(name))
    if sibling is None or NUMBER.findall(leaders[sibling]) != NUMBER.findall(sibling):
        return name
    numbers = iter(NUMBER.findall(name))
    leader = NUMBER.sub(lambda match: next(numbers), leaders[sibling])
    return leader if leader in names and leader not in leaders else name


def check_chain(model: nn.Module, stack: Stack, expected: Sequence[Any], found: Sequence[Tensor]) -> None:
    """Compare the blocks' outputs on the probe, run one by one, with those of the model's own forward pass.

    Raises:
        ModelError: naming the first block that differs: the model does something between its blocks.
    """
    for block, output, hidden in zip(stack.blocks, expected, found, strict=False):
        if not agree(hidden, hidden_of(output)):
            raise ModelError(
                f"{type(model).__name__} hands its blocks more than is known here: run on its own, {block.name} does "
                "not give what it gives inside the model, which this tool cannot prune"
            )


def agree(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the rounding of products of another shape; NaN equals NaN (a loss will report it)."""
    if found.shape != expected.shape:
        return False
    own = expected.float().cpu()
    tolerance = max(1e-4, 8 * torch.finfo(found.dtype).eps) * own.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found.float().cpu(), own, rtol=0, atol=tolerance, equal_nan=True)
