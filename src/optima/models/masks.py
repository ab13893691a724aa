"""External masks: the zeros of a checkpoint, or a safetensors file of masks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optima.errors import ModelError, RecipeError
from optima.files import PACKED, usable_path
from optima.models.blocks import Linear
from optima.models.load import find_source, skeleton, some, weight_files
from optima.models.offload import Checkpoint, UnstreamableError, open_checkpoint


class MaskFiles:
    """The masks at a path.

    Args:
        path: a Hugging Face directory with safetensors, in which a weight survives where it is not zero, or one
            safetensors file of bool or uint8 tensors (1 = the weight survives), each called like its linear, with or
            without ``.weight``. Masks have the shape in which the model stores the weight, or, of one expert of a fused
            parameter and called by its number, outputs x inputs. What a directory stores
            under other names, or in parts, as experts often are, is read as transformers reads it.
        trust_remote_code: run the code that comes with a checkpoint, to read it so.
    """

    def __init__(self, path: str, trust_remote_code: bool = False) -> None:
        self._trusted = trust_remote_code
        self.path = usable_path(path, "mask_from", "name a pruned checkpoint or a safetensors file of masks")
        self._last: tuple[str, Tensor] | None = None  # experts of one parameter are asked for one after another

    @cached_property
    def files(self) -> dict[str, tuple[Path, str]]:
        """The file and key of each tensor, by the name of its linear.

        Raises:
            RecipeError: if there is nothing to read.
        """
        files = weight_files(self.path) if self.path.is_dir() else [self.path]
        if files and all(file.name.endswith(PACKED) for file in files):
            raise RecipeError(f"mask_from {self.path} is packed: unpack it with optima unpack {self.path}")
        if not files or not all(file.is_file() for file in files):
            raise RecipeError(
                f"mask_from {self.path} is neither a directory with all its .safetensors nor such a file: name a "
                "pruned checkpoint or a safetensors file of masks"
            )
        found: dict[str, tuple[Path, str]] = {}
        for file in files:
            for key in _keys(file):
                other, known = found.setdefault(key.removesuffix(".weight"), (file, key))
                if (other, known) != (file, key):
                    raise RecipeError(
                        f"mask_from {self.path}: {known} in {other.name} and {key} in {file.name} are one: keep one"
                    )
        return found

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        """A directory as transformers reads it."""
        source = find_source(str(self.path), self._trusted)
        return open_checkpoint(source, skeleton(source), "auto")

    @cached_property
    def _stored_names(self) -> _Names:
        return _Names(self.files)

    @cached_property
    def _model_names(self) -> _Names:
        return _Names(key.removesuffix(".weight") for key in self._checkpoint.names)

    def check_names(self, known: Collection[str]) -> None:
        """Raise ``RecipeError`` if a file of masks has one for something that is not in ``known``."""
        of_model = _Names(known)
        for name in () if self.path.is_dir() else self.files:
            if not of_model.alike(name):
                raise RecipeError(
                    f"mask_from {self.path}: the model has no linear {name}: rename the mask as the model calls the "
                    f"linear (for example {some(known) or 'none'}), or remove it"
                )

    def keep_OD(self, linear: Linear) -> Tensor:
        """A linear's mask, bool, outputs x inputs, True = the weight survives.

        Raises:
            RecipeError: if there is none, or it has another dtype or shape or other values than a mask.
        """
        key = self._find(linear.name)
        if self._last is None or self._last[0] != key:
            self._last = key, self._read(key)
        keep = self._last[1]
        alone = linear.expert is not None and _same(key, linear.name)  # else one mask of all experts
        shape = torch.Size(linear.shape) if alone else linear.parameter.shape
        if keep.shape != shape:
            raise RecipeError(
                f"the external mask of {linear.name} has shape {tuple(keep.shape)}, but the model stores its weight "
                f"as {tuple(shape)}: use masks that were made for this model"
            )
        return keep if alone else linear.orient(keep)

    def _read(self, name: str) -> Tensor:
        if name in self.files:
            file, key = self.files[name]
            with safe_open(file, framework="pt") as tensors:
                stored: Tensor = tensors.get_tensor(key)
        else:
            key = name if name in self._checkpoint.names else f"{name}.weight"
            self._checkpoint.read([key])
            stored = self._checkpoint.model.get_parameter(key).detach()
            self._checkpoint.release([key])
        if not self.path.is_dir() and stored.dtype not in (torch.bool, torch.uint8):
            raise RecipeError(
                f"mask_from {self.path}: {key} is {stored.dtype}, not bool or uint8: save masks as bool, or "
                "name the directory of a checkpoint to take its zeros"
            )
        if stored.dtype == torch.uint8 and bool((stored > 1).any()):
            raise RecipeError(f"mask_from {self.path}: {key} has values above 1: a mask is 0 (pruned) or 1 (kept)")
        return stored != 0

    def _find(self, name: str) -> str:
        """The stored name of a linear, or else the one that it has in the model that a directory holds."""
        found, why = self._stored_names.matches(name), ""
        if not found and (self.path / "config.json").is_file():
            try:
                found = self._model_names.matches(name)
            except (ModelError, UnstreamableError) as error:
                why = f", nor one that transformers would make of these: {error}"
        if len(found) != 1:
            raise RecipeError(
                f"mask_from {self.path} has {'no' if not found else 'more than one'} mask for {name} (it has "
                f"{some(self.files) or 'none'}){why}: add it, or leave the linear out with --ignore '{name}'"
            )
        return found[0]


class _Names:
    """Names of masks, or of linears, to be found among many."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_tail: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            self._by_tail[_tail(name)].append(name)

    def matches(self, linear: str) -> list[str]:
        """Which are a linear's mask: called like it, or the same but for the prefix of the model around.

        Experts of one fused parameter share the mask that is called like it.
        """
        fused = linear.rpartition(".")[0]
        found = sorted({*self.alike(linear), *self.alike(fused)})
        exact = [each for each in (linear, fused) if each in found]
        return exact[:1] or found

    def alike(self, name: str) -> list[str]:
        """Those that differ at most by the prefix."""
        return [other for other in self._by_tail.get(_tail(name), ()) if _same(name, other)]


def _tail(name: str) -> str:
    """What names that are ``_same`` share at least: from the first number on, or the last part."""
    found = re.search(r"[^.]*\d.*|[^.]*$", name)
    assert found is not None
    return found[0]


def _same(first: str, second: str) -> bool:
    """Whether two names differ at most by what is around the stack of blocks, in which nothing is numbered."""
    shorter, longer = sorted((first, second), key=len)
    around = longer.removesuffix(shorter)
    return around + shorter == longer and (not around or (around.endswith(".") and not re.search(r"\d", around)))


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"mask_from: {file} is not a safetensors file ({error})") from error
