"""Where weights are while they are not worked on: in main memory, or on disk until a block's turn comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.device import Stopwatch, forward_replaced, on_device
from optima.errors import ModelError
from optima.models.blocks import Block, find_stacks
from optima.models.checkpoint import (
    Checkpoint,
    UnstreamableError,
    check_numbers,
    left_out,
    on_disk,
    open_checkpoint,
    places_of,
    recast,
)
from optima.models.load import Source, load_whole, some

Read = Callable[[], Mapping[str, Tensor]]
MAIN = torch.device("cpu")


class Weights(Protocol):
    """Who gives a model its weights when they are wanted.

    Attributes:
        notes: for the report.
        left_out: tensors of the source that the model's class has no place for.
    """

    notes: tuple[str, ...]
    left_out: tuple[str, ...]

    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> AbstractContextManager[None]:
        """The block's weights are on ``device`` inside; the way there and back counts as stage ``read``."""

    @contextmanager
    def outside(self, device: torch.device = MAIN) -> Iterator[None]:
        """Inside, a forward pass of the whole model runs on ``device``; if that is ``MAIN``, where the model is.

        Weights outside the blocks are there once it has asked for them, and stay. A block comes for its call alone: no
        gradient can come back through it.
        """

    @contextmanager
    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """These parameters and saved buffers, by their full names, in memory; not those that no checkpoint gave."""

    def replaced(self, block: Block, read: Read) -> None:
        """From now on the block has weights of its own, which ``read`` gives by full names."""


class Resident:
    """The whole model is in main memory: a block moves to the device and back.

    ``absent``: names of tensors that nobody gave it, which are not written either.
    """

    def __init__(self, model: nn.Module | None = None, absent: Collection[str] = ()) -> None:
        self.model, self.absent = model, absent
        self.notes: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()

    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> AbstractContextManager[None]:
        """See ``Weights``."""
        return _moved(nullcontext(), block, device, clock)

    @contextmanager
    def outside(self, device: torch.device = MAIN) -> Iterator[None]:
        """See ``Weights``."""
        assert self.model is not None
        with _forward_on(self.model, self, device):
            yield

    @contextmanager
    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """See ``Weights``."""
        assert self.model is not None
        wanted = frozenset(names).difference(self.absent)
        yield {name: tensor for name, tensor in self.model.state_dict().items() if name in wanted}

    def replaced(self, block: Block, read: Read) -> None:
        """See ``Weights``: it has them."""


class Streamed:
    """Weights stay on disk: a block's are read when its turn comes, and given up behind it.

    Outside the blocks, embeddings and linears read theirs when they are first asked for them, and keep them until the
    phase ends (``outside``). All else there stays in memory, for it is small. The modules are changed for good: a block
    by its ``forward``, an embedding or linear by its class, since some models ask for a weight without a call.

    Args:
        checkpoint: the model and its files.
        blocks: all blocks of its stacks.

    Raises:
        UnstreamableError: if blocks share weights, or a block's weights are made of those of others.
    """

    def __init__(self, checkpoint: Checkpoint, blocks: Sequence[Block]) -> None:
        self.checkpoint = checkpoint
        self.notes: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._replaced: dict[str, Read] = {}
        self._kept: list[str] = []
        self._device = MAIN  # of those
        self._reading = False
        self._inside, outside = _parts(checkpoint, blocks)
        owners = {
            f"{path}.{name}": module
            for path, module in checkpoint.model.named_modules()
            if isinstance(module, (nn.Embedding, nn.Linear))
            for name, _ in module.named_parameters(recurse=False)
        }
        lazy = {name for name in outside if all(same in owners for same in checkpoint.names[name])}
        checkpoint.read([name for name in outside if name not in lazy])
        for name in sorted(lazy):
            self._read_when_asked(owners[name], name)
        # The first parameter, which is not the first tensor where a model has buffers of its own (BART).
        first = next((name for name, _ in checkpoint.model.named_parameters()), "")
        self._first = [first] if first in outside else []
        for block in blocks:
            self._read_when_called(block)

    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> AbstractContextManager[None]:
        """See ``Weights``."""
        # What is read for the visit alone is given up behind it.
        given_up = bool(self._missing(self._inside[block.name]))
        return _moved(self._block(block.name), block, device, clock, comes_back=not given_up)

    @contextmanager
    def outside(self, device: torch.device = MAIN) -> Iterator[None]:
        """See ``Weights``."""
        self._device = device
        try:
            # Where the first parameter is, models believe that they are.
            self._keep(self._first)
            with _forward_on(self.checkpoint.model, self, device):
                yield
        finally:
            self._device = MAIN
            self.checkpoint.release(self._kept)
            self._kept.clear()

    @contextmanager
    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """See ``Weights``."""
        wanted = frozenset(names)
        with ExitStack() as stack:
            for block, inside in self._inside.items():
                if not wanted.isdisjoint(inside):
                    stack.enter_context(self._block(block))
            stack.enter_context(self._read(sorted(wanted)))
            yield {name: tensor for name, tensor in self.checkpoint.model.state_dict().items() if name in wanted}

    def replaced(self, block: Block, read: Read) -> None:
        """See ``Weights``."""
        self._replaced[block.name] = read

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self.checkpoint.is_read(name)]

    def _fetch(self, missing: Sequence[str]) -> None:
        if not missing:  # a block is called once a batch, and to read nothing takes transformers 3 ms
            return
        self._reading = True
        try:
            self.checkpoint.read(missing)
        finally:
            self._reading = False

    @contextmanager
    def _read(self, names: Sequence[str]) -> Iterator[list[str]]:
        """These tensors are in memory inside; those that were there stay. Gives the names of the others."""
        missing = self._missing(names)
        try:
            self._fetch(missing)
            yield missing
        finally:
            self.checkpoint.release(missing)

    @contextmanager
    def _block(self, name: str) -> Iterator[None]:
        """The same of a block, which may have been replaced."""
        with self._read(self._inside[name]) as missing:
            if missing and name in self._replaced:
                state = self.checkpoint.model.state_dict()
                with torch.no_grad():
                    for changed, tensor in self._replaced[name]().items():
                        state[changed].copy_(tensor)
            yield

    def _read_when_called(self, block: Block) -> None:
        forward = block.module.forward

        @wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            lost = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_meta]
            assert not lost, f"{block.name} was given numbers made of weights that had not been read"
            with self._block(block.name):
                return forward(*args, **kwargs)

        block.module.forward = called

    def _keep(self, names: Sequence[str]) -> None:
        """Read what is missing of ``names``, until the phase ends."""
        missing = self._missing(names)
        self._fetch(missing)
        self._kept.extend(missing)
        try:
            for name in missing if self._device != MAIN else ():
                parameter = self.checkpoint.model.get_parameter(name)
                parameter.data = parameter.data.to(self._device)
        except BaseException:  # out of memory: whoever tries again must find them missing
            self.checkpoint.release(missing)
            raise

    def _read_when_asked(self, module: nn.Module, name: str) -> None:
        kind, last = type(module), name.rpartition(".")[2]

        def ask(self_: nn.Module, attribute: str) -> Any:
            if attribute == last and not self._reading:
                self._keep([name])
            return kind.__getattr__(self_, attribute)

        module.__class__ = type(kind.__name__, (kind,), {"__getattr__": ask})


@contextmanager
def _forward_on(model: nn.Module, weights: Weights, device: torch.device) -> Iterator[None]:
    """See ``Weights.outside``; weights that are still on disk are left to those who read them."""
    if device.type == "cpu":
        yield
        return
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    inside = {module for block in blocks for module in block.module.modules()}
    with ExitStack() as stack:
        for module in (each for each in model.modules() if each not in inside):
            # A forward pass may have put another buffer into the place of one: it comes along.
            stack.callback(_bring_buffers, module, dict(module._buffers))
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if not tensor.is_meta:
                    stack.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.to(device)
        for block in blocks:
            called = partial(_brought, weights, block, device, block.module.forward)
            stack.enter_context(forward_replaced(block.module, called))
        yield


def _bring_buffers(module: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Bring those to where they were that are not the same any more."""
    for name, buffer in module._buffers.items():
        if buffer is not None and (known := before.get(name)) is not None and buffer is not known:
            module._buffers[name] = buffer.to(known.device)


def _brought(
    weights: Weights, block: Block, device: torch.device, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The block's ``forward``, with its weights where the pass runs."""
    with weights.on(block, device):
        return forward(*args, **kwargs)


@contextmanager
def _moved(
    read: AbstractContextManager[None],
    block: Block,
    device: torch.device,
    clock: Stopwatch | None,
    comes_back: bool = True,
) -> Iterator[None]:
    """Inside ``read`` a block that is on ``device``; the way there and back counts as stage ``read``."""
    clock = clock or Stopwatch(device)
    with ExitStack() as stack:
        with clock("read"):
            stack.enter_context(read)
            stack.enter_context(on_device(block.module, device, comes_back))
        yield
        with clock("read"):
            stack.close()


def _parts(checkpoint: Checkpoint, blocks: Sequence[Block]) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the tensors inside each block, and outside of all, each of which can be read without the others."""
    inside = {block.name: [name for name in checkpoint.names if name.startswith(f"{block.name}.")] for block in blocks}
    for names in inside.values():
        if shared := [name for name in names if not set(checkpoint.names[name]) <= set(names)]:
            raise UnstreamableError(f"{' and '.join(checkpoint.names[shared[0]])} are one weight")
        checkpoint.check(names)
    known = {name for names in inside.values() for name in names}
    outside = [name for name in checkpoint.names if name not in known]
    checkpoint.check(outside)
    return inside, outside


def open_weights(
    source: Source,
    structure: PreTrainedModel,
    dtype: str,
    check: Callable[[bool], None] = lambda streamed: None,
    whole: str | None = None,
) -> tuple[PreTrainedModel, Weights]:
    """The model of ``source`` and who gives it its weights: from disk, where that can be.

    Args:
        source: where it is from.
        structure: its skeleton.
        dtype: of the weights; ``auto`` keeps the checkpoint's own.
        check: is told, before they are read, whether they stay on disk; it may refuse.
        whole: why it must be held in main memory, if it must.

    Raises:
        ModelError: if the weights cannot be found or read, or are quantized.
    """
    shapes = {} if source.gguf_file else on_disk(source)
    check_numbers(source, shapes)
    model, weights, notes = _opened(source, structure, dtype, check, whole)
    places = places_of(model, shapes)
    if names := left_out(shapes, places, model):
        what = f"{source.name} has weights that {type(model).__name__} has no place for"
        notes.append(f"{what} ({some(names)}): they are not in the output")
    weights.left_out = tuple(names)
    if dtype == "auto":  # what is asked for goes without saying
        for (stored, given), names in recast(shapes, places, model).items():
            which = f"{len(names)} of {len(shapes)} tensors ({some(names)}) in {stored}"
            notes.append(f"{source.name} has {which}, and its configuration makes them {given}: --dtype sets another")
    weights.notes = tuple(notes)
    return model, weights


def why_whole(source: Source, structure: PreTrainedModel, dtype: str) -> str:
    """Why weights that are on this disk cannot stay there in a run; empty if they can, or are not there to tell."""
    if source.local is None:
        return ""
    try:
        checkpoint = open_checkpoint(source, structure, dtype)
        _parts(checkpoint, [block for stack in find_stacks(checkpoint.model) for block in stack.blocks])
    except UnstreamableError as error:
        return str(error)
    except ModelError:  # what a plan needs is the configuration
        return ""
    return ""


def _opened(
    source: Source, structure: PreTrainedModel, dtype: str, check: Callable[[bool], None], whole: str | None
) -> tuple[PreTrainedModel, Weights, list[str]]:
    """The same, and notes."""
    if whole is None:
        try:
            checkpoint = open_checkpoint(source, structure, dtype)
            blocks = [block for stack in find_stacks(checkpoint.model) for block in stack.blocks]
            check(True)
            return checkpoint.model, Streamed(checkpoint, blocks), []
        except UnstreamableError as error:
            whole = str(error)
    check(False)
    model, absent = load_whole(source, dtype)
    notes = [f"the whole model was held in main memory: {whole}"]
    if absent:
        notes.append(f"{source.name} lacks weights of {type(model).__name__} ({some(absent)}): the output does too")
    return model, Resident(model, absent), notes
