"""The activations between blocks: each batch's hidden states, and what every block is called with besides.

Shapes: B sequences in a batch, L tokens in a sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optima.calibration.probe import Probe, hidden_of
from optima.calibration.store import Store
from optima.distributed import ALONE, Ranks
from optima.errors import ModelError
from optima.models.stacks import Block, Linear

# Everything a block is called with besides its hidden states (positions, masks, rotary embeddings ...), by name or not.
Call = tuple[tuple[Any, ...], dict[str, Any]]
# Does the work of a block's forward pass, given its arguments by place and by name.
Called = Callable[[tuple[Any, ...], dict[str, Any]], Any]
# A batch and one of its samples, or all.
Piece = tuple[int, int | None]


@dataclass
class Streams:
    """The activation store of one stack.

    Attributes:
        probe: what the stack looks like when it runs.
        sizes: (B, L) of each batch.
        hidden: each batch's hidden states, on the CPU, in the model's dtype; usually (B, L, E).
        calls: ``calls[block][batch]``, of the blocks that are needed; equal tensors are stored once.
        carried: for each batch, what blocks returned for later ones besides hidden states, by (block, place).
        store: where hidden states and what is carried wait; copies and parts share it.
        ranks: the processes that sequences are split over: these are the ones of this process.
        samples: how many sequences each of them has; empty if there is one.
    """

    probe: Probe
    sizes: list[tuple[int, int]]
    hidden: list[Tensor]
    calls: list[list[Call]]
    carried: list[dict[tuple[int, int], Tensor]]
    store: Store = field(default_factory=Store)
    ranks: Ranks = ALONE
    samples: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of all processes; sequences are equally long."""
        own = sum(samples * length for samples, length in self.sizes)
        return sum(self.samples) * self.sizes[0][1] if self.samples else own

    @property
    def tokens_before(self) -> int:
        """Those of processes of lower rank."""
        return sum(self.samples[: self.ranks.rank]) * self.sizes[0][1]

    def copy(self) -> Streams:
        """Streams that advance on their own; the tensors they hold are shared."""
        return self.part(range(len(self.hidden)))

    def part(self, batches: Sequence[int]) -> Streams:
        """Streams of some batches that advance on their own."""
        calls = [[called[batch] for batch in batches] for called in self.calls]
        sizes, hidden = [self.sizes[batch] for batch in batches], [self.hidden[batch] for batch in batches]
        carried = [dict(self.carried[batch]) for batch in batches]
        return Streams(self.probe, sizes, hidden, calls, carried, self.store, self.ranks, self.samples)

    def groups(self, block: Block) -> list[tuple[Linear, ...]]:
        """The block's linears to prune, by the input that they share."""
        return self.probe.groups[block.index]

    def run_sample(
        self, block: Block, batch: int, sample: int, device: torch.device, call: Called | None = None
    ) -> Tensor:
        """The block's output on one sequence of a batch, for example (1, L, E), on ``device``.

        Raises:
            ModelError: if the block is called with something that cannot be taken apart into samples.
        """
        samples = self.sizes[batch][0]
        if problem := self._inseparable(block, batch):
            raise ModelError(f"{problem}: use --batch-size 1")
        return hidden_of(self.run(block, batch, device, lambda tensor: _take_sample(tensor, sample, samples), call))

    def _inseparable(self, block: Block, batch: int) -> str:
        """Why a batch cannot be taken apart into samples; empty if it can."""
        args, kwargs = self.calls[block.index][batch]
        if self.sizes[batch][0] == 1:
            return ""
        if self.probe.sample_dim:
            return "the hidden states of this model are not batch first"
        if any(_is_state(value) for value in (*args, *kwargs.values())):
            return "the blocks of this model share keys and values, which cannot be taken apart into samples"
        return ""

    def pieces(self, block: Block) -> list[Piece]:
        """The smallest parts that the block can run on: the samples of each batch, or the batch."""
        return [
            (batch, sample)
            for batch, (samples, _) in enumerate(self.sizes)
            for sample in ([None] if self._inseparable(block, batch) else range(samples))
        ]

    def run_piece(self, block: Block, piece: Piece, device: torch.device, call: Called | None = None) -> Tensor:
        """The block's output on one of ``pieces``, on ``device``; ``call`` as in ``run``."""
        batch, sample = piece
        if sample is None:
            return hidden_of(self.run(block, batch, device, call=call))
        return self.run_sample(block, batch, sample, device, call)

    @torch.inference_mode(False)
    @torch.no_grad()
    def advance(self, block: Block, device: torch.device) -> None:
        """Replace each batch's hidden states by the block's outputs. The last needed block may leave this out."""
        later = [source for own in self.probe.carried for source in own.values()]
        wanted = {place for source, place in later if source == block.index}
        for batch in range(len(self.hidden)):
            output = self.run(block, batch, device)
            self.hidden[batch] = self.store.keep(hidden_of(output).cpu())
            for place in wanted:
                candidates = [self.carried[batch - 1].get((block.index, place))] if batch else []
                self.carried[batch][block.index, place] = self.store.keep(share(output[place], candidates))

    def run(
        self,
        block: Block,
        batch: int,
        device: torch.device,
        part: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        call: Called | None = None,
    ) -> Any:
        """What the block returns for a batch, on ``device``, where the block is; ``part`` is taken of every tensor.

        ``call`` is given the arguments by place, and those by name, instead of the block.
        """
        called_with = self.calls[block.index][batch]
        args, kwargs = list(called_with[0]), dict(called_with[1])
        for argument, source in self.probe.carried[block.index].items():
            where: Any = args if isinstance(argument, int) else kwargs
            where[argument] = self.carried[batch][source]
        inputs = (self.hidden[batch], args, kwargs)
        hidden, args, kwargs = map_tensors(inputs, lambda tensor: part(tensor).to(device))
        return block.module(hidden, *args, **kwargs) if call is None else call((hidden, *args), kwargs)


def _take_sample(tensor: Tensor, sample: int, samples: int) -> Tensor:
    """One sample's part of an argument; what is there once serves all. Gradients can be taken through it."""
    tensor = tensor.clone() if tensor.is_inference() else tensor
    if samples == 1 or tensor.ndim < 2 or tensor.shape[0] == 1:
        return tensor
    if tensor.shape[0] != samples:
        raise ModelError(
            f"a block of this model is called with a tensor of shape {tuple(tensor.shape)}, which cannot be taken "
            f"apart into {samples} samples: use --batch-size 1"
        )
    return tensor[sample : sample + 1]


def _is_state(value: Any) -> bool:
    """Whether this is what ``map_tensors`` passes on as it is, so that blocks can write to it for later ones."""
    return isinstance(value, Mapping) and type(value) is not dict


def share(value: Any, candidates: Any) -> Any:
    """``value`` on the CPU, with every tensor that equals one inside ``candidates`` replaced by that one."""
    pool: list[Tensor] = []
    map_tensors(candidates, pool.append)

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        same = (t for t in pool if t.shape == tensor.shape and t.dtype == tensor.dtype and torch.equal(t, tensor))
        return next(same, tensor)

    return map_tensors(value, convert)


def map_tensors(value: Any, convert: Callable[[Tensor], object]) -> Any:
    """``value`` with every tensor converted, also inside dicts, tuples and lists; other objects are passed on."""
    if isinstance(value, Tensor):
        return convert(value)
    if type(value) is dict:
        return {key: map_tensors(item, convert) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)([map_tensors(item, convert) for item in value])
    return value
