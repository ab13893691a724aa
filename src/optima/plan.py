"""What a run does, resolved and checked before weights and text are read; ``optima plan`` prints it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from optima.core import make_solver
from optima.core.shifted import MOST_EIGENVALUES
from optima.data.generate import can_continue
from optima.device import card_memory, named_device
from optima.distributed import Ranks
from optima.errors import CalibrationError, ModelError, RecipeError
from optima.linear import Methods
from optima.main_memory import total_memory
from optima.models.blocks import (
    Block,
    Linear,
    Stack,
    count_parameters,
    dense_notes,
    find_stacks,
    is_expert,
    select_linears,
)
from optima.models.inspect import check_length, head_of
from optima.models.load import Source, dtype_as_read, find_source, skeleton
from optima.models.masks import MaskFiles
from optima.models.offload import Weights, open_weights
from optima.patterns import NM, Pattern, Scope, Unstructured, kind
from optima.recipe import BYTES_PER_TUNED, DEFAULT_EPOCHS, Recipe, RunOptions, Shrink
from optima.reporting.record import Size
from optima.reporting.summary import runtime_note
from optima.selectors.alps import ALPS
from optima.selectors.base import Selector, load_foreign, make_selector
from optima.selectors.external import External
from optima.selectors.optima import Optima
from optima.structures.config import skeleton_of, smaller_config
from optima.structures.neurons import find_neurons

BATCH_SIZE, CPU_TOKENS = 8, 2048  # of a forward pass; larger activations leave the caches of a CPU
# Shares of the main and the device memory that the whole model may take while it generates.
MAIN_SHARE, DEVICE_SHARE = 0.5, 0.8
LIBRARIES_BYTES = 2**29
# Of the linear at work, for each entry of its Hessian and each weight: what thanos and alps take, the most.
BYTES_PER_ENTRY, BYTES_PER_WEIGHT = 62, 56
GIB = 2**30

Options = TypeVar("Options", bound=RunOptions)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Options resolved for a model.

    Attributes:
        model: with its weights, or its skeleton.
        source: where the model is from; None if it is in memory.
        options: with its open settings filled in.
        stacks: with the linears to change.
        dtype: of the weights as read: a skeleton is in float32.
        device: where blocks run.
        calibration: of the caller: token ids (N, L), or documents; None: the dataset of the options is read.
        notes: which weights stay dense, and what was resolved otherwise than asked.
        sizes: of the dense and of the smaller model, if structures are removed.
    """

    model: PreTrainedModel
    source: Source | None
    options: RunOptions
    stacks: tuple[Stack, ...]
    dtype: torch.dtype
    device: torch.device
    calibration: Any
    notes: tuple[str, ...]
    sizes: tuple[Size, ...] = ()

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all stacks, in order."""
        return [block for stack in self.stacks for block in stack.blocks]

    @property
    def linears(self) -> list[Linear]:
        """The linears to change, in order."""
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def name(self) -> str:
        """The model's name."""
        return type(self.model).__name__ if self.source is None else self.source.name

    @property
    def batch_size(self) -> int:
        """Sequences of a forward pass."""
        return self.options.batch_size or 1

    @property
    def identity(self) -> dict[str, Any]:
        """The options that identify a run."""
        return self.options.to_dict()

    @property
    def task(self) -> str:
        """What is done, in a line of progress."""
        blocks = sum(bool(block.linears) for block in self.blocks)
        return f"pruning {len(self.linears)} linears in {blocks} blocks"

    @property
    def output_bytes(self) -> int:
        """Size of the output."""
        return count_parameters(self.model) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class PrunePlan(Plan):
    """A recipe resolved for a model.

    Attributes:
        options: the recipe.
        methods: selector and solver.
        patterns: the pattern of each linear to prune, by its full name.
        fallback: patterns of a stack without gradients, where they differ.
        scope_named: whether the user named the scope.
    """

    options: Recipe
    methods: Methods
    patterns: dict[str, Pattern]
    fallback: dict[str, Pattern]
    scope_named: bool

    @property
    def identity(self) -> dict[str, Any]:
        """See ``Plan``; the default scope depends on the model."""
        return (self.options if self.scope_named else self.options.replace(scope=None)).to_dict()


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan(Plan):
    """The removal of structures, resolved for a model.

    Attributes:
        options: what is removed, and how the rest is repaired.
        width: neurons of each MLP that stay; None: all.
        sizes: of the dense and of the smaller model.
    """

    options: Shrink
    width: int | None
    sizes: tuple[Size, ...]

    def stack_of(self, model: PreTrainedModel) -> Stack:
        """The stack of ``model``, with the linears that the loss is observed at."""
        return _observed(find_stacks(model)[0], self.width)

    @property
    def task(self) -> str:
        """See ``Plan``."""
        neurons = [] if self.width is None else [f"all but {self.width:,} neurons of each block"]
        blocks = [f"{self.options.blocks} of {len(self.blocks)} blocks"] if self.options.blocks else []
        return f"removing {' and '.join(blocks + neurons)}"


def _size(model: PreTrainedModel, itemsize: int) -> Size:
    blocks, head = (block for stack in find_stacks(model) for block in stack.blocks), head_of(model)
    used = {id(linear.parameter): linear.parameter.numel() for block in blocks for linear in block.linears}
    used |= {} if head is None else {id(parameter): parameter.numel() for parameter in head.parameters()}
    parameters = count_parameters(model)
    return Size(parameters, parameters * itemsize, 2 * sum(used.values()))


Planned = TypeVar("Planned", bound=Plan)


def plan_run(
    model: object,
    resolve: Callable[..., Planned],
    output_dir: object,
    calibration: object,
    ranks: Ranks,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Planned:
    """Make every check that needs neither weights nor text; arguments: see ``optima.prune``.

    ``resolve`` is called as ``resolve_recipe``, without the recipe.
    """
    place, source = ranks.on(device), None
    if isinstance(model, str | Path):
        source = find_source(str(model), trust_remote_code)
        model = skeleton(source)
        if output_dir is None:
            raise RecipeError("output_dir is missing: a model that is read from disk must be written somewhere")
    elif not isinstance(model, PreTrainedModel):
        raise ModelError(f"model must be a path, a hub id or a model of transformers, got {type(model).__name__}")
    else:
        check_in_memory(model)
    plan = resolve(model, device=place, source=source, calibration=calibration, trust_remote_code=trust_remote_code)
    if (count := plan.options.samples()) < ranks.size:
        raise RecipeError(f"{ranks.size} processes share {count} calibration sequences: start {count} at most")
    return plan


def make_plan(source: Source, options: RunOptions, device: str = "auto") -> Plan:
    """Plan pruning or shrinking ``source`` without its weights; arguments and errors: see ``resolve_recipe``."""
    resolve: Callable[..., Plan] = resolve_shrink if isinstance(options, Shrink) else resolve_recipe
    return resolve(skeleton(source), options, device=named_device(device), source=source)


def resolve_recipe(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    device: torch.device,
    source: Source | None = None,
    calibration: object = None,
    trust_remote_code: bool = False,
) -> PrunePlan:
    """Fill in the open settings of ``recipe``, and make every check that needs neither weights nor text.

    Args:
        model: with its weights, or its skeleton.
        recipe: what to do.
        device: where blocks are pruned.
        source: where the model is from; None if it is in memory.
        calibration: see ``optima.prune``.
        trust_remote_code: whether a selector of the user's own, or code of a checkpoint of masks, may run.

    Raises:
        OptimaError: for what cannot be done.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe must be a Recipe, got {type(recipe).__name__}: build one, or use load_recipe")
    methods = make_methods(recipe, trust_remote_code)
    scope_named = recipe.scope is not None
    recipe = recipe.resolved(scope=default_scope(recipe.resolved_objective, methods.selector))
    stacks = tuple(chosen_stacks(model, recipe))
    linears = [linear for stack in stacks for block in stack.blocks for linear in block.linears]
    patterns, fallback = _patterns(model, stacks, linears, recipe, methods), dict[str, Pattern]()
    if recipe.objective == "loss" and recipe.scope is not None and not scope_named:
        scope = default_scope("sink", methods.selector)
        fallback = {name: replace(p, scope=scope) for name, p in patterns.items() if isinstance(p, Unstructured)}
    for linear in linears:
        if linear.expert is None and "weight" not in linear.module._parameters:
            raise ModelError(f"the weight of {linear.name} is computed from others: remove its parametrization first")
    recipe, data_notes = resolve_calibration(recipe, model, stacks, device, source, calibration)
    return PrunePlan(
        model=model,
        source=source,
        options=recipe,
        stacks=stacks,
        dtype=_dtype(model, source, recipe),
        device=device,
        calibration=calibration,
        notes=(*dense_notes(model, stacks), *_unmatched(recipe, stacks), *data_notes),
        methods=methods,
        patterns=patterns,
        fallback=fallback,
        scope_named=scope_named,
    )


def resolve_shrink(
    model: PreTrainedModel,
    options: Shrink,
    *,
    device: torch.device,
    source: Source | None = None,
    calibration: object = None,
    trust_remote_code: bool = False,
) -> ShrinkPlan:
    """Check what ``options`` remove from a model, without its weights; arguments: see ``resolve_recipe``.

    Raises:
        OptimaError: for what cannot be done.
    """
    if not isinstance(options, Shrink):
        raise RecipeError(f"options must be a Shrink, got {type(options).__name__}: optima.Shrink(neurons=0.25)")
    stack, *others = find_stacks(model)
    if others:
        raise ModelError(f"{type(model).__name__} has an encoder and a decoder: models with one stack can be shrunk")
    total, width = len(stack.blocks), None
    if (count := options.blocks or 0) > total - 2:
        raise RecipeError(f"blocks must be at most {total - 2}: of {total} blocks, the first and the last one stay")
    if options.neurons is not None:
        dense = find_neurons(stack.blocks[0]).read_HCW.shape[-1]
        width = round(dense * (1.0 - options.neurons) / options.multiple) * options.multiple
        if not 0 < width < dense:
            raise RecipeError(
                f"neurons {options.neurons:g} of {dense} leaves {width} in multiples of {options.multiple}: give "
                "another fraction, or a smaller --multiple"
            )
    config = smaller_config(model, stack, range(1, count + 1), width)  # whichever go, they are so many
    options = options.replace(tuning_epochs=DEFAULT_EPOCHS if options.tuning_epochs is None else options.tuning_epochs)
    stack = _observed(stack, width)
    options, notes = resolve_calibration(options, model, [stack], device, source, calibration)
    dtype = _dtype(model, source, options)
    return ShrinkPlan(
        model=model,
        source=source,
        options=options,
        stacks=(stack,),
        dtype=dtype,
        device=device,
        calibration=calibration,
        notes=notes,
        width=width,
        sizes=tuple(_size(each, dtype.itemsize) for each in (model, skeleton_of(model, config))),
    )


def _observed(stack: Stack, width: int | None) -> Stack:
    """The stack with the readers of neurons alone, or where all neurons stay with one linear of each block."""

    def chosen(block: Block) -> Block:
        plain = [linear for linear in block.linears if not is_expert(linear) and linear.name not in block.routers]
        name = plain[-1].name if width is None else find_neurons(block).reader
        return replace(block, linears=tuple(linear for linear in plain if linear.name == name))

    return replace(stack, blocks=tuple(map(chosen, stack.blocks)))


def _dtype(model: PreTrainedModel, source: Source | None, options: RunOptions) -> torch.dtype:
    return model.dtype if source is None else dtype_as_read(model.config, options.dtype)


def resolve_calibration(
    options: Options,
    model: PreTrainedModel,
    stacks: Sequence[Stack],
    device: torch.device,
    source: Source | None,
    calibration: object,
) -> tuple[Options, tuple[str, ...]]:
    """Fill in what calibration needs: sequences, their length and the batch size; notes of what is not done."""
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.is_floating_point() or calibration.dtype == torch.bool:
            shape = f"{tuple(calibration.shape)} {calibration.dtype}"
            raise CalibrationError(f"calibration must be token ids, integers of shape (samples, length), got {shape}")
        options = options.replace(num_calibration_samples=len(calibration), max_seq_length=calibration.shape[1])
    check_length(model, options.max_seq_length)
    inputs = len(stacks) * max(each.shape[1] for stack in stacks for block in stack.blocks for each in block.linears)
    fits = max(CPU_TOKENS // options.max_seq_length, 1) if device.type == "cpu" else BATCH_SIZE
    options = options.replace(batch_size=options.batch_size or fits, num_calibration_samples=options.samples(inputs))
    size = count_parameters(model) * _dtype(model, source, options).itemsize
    if options.self_generated and (reason := _why_not_generated(model, size, device, calibration)):
        return options.replace(self_generated=0.0), (f"no calibration data is self-generated: {reason}",)
    return options, ()


def make_methods(recipe: Recipe, trust_remote_code: bool = False) -> Methods:
    """Selector and solver of ``recipe``.

    Raises:
        RecipeError: if a selector of the user's own cannot be loaded, or asks for what nothing can give.
    """
    name = recipe.selector
    selector: Selector
    if not isinstance(name, str):
        selector = name
    elif name == "external":
        assert recipe.mask_from is not None, "a recipe checks it"
        selector = External(MaskFiles(recipe.mask_from, trust_remote_code))
    elif ":" in name and not trust_remote_code:
        raise RecipeError(f"selector {name} runs code: if you trust it, add --trust-remote-code")
    else:
        selector = load_foreign(name) if ":" in name else make_selector(name)
    needs = frozenset(getattr(selector, "needs", ())) if recipe.resolved_objective == "loss" else frozenset()
    return Methods(selector, make_solver(recipe.solver, recipe.gap), needs=needs)


def default_scope(objective: str, selector: Selector) -> Scope:
    """The published scope; but rows compete where Fisher weights compare them, and those of ours only there."""
    published = selector.published_scope
    if objective == "loss":
        return "layer" if published == "row" else published
    return "row" if isinstance(selector, Optima) else published


def chosen_stacks(model: nn.Module, recipe: Recipe) -> list[Stack]:
    """The stacks of ``model`` with the linears that ``recipe`` prunes."""
    return select_linears(find_stacks(model), recipe.targets, recipe.ignore)


def _patterns(
    model: nn.Module, stacks: Sequence[Stack], linears: Sequence[Linear], recipe: Recipe, methods: Methods
) -> dict[str, Pattern]:
    selector, patterns = methods.selector, dict[str, Pattern]()
    if not recipe.any_pattern:
        table = recipe.table(recipe.scope or "row")
        patterns |= table.assign({linear.name: linear.shape[1] for linear in linears})
    if isinstance(selector, External):
        if isinstance(masks := selector.masks, MaskFiles):
            excluded = [linear for stack in stacks for block in stack.blocks for linear in block.excluded]
            known = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
            known += [name for name, module in model.named_modules() if hasattr(module, "weight")]
            masks.check_names([*known, *(linear.name for linear in (*linears, *excluded))])
        patterns |= selector.check(linears, patterns, recipe.ignore)
    wide = [linear.name for linear in linears if linear.shape[1] > MOST_EIGENVALUES]
    if isinstance(selector, ALPS) and wide:
        raise RecipeError(f"selector alps: {wide[0]} has more than {MOST_EIGENVALUES:,} inputs: --ignore it")
    return patterns


def check_in_memory(model: PreTrainedModel) -> None:
    """Raise ``ModelError`` unless all weights of a model in memory are plain tensors under their own names."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model has weights that are not in memory (offloaded, or on meta): load it whole")
    if len(places := {str(parameter.device) for parameter in model.parameters()}) > 1:
        raise ModelError(f"the model is spread over {', '.join(sorted(places))}: load it on one device, or the CPU")
    if getattr(model, "is_quantized", False) or any(parameter.itemsize < 2 for parameter in model.parameters()):
        raise ModelError("the model is quantized: load it unquantized, prune it, then quantize the result")
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            raise ModelError(f"{name} is a {type(parameter).__name__}, not a plain tensor: load the model as it is")
        if {"base_layer", "_orig_mod"} & set(name.split(".")):
            raise ModelError(f"the model is wrapped ({name}): merge adapters, and unwrap torch.compile, first")


def _unmatched(recipe: Recipe, stacks: Sequence[Stack]) -> list[str]:
    names = [linear.name for stack in stacks for block in stack.blocks for linear in (*block.linears, *block.excluded)]
    asked = (regex for regex in recipe.ignore if regex not in Recipe().ignore)
    return [f"ignore {each!r} matches no linear" for each in asked if not any(re.search(each, name) for name in names)]


def _why_not_generated(model: PreTrainedModel, size: int, device: torch.device, calibration: object) -> str:
    """Why the model of ``size`` bytes does not generate text; empty if it does.

    By the total memory, which is the same for a resumed run.
    """
    if calibration is not None:
        return "the caller passed the calibration data"
    if not can_continue(model):
        return f"{type(model).__name__} does not generate text"
    if size > MAIN_SHARE * total_memory():
        return f"its weights take {size / GIB:.1f} GiB, more than {MAIN_SHARE:.0%} of the main memory"
    here = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    if here and size > DEVICE_SHARE * card_memory(device):
        return f"its weights take {size / GIB:.1f} GiB, more than {DEVICE_SHARE:.0%} of the device memory"
    return ""


def load_weights(plan: Plan, whole: str | None = None) -> tuple[PreTrainedModel, Weights]:
    """The model and its weights; ``whole``: why these must be in main memory, if they must."""
    if plan.source is None:
        return plan.model, Weights(plan.model)
    if plan.options.self_generated:
        whole = whole or "it generates calibration data"
    return open_weights(plan.source, plan.model, plan.options.dtype, whole)


def estimate_memory(plan: Plan, streamed: bool) -> tuple[int, int]:
    """About the bytes of memory for weights and work, and those of activations, which may be in files."""
    options, itemsize, work = plan.options, plan.dtype.itemsize, 0
    sizes = [count_parameters(block.module) for block in plan.blocks]
    whole = count_parameters(plan.model)
    weights = (whole - sum(sizes) + 2 * max(sizes) if streamed else whole) * itemsize
    for block, size in zip(plan.blocks, sizes, strict=True):
        hessians = sum(8 * linear.shape[1] ** 2 for linear in block.linears)
        shapes = [linear.shape for linear in block.linears]
        solving = max((BYTES_PER_ENTRY * d * d + BYTES_PER_WEIGHT * o * d for o, d in shapes), default=0)
        trained = size if isinstance(plan, ShrinkPlan) else sum(o * d for o, d in shapes)
        tuning = BYTES_PER_TUNED * trained if options.tuning_epochs else 0
        work = max(work, hessians + max(solving, tuning))
    hidden = getattr(plan.model.config.get_text_config(), "hidden_size", None) or 0
    # The gradient pass has the inputs of all blocks, of a quarter of the text.
    copies = max(2, 1 + len(sizes) / 4) if getattr(options, "objective", "") == "loss" else 1
    return LIBRARIES_BYTES + weights + work, int(
        options.samples() * options.max_seq_length * hidden * itemsize * copies
    )


def print_plan(plan: Plan, name: str, console: Console) -> None:
    """Print ``plan``: what goes, and its memory."""
    options = plan.options
    resident = bool(options.self_generated) or bool(plan.source and plan.source.gguf_file)
    memory, activations = estimate_memory(plan, streamed=not resident)
    size = plan.sizes[-1].bytes if plan.sizes else plan.output_bytes
    what = _shrink_lines(plan) if isinstance(plan, ShrinkPlan) else _prune_lines(plan, name, console)
    lines = [
        *what,
        f"calibration: {options.samples()} x {options.max_seq_length} tokens, batch size {options.batch_size}",
        f"memory: about {memory / GIB:.2f} GiB, with {'the whole model' if resident else 'two blocks at a time'}",
        f"activations: about {activations / GIB:.2f} GiB, in files where main memory is short",
        f"disk: {size / GIB:.2f} GiB for the result",
        *(f"note: {note}" for note in plan.notes),
    ]
    if isinstance(plan, PrunePlan):
        if any(isinstance(each, NM) for each in plan.patterns.values()):
            lines.append("note: N:M patterns lose less after `optima permute`, which moves the channels of the model")
        runtime = runtime_note(str(each) for each in plan.patterns.values()).replace("**", "").replace("`", "")
        lines.append(f"note: {runtime}")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _shrink_lines(plan: ShrinkPlan) -> list[str]:
    dense, small = plan.sizes
    return [
        f"{plan.task}; which ones, the run finds out",
        f"parameters: {dense.parameters:,} to {small.parameters:,} ({small.parameters / dense.parameters:.1%})",
        f"FLOPs per token: {dense.flops:,} to {small.flops:,} ({small.flops / dense.flops:.1%})",
        f"repair: {plan.options.tuning_epochs} epochs of tuning",
    ]


def _prune_lines(plan: Plan, name: str, console: Console) -> list[str]:
    assert isinstance(plan, PrunePlan)
    table = Table(title=f"{name}: what would be pruned", title_justify="left")
    for heading in ("blocks", "linear", "outputs x inputs", "sparsity"):
        table.add_column(heading)
    for _, same in groupby(plan.blocks, key=lambda block: _rows(plan, block)):
        blocks = list(same)
        span = f"{blocks[0].index}" if len(blocks) == 1 else f"{blocks[0].index}-{blocks[-1].index}"
        for (linear, *shown), count in _rows(plan, blocks[0]).items():
            table.add_row(span, linear if count == 1 else f"{linear} ({count})", *shown)
        table.add_section()
    console.print(table)
    sizes = {linear.name: math.prod(linear.shape) for linear in plan.linears}
    pruned, whole, recipe = sum(sizes.values()), count_parameters(plan.model), plan.options
    sparsity = sum(plan.patterns[linear].sparsity * size for linear, size in sizes.items()) / pruned
    return [
        f"weights in these linears: {pruned:,} of {whole:,} parameters ({pruned / whole:.0%})",
        f"sparsity of these linears: {sparsity:.2%}{', the mean' * (recipe.allocation == 'loss')}",
        f"method: selector {recipe.selector}, objective {recipe.objective}, allocation {recipe.allocation}, "
        f"solver {recipe.solver}, {recipe.tuning_epochs} epochs of tuning",
    ]


def _rows(plan: PrunePlan, block: Block) -> dict[tuple[str, str, str], int]:
    rows: dict[tuple[str, str, str], int] = {}
    for linear in block.linears:
        name = kind(linear.name.removeprefix(f"{block.name}."))
        row = (f"*.{name}", "{} x {}".format(*linear.shape), str(plan.patterns[linear.name]))
        rows[row] = rows.get(row, 0) + 1
    return rows
