"""The forward pass of a model on a batch of token ids, and of its modules: modes, replacements, outputs.

An encoder-decoder reads the first half of every text with its encoder, and continues it with the second half in its
decoder, after the token that starts it: prefix language modelling (Raffel et al., JMLR 2020, section 3.1.4), which
needs no pairs of texts.

Shapes: B sequences in a batch, L tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from optima.errors import ModelError
from optima.models.inspect import arguments_of, is_encoder_decoder


def forward(model: nn.Module, tokens_BL: Tensor, **options: Any) -> Any:
    """The model's own forward pass on token ids, on the device of its embedding, without a cache.

    Raises:
        ModelError: if the model needs other inputs.
    """
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in arguments(model, tokens_BL).items()}
    configs = (model.config, *(getattr(model.config, name, None) for name in ("text_config", "decoder")))
    if any(getattr(config, "use_cache", None) is not None for config in configs):
        options["use_cache"] = False
    if "output_router_logits" in arguments_of(model):
        options["output_router_logits"] = False  # the model would compute a loss from them
    if getattr(model.config, "return_dict", True) is False:
        options["return_dict"] = True
    try:
        return model(**inputs, **options)
    except (TypeError, ValueError, NotImplementedError) as error:  # where inputs are missing, or a forward pass
        raise ModelError(f"{type(model).__name__} cannot run on token ids alone: {error}") from error


def arguments(model: nn.Module, tokens_BL: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward pass of ``model`` on token ids."""
    if not is_encoder_decoder(model):
        return {"input_ids": tokens_BL}
    half = tokens_BL.shape[1] // 2
    decoded, start = tokens_BL[:, half:], _decoder_start(model)
    if start is not None:
        decoded = torch.cat([torch.full_like(decoded[:, :1], start), decoded[:, :-1]], dim=1)
    return {"input_ids": tokens_BL[:, :half], "decoder_input_ids": decoded}


def _decoder_start(model: nn.Module) -> int | None:
    """The token that a decoder reads first, as ``generate`` finds it."""
    settings = [getattr(model, name, None) for name in ("config", "generation_config")]
    found = [getattr(each, name, None) for name in ("decoder_start_token_id", "bos_token_id") for each in settings]
    return next((token for token in found if isinstance(token, int)), None)


def stack_size(model: nn.Module, part: str, tokens_BL: Tensor) -> tuple[int, int]:
    """(B, L) of the hidden states of the stack ``part``: whole, encoder or decoder."""
    found = arguments(model, tokens_BL)["decoder_input_ids" if part == "decoder" else "input_ids"]
    return found.shape[0], found.shape[1]


def label_size(model: nn.Module, tokens_BL: Tensor) -> tuple[int, int]:
    """(B, L) of the tokens that the LM head predicts."""
    return stack_size(model, "decoder" if is_encoder_decoder(model) else "whole", tokens_BL)


def rows_of(tensor: Tensor, rows: slice, samples: int) -> Tensor:
    """The rows of a tensor, equally many for each sample, that belong to some samples of a batch."""
    if rows.stop - rows.start == samples:
        return tensor
    each = len(tensor) // samples
    return tensor[rows.start * each : rows.stop * each]


def map_tensors(value: Any, convert: Callable[[Tensor], object]) -> Any:
    """A copy of ``value`` with every tensor converted, also inside mappings, tuples and lists."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, MutableMapping):
        copied = copy(value)
        copied.update({key: map_tensors(item, convert) for key, item in value.items()})
        return copied
    if type(value) in (tuple, list):
        return type(value)([map_tensors(item, convert) for item in value])
    return value


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returned, bare or in front of others."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """``output`` of a block, with its hidden states replaced."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module is back in its own mode afterwards."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """No parameter of the module requires gradients inside; all are as they were afterwards."""
    # Those of a model that was made in inference mode could not be set back.
    before = [(each, each.requires_grad) for each in module.parameters() if not each.is_inference()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module.forward`` is ``forward`` inside. One that the module itself holds (accelerate's hooks) comes back."""
    attributes = vars(module)
    own = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(own)


def once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns what ``forward`` returned for its first call."""
    known: list[Any] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        known[:] = known or [forward(*args, **kwargs)]
        return known[0]

    return called
