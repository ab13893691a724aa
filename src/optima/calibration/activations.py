"""The activations between blocks: each batch's hidden states, and what every block is called with besides.

Shapes: B sequences in a batch, L tokens in a sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optima.calibration.batch_size import BatchSize
from optima.calibration.probe import Probe, hidden_of
from optima.calibration.store import Store
from optima.data.batches import Batch
from optima.device import full_precision
from optima.distributed import ALONE, Ranks
from optima.errors import ModelError
from optima.models.blocks import Block, Linear

# Everything a block is called with besides its hidden states (positions, masks, rotary embeddings ...), by name or not.
Call = tuple[tuple[Any, ...], dict[str, Any]]
# Does the work of a block's forward pass, given its arguments by place and by name.
Called = Callable[[tuple[Any, ...], dict[str, Any]], Any]
# What is entered around the forward pass of samples of a batch.
Watched = Callable[[int, slice], AbstractContextManager[None]]
# A batch and some of its samples.
Microbatch = tuple[int, slice]
Result = TypeVar("Result")


class Look(NamedTuple):
    """Some of the ``samples`` of a batch, and how often all were looked at before."""

    batch: int
    part: slice
    samples: int
    turn: int = 0


@dataclass
class Activations:
    """The activation store of one stack.

    Attributes:
        probe: what the stack looks like when it runs.
        sizes: (B, L) of each batch.
        hidden: each batch's hidden states, on the CPU, in the model's dtype; usually (B, L, E).
        calls: ``calls[block][batch]``, of the blocks that are needed; equal tensors are stored once.
        carried: for each batch, what blocks returned for later ones besides hidden states, by (block, place).
        store: where hidden states and what is carried wait; copies and parts share it.
        ranks: the processes that sequences are split over: these are the ones of this process.
        parts: how many sequences, and tokens, each of them has; empty if there is one.
        batches: what the model is given for each batch.
        batch_size: where blocks run, and how many sequences together; copies and parts share it.
        whole: why batches cannot be taken apart, as the look at the model showed; empty if they can.
        fixed: first dimensions of what blocks are called with for one sample, which do not count samples (heads).
    """

    probe: Probe
    sizes: list[tuple[int, int]]
    hidden: list[Tensor]
    calls: list[list[Call]]
    carried: list[dict[tuple[int, int], Tensor]]
    store: Store = field(default_factory=Store)
    ranks: Ranks = ALONE
    parts: tuple[tuple[int, int], ...] = ()
    batches: list[Batch] = field(default_factory=list)
    batch_size: BatchSize = field(default_factory=BatchSize)
    whole: str = ""
    fixed: frozenset[int] = frozenset()

    @property
    def tokens(self) -> int:
        """Of all processes."""
        if self.ranks.size == 1:
            return sum(samples * length for samples, length in self.sizes)
        assert self.parts, "a part of the batches needs counted()"
        return sum(tokens for _, tokens in self.parts)

    @property
    def before(self) -> tuple[int, int]:
        """Sequences, and tokens, of processes of lower rank."""
        assert self.ranks.size == 1 or self.parts, "a part of the batches needs counted()"
        lower = self.parts[: self.ranks.rank]
        return sum(samples for samples, _ in lower), sum(tokens for _, tokens in lower)

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self.batch_size.device

    def clone(self) -> Activations:
        """Activations that go forward on their own; the tensors they hold are shared."""
        return replace(self.part(range(len(self.hidden))), parts=self.parts)

    def part(self, batches: Sequence[int]) -> Activations:
        """Of some batches, going forward on their own, with states of their own; ``counted`` counts them."""
        calls = _with_own_states([[called[batch] for batch in batches] for called in self.calls])
        sizes, hidden = [self.sizes[batch] for batch in batches], [self.hidden[batch] for batch in batches]
        carried, given = [dict(self.carried[batch]) for batch in batches], [self.batches[batch] for batch in batches]
        return replace(self, sizes=sizes, hidden=hidden, calls=calls, carried=carried, batches=given, parts=())

    def counted(self) -> Activations:
        """These acts, with how much of them each process has: they may be a part. All processes call it."""
        if self.ranks.size == 1:
            return self
        own = sum(samples for samples, _ in self.sizes), sum(samples * length for samples, length in self.sizes)
        return replace(self, parts=tuple(self.ranks.gather(own)))

    def groups(self, block: Block) -> list[tuple[Linear, ...]]:
        """The block's linears to prune, by the input that they share."""
        return self.probe.groups[block.index]

    def indivisible(self, block: Block, batch: int, looks: bool = False) -> str:
        """Why a batch cannot be taken apart into samples when it enters ``block``; empty if it can.

        What later blocks are to read of it can be read in parts, but not written: by a pass that only ``looks`` it can.
        """
        samples = self.sizes[batch][0]
        if samples == 1:
            return ""
        if self.whole:
            return self.whole
        if self.probe.sample_dim:
            return "the hidden states of this model are not batch first"
        given: list[Tensor] = []
        states = [dict(state) for state in self.states(block, batch)]
        if states and not looks:
            return "the blocks of this model share keys and values, which cannot be taken apart into samples"
        args, kwargs = self.calls[block.index][batch]
        carried = [self.carried[batch].get(source) for source in self.probe.carried[block.index].values()]
        map_tensors((args, kwargs, carried, states), given.append)
        counts = (1, samples) if samples not in self.fixed else (1,)  # else nobody knows which of the two it is
        for shape in (tensor.shape for tensor in given if tensor.ndim > 1 and tensor.shape[0] not in counts):
            return (
                f"a block of this model is called with a tensor of shape {tuple(shape)}, which cannot be taken apart "
                f"into {samples} samples"
            )
        return ""

    def states(self, block: Block, batch: int) -> list[MutableMapping[Any, Any]]:
        """What the block is given that it can leave keys and values in, or read those of earlier blocks from."""
        return _states_in(*self.calls[block.index][batch])

    def pieces(self, block: Block) -> list[Microbatch]:
        """The smallest parts that the block can look at: the samples of each batch, or the batch."""
        return [
            (batch, slice(first, first + step))
            for batch, (samples, _) in enumerate(self.sizes)
            for step in [samples if self.indivisible(block, batch, looks=True) else 1]
            for first in range(0, samples, step)
        ]

    def map_microbatches(self, block: Block, batch: int, work: Callable[[slice], Result]) -> list[Result]:
        """What ``work`` returns for the parts of a batch that the device has memory for, see ``BatchSize.map``."""
        return self.batch_size.map(self.sizes[batch][0], work, self.indivisible(block, batch))

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, block: Block, watched: Watched | None = None) -> None:
        """Replace each batch's hidden states by the block's outputs. The last needed block may leave this out.

        ``watched`` is entered around each forward pass, with the batch and the samples of it that run.
        """

        def run(batch: int, part: slice) -> list[Tensor]:
            with nullcontext() if watched is None else watched(batch, part):
                return self.outputs(block, batch, part)

        with full_precision():
            for batch in range(len(self.sizes)):
                self.receive(block, batch, self.map_microbatches(block, batch, partial(run, batch)))

    def outputs(self, block: Block, batch: int, part: slice) -> list[Tensor]:
        """What the block hands on for samples of a batch, on the CPU: hidden states, and what later blocks ask for."""
        output = self.run(block, batch, part)
        handed_on = (hidden_of(output), *(output[place] for place in self._wanted(block)))
        return [tensor.detach().cpu() for tensor in handed_on]

    def receive(self, block: Block, batch: int, parts: Sequence[list[Tensor]]) -> None:
        """Put ``outputs`` of all parts of a batch, in order, in the place of what entered the block."""
        states, *more = zip(*parts, strict=True)
        hidden, others = (
            states[0] if len(states) == 1 else torch.cat(states),
            [_joined(each, self.sizes[batch][0]) for each in more],
        )
        self.hidden[batch] = self.store.keep(hidden)
        for place, tensor in zip(self._wanted(block), others, strict=True):
            candidates = [self.carried[batch - 1].get((block.index, place))] if batch else []
            self.carried[batch][block.index, place] = self.store.keep(share(tensor, candidates))
        for state in self.states(block, batch):  # what the block wrote waits where hidden states do
            for key, value in state.items():
                state[key] = map_tensors(value, lambda tensor: self.store.keep(tensor.cpu()))

    def forget(self, block: Block) -> None:
        """Drop what no block behind this one is given, for acts that do not go back through the blocks."""
        later = {source for own in self.probe.carried[block.index + 1 :] for source in own.values()}
        self.carried[:] = [{at: each[at] for at in each if at in later} for each in self.carried]

    def _wanted(self, block: Block) -> list[int]:
        """Places in what the block returns that later blocks are given."""
        later = {source for own in self.probe.carried for source in own.values()}
        return sorted(place for source, place in later if source == block.index)

    def run(
        self,
        block: Block,
        batch: int,
        part: slice | None = None,
        call: Called | None = None,
        looks: bool = False,
    ) -> Any:
        """What the block, which is on the device, returns for a batch, or the samples ``part`` of it.

        ``call`` is given the arguments by place, and those by name, instead of the block. If it only ``looks``, what
        the block leaves for later ones is not kept.

        Raises:
            ModelError: if the block is called with something that cannot be taken apart into samples.
        """
        called_with, samples = self.calls[block.index][batch], self.sizes[batch][0]
        args, kwargs = list(called_with[0]), dict(called_with[1])
        for argument, source in self.probe.carried[block.index].items():
            where: Any = args if isinstance(argument, int) else kwargs
            where[argument] = self.carried[batch][source]
        if looks:
            (((own, kwargs),),) = _with_own_states([[(tuple(args), kwargs)]])
            args = list(own)
        inputs = (self.hidden[batch], args, kwargs)
        if part is not None and part.stop - part.start < samples:
            if problem := self.indivisible(block, batch, looks):
                raise ModelError(f"{problem}: use --batch-size 1")
            given = partial(piece, part=part, samples=samples)
            inputs = map_tensors(inputs, given)
            for state in _states_in(args, kwargs) if looks else []:  # copies
                state.update({key: map_tensors(value, given) for key, value in state.items()})
        hidden, args, kwargs = map_tensors(inputs, lambda each: moved(_usable(each), self.device))
        with _lent(_states_in(args, kwargs), self.device):
            return block.module(hidden, *args, **kwargs) if call is None else call((hidden, *args), kwargs)


@contextmanager
def _lent(states: Sequence[MutableMapping[Any, Any]], device: torch.device) -> Iterator[None]:
    """What states hold is on ``device`` inside, and where it was behind; what is written meanwhile stays."""
    held = [
        (state, key, value, map_tensors(value, lambda tensor: tensor.to(device)))
        for state in states
        for key, value in state.items()
    ]
    for state, key, _, copied in held:
        state[key] = copied
    try:
        yield
    finally:
        for state, key, value, copied in held:
            if state.get(key) is copied:
                state[key] = value


def piece(tensor: Tensor, part: slice, samples: int) -> Tensor:
    """What some samples of a batch are given of a tensor: what is there once, or has no samples, serves all."""
    some = part.stop - part.start < samples and tensor.ndim > 1 and len(tensor) > 1
    return tensor[part] if some else tensor


def _usable(tensor: Tensor) -> Tensor:
    """The tensor in a form that gradients can be taken through."""
    return tensor.clone() if tensor.is_inference() else tensor


def _joined(parts: Sequence[Tensor], samples: int) -> Tensor:
    """What a block returned for the parts of a batch; what is there once serves all of them."""
    first = parts[0]
    if len(parts) == 1 or ((first.ndim < 2 or len(first) == 1) and all(torch.equal(first, part) for part in parts)):
        return first
    if first.ndim < 2 or sum(map(len, parts)) != samples:
        raise ModelError(
            f"a block of this model returns a tensor of shape {tuple(first.shape)} for some of {samples} samples, "
            "which cannot be put together: use --batch-size 1"
        )
    return torch.cat(list(parts))


def _states_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[MutableMapping[Any, Any]]:
    return [value for value in (*args, *kwargs.values()) if is_state(value)]


def is_state(value: Any) -> bool:
    """Whether this is what ``map_tensors`` passes on as it is, so that blocks can write to it for later ones."""
    return isinstance(value, MutableMapping) and type(value) is not dict


def _with_own_states(calls: Sequence[Sequence[Call]]) -> list[list[Call]]:
    """``calls[block][batch]``, where states are copies, which the blocks of a batch go on sharing."""
    copies: dict[int, Any] = {}

    def own(value: Any) -> Any:
        return copies.setdefault(id(value), copy(value)) if is_state(value) else value

    return [
        [(tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}) for args, kwargs in called]
        for called in calls
    ]


def share(value: Any, candidates: Any, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """``value`` on the CPU, with every tensor that equals one inside ``candidates`` replaced by that one.

    All others go through ``keep``.
    """
    pool: list[Tensor] = []
    map_tensors(candidates, pool.append)

    def convert(tensor: Tensor) -> Tensor:
        tensor = moved(tensor.detach(), torch.device("cpu"))
        same = (t for t in pool if t.shape == tensor.shape and t.dtype == tensor.dtype and torch.equal(t, tensor))
        found = next(same, None)
        return keep(tensor) if found is None else found

    return map_tensors(value, convert)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. What stands there once for all samples, as masks do, goes once, and stays so."""
    if tensor.device == device or 0 not in tensor.stride():
        return tensor.to(device)
    once = tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]
    return once.to(device).expand(tensor.shape)


def map_tensors(value: Any, convert: Callable[[Tensor], object]) -> Any:
    """``value`` with every tensor converted, also inside dicts, tuples and lists; other objects are passed on."""
    if isinstance(value, Tensor):
        return convert(value)
    if type(value) is dict:
        return {key: map_tensors(item, convert) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)([map_tensors(item, convert) for item in value])
    return value
