"""What a run would prune and take, from the model's configuration alone: no weights are loaded.

Memory is one stated upper bound. ``measure`` says what this machine really takes, by pruning random linears of the
model's shapes.

Shapes: O outputs, D inputs, F factors of a random hessian.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optima.build import build
from optima.device import PeakMemory, find_device
from optima.linalg.hessian import Hessian
from optima.linalg.products import gram
from optima.linalg.statistics import Statistics
from optima.linear import Methods, prune_linear
from optima.models.skeleton import skeleton
from optima.models.source import Source
from optima.models.stacks import Linear, guess_groups
from optima.patterns import Pattern
from optima.preflight import Preflight, preflight
from optima.qp.rows import DEFAULT_BUDGET_BYTES
from optima.recipe import Recipe
from optima.selectors.base import LinearTask, needs

# Most bytes at a time for each entry of a hessian that is worked with, and for each weight of its linear: what ALPS
# takes, the largest of the selectors.
BYTES_PER_SQUARE, BYTES_PER_WEIGHT = 72, 56
FACTORS = 64
SURVEY_NOTE = "allocation {} takes each linear's sparsity from calibration: the same for all is shown"


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        found: stacks, linears and patterns (on the meta device), and what stays dense.
        num_parameters: of the whole model.
        pruned_parameters: weights in the linears to prune.
        work_bytes: upper bound of the work space on the device: all hessians of a block, and one linear at work. An
            accelerator also holds ``block_bytes``.
        block_bytes: the largest block's weights.
        inputs_bytes: stored block inputs (main memory).
        model_bytes: the model's weights (main memory).
        notes: what will not be pruned, and what only calibration can tell.
    """

    found: Preflight
    num_parameters: int
    pruned_parameters: int
    work_bytes: int
    block_bytes: int
    inputs_bytes: int
    model_bytes: int
    notes: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """Share of the weights of all linears to prune that the patterns ask to prune."""
        sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in self.found.linears}
        pruned = sum(self.found.patterns[name].sparsity * size for name, size in sizes.items())
        return pruned / sum(sizes.values())


@dataclass(frozen=True)
class Measured:
    """What a run takes on this machine.

    Attributes:
        seconds: of its stages, whole run: ``forward``, ``hessian`` and ``linears``.
        work_bytes: peak work space of one linear, its hessian included.
    """

    seconds: dict[str, float]
    work_bytes: int


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Plan pruning ``source`` by ``recipe`` without loading weights.

    Raises:
        OptimaError: whatever a run would be refused for that its configuration shows.
    """
    model, config = skeleton(source)
    found = preflight(model, recipe, build(recipe), recipe.max_seq_length)
    num_parameters = sum(p.numel() for p in model.parameters())
    hidden = getattr(config.get_text_config(), "hidden_size", None)
    dtype = _dtype(recipe.dtype if recipe.dtype != "auto" else config.dtype)
    # A survey carries the dense model's block inputs beside those that pruning starts from.
    surveyed = recipe.allocation != "uniform"
    tokens = recipe.num_calibration_samples * recipe.max_seq_length * (2 if surveyed else 1)
    notes = [*found.notes, *([SURVEY_NOTE.format(recipe.allocation)] if surveyed else [])]
    if hidden is None:
        notes.append("the configuration names no hidden_size: the block inputs are not counted")
    return Plan(
        found=found,
        num_parameters=num_parameters,
        pruned_parameters=sum(linear.shape[0] * linear.shape[1] for linear in found.linears),
        work_bytes=max(_work_bytes(guess_groups(block), needs(build(recipe).selector)) for block in found.blocks),
        block_bytes=max(sum(p.numel() for p in block.module.parameters()) for block in found.blocks) * dtype.itemsize,
        inputs_bytes=tokens * (hidden or 0) * dtype.itemsize,
        model_bytes=num_parameters * dtype.itemsize,
        notes=tuple(notes),
    )


def _dtype(value: Any) -> torch.dtype:
    """A configuration's dtype, which may be missing or given by name."""
    if value is None:
        return torch.float32
    found = getattr(torch, value) if isinstance(value, str) else value
    assert isinstance(found, torch.dtype)
    return found


def _work_bytes(groups: list[list[Linear]], selector_needs: frozenset[str]) -> int:
    """Upper bound for one block: every hessian waits in float64 while the largest linear is worked with."""
    sizes = [linear.shape for group in groups for linear in group]
    waiting = sum(8 * group[0].shape[1] ** 2 for group in groups)
    work = max((BYTES_PER_SQUARE * d * d + BYTES_PER_WEIGHT * o * d for o, d in sizes), default=0)
    gradients = 12 * sum(o * d for o, d in sizes) if "gradient" in selector_needs else 0
    return waiting + work + gradients + DEFAULT_BUDGET_BYTES


def measure(plan: Plan, recipe: Recipe) -> Measured:
    """Prune one random linear of each shape and multiply one batch, and scale up to the run.

    Products of activations are timed for a batch of the model's dtype and widths; attention and element-wise work of
    the blocks come on top.
    """
    device, methods = find_device(recipe.device), build(recipe)
    tokens = recipe.num_calibration_samples * recipe.max_seq_length
    batch = min(recipe.batch_size * recipe.max_seq_length, tokens)
    seconds = {"forward": 0.0, "hessian": 0.0, "linears": 0.0}
    timed: dict[tuple[object, ...], float] = {}
    memory = PeakMemory(device)

    def once(key: tuple[object, ...], work: Callable[[], object]) -> float:
        if key not in timed:
            work()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            timed[key] = time.perf_counter() - started
        return timed[key]

    for block in plan.found.blocks:
        for group in guess_groups(block):
            inputs = group[0].shape[1]
            inputs_TD = torch.zeros(batch, inputs, device=device)
            seconds["hessian"] += tokens / batch * once(("gram", inputs), lambda x=inputs_TD: gram(x))
            for linear in group:
                outputs, pattern = linear.shape[0], plan.found.patterns[linear.name]
                weight_OD = torch.zeros(linear.shape, dtype=linear.dtype, device=device)
                product = once(("product", *linear.shape), lambda x=inputs_TD, w=weight_OD: x.to(w.dtype) @ w.mT)
                seconds["forward"] += 2 * tokens / batch * product
                seconds["linears"] += once(
                    ("linear", *linear.shape, str(pattern)),
                    lambda o=outputs, d=inputs, p=pattern: _prune_random(o, d, p, methods, device),
                )
    return Measured(seconds, memory.peak() - memory.baseline)


def _prune_random(outputs: int, inputs: int, pattern: Pattern, methods: Methods, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    factors_FD = random(min(FACTORS, inputs), inputs)
    hessian_DD = factors_FD.mT @ factors_FD / len(factors_FD)
    hessian_DD.diagonal().add_(0.2)
    task = LinearTask("random", random(outputs, inputs), Statistics(Hessian(hessian_DD)), random(outputs, inputs).abs())
    prune_linear(task, pattern, methods, torch.bfloat16)
