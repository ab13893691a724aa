"""Masks that someone else made: the zeros of a checkpoint, or a safetensors file of masks, each read once."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from optima.errors import RecipeError
from optima.models.stacks import Linear

MASK_DTYPES = ("BOOL", "U8")
# Names listed in a message.
LISTED = 5


class MaskFiles:
    """The masks at a path.

    Args:
        path: a Hugging Face directory with safetensors, in which a weight survives where it is not zero, or one
            safetensors file of bool or uint8 tensors (1 = the weight survives), each called like its linear, with or
            without ``.weight``. Masks have the shape in which the model stores the weight.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self._packed: dict[str, tuple[torch.Size, Tensor]] = {}  # eight weights in a byte

    @cached_property
    def is_checkpoint(self) -> bool:
        """True for a directory, whose zeros are the mask."""
        return self.path.is_dir()

    @cached_property
    def files(self) -> dict[str, Path]:
        """Where each tensor is, by the name of its linear.

        Raises:
            RecipeError: if there is nothing to read.
        """
        files = sorted(self.path.glob("*.safetensors")) if self.is_checkpoint else [self.path]
        if not files or not all(file.is_file() for file in files):
            raise RecipeError(
                f"mask_from {self.path} is neither a directory with .safetensors nor such a file: name a pruned "
                "checkpoint or a safetensors file of masks"
            )
        return {key.removesuffix(".weight"): file for file in files for key in _keys(file)}

    def check_names(self, known: Collection[str]) -> None:
        """Raise ``RecipeError`` if a file of masks has one for something that is not in ``known``."""
        if self.is_checkpoint:
            return
        for name in self.files:
            if not any(_same(name, other) for other in known):
                raise RecipeError(
                    f"mask_from {self.path}: the model has no linear {name}: rename the mask as the model calls the "
                    f"linear (for example {_some(known)}), or remove it"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a linear's mask, without reading it.

        Raises:
            RecipeError: if there is none, or its dtype is not that of a mask.
        """
        key = self._find(name)
        with _open(self.files[key]) as tensors:
            piece = tensors.get_slice(_full(key, tensors.keys()))
            if not self.is_checkpoint and piece.get_dtype() not in MASK_DTYPES:
                raise RecipeError(
                    f"mask_from {self.path}: {key} is {piece.get_dtype()}, not bool or uint8: save masks as bool, or "
                    "name the directory of a checkpoint to take its zeros"
                )
            return tuple(piece.get_shape())

    def keep(self, name: str) -> Tensor:
        """A linear's mask as it is stored, bool, True = the weight survives. The file is read at the first call.

        Raises:
            RecipeError: if there is none, or it has other values than 0 and 1.
        """
        if name not in self._packed:
            key = self._find(name)
            with _open(self.files[key]) as tensors:
                tensor = tensors.get_tensor(_full(key, tensors.keys()))
            if tensor.dtype == torch.uint8 and bool((tensor > 1).any()):
                raise RecipeError(f"mask_from {self.path}: {key} has values above 1: a mask is 0 (pruned) or 1 (kept)")
            self._packed[name] = (tensor.shape, _pack(tensor != 0))
        shape, packed = self._packed[name]
        return _unpack(packed, shape)

    def keep_OD(self, linear: Linear) -> Tensor:
        """A linear's mask as outputs x inputs.

        Raises:
            RecipeError: as ``keep``, or if the mask has another shape than the linear's weight.
        """
        wanted, found = tuple(linear.parameter.shape), self.shape(linear.name)
        if found != wanted:
            raise RecipeError(
                f"the external mask of {linear.name} has shape {found}, but the model stores its weight as {wanted}: "
                "use masks that were made for this model"
            )
        return linear.orient(self.keep(linear.name))

    def _find(self, name: str) -> str:
        """The stored name of a linear: its own, or the same without the prefix of the model around its blocks."""
        if name in self.files:
            return name
        found = [key for key in self.files if _same(key, name)]
        if len(found) != 1:
            raise RecipeError(
                f"mask_from {self.path} has {'no' if not found else 'more than one'} mask for {name} (it has "
                f"{_some(self.files)}): add it, or leave the linear out with --ignore '{name}'"
            )
        return found[0]


def _pack(keep: Tensor) -> Tensor:
    bits = nn.functional.pad(keep.reshape(-1), (0, -keep.numel() % 8)).reshape(-1, 8)
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.bool().reshape(-1)[: shape.numel()].reshape(shape)


def _same(first: str, second: str) -> bool:
    """Whether two names differ at most by what is around the stack of blocks, in which nothing is numbered."""
    shorter, longer = sorted((first, second), key=len)
    around = longer.removesuffix(shorter)
    return around + shorter == longer and (not around or (around.endswith(".") and not re.search(r"\d", around)))


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:LISTED]) + (" ..." if len(listed) > LISTED else "") if listed else "none"


def _full(name: str, keys: Collection[str]) -> str:
    return name if name in keys else f"{name}.weight"


def _open(file: Path) -> safe_open:
    return safe_open(file, framework="pt")


def _keys(file: Path) -> list[str]:
    try:
        with _open(file) as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"mask_from: {file} is not a safetensors file ({error})") from error
