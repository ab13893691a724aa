"""Where weights are while no block works with them: in main memory, or on disk.

From disk a block is read when it is needed, checked for NaN and Inf, brought to the device, and released afterwards.
accelerate's disk offload would store a second copy of all that transformers fuses when it reads a checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from optima.core.products import all_finite
from optima.device import Stopwatch, card_memory, on_device
from optima.errors import ModelError, NumericalError
from optima.models.blocks import Block, count_outside, find_stacks
from optima.models.conversion import fill_buffers, load_tensors, places_of, shape_of
from optima.models.forward import forward_replaced
from optima.models.load import (
    LOADING,
    Source,
    check_complete,
    explain_read_errors,
    fetch_weights,
    load_config,
    load_whole,
    no_bars,
    some,
)

Read = Callable[[], Mapping[str, Tensor]]
MAIN = torch.device("cpu")


class UnstreamableError(Exception):
    """Why this checkpoint must be read whole."""


class Weights:
    """The weights of a model that is in memory as a whole: a block moves to the device and back.

    Args:
        model: whose weights they are.
        absent: names of tensors that its checkpoint lacks, which are not written either.
        left_out: names of those of the checkpoint that the model's class has no place for.

    Attributes:
        notes: for the report.
    """

    def __init__(self, model: Any = None, absent: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        self.model, self.absent, self.left_out = model, frozenset(absent), tuple(left_out)
        self.notes: tuple[str, ...] = ()
        self._to_check = set() if model is None else _finite_parameters(model)

    @contextmanager
    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> Iterator[None]:
        """The block's weights are on ``device`` inside; the way there and back counts as stage ``read``.

        Raises:
            NumericalError: if a weight has NaN or Inf.
        """
        clock = clock or Stopwatch(device)
        with ExitStack() as stack:
            with clock("read"):
                released = stack.enter_context(self._in_memory(block.name))
                stack.enter_context(on_device(block.module, device, comes_back=not released))
            yield
            with clock("read"):
                stack.close()

    @contextmanager
    def outside(self, device: torch.device = MAIN) -> Iterator[None]:
        """Inside, a forward pass of the whole model runs on ``device``; if that is ``MAIN``, where the model is.

        A block is there for its call alone: no gradient can come back through it.
        """
        with self._in_memory(""):
            if device.type == "cpu":
                yield
            else:
                with self._blocks_on_call(device):
                    yield

    @contextmanager
    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """These parameters and saved buffers, by their full names, in memory; not those that no checkpoint has."""
        wanted = set(names).difference(self.absent)
        yield {name: tensor for name, tensor in self.model.state_dict().items() if name in wanted}

    def replaced(self, block: Block, read: Read) -> None:
        """From now on the block has the weights that ``read`` returns by full names."""

    @contextmanager
    def _in_memory(self, block: str) -> Iterator[bool]:
        """The block's weights are in memory inside; yields whether they are released afterwards."""
        self._check({name: self.model.get_parameter(name) for name in self._to_check}, "", "Repair the model.")
        yield False

    def _check(self, tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
        """Raise ``NumericalError`` if one is not finite; all of a device at once, so that a GPU is waited for once."""
        for device in {tensor.device for tensor in tensors.values()}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            if not all_finite(*here.values()):
                name = next(name for name, tensor in here.items() if not all_finite(tensor))
                raise NumericalError(f"{where}tensor {name} has NaN or Inf. {remedy}")
        self._to_check = self._to_check.difference(tensors)

    @contextmanager
    def _blocks_on_call(self, device: torch.device) -> Iterator[None]:
        """All else is on ``device`` inside, and a block while it is called."""
        blocks = [block for stack in find_stacks(self.model) for block in stack.blocks]
        inside = {module for block in blocks for module in block.module.modules()}
        home = next(self.model.parameters()).device
        with ExitStack() as stack:
            for module in (each for each in self.model.modules() if each not in inside):
                stack.callback(_move, module, home)
                _move(module, device)
            for block in blocks:
                called = partial(self._call, block, device, block.module.forward)
                stack.enter_context(forward_replaced(block.module, called))
            yield

    def _call(self, block: Block, device: torch.device, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.on(block, device):
            return forward(*args, **kwargs)


def _move(module: nn.Module, device: torch.device) -> None:
    """Move its own parameters and buffers, not those of its children."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device), recurse=False)


def _finite_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that must be finite: embeddings may have rows that no text uses, biases forbid tokens."""
    modules = (module for module in model.modules() if isinstance(module, nn.Embedding))
    rows = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    return {
        name
        for name, each in model.named_parameters()
        if each.is_floating_point() and id(each) not in rows and not name.endswith("bias")
    }


class _Stored:
    """A tensor on disk, as transformers asks for it: read whole, since safetensors holds a slice twice for a moment."""

    def __init__(self, file: Path, opened: Any, name: str) -> None:
        self.file, self._opened, self._name = file, opened, name
        self._slice = opened.get_slice(name)
        self.get_shape, self.get_dtype = self._slice.get_shape, self._slice.get_dtype

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self._opened.get_tensor(self._name) if index is ... else self._slice[index]
        return part


class Streamed(Weights):
    """Weights stay on disk: a block's are read when it is needed, and released afterwards.

    The input embedding and the LM head are read when they are called, and kept until the phase ends (``outside``). All
    else outside the blocks is small, and stays in memory.

    Args:
        model: on the meta device but for its buffers that are not saved.
        stored: the tensors of its safetensors files, by their names there.

    Attributes:
        names: of each parameter and saved buffer, those that are the same tensor, itself included.

    Raises:
        UnstreamableError: if blocks share weights, or a block's weights are made of those of others.
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, _Stored]) -> None:
        super().__init__(model)
        self._stored = stored
        self._empty: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        same: defaultdict[int, list[str]] = defaultdict(list)
        for name, tensor in self._empty.items():
            same[id(tensor)].append(name)
        self.names = names = {name: tuple(same[id(tensor)]) for name, tensor in self._empty.items()}
        self._on_disk: defaultdict[str, list[str]] = defaultdict(list)
        for name, place in places_of(model, stored).items():
            self._on_disk[place].append(name)
        held = {*names, *(name for name, _ in model.named_buffers())}  # older releases saved rotary frequencies
        self.left_out = tuple(name for place, parts in self._on_disk.items() if place not in held for name in parts)
        self._replaced: dict[str, Read] = {}
        self._kept: list[str] = []
        self._device = MAIN  # of those
        blocks = [block.name for stack in find_stacks(model) for block in stack.blocks]
        self._inside = {block: [name for name in names if name.startswith(f"{block}.")] for block in blocks}
        for inside in self._inside.values():
            if shared := [name for name in inside if not set(names[name]) <= set(inside)]:
                raise UnstreamableError(f"{' and '.join(names[shared[0]])} are one weight")
            self._check_parts(inside)
        outside = sorted(set(names).difference(*self._inside.values()))
        self._check_parts(outside)
        rows, lazy = getattr(model.config.get_text_config(), "vocab_size", None), set[str]()
        for name in outside:
            module, tensor = model.get_submodule(name.rpartition(".")[0]), self._get(name)
            if isinstance(module, nn.Embedding | nn.Linear) and tensor.ndim == 2 and len(tensor) == rows:
                lazy.add(name)
                module.register_forward_pre_hook(lambda module, args, name=name: self._keep([name]))
        self.read([name for name in outside if name not in lazy])
        # The first parameter, which is not the first tensor where a model has buffers of its own (BART).
        first = next(name for name, _ in model.named_parameters())
        self._first = [first] if first in outside else []

    def _check_parts(self, names: Collection[str]) -> None:
        """Raise ``UnstreamableError`` if the tensors ``names`` need others on disk than those named like them."""
        missing = self._load({name: shape_of(part) for name, part in self._parts(names).items()}, "meta")
        self.release(names)
        for name in names:
            if missing.issuperset(self.names[name]):
                raise UnstreamableError(f"{name} is not in the checkpoint, or in parts of others")

    def read(self, names: Collection[str]) -> list[str]:
        """Put the tensors ``names``, and those that are the same, into the model, on the CPU.

        Returns:
            The names of those that were not there.

        Raises:
            NumericalError: if one has NaN or Inf.
            ModelError: if the files cannot be read any more.
        """
        names = [name for name in names if self._get(name).is_meta]
        if not names:  # a block is called once a batch, and to read nothing takes transformers 3 ms
            return names
        parts = self._parts(names)
        self._load(parts, "cpu")
        for name in names:
            (tensor, *_) = (found for same in self.names[name] if not (found := self._get(same)).is_meta)
            tensor.requires_grad_(self._empty[name].requires_grad)
            self._set(name, tensor)
        where = ", ".join(sorted({str(part.file) for part in parts.values()}))
        new = {name: self._get(name) for name in self._to_check.intersection(names)}
        self._check(new, f"{where}: ", "Re-download the checkpoint.")
        return names

    def release(self, names: Collection[str]) -> None:
        """Give up the tensors ``names``, and those that are the same."""
        for name in names:
            self._set(name, self._empty[name])

    def _get(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(path), last)
        return found

    def _set(self, name: str, tensor: Tensor) -> None:
        for same in self.names[name]:
            path, _, last = same.rpartition(".")
            module = self.model.get_submodule(path)
            (module._parameters if last in module._parameters else module._buffers)[last] = tensor

    def _parts(self, names: Collection[str]) -> dict[str, _Stored]:
        wanted = {same for name in names for same in self.names[name]}
        return {part: self._stored[part] for same in sorted(wanted) for part in self._on_disk.get(same, ())}

    def _load(self, parts: Mapping[str, Any], device: str) -> frozenset[str]:
        try:
            with no_bars():
                return load_tensors(self.model, parts, device)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the weights of {self.model.name_or_path} cannot be read any more: {error}") from error

    @contextmanager
    def outside(self, device: torch.device = MAIN) -> Iterator[None]:
        """See ``Weights``."""
        self._device = device
        try:
            self._keep(self._first)  # where it is, models believe that they are
            with self._blocks_on_call(device):
                yield
        finally:
            self._device = MAIN
            self.release(self._kept)
            self._kept.clear()

    def _keep(self, names: Sequence[str]) -> None:
        self._kept += self.read(names)
        for name in names:
            parameter = self._get(name)
            parameter.data = parameter.data.to(self._device)

    @contextmanager
    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """See ``Weights``."""
        with ExitStack() as stack:
            for block, inside in self._inside.items():
                if not set(inside).isdisjoint(names):
                    stack.enter_context(self._in_memory(block))
            stack.callback(self.release, self.read(sorted(names)))
            with super().state(names) as found:
                yield found

    def replaced(self, block: Block, read: Read) -> None:
        """See ``Weights``."""
        self._replaced[block.name] = read

    @contextmanager
    def _in_memory(self, block: str) -> Iterator[bool]:
        missing: list[str] = []
        try:
            missing = self.read(self._inside[block])
            if missing and block in self._replaced:
                state = self.model.state_dict()
                with torch.no_grad():
                    for changed, tensor in self._replaced[block]().items():
                        state[changed].copy_(tensor)
            yield bool(missing)
        finally:
            self.release(missing)


def open_checkpoint(source: Source, structure: PreTrainedModel, dtype: str) -> Streamed:
    """A model of the class of ``structure`` whose weights stay on disk.

    Args:
        source: a directory, or a model of the hub, which is downloaded.
        structure: its skeleton.
        dtype: of the weights; ``auto`` keeps the checkpoint's own.

    Raises:
        UnstreamableError: if it must be read whole.
        ModelError: if the weights cannot be found or read.
    """
    if source.gguf_file:
        raise UnstreamableError("GGUF weights are unpacked when they are read")
    with explain_read_errors(source, "weights"), no_bars():
        stored = _stored(source)
        shapes = {name: shape_of(part) for name, part in stored.items()}
        kind: Any = type(structure)
        model, loading = kind.from_pretrained(
            None, config=load_config(source), state_dict=shapes, dtype=dtype, device_map={"": "meta"}, **LOADING
        )
        if model.can_generate():
            with suppress(OSError):  # without a file it is made of the model's configuration
                model.generation_config = GenerationConfig.from_pretrained(source.path)
    model.config.name_or_path = source.path
    check_complete(source, model, loading)
    if loading["missing_keys"]:
        raise UnstreamableError(f"weights that it lacks ({min(loading['missing_keys'])}) are made anew")
    fill_buffers(model)
    model.eval()
    return Streamed(model, stored)


def _stored(source: Source) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for file in fetch_weights(source):
        try:  # tensors are read, not mapped: a private mapping of a file counts as memory of the process
            opened: Any = safe_open(file, framework="pt", backend="pread")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be opened: {error}") from error
        stored |= {name: _Stored(file, opened, name) for name in opened.keys()}  # noqa: SIM118
    return stored


def open_weights(
    source: Source, structure: PreTrainedModel, dtype: str, whole: str | None = None
) -> tuple[PreTrainedModel, Weights]:
    """The model of ``source``, and what gives it its weights: from disk where possible.

    Args:
        source: where it is from.
        structure: its skeleton.
        dtype: of the weights; ``auto`` keeps the checkpoint's own.
        whole: why the model must be in main memory, if it must.

    Raises:
        ModelError: if the weights cannot be found or read.
    """
    notes: list[str] = []
    weights: Weights
    try:
        if whole is not None:
            raise UnstreamableError(whole)
        weights = open_checkpoint(source, structure, dtype)
    except UnstreamableError as error:
        weights = Weights(*load_whole(source, dtype))
        notes.append(f"the whole model was held in main memory: {error}")
    model = weights.model
    if weights.absent:
        missing = some(weights.absent)
        notes.append(f"{source.name} lacks weights of {type(model).__name__} ({missing}): the output does too")
    if weights.left_out:
        what = f"{source.name} has weights that {type(model).__name__} has no place for"
        notes.append(f"{what} ({some(weights.left_out)}): they are not in the output")
    weights.notes = tuple(notes)
    return model, weights


def outside_device(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Where what is outside the blocks runs, if these run on ``device``; see ``Weights.outside``.

    There, unless it would take more than half of the card. It is the same on all ranks, and for a run that is resumed.
    """
    first = next(model.parameters())  # where inputs go
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    inside = any(first is parameter for block in blocks for parameter in block.module.parameters())
    if device.type in ("cpu", first.device.type) or inside:
        return MAIN
    outside = count_outside(model, blocks) * model.dtype.itemsize
    return device if 2 * outside <= card_memory(device) else MAIN


@torch.no_grad()
def replace_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give tensors of a module these values; one of another shape is replaced, and the sizes of its linear follow."""
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        old: Tensor = getattr(owner, last)
        if old.shape == tensor.shape:
            old.copy_(tensor)
            continue
        new = tensor.to(old.device, old.dtype, copy=True)
        setattr(owner, last, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if last == "weight":
            sizes = new.shape
            names = ("out_features", "in_features") if isinstance(owner, nn.Linear) else ("nx", "nf")
            for attribute, size in zip(names, sizes, strict=True):
                setattr(owner, attribute, size)
