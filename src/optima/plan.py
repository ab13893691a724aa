"""What a run would prune and take, from the model's configuration alone: no weights are loaded.

Memory is one stated upper bound. ``optima.rehearsal`` says what a run really takes on this machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from optima.build import build
from optima.calibration.documents import check_of_hub
from optima.calibration.own_text import check_writes
from optima.calibration.swept import kept_bytes, surveyed_share, swept_share, tuned_share
from optima.linear import Methods
from optima.memory import GIB, METRIC_BYTES, HostMemory, coupling_bytes, host_memory, in_turn, work_bytes
from optima.models.experts import ExpertLinear, split_on_disk
from optima.models.reading import check_length, is_encoder_decoder
from optima.models.skeleton import dtype_as_read, skeleton
from optima.models.source import Source, orders_of
from optima.models.stacks import Block, count_by_place, count_parameters, has_experts
from optima.patterns import NM
from optima.preflight.checks import Preflight, check_order, preflight, sized
from optima.recipe import Recipe

ORDER_NOTE = "patterns n:m lose less with channels in another order: optima order writes the same model so"
SURVEY_NOTE = "{} takes each linear's sparsity from calibration: the same for all is shown"


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        model: its skeleton.
        recipe: with the number of sequences that the model takes.
        found: stacks, linears and patterns (on the meta device), and what stays dense.
        methods: as a run would build them, external masks read.
        num_parameters: of the whole model.
        pruned_parameters: weights in the linears to prune.
        work_bytes: upper bound of the work space on the device: of hessians and a linear, a sweep, or tuning. An
            accelerator also holds ``block_bytes``.
        block_bytes: the largest block's weights.
        inputs_bytes: stored block inputs: in main memory, as far as there is room, and in files.
        model_bytes: the model's weights, on disk; so many are written again.
        beside_bytes: of experts that are fused in the model and split on disk: a second copy of them is there until the
            run ends.
        host: main memory that a run takes beside block inputs.
        left_bytes: main memory for block inputs.
        passes: forward passes over the calibration text; a backward pass counts as two.
        reads: how often the weights are read from disk.
        dtype: of the weights.
        streamed: whether weights stay on disk until they are wanted.
        seconds: that it took to make, as it does at the start of a run.
        notes: what will not be pruned, and what only calibration can tell.
    """

    model: PreTrainedModel
    recipe: Recipe
    found: Preflight
    methods: Methods
    num_parameters: int
    pruned_parameters: int
    work_bytes: int
    block_bytes: int
    inputs_bytes: int
    model_bytes: int
    beside_bytes: int
    host: HostMemory
    left_bytes: int
    passes: int
    reads: int
    dtype: torch.dtype
    streamed: bool
    seconds: float
    notes: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Share of the weights of all linears to prune that the patterns ask to prune."""
        sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in self.found.linears}
        pruned = sum(self.found.patterns[name].sparsity * size for name, size in sizes.items())
        return pruned / sum(sizes.values())

    def held_bytes(self, block: Block | None = None) -> int:
        """Of weights in main memory while a run works on a block, or outside of them."""
        if not self.streamed:
            return self.model_bytes
        count = count_by_place(self.model, self.found.blocks)[1] if block is None else count_parameters(block.module)
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Measured:
    """What a run takes on this machine, as its report will name it.

    Attributes:
        seconds: of its stages: ``start``, ``read``, ``forward``, ``hessian``, ``sweep``, ``linears``, ``tune`` and
            ``write``.
        peak_bytes: highest memory: on a CPU all that is resident.
        notes: what is not in these figures.
    """

    seconds: dict[str, float]
    peak_bytes: int
    notes: tuple[str, ...]


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Plan pruning ``source`` by ``recipe`` without loading weights.

    Raises:
        OptimaError: whatever a run would be refused for that its configuration shows.
    """
    started = time.perf_counter()
    model, config = skeleton(source)
    check_of_hub(recipe, recipe.read)
    if recipe.written:
        check_writes(model)
    methods = build(recipe)
    check_order(source, model, recipe)
    found = preflight(model, recipe, methods)
    check_length(model, recipe.max_seq_length)
    dtype = dtype_as_read(config, recipe.dtype)
    recipe, found = sized(model, recipe, found, dtype)
    num_parameters = count_parameters(model)
    hidden, beside = _numbers(config.get_text_config())
    writes = recipe.written and not recipe.read  # else it may, if these have too little
    streamed = not source.gguf_file and not writes
    memory = host_memory(model, found.blocks, recipe, methods, dtype, streamed)
    # Block inputs that are kept at once: a survey and tuning carry the dense model's beside those of the pruned one, a
    # sweep for the loss keeps those of all blocks, up to a limit.
    assert recipe.num_calibration_samples is not None
    tokens = recipe.num_calibration_samples * recipe.max_seq_length
    inputs = tokens * (hidden or 0) * dtype.itemsize
    own = tokens // 2 if is_encoder_decoder(model) else tokens  # of a stack
    swept = swept_share(recipe.swept_share, own) if recipe.applied_objective == "loss" else 0.0
    experts = has_experts(found.linears)
    surveyed = recipe.surveys * (surveyed_share(recipe.swept_share, own, experts) if swept else 1.0)
    tuned = tuned_share(recipe.tuning_share, own) if recipe.tuning_epochs else 0.0
    kept = inputs + min((len(found.blocks) + 1) * inputs * swept, kept_bytes()) if swept else 0
    coupled = coupling_bytes(found.blocks, methods)
    width = getattr(config.get_text_config(), "hidden_size", None) or 0  # of one version of the hidden states
    metrics = METRIC_BYTES * width**2 * len(found.blocks) if swept and tuned else 0
    kept += coupled + metrics
    routed = any(isinstance(linear, ExpertLinear) for linear in found.linears)  # what they are given is kept
    notes = list(found.notes)
    if any(isinstance(pattern, NM) for pattern in found.patterns.values()) and orders_of(source) is None:
        notes.append(ORDER_NOTE)
    if surveyed:
        notes.append(
            SURVEY_NOTE.format("keep_dense" if recipe.keep_dense else f"allocation {recipe.applied_allocation}")
        )
    if note := memory.note(recipe.memory_budget):
        notes.append(note)
    if recipe.written:
        size = f"{num_parameters * dtype.itemsize / GIB:.1f} GiB"
        when = "to write its own text" if writes else "to write what the data sets lack, if they do"
        notes.append(f"{when}, the whole model is in main memory and then on the device: {size}, and keys and values")
    if hidden is None:
        notes.append("the configuration names no hidden_size: the block inputs are not counted")
    return Plan(
        model=model,
        recipe=recipe,
        found=found,
        methods=methods,
        num_parameters=num_parameters,
        pruned_parameters=sum(linear.shape[0] * linear.shape[1] for linear in found.linears),
        work_bytes=work_bytes(model, found.blocks, recipe, methods, dtype),
        block_bytes=max(count_parameters(block.module) for block in found.blocks) * dtype.itemsize,
        inputs_bytes=max(int(inputs * (1 + max(surveyed, tuned) + routed)) + coupled // 2 + metrics, int(kept))
        + tokens * beside * dtype.itemsize,
        model_bytes=num_parameters * dtype.itemsize,
        beside_bytes=split_on_disk(model, found.linears) * dtype.itemsize,
        host=memory,
        left_bytes=memory.left(recipe.memory_budget),  # refused, if it is too little
        passes=forward_passes(
            recipe,
            methods,
            (swept, surveyed, tuned),
            all(in_turn(block, recipe) for block in found.blocks if block.linears),
        ),
        reads=_reads(recipe, len(found.blocks) * inputs * swept),
        dtype=dtype,
        streamed=streamed,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _numbers(text: Any) -> tuple[int | None, int]:
    """What blocks hand on for a token, None if that is unknown, and what they are called with besides (Gemma 3n)."""
    hidden, versions = getattr(text, "hidden_size", None), getattr(text, "altup_num_inputs", None) or 1
    beside = getattr(text, "hidden_size_per_layer_input", None) or 0
    return hidden and versions * hidden, beside * (getattr(text, "num_hidden_layers", None) or 0)


def forward_passes(recipe: Recipe, methods: Methods, shares: tuple[float, float, float], in_turn: bool) -> int:
    """Calibrate and carry on; a survey; the sweep; a selector's gradients; dense targets and epochs.

    A backward pass counts as two.

    Args:
        recipe: as sized.
        methods: as built from it.
        shares: of the sequences that are swept, surveyed and tuned on.
        in_turn: whether all blocks are calibrated in turn.
    """
    (swept, surveyed, tuned), by_gradient = shares, "gradient" in methods.needs
    once = 2 - (in_turn and not tuned) + 3 * by_gradient
    part = 4 * swept + surveyed + (3 * (recipe.tuning_epochs or 0) + 1) * tuned
    return once + math.ceil(part)


def _reads(recipe: Recipe, swept_bytes: float) -> int:
    """Fingerprint, two looks and a check; a survey; a sweep there and back, a part of the text at a time; pruning."""
    return 5 + bool(recipe.surveys) + 2 * math.ceil(swept_bytes / kept_bytes())
