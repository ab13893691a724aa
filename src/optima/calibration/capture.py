"""The inputs of every block: captured once from the model's own forward pass, then carried from block to block.

Shapes: B sequences in a batch, L tokens in a sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optima.errors import ModelError
from optima.models.stacks import Block


@dataclass(frozen=True)
class Call:
    """Everything a block is called with besides its hidden states (positions, masks, rotary embeddings ...)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BlockInputs:
    """The activation store: each batch's current hidden states, and each block's own call arguments.

    Attributes:
        hidden: one (B, L, E) tensor a batch, on the CPU, in the model's dtype.
        calls: ``calls[block][batch]``; equal tensors are stored once.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Memory held by hidden states and distinct call arguments."""
        tensors = {id(t): t for t in self.hidden}
        for calls in self.calls:
            for call in calls:
                for tensor in _tensors((call.args, call.kwargs)):
                    tensors[id(tensor)] = tensor
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def run(self, block: Block, batch: int, device: torch.device) -> Tensor:
        """The block's output on a batch, on ``device``."""
        call = self.calls[block.index][batch]
        return _run(block, self.hidden[batch], call.args, call.kwargs, device)

    def run_sample(self, block: Block, batch: int, sample: int, device: torch.device) -> Tensor:
        """The block's output on one sequence of a batch, (1, L, E) on ``device``.

        Raises:
            ModelError: if the block is called with a tensor that cannot be taken apart into samples.
        """
        call, hidden = self.calls[block.index][batch], self.hidden[batch]
        samples = len(hidden)

        def take(item: Any) -> Any:
            return _take_sample(item, sample, samples) if isinstance(item, Tensor) else item

        args, kwargs = _map((call.args, call.kwargs), take)
        return _run(block, hidden[sample : sample + 1], args, kwargs, device)


def _run(block: Block, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Tensor:
    args, kwargs = _to_device((args, kwargs), device)
    output = block.module(hidden.to(device), *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _take_sample(tensor: Tensor, sample: int, samples: int) -> Tensor:
    """One sample's part of a call argument; what is there once serves all."""
    if samples == 1 or tensor.ndim < 2 or tensor.shape[0] == 1:
        return tensor
    if tensor.shape[0] != samples:
        raise ModelError(
            f"a block of this model is called with a tensor of shape {tuple(tensor.shape)}, which cannot be taken "
            f"apart into {samples} samples: use --batch-size 1"
        )
    return tensor[sample : sample + 1]


class _AllCaptured(Exception):  # noqa: N818 - not an error
    """Stops the model's forward pass after its last block."""


@torch.no_grad()
def capture_block_inputs(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> BlockInputs:
    """Run the model's own forward pass on token batches, with the blocks replaced by recorders.

    Only the embedding and what surrounds the blocks is computed, where the model's weights are.

    Args:
        model: the whole model.
        blocks: its blocks, in order.
        batches: token ids, (B, L) int64 each.

    Raises:
        ModelError: if the model does not call its blocks once each, in order, on hidden states.
    """
    store = BlockInputs(calls=[[] for _ in blocks])
    # The embedding is the first parameter of every model of the library.
    device = next(model.parameters()).device
    probe = batches[0][:1, :8].to(device)
    wrap = _output_form(model, blocks[0], probe)
    _check_called_once(model, blocks, probe, wrap)
    with _replaced(blocks, lambda index: _recorder(store, index, len(blocks), wrap)):
        for tokens in batches:
            _run_until_captured(model, tokens.to(device))
    return store


def _run_until_captured(model: nn.Module, tokens: Tensor) -> None:
    try:
        model(input_ids=tokens, **_no_cache(model))
    except _AllCaptured:
        return
    raise ModelError(f"{type(model).__name__} finished its forward pass without calling its last block")


def _output_form(model: nn.Module, block: Block, tokens: Tensor) -> Callable[[Tensor], Any]:
    """How this model's blocks return hidden states, learned by running the first one: bare, or in a tuple."""
    outputs: list[Any] = []
    original = block.module.forward

    home = next(block.module.parameters()).device

    def spy(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _to_device((args, kwargs), home)
        outputs.append(original(*args, **kwargs))
        raise _AllCaptured

    with _replaced([block], lambda index: spy):
        _run_until_captured(model, tokens)
    if isinstance(outputs[0], tuple):
        rest = outputs[0][1:]
        return lambda hidden: (hidden, *rest)
    return lambda hidden: hidden


def _check_called_once(
    model: nn.Module, blocks: Sequence[Block], tokens: Tensor, wrap: Callable[[Tensor], Any]
) -> None:
    """Refuse models that share, skip or reorder blocks: a whole forward pass over a few tokens shows it."""
    called: list[int] = []

    def counter(index: int) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            called.append(index)
            return wrap(args[0] if args else kwargs["hidden_states"])

        return count

    with _replaced(blocks, counter):
        model(input_ids=tokens, **_no_cache(model))
    if called != list(range(len(blocks))):
        raise ModelError(
            f"{type(model).__name__} does not call each of {blocks[0].name} .. {blocks[-1].name} exactly once, in "
            "order, in a forward pass (shared or skipped layers), which this tool cannot prune"
        )


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def _recorder(store: BlockInputs, index: int, count: int, wrap: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states", None)
        if not isinstance(hidden, Tensor):
            raise ModelError("a block of this model is not called with hidden states as its first argument")
        if index == 0:
            store.hidden.append(hidden.detach().cpu())
        previous = store.calls[index][-1] if store.calls[index] else None
        earlier = store.calls[index - 1][-1] if index else None
        shared = [(c.args, c.kwargs) for c in (previous, earlier) if c is not None]
        new_args, new_kwargs = _share((args, kwargs), shared)
        store.calls[index].append(Call(new_args, new_kwargs))
        if index == count - 1:
            raise _AllCaptured
        return wrap(hidden)

    return record


@contextmanager
def _replaced(blocks: Sequence[Block], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Each block's forward is ``make(position)`` inside this context."""
    try:
        for position, block in enumerate(blocks):
            block.module.forward = make(position)
        yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)


def _share(value: Any, candidates: list[Any]) -> Any:
    """``value`` on the CPU, with every tensor that equals one of the candidates' replaced by that one."""
    pool = [tensor for candidate in candidates for tensor in _tensors(candidate)]

    def convert(item: Any) -> Any:
        if isinstance(item, Tensor):
            item = item.detach().cpu()
            for tensor in pool:
                if tensor.shape == item.shape and tensor.dtype == item.dtype and torch.equal(tensor, item):
                    return tensor
            return item
        return item

    return _map(value, convert)


def _to_device(value: Any, device: torch.device) -> Any:
    return _map(value, lambda item: item.to(device) if isinstance(item, Tensor) else item)


def _map(value: Any, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, convert) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([_map(item, convert) for item in value])
    return convert(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
