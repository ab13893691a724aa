"""A model's modules without its weights."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from optima.models.load import Source, check_safetensors, explain_read_errors, load_config, model_class, pinned


def skeleton(source: Source) -> tuple[PreTrainedModel, PretrainedConfig]:
    """The model's modules on the meta device, in evaluation mode: shapes and names, no weights.

    Raises:
        ModelError: if the configuration cannot be read or built, or no weights go with it.
    """
    config = load_config(source)
    with explain_read_errors(source, "weights"):
        check_safetensors(pinned(source, config), config)
    cls = model_class(config, source)
    with explain_read_errors(source, "configuration"), torch.device("meta"):
        if hasattr(cls, "from_config"):  # an Auto class
            model = cls.from_config(config, trust_remote_code=source.trust_remote_code)
        else:
            model = cls(config)
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    return model.eval(), config


def dtype_as_read(config: PretrainedConfig, dtype: str) -> torch.dtype:
    """What weights are read in, and written in: ``dtype``, or of ``auto`` the configuration's, which may have none."""
    own = config.dtype or config.get_text_config().dtype  # of models that see, the language part's may be the only one
    found = own if dtype == "auto" else dtype
    found = getattr(torch, found) if isinstance(found, str) else found or torch.float32
    assert isinstance(found, torch.dtype)
    return found
