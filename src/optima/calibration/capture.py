"""Capture the inputs of every block of a stack, once, from the model's own forward pass.

Shapes: B sequences in a batch, L tokens in a sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optima.calibration.activations import Activations, Call, map_tensors, share
from optima.calibration.batch_size import BatchSize
from optima.calibration.probe import PROBE_LENGTH, agree, forward, hidden_of, look, with_hidden
from optima.calibration.store import Store
from optima.core.products import keep_freed_memory
from optima.data.batches import Batch, first_of, indivisible, some_of, stack_size
from optima.device import forward_replaced, full_precision
from optima.distributed import ALONE, Ranks
from optima.errors import ModelError
from optima.models.blocks import Block, Stack


class _AllCaptured(Exception):  # noqa: N818 - not an error
    """Stops the model's forward pass at the last block that is needed."""


@torch.inference_mode(False)  # gradients are taken through what is captured
@torch.no_grad()
@full_precision()  # as blocks run, to which it is compared
def capture(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Batch],
    whole: bool = False,
    ranks: Ranks = ALONE,
    store: Store | None = None,
    batch_size: BatchSize | None = None,
) -> Activations:
    """The acts that enter ``stack``, after a look at the model and a check of the chain of its blocks.

    The whole model runs on ``PROBE_LENGTH`` tokens, then its blocks one by one; the outputs must agree. On the batches
    only the embedding and what surrounds the blocks is computed. All this happens where the model's weights are, or are
    brought when it runs (``Weights.outside``): some models have parts that only run there.

    Args:
        model: the whole model, in evaluation mode.
        stack: one of its stacks, with the linears to prune; blocks behind the last of them are left out.
        batches: token ids, (B, L) int64 each, or a processor's outputs.
        whole: no block is left out.
        ranks: the processes that each have batches of their own, of sequences that are equally long.
        store: keeps the hidden states; None: main memory does.
        batch_size: of the device where blocks will run; takes apart the batches that it has no memory for, and those of
            the acts are smaller then. None: of the CPU.

    Raises:
        ModelError: if the model does not call its blocks once each, in order, on hidden states, or hands them more
            than can be carried from block to block.
    """
    keep_freed_memory()
    # The same in every process: they must find the same groups.
    first = ranks.on_rank0(lambda: first_of(model, batches[0], PROBE_LENGTH))
    apart = ""
    try:
        probe = look(model, stack, first)
    except ModelError:
        if first is batches[0] or isinstance(first, Tensor):
            raise
        # Its images may be as many as its texts, and not one each.
        first = ranks.on_rank0(lambda: batches[0])
        probe, apart = look(model, stack, first), "a batch of this model cannot be taken apart into its samples"
    blocks = stack.blocks if whole else stack.blocks[: stack.needed]
    batch_size = batch_size or BatchSize()
    home = BatchSize(next(model.parameters()).device)  # blocks come to where the embedding is, see ``Weights.outside``
    trial = Activations(probe, [], [], [[] for _ in blocks], [], batch_size=home, whole=apart)
    _record(model, stack, [first], trial)
    for block in blocks:
        trial.forward(block)
        if not agree(trial.hidden[0], hidden_of(probe.outputs[block.index]), next(model.parameters()).dtype):
            raise ModelError(
                f"{type(model).__name__} hands its blocks more than is known here: run on its own, {block.name} does "
                "not give what it gives inside the model, which this tool cannot prune"
            )
    # Of a batch that cannot be taken apart they are large.
    shapes = map_tensors(probe.outputs, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))
    probe = replace(probe, outputs=shapes)
    none: list[list[Call]] = [[] for _ in blocks]
    fixed = _fixed(trial)
    empty = Activations(probe, [], [], none, [], store or Store(), batch_size=batch_size, whole=apart, fixed=fixed)
    acts = _recorded(model, stack, batches[0], empty)
    words = [batch for batch in batches if isinstance(batch, Tensor)]
    if words and any(acts.indivisible(block, 0, looks=True) for block in blocks):
        # Not later, then now: tuning goes by sequences, and memory may be short.
        batches = [one for batch in words for one in batch.split(1)]
        del acts
        acts = _recorded(model, stack, batches[0], empty)
    _record(model, stack, batches[1:], acts)
    return replace(acts, ranks=ranks).counted()


def _recorded(model: nn.Module, stack: Stack, batch: Batch, empty: Activations) -> Activations:
    """Activations as ``empty``, with what enters the blocks of ``stack``."""
    calls: list[list[Call]] = [[] for _ in empty.calls]
    acts = replace(empty, sizes=[], hidden=[], calls=calls, carried=[], batches=[])
    _record(model, stack, [batch], acts)
    return acts


def _fixed(trial: Activations) -> frozenset[int]:
    """Lengths of what a block is called with for a single sample, which are no number of samples."""
    fixed: set[int] = set()
    if trial.sizes[0][0] == 1:
        map_tensors(trial.calls, lambda tensor: fixed.add(len(tensor)) if tensor.ndim > 1 and len(tensor) > 1 else None)
    return frozenset(fixed)


def _record(model: nn.Module, stack: Stack, batches: Sequence[Batch], acts: Activations) -> None:
    """Run the model's forward pass with the first blocks, as many as ``acts`` have, replaced by recorders."""
    blocks = stack.blocks[: len(acts.calls)]

    def record(batch: Batch, samples: int, part: slice) -> None:
        given, done = some_of(batch, part, samples), len(acts.sizes)
        del acts.hidden[done:]  # what a pass left that ran out of memory
        for calls in acts.calls:
            del calls[done:]
        try:
            forward(model, given)
        except _AllCaptured:
            count, length = stack_size(model, stack, given)
            hidden = acts.hidden[-1]
            acts.sizes.append((count, hidden.shape[acts.probe.sample_dim + 1] if length is None else length))
            acts.batches.append(given)
            acts.carried.append({})
            return
        raise ModelError(f"{type(model).__name__} finished its forward pass without calling its last block")

    with ExitStack() as replaced:
        for block in blocks:
            replaced.enter_context(forward_replaced(block.module, _recorder(acts, block, block is blocks[-1])))
        for batch in batches:
            samples = stack_size(model, stack, batch)[0]
            whole = acts.whole or indivisible(batch, samples)
            acts.batch_size.map(samples, partial(record, batch, samples), whole)


def _recorder(acts: Activations, block: Block, last: bool) -> Callable[..., Any]:
    index, output = block.index, acts.probe.outputs[block.index]

    def record(*args: Any, **kwargs: Any) -> Any:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), args)
        if not isinstance(hidden, Tensor):
            raise ModelError(f"{block.name} is not called with hidden states as its first argument")
        if index == 0:
            acts.hidden.append(acts.store.keep(hidden.detach().cpu()))
        earlier = [*acts.calls[index][-1:], *(acts.calls[index - 1][-1:] if index else [])]
        acts.calls[index].append(share((args, kwargs), earlier, acts.store.keep))
        if last:
            raise _AllCaptured
        return with_hidden(output, hidden)

    return record
