"""Activations between blocks: hidden states, and the other arguments (kwargs) that each block is called with.

``capture`` runs the model's embedding once on every batch. From there blocks run one by one (``Activations.forward``).
A probe of a few tokens checks that this gives what the model gives. Where a block is called with what earlier blocks
computed (T5's position bias, shared keys and values, indices of sparse attention), the dense blocks run in ``capture``
too, and later passes use these arguments of the dense model.

Shapes: B sequences in a batch, L tokens in a sequence, D inputs, E hidden size.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from optima.calibration.batch_size import BatchSize
from optima.calibration.store import Store
from optima.core.products import keep_freed_memory
from optima.device import full_precision, one_memory_error
from optima.distributed import ALONE, Ranks
from optima.errors import ModelError
from optima.models.blocks import Block, Linear, Stack
from optima.models.forward import forward, forward_replaced, hidden_of, map_tensors, stack_size, with_hidden
from optima.models.inspect import is_encoder_decoder
from optima.patterns import kind

PROBE_LENGTH = 8
OWN_WAY = (
    "run on its own, {} does not give what it gives inside {}, which calls it with more than is known here: this model "
    "cannot be pruned"
)
# What a block is called with besides its hidden states (positions, masks, rotary embeddings ...), by place and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Result = TypeVar("Result")


class Microbatch(NamedTuple):
    """The ``rows`` of the ``samples`` of a batch."""

    batch: int
    rows: slice
    samples: int


@dataclass(frozen=True)
class Probe:
    """What a forward pass over a few tokens shows of a stack.

    Attributes:
        groups: for each block, its linears by the input that they share.
        outputs: what each block returned; of tensors the shapes alone.
        dense_arguments: whether blocks are called with what earlier blocks computed.
        shared_states: whether blocks share keys and values.
        routed: names of the linears that are not called with every token (experts).
    """

    groups: list[list[tuple[Linear, ...]]]
    outputs: list[Any]
    dense_arguments: bool
    shared_states: bool
    routed: frozenset[str]


@dataclass
class Activations:
    """The activation store of one stack.

    Attributes:
        probe: of the stack.
        length: L.
        hidden: each batch's hidden states, on the CPU, in the model's dtype; usually (B, L, E).
        arguments: ``arguments[block][batch]``, of the blocks that are needed; equal tensors are stored once.
        batches: token ids, (B, L) each.
        store: keeps tensors; copies and parts share it.
        ranks: the processes that sequences are split over: these are the ones of this process.
        batch_size: where blocks run, and how many sequences together; copies and parts share it.
        counts: sequences of each rank.
    """

    probe: Probe
    length: int
    arguments: list[list[Arguments]]
    hidden: list[Tensor] = field(default_factory=list)
    batches: list[Tensor] = field(default_factory=list)
    store: Store = field(default_factory=Store)
    ranks: Ranks = ALONE
    batch_size: BatchSize = field(default_factory=BatchSize)
    counts: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all ranks."""
        return sum(self.counts) * self.length

    @property
    def before(self) -> int:
        """Sequences of lower ranks."""
        return sum(self.counts[: self.ranks.rank])

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self.batch_size.device

    def part(self, batches: Sequence[int] | None = None) -> Activations:
        """The activations of some batches, or all, advancing on their own; tensors are shared. All ranks call it."""
        batches = range(len(self.batches)) if batches is None else batches
        part = replace(
            self,
            hidden=[self.hidden[batch] for batch in batches],
            arguments=[[own[batch] for batch in batches] for own in self.arguments],
            batches=[self.batches[batch] for batch in batches],
        )
        return part.counted()

    def counted(self) -> Activations:
        """With ``counts``. All ranks call it."""
        return replace(self, counts=self.ranks.gather(sum(map(len, self.batches))))

    def groups(self, block: Block) -> list[tuple[Linear, ...]]:
        """The block's linears to prune, by the input that they share."""
        return self.probe.groups[block.index]

    def numbered(self) -> dict[int, Microbatch]:
        """The single sequences of this rank, by their number among those of all ranks."""
        sizes = enumerate(map(len, self.batches))
        own = (Microbatch(batch, slice(row, row + 1), samples) for batch, samples in sizes for row in range(samples))
        return dict(enumerate(own, start=self.before))

    def map_microbatches(self, batch: int, work: Callable[[slice], Result]) -> list[Result]:
        """What ``work`` returns for the microbatches that the device has memory for, see ``BatchSize.map``."""
        return self.batch_size.map(len(self.batches[batch]), work)

    @torch.no_grad()
    def forward(self, block: Block, start: Callable[[int, slice], None] = lambda batch, rows: None) -> None:
        """Replace each batch's hidden states by the block's outputs.

        ``start`` is called before each forward pass, with the batch and the samples of it that run.
        """

        def run(batch: int, rows: slice) -> Tensor:
            start(batch, rows)
            return _queue_copy(hidden_of(self.run(block, batch, rows)))

        with full_precision(), ExitStack() as waiting:
            for batch in range(len(self.batches)):
                outputs = self.map_microbatches(batch, partial(run, batch))
                event = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
                waiting.close()  # receives the batch before, while the device works on this one
                waiting.callback(self._receive, batch, outputs, event)

    def _receive(self, batch: int, outputs: list[Tensor], event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        copies = len(outputs) > 1 or event is not None  # pinned memory is used again
        self.hidden[batch] = self.store.keep(torch.cat(outputs) if copies else outputs[0])

    def run(self, block: Block, batch: int, rows: slice | None = None, call: Call | None = None) -> Any:
        """What the block, which is on the device, returns for a batch, or for ``rows`` of it.

        ``call`` is called with the positional and the keyword arguments instead of the block.
        """
        inputs = (self.hidden[batch], *self.arguments[block.index][batch])
        if rows is not None and rows.stop - rows.start < len(self.batches[batch]):
            # What has one row, or none for a sample, serves all.
            inputs = map_tensors(inputs, lambda each: each[rows] if each.ndim > 1 and len(each) > 1 else each)
        hidden, args, kwargs = map_tensors(inputs, lambda each: moved(each, self.device))
        return block.module(hidden, *args, **kwargs) if call is None else call((hidden, *args), kwargs)


def _queue_copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; from a CUDA device by way of pinned memory, where it is complete after an event."""
    if not tensor.is_cuda:
        return tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor.detach(), non_blocking=True)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. What is expanded over samples, as masks are, is copied once, and expanded there."""
    if tensor.device == device:
        return tensor
    once = tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())] if 0 in tensor.stride() else tensor
    if device.type == "cuda" and not once.is_cuda:
        return once.pin_memory().to(device, non_blocking=True).expand(tensor.shape)
    return once.to(device).expand(tensor.shape)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the rounding of products of another shape; NaN equals NaN.

    ``dtype``: of the weights, which may be coarser than that of the hidden states.
    """
    if found.shape != expected.shape or not found.is_floating_point():
        return torch.equal(found.cpu(), expected.cpu())
    own, coarsest = expected.float().cpu(), max(torch.finfo(each).eps for each in (found.dtype, dtype))
    tolerance = max(1e-4, 8 * coarsest) * own.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found.float().cpu(), own, rtol=0, atol=tolerance, equal_nan=True)


def _alike(found: Any, expected: Any, dtype: torch.dtype) -> bool:
    pairs: tuple[list[Tensor], list[Tensor]] = [], []
    for arguments, tensors in zip((found, expected), pairs, strict=True):
        map_tensors(arguments, tensors.append)
    same = len(pairs[0]) == len(pairs[1])
    return same and all(agree(one, other, dtype) for one, other in zip(*pairs, strict=True))


class _AllCaptured(Exception):  # noqa: N818 - not an error
    """Stops the model's forward pass at the last block that is needed."""


@torch.no_grad()
@full_precision()
def capture(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Tensor],
    whole: bool = False,
    ranks: Ranks = ALONE,
    store: Store | None = None,
    batch_size: BatchSize | None = None,
) -> Activations:
    """The activations that enter ``stack``.

    The model runs where its weights are, or are brought when it runs (``Weights.outside``).

    Args:
        model: the whole model, in evaluation mode.
        stack: one of its stacks; blocks after the last linear to prune are left out, unless it is ``whole``.
        batches: token ids, (B, L) int64 each, of this rank.
        whole: see there.
        ranks: the processes that share the sequences.
        store: keeps the hidden states; None: in main memory.
        batch_size: of the device where blocks will run; None: the CPU.

    Raises:
        ModelError: if its blocks, run one by one, do not give what the model gives.
    """
    keep_freed_memory()
    blocks = stack.blocks if whole else stack.blocks[: stack.needed]
    length = PROBE_LENGTH * (1 + is_encoder_decoder(model))
    sample = ranks.on_rank0(lambda: batches[0][:1, :length])  # all ranks must find the same groups
    probe, called = _probe(model, stack, sample)
    home = BatchSize(next(model.parameters()).device)
    trial = Activations(probe, length, [[] for _ in blocks], batch_size=home)
    _record(model, stack, [sample], trial)
    for block, ((found,), expected) in zip(blocks, zip(trial.arguments, called, strict=False), strict=True):
        if not _alike(found, expected, next(model.parameters()).dtype):
            raise ModelError(OWN_WAY.format(block.name, type(model).__name__))
    probe = replace(probe, outputs=map_tensors(probe.outputs, lambda tensor: tensor.new_zeros(()).expand(tensor.shape)))
    rows: list[int] = []
    map_tensors((trial.hidden, trial.arguments), lambda tensor: rows.append(len(tensor)) if tensor.ndim > 1 else None)
    if set(rows) != {1}:  # not one row for a sequence: batches cannot be split, and sequences run one by one
        batches = [one for batch in batches for one in batch.split(1)]
    _, length = stack_size(model, stack.part, batches[0])
    acts = Activations(probe, length, [[] for _ in blocks], [], [], store or Store(), ranks, batch_size or BatchSize())
    _record(model, stack, batches, acts)
    return acts.counted()


def _record(model: nn.Module, stack: Stack, batches: Sequence[Tensor], acts: Activations) -> None:
    blocks = stack.blocks[: len(acts.arguments)]

    def record(batch: Tensor, rows: slice) -> None:
        batch, done = batch[rows], len(acts.batches)
        del acts.hidden[done:]  # of a pass that ran out of memory
        for own in acts.arguments:
            del own[done:]
        with suppress(_AllCaptured):
            forward(model, batch)
        acts.batches.append(batch)

    def called(block: Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index, (hidden, arguments) = block.index, _split(args, kwargs)
        if index == 0:
            acts.hidden.append(acts.store.keep(hidden.detach().cpu()))
        earlier = [*acts.arguments[index][-1:], *(acts.arguments[index - 1][-1:] if index else [])]
        acts.arguments[index].append(_shared(arguments, earlier, acts.store.keep))
        if block is blocks[-1]:
            raise _AllCaptured
        if acts.probe.dense_arguments:
            return original(*args, **kwargs)
        return with_hidden(acts.probe.outputs[index], hidden)

    with ExitStack() as replaced:
        for block in blocks:
            recorder = partial(called, block, block.module.forward)
            replaced.enter_context(forward_replaced(block.module, recorder))
        for batch in batches:
            acts.batch_size.map(len(batch), partial(record, batch))


def _shared(value: Any, earlier: Any, keep: Callable[[Tensor], Tensor]) -> Any:
    """``value`` on the CPU, with every tensor that equals one inside ``earlier`` replaced by that one."""
    pool: list[Tensor] = []
    map_tensors(earlier, pool.append)

    def convert(tensor: Tensor) -> Tensor:
        tensor = moved(tensor.detach(), torch.device("cpu"))
        same = (t for t in pool if t.shape == tensor.shape and t.dtype == tensor.dtype and torch.equal(t, tensor))
        found = next(same, None)
        return keep(tensor) if found is None else found

    return map_tensors(value, convert)


def _probe(model: nn.Module, stack: Stack, batch: Tensor) -> tuple[Probe, list[Arguments]]:
    """Run the whole model once on a small batch; returns what it shows, and the arguments of each block.

    Raises:
        ModelError: if it does not call its blocks once each, in order, each on the hidden states of the one before.
    """
    called: list[int] = []
    entered: list[Arguments] = []
    outputs: list[Any] = []
    groups: list[list[tuple[Linear, ...]]] = []
    inputs: defaultdict[str, list[object]] = defaultdict(list)
    held: list[Tensor] = []  # until a block is done, so that no address is used again
    tokens = Counter[str]()
    passed_on = shared_states = False

    def see(linear: Linear, tensor: Tensor) -> None:
        if tensor.numel():
            held.append(tensor)
            # The same numbers at the same place, not changed in place since.
            identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
            inputs[linear.name].append(identity)
            tokens[linear.name] += tensor.numel() // tensor.shape[-1]

    def enter(block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, arguments = _split(args, kwargs)
        if outputs and not agree(hidden, hidden_of(outputs[-1]), next(model.parameters()).dtype):
            raise ModelError(OWN_WAY.format(block.name, type(model).__name__))
        entered.append(map_tensors(arguments, lambda tensor: tensor))

    def leave(block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal passed_on, shared_states
        found: defaultdict[object, list[Linear]] = defaultdict(list)
        for linear in block.linears:
            found[tuple(inputs[linear.name]) or linear.name].append(linear)
        groups.append([tuple(group) for group in found.values()])
        returned = {id(each) for other in outputs if isinstance(other, (tuple, list)) for each in other[1:]}
        for value in (*args, *kwargs.values()):
            passed_on |= isinstance(value, Tensor) and id(value) in returned
            shared_states |= isinstance(value, MutableMapping) and type(value) is not dict and len(value) > 0
        inputs.clear()
        held.clear()
        called.append(block.index)
        outputs.append(output)

    with ExitStack() as hooks, one_memory_error():
        for block in stack.blocks:
            hooks.callback(block.module.register_forward_pre_hook(partial(enter, block), with_kwargs=True).remove)
            hooks.callback(block.module.register_forward_hook(partial(leave, block), with_kwargs=True).remove)
            hooks.enter_context(block.linearized())
            for linear in block.linears:
                hooks.callback(linear.observe(partial(see, linear)).remove)
        forward(model, batch.clone())
    _check_called(model, stack, called)
    linears = [linear.name for block in stack.blocks for linear in block.linears]
    every = math.prod(_check_outputs(model, stack, batch, hidden_of(outputs[0])))
    routed = {kind(name) for name in linears if tokens[name] != every}
    unordered = frozenset(name for name in linears if kind(name) in routed)
    return Probe(groups, outputs, passed_on or shared_states, shared_states, unordered), entered


def _check_called(model: nn.Module, stack: Stack, called: Sequence[int]) -> None:
    names = [block.name for block in stack.blocks]
    if called != list(range(len(names))):
        skipped = ", ".join(name for index, name in enumerate(names) if index not in called)
        raise ModelError(
            f"{type(model).__name__} does not call each of {names[0]} .. {names[-1]} exactly once, in order, in a "
            f"forward pass over text (not called: {skipped or 'none'}). Such blocks cannot be pruned"
        )


def _check_outputs(model: nn.Module, stack: Stack, batch: Tensor, hidden: Any) -> tuple[int, int]:
    """(B, L) of the hidden states; raise ``ModelError`` if the blocks return something else."""
    samples, length = stack_size(model, stack.part, batch)
    counts = tuple(hidden.shape[:-1]) if isinstance(hidden, Tensor) else ()
    if counts[:2] != (samples, length) and counts != (length, samples) and counts[1:] != (samples, length):
        raise ModelError(f"the blocks of {type(model).__name__} return {counts}, not hidden states of {length} tokens")
    return samples, length


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden, (args[1:], {name: value for name, value in kwargs.items() if args or name != "hidden_states"})
