"""What a run would prune and take, from the model's configuration alone: no weights are loaded.

Memory is one stated upper bound. ``measure`` says what this machine really takes, by pruning random linears of the
model's shapes.

Shapes: O outputs, D inputs, F factors of a random hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optima.build import build
from optima.calibration.loss_weights import KEPT_BYTES
from optima.calibration.own_text import check_writes
from optima.device import PeakMemory, Stopwatch, find_device
from optima.linalg.hessian import Hessian
from optima.linalg.products import add_gram
from optima.linalg.statistics import Statistics
from optima.linear import Methods, prune_linear
from optima.memory import HostMemory, batch_tokens, host_memory, work_bytes
from optima.models.experts import ExpertLinear
from optima.models.skeleton import skeleton
from optima.models.source import Source
from optima.models.stacks import Linear, guess_groups
from optima.patterns import Pattern
from optima.preflight import Preflight, preflight, sized
from optima.recipe import SELF, Recipe
from optima.selectors.base import LinearTask

# Of a random hessian: common factors of the inputs, and what each input has to itself.
FACTORS, OWN_SHARE = 64, 0.2
SURVEY_NOTE = "{} takes each linear's sparsity from calibration: the same for all is shown"


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        found: stacks, linears and patterns (on the meta device), and what stays dense.
        methods: as a run would build them, external masks read.
        num_parameters: of the whole model.
        pruned_parameters: weights in the linears to prune.
        work_bytes: upper bound of the work space on the device: all hessians of a block, and one linear at work. An
            accelerator also holds ``block_bytes``.
        block_bytes: the largest block's weights.
        inputs_bytes: stored block inputs: in main memory, as far as there is room, and in files.
        model_bytes: the model's weights, on disk; so many are written again.
        host: main memory that a run takes beside block inputs.
        left_bytes: main memory for block inputs.
        passes: forward passes over the calibration text; a backward pass counts as two.
        reads: how often the weights are read from disk.
        dtype: of the weights.
        notes: what will not be pruned, and what only calibration can tell.
    """

    found: Preflight
    methods: Methods
    num_parameters: int
    pruned_parameters: int
    work_bytes: int
    block_bytes: int
    inputs_bytes: int
    model_bytes: int
    host: HostMemory
    left_bytes: int
    passes: int
    reads: int
    dtype: torch.dtype
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
    if recipe.dataset == [SELF]:
        check_writes(model)
    methods = build(recipe)
    found = preflight(model, recipe, methods, recipe.max_seq_length)
    recipe = sized(recipe, found)
    num_parameters = sum(p.numel() for p in model.parameters())
    hidden = getattr(config.get_text_config(), "hidden_size", None)
    dtype = _dtype(recipe.dtype if recipe.dtype != "auto" else config.dtype)
    streamed = not source.gguf_file and recipe.dataset != [SELF]
    memory = host_memory(model, found.blocks, recipe, methods, dtype, streamed)
    surveyed = recipe.surveys
    # Block inputs that are kept at once: a survey and tuning carry the dense model's beside those of the pruned one, a
    # sweep for the loss keeps those of all blocks, up to a limit.
    assert recipe.num_calibration_samples is not None
    tokens = recipe.num_calibration_samples * recipe.max_seq_length
    inputs = tokens * (hidden or 0) * dtype.itemsize
    kept = inputs + min((len(found.blocks) + 1) * inputs, KEPT_BYTES) if recipe.applied_objective == "loss" else 0
    routed = any(isinstance(linear, ExpertLinear) for linear in found.linears)  # what experts are given is kept
    notes = list(found.notes)
    if surveyed:
        notes.append(SURVEY_NOTE.format("keep_dense" if recipe.keep_dense else f"allocation {recipe.allocation}"))
    if hidden is None:
        notes.append("the configuration names no hidden_size: the block inputs are not counted")
    return Plan(
        found=found,
        methods=methods,
        num_parameters=num_parameters,
        pruned_parameters=sum(linear.shape[0] * linear.shape[1] for linear in found.linears),
        work_bytes=work_bytes(found.blocks, recipe, methods, dtype),
        block_bytes=max(sum(p.numel() for p in block.module.parameters()) for block in found.blocks) * dtype.itemsize,
        inputs_bytes=max(inputs * (1 + max(surveyed, recipe.tuning_epochs > 0) + routed), kept),
        model_bytes=num_parameters * dtype.itemsize,
        host=memory,
        left_bytes=memory.left(recipe.memory_budget),  # refused, if it is too little
        passes=forward_passes(recipe),
        reads=_reads(recipe, len(found.blocks) * inputs),
        dtype=dtype,
        notes=tuple(notes),
    )


def forward_passes(recipe: Recipe) -> int:
    """Calibrate and carry on; a survey; the sweep, whose backward pass counts as two; dense targets and epochs."""
    epochs = recipe.tuning_epochs
    return 2 + 2 * recipe.surveys + 4 * (recipe.applied_objective == "loss") + (3 * epochs + 1 if epochs else 0)


def _reads(recipe: Recipe, inputs_bytes: int) -> int:
    """Two looks at the model and a check; a survey; a sweep there and back, a part of the text at a time; pruning."""
    parts = -(-inputs_bytes // KEPT_BYTES) if recipe.applied_objective == "loss" else 0
    return 4 + bool(recipe.surveys) + 2 * parts


def _dtype(value: Any) -> torch.dtype:
    """A configuration's dtype, which may be missing or given by name."""
    if value is None:
        return torch.float32
    found = getattr(torch, value) if isinstance(value, str) else value
    assert isinstance(found, torch.dtype)
    return found


def measure(plan: Plan, recipe: Recipe) -> Measured:
    """Prune one random linear of each shape and multiply one batch, and scale up to the run.

    Products of activations are timed for a batch of the model's dtype and widths; attention and element-wise work of
    the blocks come on top.
    """
    recipe = sized(recipe, plan.found)
    assert recipe.num_calibration_samples is not None
    meter = _Meter(plan.methods, find_device(recipe.device))
    memory = PeakMemory(meter.device)
    batch = batch_tokens(recipe, meter.device.type == "cpu")
    batches = recipe.num_calibration_samples * recipe.max_seq_length / batch
    seconds = {"forward": 0.0, "hessian": 0.0, "linears": 0.0}
    for block in plan.found.blocks:
        for group in guess_groups(block):
            inputs = group[0].shape[1]
            seconds["hessian"] += batches * meter.gram(batch, inputs)
            for linear in group:
                seconds["forward"] += plan.passes * batches * meter.product(batch, linear.shape, plan.dtype)
                seconds["linears"] += meter.prune(linear, plan.found.patterns[linear.name], plan.dtype)
    return Measured(seconds, memory.peak() - memory.baseline)


class _Meter:
    """Seconds of work on random numbers, each kind timed once, after a warm-up."""

    def __init__(self, methods: Methods, device: torch.device) -> None:
        self.methods, self.device = methods, device
        self._known: dict[tuple[object, ...], float] = {}

    def gram(self, tokens: int, inputs: int) -> float:
        """A Gram matrix of one batch."""

        def made() -> Callable[[], object]:
            inputs_TD = torch.zeros(tokens, inputs, device=self.device)
            sum_DD = torch.zeros(inputs, inputs, dtype=torch.float64, device=self.device)
            return lambda: add_gram(sum_DD, inputs_TD)

        return self._once(("gram", inputs), made)

    def product(self, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> float:
        """A batch through a linear."""

        def made() -> Callable[[], object]:
            weight_OD = torch.zeros(shape, dtype=dtype, device=self.device)
            inputs_TD = torch.zeros(tokens, shape[1], dtype=dtype, device=self.device)
            return lambda: inputs_TD @ weight_OD.mT

        return self._once(("product", shape), made)

    def prune(self, linear: Linear, pattern: Pattern, dtype: torch.dtype) -> float:
        """All that is done to a linear, with a hessian of its own."""
        return self._once(("prune", linear.shape, str(pattern)), lambda: lambda: self._prune(linear, pattern, dtype))

    def _once(self, key: tuple[object, ...], make: Callable[[], Callable[[], object]]) -> float:
        """Seconds of what ``make`` returns, which is made only where the kind is new."""
        if key not in self._known:
            work = make()
            work()
            clock = Stopwatch(self.device)
            with clock("work"):
                work()
            self._known[key] = clock.total
        return self._known[key]

    def _prune(self, linear: Linear, pattern: Pattern, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(self.device)

        shape = linear.shape
        factors_FD = random(min(FACTORS, shape[1]), shape[1])
        hessian_DD = factors_FD.mT @ factors_FD / len(factors_FD)
        hessian_DD.diagonal().add_(OWN_SHARE)
        # External masks are found by the name.
        task = LinearTask(linear.name, random(*shape), Statistics(Hessian(hessian_DD)), random(*shape).abs())
        prune_linear(task, pattern, self.methods, dtype)
