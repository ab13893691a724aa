"""The one file that uses internals of transformers: how tensors on disk become those of a model.

``from_pretrained`` renames, splits, fuses, transposes and casts what it reads, by rules that each model brings, and it
reads all of a model at once. No public function applies these rules to a few tensors, or names the tensors on disk that
one of the model is made of. ``save_pretrained`` applies them backwards, and is public.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig, str_to_torch_dtype


class Shape(Tensor):
    """A tensor on the meta device that stays there: transformers converts some on the CPU, where it has no numbers."""

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Without the device."""
        return self.as_subclass(Tensor).to(dtype=dtype)


def shape_of(part: Any) -> Tensor:
    """A slice of a safetensors file, on the meta device."""
    empty = torch.empty(part.get_shape(), dtype=str_to_torch_dtype[part.get_dtype()], device="meta")
    return empty.as_subclass(Shape)


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Maps each name on disk to the first model tensor that contains it, or a part of it."""
    rules = getattr(model, "_weight_conversions", None) or []
    renamings = [each for each in rules if isinstance(each, WeightRenaming)]
    converters = [each for each in rules if isinstance(each, WeightConverter)]
    known = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}

    def place(name: str) -> str:
        found, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return name if found not in known and name in known else found

    return {name: place(name) for name in names}


def load_tensors(model: PreTrainedModel, parts: Mapping[str, Any], device: str) -> frozenset[str]:
    """Put these tensors, by their names on disk, into the model; returns the names of its tensors that got none."""
    rules = list(getattr(model, "_weight_conversions", None) or [])
    config = LoadStateDictConfig(dtype=model.dtype, device_map={"": device}, weight_mapping=rules)
    info: Any = model._load_pretrained_model(model, dict(parts), None, config)[0]
    return frozenset(info.missing_keys)


def fill_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that are not saved, such as rotary frequencies, by the library's own initialisation."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = False  # type: ignore[assignment]  # parameters keep their own mark, and are left alone
    model.initialize_weights()
