"""The model's head, in slices of positions: vocabularies have up to 262k words.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, V vocabulary, C positions of a slice, or words of a
chunk, K chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.calibration.halving import rows_of
from optima.calibration.places import positions_at_once
from optima.calibration.probe import forward, with_hidden
from optima.calibration.streams import Streams
from optima.data.batches import DECODER_IDS, LABELS, Batch, inseparable, some_of
from optima.device import backward_explained, forward_replaced
from optima.errors import NotDifferentiableError
from optima.models.reading import in_slices, is_encoder_decoder
from optima.models.stacks import Stack

# Words whose probabilities are added up before a label is drawn among them.
CHUNK = 512


def at_the_head(model: PreTrainedModel, stack: Stack, streams: Streams, batch: int, drawn_BL: Tensor) -> Tensor:
    """The gradient of -log p(label) at the last block's output, labels drawn from p by uniform numbers.

    Args:
        model: runs where its embedding is; of its own blocks none is called.
        stack: the one that its head reads.
        streams: what leaves its last block.
        batch: number of the batch.
        drawn_BL: uniform in [0, 1), see ``label_gradient``.

    Returns:
        In the layout of ``streams.hidden``, on the CPU.

    Raises:
        NotDifferentiableError: if its words do not depend on what leaves that block.
    """
    home, given = next(model.parameters()).device, streams.batches[batch]
    samples, length = drawn_BL.shape
    step = length
    options: dict[str, Any] = {}
    sliceable = in_slices_of(model, given)
    sliced = sliceable is not None
    given = given if sliceable is None else sliceable
    whole = inseparable(given, samples) or streams.inseparable(stack.blocks[-1], batch)
    most = 1 if stack.part == "encoder" and not whole else samples  # autograd keeps a whole decoder of each sample
    if sliced:
        step = positions_at_once(model, most)

    def back(part: slice) -> Tensor:
        rows = some_of(given, part, samples)
        leaf = rows_of(streams.hidden[batch], part, samples).to(home, copy=True).requires_grad_(True)
        with head_alone(model, stack, streams, leaf) as beside:
            for start in range(0, length, step):
                for replayed in beside:
                    replayed.rewind()
                drawn_BC = drawn_BL[part, start : start + step]
                if sliced:
                    options["logits_to_keep"] = torch.arange(start, start + drawn_BC.shape[1], device=home)
                logits_TV = logits_of(forward(model, rows, **options)).flatten(0, -2)
                if not logits_TV.requires_grad:
                    raise NotDifferentiableError("its words do not depend on its last block by a gradient")
                gradient_TV = label_gradient(logits_TV.detach(), drawn_BC.flatten().to(home))
                with backward_explained("its head"):
                    logits_TV.backward(gradient_TV)
        assert leaf.grad is not None
        return leaf.grad.cpu()

    parts = streams.halving.over(samples, back, whole, most)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def head_alone(model: PreTrainedModel, stack: Stack, streams: Streams, leaf: Tensor) -> Iterator[list[_Replayed]]:
    """No block runs inside, and the last one returns ``leaf``; what lies beside them is replayed."""
    beside = {module: _Replayed(module.forward) for module in _beside(model, stack)}
    with ExitStack() as replaced:
        for block in stack.blocks:
            returned = leaf if block is stack.blocks[-1] else None
            like = streams.probe.outputs[block.index]
            replaced.enter_context(forward_replaced(block.module, partial(_hand_on, returned, like)))
        for module, replayed in beside.items():
            replaced.enter_context(forward_replaced(module, replayed))
        yield [*beside.values()]


def _beside(model: PreTrainedModel, stack: Stack) -> list[PreTrainedModel]:
    """The largest models inside without a block of ``stack``, such as an encoder, or what sees."""
    blocks, inside, found = {block.module for block in stack.blocks}, set[nn.Module](), []
    for module in model.modules():  # what holds others comes before them
        if isinstance(module, PreTrainedModel) and module not in inside:
            parts = set(module.modules())
            if not parts & blocks:
                found.append(module)
                inside |= parts
    return found


class _Replayed:
    """A forward pass that later rounds get call by call as the first did, but for what the gradient goes through."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward, self._known, self._calls = forward, list[Any](), 0

    def rewind(self) -> None:
        """A round begins."""
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        found = self._known[self._calls - 1] if self._calls <= len(self._known) else None
        if found is None:
            found = self._forward(*args, **kwargs)
            self._known[self._calls - 1 : self._calls] = [None if _has_gradient(found) else found]
        return found


def _has_gradient(returned: Any) -> bool:
    if isinstance(returned, Tensor):
        return returned.requires_grad
    values = [*returned.values()] if isinstance(returned, Mapping) else returned
    return isinstance(values, (tuple, list)) and any(map(_has_gradient, values))


def logits_of(returned: Any) -> Tensor:
    """Of words; a model for pretraining has those of another head beside them."""
    for name in ("logits", "prediction_logits"):
        if isinstance(found := getattr(returned, name, None), Tensor):
            return found
    raise NotDifferentiableError("it returns no logits of words")


def in_slices_of(model: PreTrainedModel, given: Batch) -> Batch | None:
    """What the model is given for the logits of some positions alone; None if it cannot be asked for them.

    That is the batch without its labels, against all of which the model would hold a slice; None, too, if its words
    are nowhere else.
    """
    if not in_slices(model):
        return None
    if isinstance(given, Tensor) or LABELS not in given:
        return given
    others = {name: tensor for name, tensor in given.items() if name != LABELS}
    if not is_encoder_decoder(model) or DECODER_IDS in given:
        return others
    shifted: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return None if shifted is None else others | {DECODER_IDS: shifted(labels=given[LABELS])}


def label_gradient(logits_TV: Tensor, drawn_T: Tensor) -> Tensor:
    """The gradient of -log p(label) at the logits, p less one at a label that is drawn from p.

    Args:
        logits_TV: any float dtype, which the result has too.
        drawn_T: uniform in [0, 1), see ``drawn_words``.
    """
    weight_TV = exponentials(logits_TV)
    label_T1, total_T1 = drawn_words(weight_TV, drawn_T)
    weight_TV /= total_T1
    weight_TV.scatter_add_(1, label_T1, torch.full_like(label_T1, -1.0, dtype=weight_TV.dtype))
    return weight_TV.to(logits_TV.dtype)


def exponentials(logits_TV: Tensor) -> Tensor:
    """In float32, in proportion to the probabilities of the words, the largest 1."""
    weight_TV = logits_TV.float()
    return (weight_TV - weight_TV.amax(dim=1, keepdim=True)).exp_()


def drawn_words(weight_TV: Tensor, drawn_T: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token a word, (T, 1), drawn in proportion to the weights, and their sum.

    Args:
        weight_TV: not negative.
        drawn_T: uniform in [0, 1): where in their cumulative sum the word lies. Sums go by chunks, for one over all
            words is slow, and in float32 not exact.
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


def _hand_on(returned: Tensor | None, like: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's forward that returns ``returned``, or what it is given, in the form of ``like``."""
    if returned is None:
        returned = args[0] if args else kwargs["hidden_states"]
    return with_hidden(like, returned)
