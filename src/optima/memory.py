"""Main memory of a run: what it takes whatever happens, and what is left for activations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optima.calibration.correlation import coupling_bytes
from optima.calibration.lm_head import KL_COPIES, logits_bytes, looked_at
from optima.calibration.statistics import EXPERT_BYTES
from optima.core.rows import BYTES_PER_ENTRY, DEFAULT_BUDGET_BYTES
from optima.device import REMEDY, named_device
from optima.linear import Methods, is_own
from optima.main_memory import available_memory, total_memory
from optima.models.blocks import (
    EXPERT_COUNT,
    Block,
    Linear,
    count_by_place,
    count_parameters,
    find_stacks,
)
from optima.models.inspect import head_of, is_encoder_decoder, stream_numbers
from optima.recipe import Recipe
from optima.tune import BYTES_PER_TUNED

# What configurations call the number of experts of a token: num_experts_per_tok, moe_topk, moe_k ...
EXPERTS_EACH = re.compile(r"(?!index_)((\w*_)?experts_per_tok(en)?|(\w*_)?top_?k(_experts)?|moe_k)")
# Python and the libraries.
LIBRARIES_BYTES = 512 * 2**20
# Without a budget, the share of what is free that may hold activations.
FREE_SHARE = 0.5
# Share of the memory that may hold what all sequences need inside a block, where linears are calibrated in turn.
HELD_SHARE = 0.125
# Most bytes at a time for each entry of a hessian that is worked with: the tensors of a linear by solver auto, and one
# float64 matrix more for what LAPACK copies. Of selectors and solvers that are not named, more than any of ours takes.
BYTES_PER_SQUARE = {
    **dict.fromkeys(("magnitude", "wanda", "ria", "external"), 44),
    **{"optima": 52, "admm": 56, "alps": 56, "sparsegpt": 62, "thanos": 62},
}
MOST_BYTES_PER_SQUARE = 72
LENT_BYTES_PER_SQUARE = 24  # more, for a copy of the hessian that someone else's selector is lent
# And for each weight of its linear: what ALPS takes, the largest.
BYTES_PER_WEIGHT = 56
# Of a batch's activations, how many of each linear's input and output are there at a time.
BUFFERS = 2
# And of what a token has in several streams (hyper-connections), which are mixed in float32.
STREAM_BUFFERS = 4
# How many times as many a backward pass keeps.
GRADIENT_BUFFERS = 3
GIB = 2**30
# Tokens in a forward pass on a CPU: larger activations leave its caches (a third more time on Gemma 3 270M).
CPU_TOKENS = 2048
BATCH_SIZE = 8
# Linears that read one input, by the last part of their names: those of attention, and the two halves of a gated MLP.
TOGETHER = (
    re.compile(r"(q|k|v|query|key|value|z)(_(a|b))?(_(proj|lin))?|kv_a_proj_with_mqa|in_proj_\w+"),
    re.compile(r"gate(_proj)?|up(_proj)?|w1|w3"),
)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of main memory that a run takes beside its activations.

    Attributes:
        weights: what is there at a time: streamed, two blocks (one at work, and its copy for the disk), or what is
            outside the blocks, if that is more; else the whole model. Of masks from elsewhere a bit a weight, and of
            OWL the scores of a block.
        work: of the largest linear, or of a block's sweep or tuning, on a CPU.
        by_loss: of the logits, if the loss is swept and they are there, or of those in the last block's tuning, with
            that; of an encoder's, the decoder's weights too, and what its autograd keeps of a sample.
    """

    weights: int
    work: int
    by_loss: int

    @property
    def least(self) -> int:
        """A run cannot do with less: libraries and weights."""
        return LIBRARIES_BYTES + self.weights

    @property
    def total(self) -> int:
        """An upper bound: the logits are gone before linears are worked on."""
        return self.least + max(self.work, self.by_loss)

    def left(self, processes: int = 1, there: int = 0) -> int:
        """What remains for the activations of a process; the rest of them waits in files.

        Args:
            processes: that share what is free.
            there: bytes of ``total`` that the process has taken by now.
        """
        free = available_memory() / processes
        return int(max(min(free * FREE_SHARE, free - (self.total - there)), 0))

    def shortage(self, processes: int = 1) -> str:
        """What to tell a user before the work if ``processes`` that take as much may end for want of memory, or empty.

        What libraries take is taken by now.
        """
        free, more = available_memory(), processes * (self.total - LIBRARIES_BYTES)
        if more <= free:
            return ""
        each = f" by {processes} processes" if processes > 1 else ""
        fits = processes * self.weights <= free
        return (
            f"{free / GIB:.1f} GiB of main memory are free, and up to {more / GIB:.1f} GiB may be taken{each}, "
            f"{processes * self.weights / GIB:.1f} GiB of it by weights: "
            f"{REMEDY if fits else 'free some, or use another machine'}"
        )


def host_memory(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    recipe: Recipe,
    methods: Methods,
    dtype: torch.dtype,
    streamed: bool,
) -> HostMemory:
    """What a run takes.

    Args:
        model: with its weights, or its skeleton.
        blocks: of its stacks, with the linears to prune.
        recipe: as resolved.
        methods: as built from it.
        dtype: of the weights.
        streamed: whether they stay on disk.
    """
    words = bool(by_words(model, blocks, recipe))
    most = streamed_parameters(model, blocks, words) if streamed else count_parameters(model)
    work = work_bytes(model, blocks, recipe, methods, dtype) if on_cpu(recipe) else 0
    by_loss = _through_decoder(model, recipe, dtype, streamed)
    if recipe.objective == "loss" and (on_cpu(recipe) or is_encoder_decoder(model)):
        by_loss += logits_bytes(model, batch_tokens(recipe))
    if words and on_cpu(recipe):
        by_loss = max(by_loss, words_bytes(model, recipe) + tuning_bytes(model, blocks[-1], recipe, dtype))
    pruned = [sum(math.prod(linear.shape) for linear in block.linears) for block in blocks]
    masks = sum(pruned) // 8 if recipe.mask_from is not None else 0
    return HostMemory(most * dtype.itemsize + masks, work, by_loss)


def _through_decoder(model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype, streamed: bool) -> int:
    """Of an encoder's sweep, whose gradients come through the decoder: streamed weights, and a sample's autograd."""
    if recipe.objective != "loss" or not is_encoder_decoder(model):
        return 0
    blocks = [block for stack in find_stacks(model) if stack.part == "decoder" for block in stack.blocks]
    weights = sum(count_parameters(block.module) for block in blocks) * dtype.itemsize if streamed else 0
    kept = sum(_activation_bytes(model, block, recipe, recipe.max_seq_length, dtype) for block in blocks)
    return weights + GRADIENT_BUFFERS * kept


def by_words(model: PreTrainedModel, blocks: Sequence[Block], recipe: Recipe) -> str:
    """The name of the block that is tuned by the words of the model; empty if none is."""
    by_loss = recipe.objective == "loss" and head_of(model) is not None and not is_encoder_decoder(model)
    return blocks[-1].name if recipe.tuning_epochs and by_loss and blocks[-1].linears else ""


def words_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """Of the logits of a step by the model's words: of some positions of a sequence, if it tells words in slices."""
    tokens = looked_at(model, recipe.max_seq_length)
    return KL_COPIES * 4 * int(model.config.get_text_config().vocab_size) * tokens


def streamed_parameters(model: nn.Module, blocks: Sequence[Block], words: bool = False) -> int:
    """Parameters that are in memory at a time, where weights stay on disk; with the head beside the last block."""
    inside, outside = count_by_place(model, blocks)
    return max(2 * max(inside, default=0), outside + (inside[-1] if words else 0))


def on_cpu(recipe: Recipe) -> bool:
    """Whether a run computes in main memory. A device that is named may be elsewhere."""
    return named_device(recipe.device).type == "cpu"


def work_bytes(
    model: PreTrainedModel, blocks: Sequence[Block], recipe: Recipe, methods: Methods, dtype: torch.dtype
) -> int:
    """Upper bound of the work space on the device, the block's own weights aside.

    The most of: a batch of activations beside the hessians; the hessians, which wait in float64, and one linear at
    work; a batch of the sweep; a step of tuning.
    """
    tokens = batch_tokens(recipe)
    most = 0
    for block in blocks:
        sizes = [linear.shape for linear in block.linears]
        waiting = _waiting_bytes(block)
        linear = max((_linear_bytes(o, d, recipe) for o, d in sizes), default=0)
        activations = _activation_bytes(model, block, recipe, tokens, dtype)
        weights = sum(o * d for o, d in sizes)
        masks = weights if recipe.tuning_epochs else 0
        most = max(most, waiting + masks + max(linear, activations))
        if recipe.objective == "loss":
            # What autograd keeps, and the coupling's sums with a batch's.
            most = max(most, GRADIENT_BUFFERS * activations + 4 * coupling_bytes([block], methods.needs))
        if recipe.tuning_epochs:
            most = max(most, tuning_bytes(model, block, recipe, dtype))
    return most


def _activation_bytes(model: PreTrainedModel, block: Block, recipe: Recipe, tokens: int, dtype: torch.dtype) -> int:
    """Of a forward pass through a block on so many tokens."""
    share, attention = routed_share(model.config), attention_numbers(model, recipe.max_seq_length)
    mixed = STREAM_BUFFERS * stream_numbers(model.config.get_text_config())
    linears = (*block.linears, *block.excluded)
    numbers = [sum(linear.shape) * (share if _is_sent_some(linear) else 1) for linear in linears]
    return BUFFERS * int(tokens * (sum(numbers) + attention + mixed)) * dtype.itemsize


def tuning_bytes(model: PreTrainedModel, block: Block, recipe: Recipe, dtype: torch.dtype) -> int:
    """What the optimizer keeps of a block's weights, and autograd of a step: one sequence, in nearly all models."""
    weights = sum(linear.shape[0] * linear.shape[1] for linear in block.linears)
    activations = _activation_bytes(model, block, recipe, recipe.max_seq_length, dtype)
    return GRADIENT_BUFFERS * activations + BYTES_PER_TUNED * weights


def routed_share(config: Any) -> float:
    """Of the experts of a mixture, the share that a token is sent to; 1 where the configuration does not say."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, int) and value > 0}
    counts = [value for name, value in numbers.items() if EXPERT_COUNT.fullmatch(name) and value > 1]
    each = [value for name, value in numbers.items() if EXPERTS_EACH.fullmatch(name)]
    return min(max(each) / min(counts), 1.0) if each and counts else 1.0


def _is_sent_some(linear: Linear) -> bool:
    """Whether a linear is given some tokens alone."""
    return linear.expert is not None and linear.expert.experts.routed


def attention_numbers(model: PreTrainedModel, length: int) -> int:
    """Of each token, where a model's attention makes matrices of all pairs of tokens; else 0."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    return length * heads if isinstance(heads, int) and config._attn_implementation == "eager" else 0


def host_room(recipe: Recipe, processes: int = 1) -> int:
    """Bytes of main memory for what sequences hold on their way through a block, or while the model writes.

    Not of what is free now: a run that goes on must do as it did, if there are as many processes on the machine. A
    budget is each process's own.
    """
    return int(HELD_SHARE * (total_memory() / processes))


def _waiting_bytes(block: Block) -> int:
    """Of the hessians of a block, in float64: those of fused experts some at a time, beside those of all tokens."""
    everywhere: list[int] = []
    experts: list[int] = []
    for group in guess_groups(block):
        into = experts if group[0].expert is not None else everywhere
        into.append(8 * group[0].shape[1] ** 2)
    return sum(everywhere) + min(sum(experts), EXPERT_BYTES + max(experts, default=0)) + 2 * max(experts, default=0)


def batch_tokens(recipe: Recipe) -> int:
    """Tokens in a forward pass."""
    samples = batch_size(recipe, recipe.max_seq_length)
    return min(samples, recipe.num_calibration_samples or samples) * recipe.max_seq_length


def _linear_bytes(outputs: int, inputs: int, recipe: Recipe) -> int:
    """Of one linear at work: matrices, weights, and a chunk of rows in the solver."""
    size = outputs * inputs
    rows = min(BYTES_PER_ENTRY * size, DEFAULT_BUDGET_BYTES)
    named = recipe.selector if isinstance(recipe.selector, str) and recipe.solver in ("auto", "none") else ""
    square = BYTES_PER_SQUARE.get(named, MOST_BYTES_PER_SQUARE)
    square += 0 if is_own(recipe.selector) else LENT_BYTES_PER_SQUARE
    return square * inputs**2 + BYTES_PER_WEIGHT * size + rows


def batch_size(recipe: Recipe, length: int) -> int:
    """Sequences of ``length`` tokens in one forward pass."""
    return recipe.batch_size or (max(CPU_TOKENS // length, 1) if on_cpu(recipe) else BATCH_SIZE)


def guess_groups(block: Block) -> list[list[Linear]]:
    """The block's linears by the input that they are likely to share, from names alone: an estimate for a plan."""
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear in block.linears:
        parent, _, last = linear.name.rpartition(".")
        role = next((number for number, regex in enumerate(TOGETHER) if regex.fullmatch(last)), linear.name)
        groups.setdefault((parent, linear.shape[1], role), []).append(linear)
    return list(groups.values())
