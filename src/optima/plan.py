"""What a run would prune and cost, from the model's configuration alone: no weights are loaded.

Shapes: O outputs, D inputs, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from optima.calibration.capture import capture_block_inputs
from optima.calibration.statistics import SharedInputs
from optima.errors import ModelError
from optima.models.masks import MaskFiles
from optima.models.source import Source, explain_read_errors, load_config, model_class
from optima.models.stacks import Block, Linear, find_blocks, linears_of, select_linears, uncovered_parameters
from optima.patterns import Pattern
from optima.pipeline import expect_targets
from optima.qp.rows import BYTES_PER_ENTRY, rows_per_chunk
from optima.recipe import Recipe
from optima.selectors.base import needs_of
from optima.selectors.external import External

# Iterations that a row takes to a certified gap of 1e-4, at most 22 on average over a linear (benchmarks/qp.py).
TYPICAL_ITERATIONS = 20
# Beside the iterations: targets, start and certificate.
OTHER_PRODUCTS = 4
SURVEY_NOTE = (
    "allocation {} takes each linear's sparsity from calibration: the same for all is shown, and the operations count "
    "a second pass for the survey"
)


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        blocks: the blocks with the linears that would be pruned (on the meta device).
        patterns: the pattern of each linear, by its full name; all alike where an allocation is still to be made.
        num_parameters: of the whole model.
        pruned_parameters: weights in the linears to prune.
        memory_bytes: predicted peak on the device beyond the model's weights and the stored block inputs; an
            accelerator also holds ``block_bytes``.
        block_bytes: the largest block's weights.
        inputs_bytes: stored block inputs (main memory).
        model_bytes: the model's weights (main memory).
        operations: floating-point operations of the run, forward passes included.
        notes: what will not be pruned, and what only calibration can tell.
    """

    blocks: list[Block]
    patterns: dict[str, Pattern]
    num_parameters: int
    pruned_parameters: int
    memory_bytes: int
    block_bytes: int
    inputs_bytes: int
    model_bytes: int
    operations: float
    notes: list[str]

    @property
    def sparsity(self) -> float:
        """Share of the weights of all linears to prune that the patterns ask to prune."""
        sizes = {linear.name: linear.weight_OD.numel() for block in self.blocks for linear in block.linears}
        return sum(self.patterns[name].sparsity * size for name, size in sizes.items()) / sum(sizes.values())


def skeleton(source: Source) -> tuple[nn.Module, PretrainedConfig]:
    """The model's modules on the meta device: shapes and names, no weights.

    Raises:
        ModelError: if the configuration cannot be read or built.
    """
    config = load_config(source)
    kind = model_class(config, source)
    with explain_read_errors(source, "configuration"), torch.device("meta"):
        if kind in (AutoModel, AutoModelForCausalLM):
            model = kind.from_config(config, trust_remote_code=source.trust_remote_code)
        else:
            model = kind(config)
    model.tie_weights()
    return model.eval(), config


def check_model(model: nn.Module, recipe: Recipe, length: int) -> list[Block]:
    """The blocks and linears that ``recipe`` prunes in ``model``, checked against its pattern and ``length``.

    Args:
        model: the model, or its skeleton.
        recipe: what to prune.
        length: tokens in a calibration sequence.

    Raises:
        ModelError: if nothing matches, or the model does not read token sequences as long as these.
        RecipeError: if a linear has no pattern, one that does not divide its inputs, or no external mask that fits.
    """
    blocks = select_linears(find_blocks(model), recipe.targets, recipe.ignore)
    if recipe.mask_from is not None:
        matrices = (name for name, module in model.named_modules() if getattr(module, "weight", None) is not None)
        MaskFiles(recipe.mask_from).check_names(list(matrices))
    find_patterns(blocks, recipe)
    if "input_ids" not in (parameters := inspect.signature(model.forward).parameters):
        raise ModelError(
            f"{type(model).__name__} reads no tokens (it reads {', '.join(parameters)}): prune a language model"
        )
    positions = num_positions(model)
    if positions is not None and length > positions:
        raise ModelError(
            f"calibration sequences of {length} tokens exceed the model's {positions} positions: "
            f"use --max-seq-length {positions} or less"
        )
    return blocks


def find_patterns(blocks: Sequence[Block], recipe: Recipe) -> dict[str, Pattern]:
    """The pattern of each linear by its full name, checked against the linear's inputs and any external mask."""
    selector = recipe.make_selector()
    expect_targets(selector, blocks)
    table = recipe.make_patterns(selector)
    patterns = table.assign({linear.name: linear.shape[1] for block in blocks for linear in block.linears})
    if isinstance(selector, External):
        selector.check(patterns)
    return patterns


def num_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model has positions for; None if it names no limit."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # XLNet says -1
        return None
    # RoBERTa's family counts positions from behind the padding's.
    unused = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return positions - max(unused, default=0)


def make_plan(source: Source, recipe: Recipe) -> Plan:
    """Plan pruning ``source`` by ``recipe`` without loading weights."""
    model, config = skeleton(source)
    blocks = check_model(model, recipe, recipe.max_seq_length)
    num_parameters = sum(p.numel() for p in model.parameters())
    block_parameters = max(sum(p.numel() for p in block.module.parameters()) for block in blocks)
    groups = shared_inputs(model, blocks)
    hidden = getattr(config.get_text_config(), "hidden_size", 0)
    # A survey carries the dense model's block inputs beside those that pruning starts from.
    surveyed = recipe.allocation != "uniform"
    copies = 2 if surveyed else 1
    patterns = find_patterns(blocks, recipe)
    dtype = _dtype(recipe.dtype if recipe.dtype != "auto" else config.dtype)
    return Plan(
        blocks=blocks,
        patterns=patterns,
        num_parameters=num_parameters,
        pruned_parameters=sum(linear.weight_OD.numel() for block in blocks for linear in block.linears),
        memory_bytes=predict_memory(groups, blocks, recipe, patterns, dtype.itemsize),
        block_bytes=block_parameters * dtype.itemsize,
        inputs_bytes=copies * recipe.num_calibration_samples * recipe.max_seq_length * hidden * dtype.itemsize,
        model_bytes=num_parameters * dtype.itemsize,
        operations=sum(_operations(g, block, recipe, patterns) for g, block in zip(groups, blocks, strict=True)),
        notes=uncovered_notes(blocks) + ([SURVEY_NOTE.format(recipe.allocation)] if surveyed else []),
    )


def _dtype(value: Any) -> torch.dtype:
    """A configuration's dtype, which may be missing or given by name."""
    if value is None:
        return torch.float32
    found = getattr(torch, value) if isinstance(value, str) else value
    assert isinstance(found, torch.dtype)
    return found


def uncovered_notes(blocks: Sequence[Block]) -> list[str]:
    """One line for each matrix of a block that no linear module holds, so that nothing is left out silently."""
    return [
        f"{name} ({size:,} weights) is not a linear module and is left dense, here and in every block like it"
        for name, size in uncovered_parameters(blocks[0]).items()
    ]


Groups = list[list[Linear]]


def predict_memory(
    groups: Sequence[Groups], blocks: Sequence[Block], recipe: Recipe, patterns: dict[str, Pattern], itemsize: int
) -> int:
    """Peak bytes of calibrating and solving any one block, beyond the weights and the stored block inputs."""
    gradients = "gradient" in needs_of(recipe.make_selector())

    def peak(block: Block, own: Groups) -> int:
        held = 4 * sum(linear.weight_OD.numel() for linear in block.linears) if gradients else 0
        backward = _backward_bytes(block, own, recipe, itemsize) if gradients else 0
        return max(
            _calibration_bytes(block, own, recipe, itemsize),
            held + backward,
            held + _solve_bytes(own, recipe, patterns),
        )

    return max(peak(block, own) for block, own in zip(blocks, groups, strict=True))


def shared_inputs(model: nn.Module, blocks: Sequence[Block]) -> list[Groups]:
    """For each block of a skeleton, its linears grouped by the input they share.

    The blocks run forward on the meta device, called as the model's own forward pass calls them; only what surrounds
    the blocks is given (uninitialised) memory for it.
    """
    inside = {id(module) for block in blocks for module in block.module.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module.to_empty(device="cpu", recurse=False)
            for buffer in module.buffers(recurse=False):
                # Buffers can hold indices, which must be valid; parameters' values do not matter here.
                buffer.zero_()
    store = capture_block_inputs(model, blocks, [torch.zeros(1, 8, dtype=torch.int64)])
    result: list[Groups] = []
    for block in blocks:
        shared = SharedInputs()
        with ExitStack() as stack:
            for linear in block.linears:
                stack.callback(linear.module.register_forward_pre_hook(_observe(shared, linear.name)).remove)
            store.run(block, 0, torch.device("meta"))
        groups: dict[str, list[Linear]] = {}
        for linear in block.linears:
            groups.setdefault(shared.leader.get(linear.name, linear.name), []).append(linear)
        result.append(list(groups.values()))
    return result


def _observe(shared: SharedInputs, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
        shared.find(name, args[0])

    return observe


def _calibration_bytes(block: Block, groups: Groups, recipe: Recipe, itemsize: int) -> int:
    """Hessians of all distinct inputs, and one batch's activations, which reference counting keeps short-lived."""
    tokens = recipe.batch_size * recipe.max_seq_length
    linears = linears_of(block.module, block.name)
    widths = [linear.shape[0] for linear in linears] + [group[0].shape[1] for group in groups]
    activations = tokens * sum(widths) * itemsize
    inputs = [group[0].shape[1] for group in groups]
    widest = max(inputs, default=0)
    product = widest**2 * 12 + (0 if itemsize == 4 else tokens * widest * 4)
    return sum(8 * size**2 for size in inputs) + product + activations


def _backward_bytes(block: Block, groups: Groups, recipe: Recipe, itemsize: int) -> int:
    """Gradients of all weights, beside the hessians, and the activations of one sample, which wait for the backward."""
    weights = sum(linear.weight_OD.numel() for linear in block.linears)
    widths = sum(sum(linear.shape) for linear in linears_of(block.module, block.name))
    hessians = sum(8 * group[0].shape[1] ** 2 for group in groups)
    return weights * itemsize + hessians + 2 * recipe.max_seq_length * widths * itemsize


def _solve_bytes(groups: Groups, recipe: Recipe, patterns: dict[str, Pattern]) -> int:
    """Hessians still waiting, the factorisation of one, and the work space of one linear: its selector's, that of the
    swaps, then the solver's.
    """
    peak, waiting = 0, sum(8 * group[0].shape[1] ** 2 for group in groups)
    for group in groups:
        outputs, inputs = max(linear.shape for linear in group)
        factorisation = inputs**2 * (4 * 8 + 4 + 4 + 8)
        # The second linear of a group finds what the first one's solver has left.
        squares = max(64 * inputs**2, factorisation if len(group) > 1 else 0)
        selection = squares + outputs * inputs * (2 * 4 + 50)
        weights = outputs * inputs * (4 * 4 + 1)
        workspace = min(outputs, rows_per_chunk(inputs)) * inputs * BYTES_PER_ENTRY
        peak = max(peak, waiting + selection, waiting + factorisation + weights + workspace)
        waiting -= 8 * inputs**2
    return peak


def _operations(groups: Groups, block: Block, recipe: Recipe, patterns: dict[str, Pattern]) -> float:
    """Two forward passes and the Hessians, twice where an allocation surveys them, the selector's and the solver's
    products, the swaps, and a forward and backward pass for gradients.
    """
    tokens = recipe.num_calibration_samples * recipe.max_seq_length
    forward = 4.0 * tokens * sum(parameter.numel() for parameter in block.module.parameters())
    hessians = sum(2.0 * tokens * group[0].shape[1] ** 2 for group in groups)
    sizes = [linear.shape for group in groups for linear in group]
    selector = recipe.make_selector()
    products = 75 + _solver_products(recipe)
    passes = 1 if recipe.allocation == "uniform" else 2
    backward = 1.5 * forward if "gradient" in needs_of(selector) else 0.0
    linears = sum(2.0 * products * outputs * inputs**2 for outputs, inputs in sizes)
    return backward + passes * (forward + hessians) + linears


def _solver_products(recipe: Recipe) -> int:
    """Products of a row with a D x D matrix, typically."""
    if recipe.solver in ("none", "cholesky"):
        return 0 if recipe.solver == "none" else OTHER_PRODUCTS
    one = recipe.solver == "low-rank-cg" or (recipe.solver == "auto" and recipe.max_change is None)
    return (1 if one else 2) * TYPICAL_ITERATIONS + OTHER_PRODUCTS
