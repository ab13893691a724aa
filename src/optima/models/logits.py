"""Logits in slices of positions, and tokens sampled from them. Vocabularies have up to 262k tokens.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, V vocabulary, C positions of a slice or tokens of a
chunk, K chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.errors import NotDifferentiableError
from optima.models.blocks import Stack
from optima.models.forward import forward, forward_replaced, once, with_hidden
from optima.models.inspect import is_encoder_decoder

LOGITS_BYTES = 256 * 2**20  # float32 logits of a slice in memory at once, of which a softmax makes copies
CHUNK = 512  # tokens whose probabilities are added up before a label is drawn among them


def sliceable(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions, and runs no encoder for each slice."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters and not is_encoder_decoder(model)


def positions_of_slices(model: nn.Module, at_L: Tensor, samples: int) -> Sequence[Tensor]:
    """Positions of ``samples`` sequences, split so that float32 logits of a slice take ``LOGITS_BYTES`` at most."""
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    slices: Sequence[Tensor] = at_L.split(max(LOGITS_BYTES // (4 * vocabulary * samples), 1))
    return slices


def sliced_head(
    model: PreTrainedModel,
    stack: Stack,
    outputs: Sequence[Any],
    hidden: Tensor,
    batch: Tensor,
    at_L: Tensor,
    samples: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (C,), and the logits (T, V) there of ``hidden``, a slice at a time; no block runs.

    All positions at once, if the model cannot slice its logits.

    Args:
        model: the whole model.
        stack: the stack that its head reads.
        outputs: of each block, as a probe found them.
        hidden: of the last block.
        batch: token ids.
        at_L: the positions.
        samples: of the largest microbatch.
    """
    slices = positions_of_slices(model, at_L, samples) if sliceable(model) else [None]
    for at_C in slices:
        with ExitStack() as replaced:
            for block in stack.blocks:
                output = with_hidden(outputs[block.index], hidden)
                replaced.enter_context(forward_replaced(block.module, lambda *args, output=output, **kwargs: output))
            options = {} if at_C is None else {"logits_to_keep": at_C.to(hidden.device)}
            logits = getattr(forward(model, batch, **options), "logits", None)
        if not isinstance(logits, Tensor):
            raise NotDifferentiableError("it returns no logits")
        yield at_L if at_C is None else at_C, logits.flatten(0, -2)


@contextmanager
def sliced_logits(model: PreTrainedModel, tokens_BL: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function inside the context: positions (C,) -> logits_BCV of a causal model.

    The model's own forward runs for every slice, so that scaling and softcapping of logits are its own. Its decoder
    runs in the first of these passes, and the others reuse its output. A model without ``logits_to_keep`` computes all
    logits at once.
    """
    decoder: Any = model.get_decoder()
    if not sliceable(model) or decoder is model:
        logits_BLV: Tensor = forward(model, tokens_BL).logits
        yield lambda at_C: logits_BLV[:, at_C]
        return
    with forward_replaced(decoder, once(decoder.forward)):
        yield lambda at_C: forward(model, tokens_BL, logits_to_keep=at_C).logits


def exponentials(logits_TV: Tensor) -> Tensor:
    """In float32, proportional to the probabilities, the largest 1."""
    weight_TV = logits_TV.float()
    return (weight_TV - weight_TV.amax(dim=1, keepdim=True)).exp_()


def sampled_tokens(weight_TV: Tensor, drawn_T: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each position, (T, 1), sampled in proportion to the weights, and their sum.

    Args:
        weight_TV: not negative.
        drawn_T: uniform in [0, 1): where in their cumulative sum the token lies. Sums go by chunks, for one over all
            tokens is slow, and in float32 not exact.
    """
    chunk_TKC = nn.functional.pad(weight_TV, (0, -weight_TV.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    chunk_TK = chunk_TKC.sum(dim=2)
    above_TK = chunk_TK.cumsum(dim=1)
    wanted_T1 = drawn_T[:, None] * above_TK[:, -1:]
    chunk_T1 = torch.searchsorted(above_TK, wanted_T1, right=True).clamp_max(above_TK.shape[1] - 1)
    wanted_T1 = wanted_T1 - (above_TK - chunk_TK).gather(1, chunk_T1)
    inner_TC = chunk_TKC.gather(1, chunk_T1[:, :, None].expand(-1, 1, CHUNK))[:, 0].cumsum(dim=1)
    inner_T1 = torch.searchsorted(inner_TC, wanted_T1, right=True).clamp_max(CHUNK - 1)
    return (chunk_T1 * CHUNK + inner_T1).clamp_max(weight_TV.shape[1] - 1), above_TK[:, -1:]
