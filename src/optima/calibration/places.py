"""Where the parts of a model outside its blocks run, and the memory that its logits take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.data.batches import Batch
from optima.device import card_memory, describe_memory
from optima.models.reading import head_of, in_slices
from optima.models.stacks import Stack, count_by_place, find_stacks
from optima.models.weights import MAIN

# Float32 logits of a slice in memory at once, of which a softmax makes copies.
LOGITS_BYTES = 256 * 2**20
# Copies of them at a time: logits, their softmax, the gradient, the model's own dtype.
LOGITS_COPIES = 4


def logits_bytes(model: PreTrainedModel, tokens: int, copies: int = LOGITS_COPIES) -> int:
    """Most of the logits that are there at a time, and their copies, of batches of so many tokens."""
    if in_slices(model) or head_of(model) is None:
        return copies * LOGITS_BYTES
    return copies * max(4 * int(model.config.get_text_config().vocab_size) * tokens, LOGITS_BYTES)


def positions_at_once(model: PreTrainedModel, samples: int) -> int:
    """Positions of so many sequences whose logits a slice has, at least one."""
    return max(LOGITS_BYTES // (4 * int(model.config.get_text_config().vocab_size) * samples), 1)


def head_device(
    model: PreTrainedModel,
    stack: Stack,
    device: torch.device,
    tokens: int,
    copies: int = LOGITS_COPIES,
    beside: int = 0,
) -> tuple[torch.device, str]:
    """Where the head runs, if blocks run on ``device``, and what a report must tell of it; see ``Weights.outside``.

    ``tokens``: in the largest batch. ``copies``: of their logits. ``beside``: bytes of what else will be there.
    """
    there = device.type in ("cpu", next(model.parameters()).device.type)  # a model in memory may live on the device
    if there or head_of(model) is None:
        return MAIN, ""
    if stack.part == "encoder":
        return MAIN, "the encoder's gradients came through its decoder on the CPU, whose weights were there all at once"
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if _outside_bytes(model) + logits_bytes(model, tokens, copies) + beside <= free:
        return device, ""
    return MAIN, f"the head ran on the CPU: {describe_memory(device)} had no room for the weights outside the blocks"


def embedding_device(model: PreTrainedModel, device: torch.device, batches: Sequence[Batch]) -> torch.device:
    """Where the model runs while the inputs of its blocks are captured, if these run on ``device``.

    There, for kernels of some models run nowhere else. But in main memory if the weights outside the blocks are more
    than half of a card, or batches are not of words alone: to look at the model is to hold the inputs of all linears.
    It is the same in all processes, and when a run goes on.
    """
    first = next(model.parameters())
    inside = {id(each) for stack in find_stacks(model) for block in stack.blocks for each in block.module.parameters()}
    if device.type in ("cpu", first.device.type) or id(first) in inside:  # inputs go to where the first parameter is
        return MAIN
    if not all(isinstance(batch, Tensor) for batch in batches):
        return MAIN
    fits = 2 * _outside_bytes(model) <= card_memory(device)
    return device if fits else MAIN


def _outside_bytes(model: PreTrainedModel) -> int:
    blocks = [block for each in find_stacks(model) for block in each.blocks]
    return count_by_place(model, blocks)[1] * model.dtype.itemsize
