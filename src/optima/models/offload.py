"""Where weights are while no block works with them: in main memory, or on disk.

From disk a block is read when it is needed, checked for NaN and Inf, brought to the device, and released afterwards.
accelerate's disk offload would store a second copy of all that transformers fuses when it reads a checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from optima.core.products import all_finite
from optima.device import Stopwatch, dtype_name, forward_replaced, on_device
from optima.errors import ModelError, NumericalError
from optima.models.blocks import Block, find_stacks
from optima.models.conversion import fill_buffers, load_tensors, places_of, shape_of
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


class Weights(Protocol):
    """Gives a model its weights when they are needed.

    Attributes:
        notes: for the report.
        left_out: tensors of the source that the model's class has no place for.
    """

    notes: tuple[str, ...]
    left_out: tuple[str, ...]

    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> AbstractContextManager[None]:
        """The block's weights are on ``device`` inside; the way there and back counts as stage ``read``.

        Raises:
            NumericalError: if a weight has NaN or Inf.
        """

    @contextmanager
    def outside(self, device: torch.device = MAIN) -> Iterator[None]:
        """Inside, a forward pass of the whole model runs on ``device``; if that is ``MAIN``, where the model is.

        A block is there for its call alone: no gradient can come back through it.
        """

    @contextmanager
    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """These parameters and saved buffers, by their full names, in memory; not those that no checkpoint gave."""

    def replaced(self, block: Block, read: Read) -> None:
        """From now on the block has the weights that ``read`` returns by full names."""


class Resident:
    """The whole model is in main memory: a block moves to the device and back.

    ``absent``: names of tensors that its checkpoint lacks, which are not written either.
    """

    def __init__(self, model: nn.Module | None = None, absent: Collection[str] = ()) -> None:
        self.model, self.absent = model, absent
        self.notes: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._checked = False

    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> AbstractContextManager[None]:
        """See ``Weights``."""
        self._check()
        return _moved(nullcontext(), block, device, clock)

    @contextmanager
    def outside(self, device: torch.device = MAIN) -> Iterator[None]:
        """See ``Weights``."""
        assert self.model is not None
        self._check()
        with _forward_on(self.model, self, device):
            yield

    def _check(self) -> None:
        if self.model is not None and not self._checked:
            for name in _to_check(self.model):
                _check_finite(self.model.get_parameter(name), f"tensor {name}", "Repair the model")
        self._checked = True

    @contextmanager
    def state(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """See ``Weights``."""
        assert self.model is not None
        wanted = frozenset(names).difference(self.absent)
        yield {name: tensor for name, tensor in self.model.state_dict().items() if name in wanted}

    def replaced(self, block: Block, read: Read) -> None:
        """See ``Weights``: it has them."""


class Checkpoint:
    """Reads tensors of a model on the meta device by name, and releases them.

    Args:
        model: on the meta device but for its buffers that are not saved.
        files: its safetensors files.

    Attributes:
        names: of each parameter and saved buffer, those that are the same tensor, itself included.
    """

    def __init__(self, model: PreTrainedModel, files: Collection[Path]) -> None:
        self.model = model
        opened = [(file, _open(file)) for file in files]
        self._slices = {name: _Part(file, each, name) for file, each in opened for name in each.keys()}  # noqa: SIM118
        self._empty: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        same: defaultdict[int, list[str]] = defaultdict(list)
        for name, tensor in self._empty.items():
            same[id(tensor)].append(name)
        self.names = {name: tuple(same[id(tensor)]) for name, tensor in self._empty.items()}
        self._on_disk: defaultdict[str, list[str]] = defaultdict(list)
        for name, place in places_of(model, self._slices).items():
            self._on_disk[place].append(name)
        self._to_check = _to_check(model)

    def is_read(self, name: str) -> bool:
        """Whether a tensor of the model is in memory."""
        return not _get(self.model, name).is_meta

    def check(self, names: Collection[str]) -> None:
        """Raise ``UnstreamableError`` if the tensors ``names`` need others on disk than those named like them."""
        parts = self._parts(names)
        missing = self._load({name: shape_of(part) for name, part in parts.items()}, "meta")
        self.release(names)
        loaded = self._empty.keys() - missing
        for name in names:
            if loaded.isdisjoint(self.names[name]):
                why = "is made of parts of others" if self._parts([name]) else "is not in the checkpoint"
                raise UnstreamableError(f"{name} {why}")

    def read(self, names: Collection[str]) -> None:
        """Put the tensors ``names``, and those that are the same, into the model, on the CPU.

        Raises:
            NumericalError: if one has NaN or Inf.
            ModelError: if the files cannot be read any more.
        """
        names = [name for name in names if not self.is_read(name)]
        if not names:  # a block is called once a batch, and to read nothing takes transformers 3 ms
            return
        self._load(self._parts(names), "cpu")
        for name in names:
            (tensor, *_) = (found for same in self.names[name] if not (found := _get(self.model, same)).is_meta)
            tensor.requires_grad_(self._empty[name].requires_grad)
            for same in self.names[name]:
                _set(self.model, same, tensor)
            if name in self._to_check:
                where = "".join(f"{part.file}: tensor {place}" for place, part in [*self._parts([name]).items()][:1])
                _check_finite(tensor, where, "Re-download the checkpoint")
                self._to_check.remove(name)

    def release(self, names: Collection[str]) -> None:
        """Give up the tensors ``names``, and those that are the same."""
        for name in names:
            for same in self.names[name]:
                _set(self.model, same, self._empty[same])

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors on disk are equal."""
        one, other = (list(self._parts([name]).values()) for name in (first, second))
        return len(one) == len(other) and all(torch.equal(a[...], b[...]) for a, b in zip(one, other, strict=True))

    def _parts(self, names: Collection[str]) -> dict[str, _Part]:
        wanted = {same for name in names for same in self.names[name]}
        return {part: self._slices[part] for same in sorted(wanted) for part in self._on_disk.get(same, ())}

    def _load(self, parts: Mapping[str, Any], device: str) -> frozenset[str]:
        try:
            with no_bars():
                return load_tensors(self.model, parts, device)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the weights of {self.model.name_or_path} cannot be read any more: {error}") from error


class _Part:
    """A tensor on disk, as transformers asks for it: read whole, since safetensors holds a slice twice for a moment."""

    def __init__(self, file: Path, opened: Any, name: str) -> None:
        self.file, self._opened, self._name = file, opened, name
        self._slice = opened.get_slice(name)
        self.get_shape, self.get_dtype = self._slice.get_shape, self._slice.get_dtype

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self._opened.get_tensor(self._name) if index is ... else self._slice[index]
        return part


class Streamed:
    """Weights stay on disk: a block's are read when it is needed, and released afterwards.

    The input embedding and the LM head are read when they are called, and kept until the phase ends (``outside``). All
    else outside the blocks is small, and stays in memory.

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
        self._inside, outside = _parts(checkpoint, blocks)
        model = checkpoint.model
        rows = getattr(model.config.get_text_config(), "vocab_size", None)
        kinds = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in outside}
        large = {name for name in outside if _get(model, name).ndim == 2 and len(_get(model, name)) == rows}
        lazy = {name for name in large if issubclass(kinds[name], nn.Embedding | nn.Linear)}
        owners = [(model.get_submodule(name.rpartition(".")[0]), name) for name in sorted(lazy)]
        checkpoint.read([name for name in outside if name not in lazy])
        for module, name in owners:
            module.register_forward_pre_hook(partial(self._keep_called, name))
        # The first parameter, which is not the first tensor where a model has buffers of its own (BART).
        first = next((name for name, _ in model.named_parameters()), "")
        self._first = [first] if first in outside else []
        for block in blocks:
            self._read_when_called(block)

    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> AbstractContextManager[None]:
        """See ``Weights``."""
        released = bool(self._missing(self._inside[block.name]))
        return _moved(self._block(block.name), block, device, clock, comes_back=not released)

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

    @contextmanager
    def _read(self, names: Sequence[str]) -> Iterator[list[str]]:
        """These tensors are in memory inside; those that were there stay. Yields the names of the others."""
        missing = self._missing(names)
        try:
            self.checkpoint.read(missing)
            yield missing
        finally:
            self.checkpoint.release(missing)

    @contextmanager
    def _block(self, name: str) -> Iterator[None]:
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
            with self._block(block.name):
                return forward(*args, **kwargs)

        block.module.forward = called

    def _keep(self, names: Sequence[str]) -> None:
        """Read what is missing of ``names``, until the phase ends."""
        missing = self._missing(names)
        try:
            self.checkpoint.read(missing)
            self._kept.extend(missing)
            for name in missing if self._device != MAIN else ():
                parameter = self.checkpoint.model.get_parameter(name)
                parameter.data = parameter.data.to(self._device)
        except BaseException:  # out of memory: whoever tries again must find them missing
            self.checkpoint.release(missing)
            raise

    def _keep_called(self, name: str, module: nn.Module, args: object) -> None:
        self._keep([name])


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
            # A forward pass may have put another buffer into the place of one: it comes back too.
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
    for name, buffer in module._buffers.items():
        if buffer is not None and (known := before.get(name)) is not None and buffer is not known:
            module._buffers[name] = buffer.to(known.device)


def _brought(
    weights: Weights, block: Block, device: torch.device, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
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


def _to_check(model: nn.Module) -> set[str]:
    """Names of the parameters that must be finite: embeddings may have rows that no text uses, biases forbid tokens."""
    modules = (module for module in model.modules() if isinstance(module, nn.Embedding))
    rows = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    return {
        name
        for name, each in model.named_parameters()
        if each.is_floating_point() and id(each) not in rows and not name.endswith("bias")
    }


def _check_finite(tensor: Tensor, what: str, remedy: str) -> None:
    if not all_finite(tensor):
        raise NumericalError(f"{what} has NaN or Inf. {remedy}.")


def open_checkpoint(source: Source, structure: PreTrainedModel, dtype: str) -> Checkpoint:
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
    config = load_config(source)
    if named := getattr(config, "transformers_weights", None):
        raise UnstreamableError(f"its configuration names files of its own ({named})")
    with explain_read_errors(source, "weights"), no_bars():
        files = fetch_weights(source)
        kind: Any = type(structure)
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=_shapes(files), dtype=dtype, device_map={"": "meta"}, **LOADING
        )
        if model.can_generate():
            model.generation_config = _generation(source)
    model.config.name_or_path = source.path
    check_complete(source, model, loading)
    if loading["missing_keys"]:
        raise UnstreamableError(f"weights that it lacks ({min(loading['missing_keys'])}) are made anew")
    fill_buffers(model)
    checkpoint = Checkpoint(model, files)
    if _tie(checkpoint):
        checkpoint = Checkpoint(model, files)
    model.eval()
    return checkpoint


def _shapes(files: Collection[Path]) -> dict[str, Tensor]:
    """Every tensor of safetensors files by its name there, on the meta device."""
    shapes: dict[str, Tensor] = {}
    for file in files:
        with _open(file) as opened:
            shapes |= {name: shape_of(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return shapes


def _open(file: Path) -> Any:
    """Tensors are read, not mapped: a private mapping of a file counts as memory of the process."""
    try:
        return safe_open(file, framework="pt", backend="pread")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be opened: {error}") from error


def _generation(source: Source) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source.path, **source.of_hub)
    except OSError:
        names: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
        return GenerationConfig.from_pretrained(source.path, **names, **source.of_hub)


def _tie(checkpoint: Checkpoint) -> bool:
    """Tie weights that were saved twice if they are equal, which cannot be seen on the meta device; whether any are."""
    model = checkpoint.model
    pairs = dict(model.all_tied_weights_keys)
    twice = {target: source for target, source in pairs.items() if source not in checkpoint.names[target]}
    for target, source in twice.items():
        if not checkpoint.same(target, source):
            model.all_tied_weights_keys.pop(target)
    if twice:
        model.tie_weights(recompute_mapping=False)
    return bool(twice)


def _get(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), last)
    return found


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    held: dict[str, Any] = module._parameters if last in module._parameters else module._buffers
    held[last] = tensor


def open_weights(
    source: Source,
    structure: PreTrainedModel,
    dtype: str,
    whole: str | None = None,
) -> tuple[PreTrainedModel, Weights]:
    """The model of ``source``, and what gives it its weights: from disk where possible.

    Args:
        source: where it is from.
        structure: its skeleton.
        dtype: of the weights; ``auto`` keeps the checkpoint's own.
        whole: why the model must be in main memory, if it must.

    Raises:
        ModelError: if the weights cannot be found or read, or are quantized.
    """
    shapes: dict[str, Tensor] = {}
    if not source.gguf_file:
        with explain_read_errors(source, "weights"):
            shapes = _shapes(fetch_weights(source))
        _check_unquantized(source, shapes)
    notes: list[str] = []
    weights: Weights
    try:
        if whole is not None:
            raise UnstreamableError(whole)
        checkpoint = open_checkpoint(source, structure, dtype)
        model = checkpoint.model
        weights = Streamed(checkpoint, [block for stack in find_stacks(model) for block in stack.blocks])
    except UnstreamableError as error:
        model, absent = load_whole(source, dtype)
        notes.append(f"the whole model was held in main memory: {error}")
        if absent:
            notes.append(f"{source.name} lacks weights of {type(model).__name__} ({some(absent)}): the output does too")
        weights = Resident(model, absent)
    if names := _left_out(shapes, model):
        what = f"{source.name} has weights that {type(model).__name__} has no place for"
        notes.append(f"{what} ({some(names)}): they are not in the output")
    weights.left_out, weights.notes = tuple(names), tuple(notes)
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


def _check_unquantized(source: Source, shapes: Mapping[str, Tensor]) -> None:
    """Not every quantized checkpoint says so in its configuration: weights may be codes without their scales."""
    for name, shape in shapes.items():
        small = shape.itemsize < 2 if shape.is_floating_point() else name.endswith("weight")
        if small and shape.ndim >= 2:
            raise ModelError(
                f"{source.name} is quantized ({name} is {dtype_name(shape.dtype)}): prune the unquantized checkpoint, "
                "then quantize the result"
            )


def _left_out(shapes: Mapping[str, Tensor], model: PreTrainedModel) -> list[str]:
    """Names of the weights on disk that ``model`` has no place for, as of a block for multi-token prediction.

    Rotary frequencies, which older releases saved, are no weights.
    """
    held = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    weights = [name for name, shape in shapes.items() if shape.is_floating_point() and shape.ndim]
    return [
        name for name, place in places_of(model, weights).items() if place not in held and not name.endswith("inv_freq")
    ]
