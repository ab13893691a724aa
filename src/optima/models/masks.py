"""External masks: the zeros of a checkpoint, or a safetensors file of masks."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optima.errors import ModelError, RecipeError
from optima.files import usable_path
from optima.models.blocks import Linear
from optima.models.load import find_source, skeleton, some, weight_files
from optima.models.offload import Streamed, UnstreamableError, open_checkpoint


class MaskFiles:
    """The masks at a path.

    Args:
        path: a Hugging Face directory with safetensors, in which a weight survives where it is not zero, or one
            safetensors file of bool or uint8 tensors (1 = the weight survives), each called like its linear, with or
            without ``.weight``. Masks have the shape in which the model stores the weight, or, of one expert of a fused
            parameter and called by its number, outputs x inputs. What a directory stores under other names, or in
            parts, as experts often are, is read as transformers reads it.
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
        if not files or not all(file.is_file() for file in files):
            raise RecipeError(
                f"mask_from {self.path} is neither a directory with all its .safetensors nor such a file: name a "
                "pruned checkpoint or a safetensors file of masks"
            )
        found: dict[str, tuple[Path, str]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    keys = list(tensors.keys())
            except (OSError, SafetensorError) as error:
                raise RecipeError(f"mask_from: {file} is not a safetensors file ({error})") from error
            found |= {key.removesuffix(".weight"): (file, key) for key in keys}
        return found

    @cached_property
    def _checkpoint(self) -> Streamed:
        source = find_source(str(self.path), self._trusted)
        return open_checkpoint(source, skeleton(source), "auto")

    def check_names(self, known: Collection[str]) -> None:
        """Raise ``RecipeError`` if a file of masks has one for something that is not in ``known``."""
        if not self.path.is_dir() and (unknown := self.files.keys() - known):
            raise RecipeError(
                f"mask_from {self.path}: the model has no linear {min(unknown)}: rename the mask as the model calls "
                f"the linear (for example {some(known) or 'none'}), or remove it"
            )

    def keep_OD(self, linear: Linear) -> Tensor:
        """A linear's mask, bool, outputs x inputs, True = the weight survives.

        Raises:
            RecipeError: if there is none, or it has another dtype or shape or other values than a mask.
        """
        names = [linear.name, *([linear.name.rpartition(".")[0]] if linear.expert else [])]
        name = next((name for name in names if name in self.files), names[-1])
        if self._last is None or self._last[0] != name:
            self._last = name, self._stored(name) if name in self.files else self._converted(name)
        keep = self._last[1]
        alone = linear.expert is not None and name == linear.name  # else one mask of all experts
        shape = torch.Size(linear.shape) if alone else linear.parameter.shape
        if keep.shape != shape:
            raise RecipeError(
                f"the external mask of {linear.name} has shape {tuple(keep.shape)}, but the model stores its weight "
                f"as {tuple(shape)}: use masks that were made for this model"
            )
        return keep if alone else linear.orient(keep)

    def _stored(self, name: str) -> Tensor:
        file, key = self.files[name]
        with safe_open(file, framework="pt") as tensors:
            stored: Tensor = tensors.get_tensor(key)
        if not self.path.is_dir() and stored.dtype not in (torch.bool, torch.uint8):
            raise RecipeError(
                f"mask_from {self.path}: {name} is {stored.dtype}, not bool or uint8: save masks as bool, or "
                "name the directory of a checkpoint to take its zeros"
            )
        if stored.dtype == torch.uint8 and bool((stored > 1).any()):
            raise RecipeError(f"mask_from {self.path}: {name} has values above 1: a mask is 0 (pruned) or 1 (kept)")
        return stored != 0

    def _converted(self, name: str) -> Tensor:
        why = ""
        if (self.path / "config.json").is_file():
            try:
                known = self._checkpoint.names.keys()
                for key in (name, f"{name}.weight"):
                    if key in known:
                        new = self._checkpoint.read([key])
                        keep_OD: Tensor = self._checkpoint.model.get_parameter(key).detach() != 0
                        self._checkpoint.release(new)
                        return keep_OD
            except (ModelError, UnstreamableError) as error:
                why = f", nor one that transformers would make of these: {error}"
        raise RecipeError(
            f"mask_from {self.path} has no mask for {name} (it has {some(self.files) or 'none'}){why}: add it, or "
            f"leave the linear out with --ignore '{name}'"
        )
