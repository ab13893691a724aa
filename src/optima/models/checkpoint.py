"""A checkpoint that stays on disk: a model on the meta device, and its tensors when they are asked for by name.

transformers itself renames, fuses, transposes and casts what is read: it is given the few tensors on disk that those
asked for are made of. accelerate's disk offload would hold a second copy of all that is fused, and reads by module.
"""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig, str_to_torch_dtype
from transformers.utils import logging as transformers_logging

from optima.device import dtype_name
from optima.errors import ModelError
from optima.files import shards
from optima.models.load import (
    INDEX,
    LOADING,
    WEIGHTS,
    Source,
    check_complete,
    explain_read_errors,
    find_file,
    load_config,
)

# Open files that a process may have beside the model's: libraries, sockets, files of activations while they are made.
OTHER_FILES = 512


class UnstreamableError(Exception):
    """Why this checkpoint must be read whole."""


class Checkpoint:
    """Reads tensors of a model on the meta device, and gives them up again.

    Args:
        model: on the meta device but for its buffers that are not saved; it remembers how names were converted.
        files: its safetensors files.

    Attributes:
        names: of each parameter and saved buffer, those that are the same tensor, itself included.
    """

    def __init__(self, model: PreTrainedModel, files: Collection[Path]) -> None:
        self.model = model
        self.conversions = _conversions(model)
        self._stats = {file: _stat(file) for file in files}
        _may_open(len(files))
        self._files: list[Any] = [_open(file) for file in files]
        on_disk = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - no mapping
        self._empty: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        same: defaultdict[int, list[str]] = defaultdict(list)
        for name, tensor in self._empty.items():
            same[id(tensor)].append(name)
        self.names = {name: tuple(same[id(tensor)]) for name, tensor in self._empty.items()}
        self._on_disk: defaultdict[str, list[str]] = defaultdict(list)
        for name, place in places_of(model, on_disk).items():
            self._on_disk[place].append(name)
        self._slices = {name: _Part(file, name) for name, file in on_disk.items()}

    def is_read(self, name: str) -> bool:
        """Whether a tensor of the model is in memory."""
        return not _get(self.model, name).is_meta

    def check(self, names: Collection[str]) -> None:
        """Raise ``UnstreamableError`` if the tensors ``names`` need others on disk than those named like them."""
        shapes = {name: _meta(part) for name, part in self._parts(names).items()}
        info = self._load(shapes, {"": "meta"})
        self.release(names)
        loaded = self._empty.keys() - info.missing_keys
        for name in names:
            if loaded.isdisjoint(self.names[name]):
                why = "is made of parts of others" if self._parts([name]) else "is not in the checkpoint"
                raise UnstreamableError(f"{name} {why}")

    def read(self, names: Collection[str]) -> None:
        """Put the tensors ``names``, and those that are the same, into the model, on the CPU."""
        names = [name for name in names if not self.is_read(name)]
        self._load(self._parts(names), {"": "cpu"})
        for name in names:
            (tensor, *_) = (found for same in self.names[name] if not (found := _get(self.model, same)).is_meta)
            tensor.requires_grad_(self._empty[name].requires_grad)
            for same in self.names[name]:
                _set(self.model, same, tensor)

    def release(self, names: Collection[str]) -> None:
        """Give up the tensors ``names``, and those that are the same."""
        for name in names:
            for same in self.names[name]:
                _set(self.model, same, self._empty[same])

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors on disk are equal."""
        one, other = (list(self._parts([name]).values()) for name in (first, second))
        return len(one) == len(other) and all(torch.equal(a[...], b[...]) for a, b in zip(one, other, strict=True))

    def _parts(self, names: Collection[str]) -> dict[str, Any]:
        """What these are made of, by the names on disk."""
        wanted = {same for name in names for same in self.names[name]}
        return {part: self._slices[part] for same in sorted(wanted) for part in self._on_disk.get(same, ())}

    def _load(self, parts: Mapping[str, Any], device_map: dict[str, str]) -> Any:
        config = LoadStateDictConfig(dtype=self.model.dtype, device_map=device_map, weight_mapping=self.conversions)
        place = next((str(file.parent) for file in self._stats), "")
        try:
            with no_bars():
                found = self.model._load_pretrained_model(self.model, dict(parts), None, config)[0]
            changed = next((file for file, known in self._stats.items() if _stat(file) != known), None)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the weights in {place} cannot be read any more ({error}): see to the disk") from error
        if changed is not None:
            raise ModelError(f"{changed} was changed while it was read: leave a model alone until the run is over")
        return found


class _Part:
    """A tensor on disk, as transformers asks for it: read whole, since safetensors holds a slice twice for a moment."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        slice_ = file.get_slice(name)
        self.get_shape, self.get_dtype = slice_.get_shape, slice_.get_dtype
        self._slice = slice_

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self._file.get_tensor(self._name) if index is ... else self._slice[index]
        return part


class _Shape(Tensor):
    """A tensor on the meta device that stays there: transformers converts some on the CPU, where it has no numbers."""

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).to(dtype=dtype)


def _stat(file: Path) -> tuple[int, int, int]:
    """What differs once a file was replaced or written into."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


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
    with explain_read_errors(source, "weights"):
        if not (files := _find(source)):
            raise UnstreamableError(f"there is neither {WEIGHTS} nor {INDEX}")
    with explain_read_errors(source, "weights"), no_bars():
        shapes = _shapes(files)
        kind: Any = type(structure)
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=shapes, dtype=dtype, device_map={"": "meta"}, **LOADING
        )
        _add_generation(source, model)
    model.config.name_or_path = source.path
    check_complete(source, model, loading)
    if loading["missing_keys"]:
        raise UnstreamableError(f"weights that it lacks ({min(loading['missing_keys'])}) are made anew")
    _fill_buffers(model)
    checkpoint = Checkpoint(model, files)
    if _tie(checkpoint):
        checkpoint = Checkpoint(model, files)
    model.eval()
    return checkpoint


def _find(source: Source) -> list[Path]:
    """The files that transformers would read, in its order of preference; downloaded, if they are on the hub."""
    if file := find_file(source, WEIGHTS):
        return [file]
    if index := find_file(source, INDEX):
        names = shards(index)
        found = [find_file(source, name) for name in names]
        if missing := [name for name, path in zip(names, found, strict=True) if path is None]:
            raise OSError(f"{missing[0]} is missing")
        return [path for path in found if path is not None]
    return []


def _shapes(files: Collection[Path]) -> dict[str, Tensor]:
    """Every tensor of safetensors files, on the meta device."""
    shapes: dict[str, Tensor] = {}
    for file in files:
        with _open(file) as opened:
            shapes |= {name: _meta(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return shapes


def _conversions(model: PreTrainedModel) -> list[Any]:
    return list(getattr(model, "_weight_conversions", None) or [])


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Of each tensor on disk that of the model which it becomes (a part of); the first, if they are several."""
    renamings = [each for each in _conversions(model) if isinstance(each, WeightRenaming)]
    converters = [each for each in _conversions(model) if isinstance(each, WeightConverter)]
    known = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}

    def place(name: str) -> str:
        found, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return name if found not in known and name in known else found

    return {name: place(name) for name in names}


def left_out(shapes: dict[str, Tensor], places: Mapping[str, str], model: PreTrainedModel) -> list[str]:
    """Names of the weights, of these ``shapes`` on disk, that ``model`` has no place for, by their ``places_of``.

    transformers says nothing of those that its class expects: a block for multi-token prediction, for example.
    Rotary frequencies, which older releases saved, are no weights.
    """
    held = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    weights = (name for name, shape in shapes.items() if shape.is_floating_point() and shape.ndim)
    return [name for name in weights if places[name] not in held and not name.endswith("inv_freq")]


def recast(
    shapes: dict[str, Tensor], places: Mapping[str, str], model: PreTrainedModel
) -> dict[tuple[str, str], list[str]]:
    """Names of those that ``model`` has in another dtype, by both dtypes."""
    held, found = model.state_dict(), defaultdict[tuple[str, str], list[str]](list)
    for name, place in places.items():
        if place in held and shapes[name].is_floating_point() and shapes[name].dtype != held[place].dtype:
            found[dtype_name(shapes[name].dtype), dtype_name(held[place].dtype)].append(name)
    return found


def check_numbers(source: Source, shapes: dict[str, Tensor]) -> None:
    """Raise ``ModelError`` if weights are codes on disk, which would be read without their scales.

    Not every quantized checkpoint says so in its configuration.
    """
    for name, shape in shapes.items():
        small = shape.itemsize < 2 if shape.is_floating_point() else name.endswith("weight")
        if small and shape.ndim >= 2:
            raise ModelError(
                f"{source.name} is quantized ({name} is {dtype_name(shape.dtype)}): prune the unquantized checkpoint, "
                "then quantize the result"
            )


def on_disk(source: Source) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name there, on the meta device."""
    with explain_read_errors(source, "weights"):
        return _shapes(_find(source))


def _open(file: Path) -> Any:
    """Tensors are read, not mapped: a private mapping of a file counts as memory of the process."""
    if file.exists() and not os.access(file, os.R_OK):
        raise ModelError(f"{file} may not be read: see its permissions")
    try:
        return safe_open(file, framework="pt", backend="pread")
    except OSError as error:  # also of a limit: safetensors says then that there is no such file
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise ModelError(
            f"{file} cannot be opened ({error}): see that it is there, and that ulimit -n, which is {most}, is more "
            "than the model has files"
        ) from error


def _may_open(count: int) -> None:
    """Raise the limit of open files where it would be too low for so many more, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < (wanted := count + OTHER_FILES) and soft != resource.RLIM_INFINITY:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(most, soft), hard))


def _meta(part: Any) -> Tensor:
    empty = torch.empty(part.get_shape(), dtype=str_to_torch_dtype[part.get_dtype()], device="meta")
    return empty.as_subclass(_Shape)


def _add_generation(source: Source, model: PreTrainedModel) -> None:
    """The generation configuration, as ``from_pretrained`` finds it."""
    if not model.can_generate():
        return
    try:
        found = GenerationConfig.from_pretrained(source.path, **source.of_hub)
    except OSError:
        names: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
        found = GenerationConfig.from_pretrained(source.path, **names, **source.of_hub)
    model.generation_config = found


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that are not saved, such as rotary frequencies, by the library's own initialisation."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = False  # type: ignore[assignment]  # parameters keep their own mark, and are left alone
    model.initialize_weights()


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
    module = model.get_submodule(path)
    # Not as attributes: see ``optima.models.offload.Streamed``.
    found: Tensor | None = module._parameters.get(last)
    found = module._buffers[last] if found is None else found
    assert found is not None
    return found


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    # Not as an attribute: torch asks for the old one first, and what was given up would be read again.
    held: dict[str, Any] = module._parameters if last in module._parameters else module._buffers
    held[last] = tensor


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bars for what it reads and writes, with which it switches off the hub's."""
    shown, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if downloads:
            enable_progress_bars()
