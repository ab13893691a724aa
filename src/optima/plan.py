"""What a run would prune and take, from the model's configuration alone: no weights are loaded.

Memory is one stated upper bound.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from optima.activations import Shares, activations
from optima.linear import Methods
from optima.memory import GIB, HostMemory, host_memory, work_bytes
from optima.models.blocks import count_parameters
from optima.models.load import Source, orders_of, skeleton
from optima.models.moe import split_on_disk
from optima.models.offload import why_whole
from optima.patterns import NM
from optima.preflight.checks import Preflight
from optima.preflight.fitting import fit
from optima.recipe import Recipe

ORDER_NOTE = "patterns n:m lose less with channels in another order: optima order writes the same model so"
SURVEY_NOTE = "allocation loss takes each linear's sparsity from calibration: the same for all is shown"


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        model: its skeleton.
        recipe: with its open settings filled in, as a run would.
        found: stacks, linears and patterns (on the meta device), and what stays dense.
        methods: as a run would build them, external masks read.
        num_parameters: of the whole model.
        pruned_parameters: weights in the linears to prune.
        work_bytes: upper bound of the work space on the device: of hessians and a linear, a sweep, or tuning. An
            accelerator also holds ``block_bytes``.
        block_bytes: the largest block's weights, without those that stay in main memory.
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
    shares: Shares
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


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Plan pruning ``source`` by ``recipe`` without loading weights.

    Raises:
        OptimaError: whatever a run would be refused for that its configuration shows.
    """
    started = time.perf_counter()
    model, _ = skeleton(source)
    fitted = fit(source, model, recipe)
    recipe, methods, found, dtype = fitted.recipe, fitted.methods, fitted.found, fitted.dtype
    num_parameters = count_parameters(model)
    kept = activations(model, found.blocks, recipe, methods.needs, dtype)
    whole = "" if source.gguf_file or recipe.self_generated else why_whole(source, model, recipe.dtype)
    streamed = not (source.gguf_file or recipe.self_generated or whole)
    memory = host_memory(model, found.blocks, recipe, methods, dtype, streamed)
    notes = list(found.notes)
    if any(isinstance(pattern, NM) for pattern in found.patterns.values()) and orders_of(source) is None:
        notes.append(ORDER_NOTE)
    if kept.shares.surveyed:
        notes.append(SURVEY_NOTE)
    if recipe.self_generated:
        size = f"{num_parameters * dtype.itemsize / GIB:.1f} GiB"
        notes.append(f"self_generated needs the whole model in memory, {size}, and its KV cache")
    if whole:
        notes.append(f"the whole model is held in main memory: {whole}")
    if not kept.known:
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
        inputs_bytes=kept.stored,
        model_bytes=num_parameters * dtype.itemsize,
        beside_bytes=split_on_disk(model, [each.module for each in found.linears]) * dtype.itemsize,
        host=memory,
        shares=kept.shares,
        left_bytes=memory.left(),
        passes=forward_passes(
            recipe,
            methods,
            kept.shares,
        ),
        reads=_reads(recipe, bool(kept.shares.swept)) if streamed else 2,
        dtype=dtype,
        streamed=streamed,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def forward_passes(recipe: Recipe, methods: Methods, shares: Shares) -> int:
    """Calibrate and carry on; a survey; the sweep; a selector's gradients; dense targets and epochs.

    A backward pass counts as two.

    Args:
        recipe: as sized.
        methods: as built from it.
        shares: of the sequences.
    """
    swept, surveyed, tuned = shares
    part = 4 * swept + surveyed + (3 * (recipe.tuning_epochs or 0) + 1) * tuned
    return 2 + math.ceil(part)


def _reads(recipe: Recipe, swept: bool) -> int:
    """Two looks; the sensitivity pass; the gradient pass there and back; pruning."""
    return 3 + (recipe.allocation == "loss") + 2 * swept
