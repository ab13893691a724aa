"""What a model reads: batches of token ids or of a processor's outputs, and the forward pass on them.

An encoder-decoder reads the first half of every text with its encoder, and continues it with the second half in its
decoder, after the token that starts it: prefix language modelling (Raffel et al., JMLR 2020, section 3.1.4), which
needs no pairs of texts.

Shapes: B sequences in a batch, L tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optima.errors import CalibrationError, ModelError
from optima.models.inspect import arguments_of, is_encoder_decoder, needed_arguments

Batch = Tensor | Mapping[str, Tensor]
IDS, MASK, LABELS, DECODER_IDS, EMBEDDED = "input_ids", "attention_mask", "labels", "decoder_input_ids", "inputs_embeds"
# Arguments with the tokens that a stack reads, in the order in which they are looked for.
TOKENS_OF = {"decoder": (DECODER_IDS, LABELS), "encoder": (IDS,), "whole": (IDS,)}


def forward(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """The model's own forward pass on a batch, on the device of its embedding, without a cache.

    Raises:
        ModelError: if the model needs other inputs.
    """
    parameters = list(model.parameters())
    dtype = next(parameter.dtype for parameter in parameters if parameter.is_floating_point())
    given = {}
    for name, tensor in arguments(model, batch).items():
        # Processors return float32, which not every model casts to its own dtype.
        given[name] = tensor.to(parameters[0].device, dtype if tensor.is_floating_point() else None)
    configs = (model.config, *(getattr(model.config, name, None) for name in ("text_config", "decoder")))
    if any(getattr(config, "use_cache", None) is not None for config in configs):
        options["use_cache"] = False
    if "output_router_logits" in arguments_of(model):
        options["output_router_logits"] = False  # the model would compute a loss from them
    if getattr(model.config, "return_dict", True) is False:
        options["return_dict"] = True
    try:
        return model(**given, **options)
    except (TypeError, ValueError, NotImplementedError) as error:  # where inputs are missing, or a forward pass
        what = "token ids alone" if isinstance(batch, Tensor) else "what it is given for calibration"
        raise ModelError(f"{type(model).__name__} cannot run on {what}: {error}") from error


def arguments(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The arguments of a forward pass of ``model`` on a batch."""
    if not isinstance(batch, Tensor):
        return dict(batch)
    if not is_encoder_decoder(model):
        return {IDS: batch}
    half = batch.shape[1] // 2
    decoded, start = batch[:, half:], _decoder_start(model)
    if start is not None:
        decoded = torch.cat([torch.full_like(decoded[:, :1], start), decoded[:, :-1]], dim=1)
    return {IDS: batch[:, :half], DECODER_IDS: decoded}


def _decoder_start(model: nn.Module) -> int | None:
    """The token that a decoder reads first, as ``generate`` finds it."""
    settings = [getattr(model, name, None) for name in ("config", "generation_config")]
    found = [getattr(each, name, None) for name in ("decoder_start_token_id", "bos_token_id") for each in settings]
    return next((token for token in found if isinstance(token, int)), None)


def label_size(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """(B, L) of the tokens that the LM head predicts.

    Raises:
        CalibrationError: if the batch has none.
    """
    names: tuple[str, ...] = TOKENS_OF["decoder"] if is_encoder_decoder(model) else (IDS, EMBEDDED)
    tokens = first_named(arguments(model, batch), names)
    if tokens is None:
        raise CalibrationError(
            f"a calibration batch has no {' or '.join(names)}, which objective loss needs: add them, or set "
            "--objective sink"
        )
    return len(tokens), tokens.shape[1]


def stack_size(model: nn.Module, part: str, batch: Batch) -> tuple[int, int | None]:
    """(B, L) of the hidden states of the stack ``part``; L is None where the batch does not show it (audio)."""
    given: Any = arguments(model, batch)
    tokens = first_named(given, TOKENS_OF[part])
    if tokens is not None:
        return len(tokens), tokens.shape[1]
    return len(given.get(getattr(model, "main_input_name", ""), next(iter(given.values())))), None


def first_named(given: Mapping[str, Tensor], names: Sequence[str]) -> Tensor | None:
    """The first of the tensors ``names`` that a batch has."""
    return next((given[name] for name in names if name in given), None)


def divisible(batch: Batch, samples: int) -> bool:
    """Whether each tensor of a batch has a row for each of its samples."""
    return isinstance(batch, Tensor) or all(tensor.shape[:1] == (samples,) for tensor in batch.values())


def some_of(batch: Batch, rows: slice, samples: int) -> Batch:
    """Some samples of a ``divisible`` batch."""
    if isinstance(batch, Tensor):
        return rows_of(batch, rows, samples)
    return {name: rows_of(tensor, rows, samples) for name, tensor in batch.items()}


def rows_of(tensor: Tensor, rows: slice, samples: int) -> Tensor:
    """The rows of a tensor, equally many for each sample, that belong to some samples of a batch."""
    if rows.stop - rows.start == samples:
        return tensor
    each = len(tensor) // samples
    return tensor[rows.start * each : rows.stop * each]


def head_inputs(model: nn.Module, batch: Batch) -> Batch:
    """What of a batch the LM head needs where no block runs: its tokens, and what the model insists on."""
    if isinstance(batch, Tensor):
        return batch
    tokens = next(name for name in (IDS, EMBEDDED) if name in batch)
    needed = {tokens, *needed_arguments(model)}
    return {name: tensor for name, tensor in batch.items() if name in needed}
