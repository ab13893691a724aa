"""Write a model with its channels permuted and its value heads rotated: the same function, of which N:M prunes less."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.activations import Activations, capture
from optima.calibration.hessians import observe
from optima.calibration.weights import FisherWeights
from optima.core.shifted import saliency_unit, scaled_weight
from optima.errors import ModelError, RecipeError
from optima.extras.channels import Saliency, best_order, best_rotation, lost, reader_saliency, writer_saliency
from optima.loop import find_fisher_weights
from optima.models.blocks import Block, Stack, linears_of
from optima.models.channels import TOLERANCE, Channels, difference, find_channels, move
from optima.models.forward import evaluating
from optima.models.offload import outside_device
from optima.patterns import NM
from optima.plan import PrunePlan, chosen_stacks, resolve_recipe
from optima.recipe import SINK_WEIGHT, Recipe
from optima.run import open_run
from optima.state import RunState

MOST_ZEROS = 0.1  # of a linear that is not pruned


@dataclass(frozen=True)
class Permutation:
    """What ``permute`` did.

    Attributes:
        permuted: of each MLP, by name, the saliency that the pattern prunes of its last linear, relative to before.
        rotated: of each attention the same, a mean over the linears that write and read the values.
        notes: which were skipped, and why.
    """

    permuted: dict[str, float] = field(default_factory=dict)
    rotated: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for what, pruned in ("MLPs permuted", self.permuted), ("attentions rotated", self.rotated):
            if pruned:
                less = 1.0 - sum(pruned.values()) / len(pruned)
                lines.append(f"{len(pruned)} {what}; of their saliency the pattern prunes {less:.1%} less")
        return "\n".join([*lines, *(f"note: {note}" for note in dict.fromkeys(self.notes))])


def permute(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Iterable[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Permutation:
    """Permute the channels of MLPs and rotate value heads so that N:M patterns prune less; the function stays the same.

    The saliency of a weight is a diagonal estimate of the loss of its removal (``optima.core.shifted.saliency_unit``)
    on inputs of the dense model. Every block is tested with random permutations first.

    Args:
        model: a hub id, a local directory, a GGUF file, all of which is read into memory; or a model in memory, which
            is changed in place.
        recipe: its patterns, calibration and objective count.
        output_dir: where the checkpoint is written; may be None for a model in memory.
        tokenizer: for a model in memory; a path brings its own.
        calibration: instead of the recipe's dataset: documents, or token ids of shape (samples, length).
        device: auto, cpu, cuda or cuda:N.
        trust_remote_code: run code that comes with the checkpoint.
        progress: print a line per block.

    Raises:
        OptimaError: for bad input, or if no channels of the model can be moved. Nothing is left half-written. A model
            in memory may compute something else then: load it anew.
    """
    with open_run(
        model,
        partial(_resolve, recipe=Recipe() if recipe is None else recipe),
        output_dir=output_dir,
        tokenizer=tokenizer,
        calibration=calibration,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
        whole="its channels are permuted",
    ) as opened:
        search = _Search(opened.plan, opened.network, opened.state)
        with evaluating(opened.network):
            search.run(opened.batches)
        found = search.found
        if not found.permuted and not found.rotated:
            raise ModelError(f"no channels can be permuted or rotated: {'; '.join(found.notes)}")
        if opened.state.writer is not None:
            opened.state.writer.publish()
    found.notes.extend(opened.state.notes)
    return found


def _resolve(model: PreTrainedModel, recipe: Recipe, **options: Any) -> PrunePlan:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("channels are permuted by one process: start it without torchrun")
    plan = resolve_recipe(model, recipe, **options)
    if not any(isinstance(pattern, NM) for pattern in plan.patterns.values()):
        raise RecipeError("permuted channels matter to patterns n:m alone: add --pattern 2:4, for example")
    return replace(plan, options=plan.options.replace(tuning_epochs=0))


@dataclass
class _Search:
    """Permutes and rotates the channels of a model in memory, block by block."""

    plan: PrunePlan
    network: PreTrainedModel
    state: RunState
    found: Permutation = field(default_factory=Permutation)

    def run(self, batches: Sequence[Tensor]) -> None:
        self.generator = torch.Generator().manual_seed(self.plan.options.seed)
        self.patterns = {name: each for name, each in self.plan.patterns.items() if isinstance(each, NM)}
        stacks = [stack for stack in chosen_stacks(self.network, self.plan.options) if stack.needed]
        for block in (block for stack in stacks for block in stack.blocks):
            _check_dense(block)
        for stack in stacks:
            self._move_stack(stack, batches)

    def _move_stack(self, stack: Stack, batches: Sequence[Tensor]) -> None:
        plan, state = self.plan, self.state
        with state.weights.outside(outside_device(self.network, plan.device)):
            acts = capture(self.network, stack, batches, whole=True, store=state.store, batch_size=state.batch_size)
        fisher = None
        if plan.options.objective == "loss":
            fisher, _ = find_fisher_weights(self.network, stack, acts, state, coupled=False)
        state.progress.stage("permute", len(stack.blocks))
        for block in stack.blocks:
            with state.weights.on(block, plan.device, state.clock):
                self.linears = {linear.name: linear for linear in linears_of(block.module, block.name)}
                found = self._movable(block, acts)
                saliencies = self._saliencies(block, found, acts, fisher)
                for each in found:
                    if not (own := saliencies[each.name]):
                        self.found.notes.append(f"{each.name}: no calibration token reached it: its channels stay")
                    elif each.kind == "heads":
                        self._rotate(each, own)
                    else:
                        self._permute(each, *own[0])
            state.progress.block(block.name)

    def _movable(self, block: Block, acts: Activations) -> list[Channels]:
        """Channels that matter to an N:M pattern, and that may move while the block computes the same."""
        found: list[Channels] = []
        num_heads = getattr(self.network.config.get_text_config(), "num_attention_heads", None)
        for channels in find_channels(block, num_heads if isinstance(num_heads, int) else None):
            first = channels[0]
            deciding = first.linears if first.kind == "heads" else {first.reader}
            if not deciding & self.patterns.keys():
                continue
            shared = {f"{name}.weight".removeprefix(f"{block.name}.") for name in first.linears} & block.common
            pattern, width = self.patterns.get(first.reader), first.read_HCW.shape[-1]
            if shared or (first.kind == "heads" and acts.probe.shared_states):
                reason = "other blocks use them too"
            elif pattern is not None and width % pattern.m:
                reason = f"{width} of them make no groups of {pattern}"
            elif difference(block, channels, acts) > TOLERANCE:
                reason = "the block would not compute the same"
            else:
                found += channels
                continue
            self.found.notes.append(f"{first.name}: its {first.kind} channels stay as they are: {reason}")
        return found

    def _saliencies(
        self, block: Block, found: Sequence[Channels], acts: Activations, fisher: FisherWeights | None
    ) -> dict[str, list[tuple[Any, NM]]]:
        """By the name of channels: of an MLP, the saliencies of the reader, (O, D); of heads, functions of a rotation.

        ``acts`` become the block's outputs.
        """
        by_linear = {name: each for each in found for name in each.linears & self.patterns.keys()}
        saliencies: defaultdict[str, list[tuple[Any, NM]]] = defaultdict(list)
        options = self.plan.options
        sink_weight = 0.0 if fisher is not None or options.objective == "plain" else SINK_WEIGHT
        for group in observe(block, acts, sink_weight, options.damping, weights=fisher, onward=True):
            if (hessian := group.hessian) is None:
                continue
            for linear in (linear for linear in group.linears if linear.name in by_linear):
                name, channels = linear.name, by_linear[linear.name]
                weight_OD = linear.read().to(self.plan.device, torch.float32)
                row_O, reads = None if fisher is None else fisher.rows.get(name), name == channels.reader
                saliency: Any
                if channels.kind == "heads":
                    saliency = (reader_saliency if reads else writer_saliency)(channels, weight_OD, hessian, row_O)
                elif reads:
                    saliency = scaled_weight(weight_OD, hessian, saliency_unit(hessian)).square()
                    saliency *= 1.0 if row_O is None else row_O[:, None].to(saliency)
                else:
                    continue
                saliencies[channels.name].append((saliency, self.patterns[name]))
        return saliencies

    def _permute(self, channels: Channels, saliency_OD: Tensor, pattern: NM) -> None:
        order_D = best_order(saliency_OD, pattern, self.generator)
        before, after = lost(saliency_OD, pattern), lost(saliency_OD[:, order_D.to(saliency_OD.device)], pattern)
        move(channels, self.linears, order_D[None])
        self.found.permuted[channels.name] = after / before if before else 1.0

    def _rotate(self, channels: Channels, parts: Sequence[tuple[Saliency, NM]]) -> None:
        heads, _, width = channels.read_HCW.shape
        begin_HWW = torch.randn(heads, width, width, generator=self.generator)
        rotation_HWW, self.found.rotated[channels.name] = best_rotation(parts, begin_HWW.to(self.plan.device))
        move(channels, self.linears, rotation_HWW)


def _check_dense(block: Block) -> None:
    """Raise ``ModelError`` if a linear was pruned: a rotation would fill its zeros."""
    for linear in block.linears:
        weight_OD = linear.read()
        zeros = 1.0 - int(weight_OD.count_nonzero()) / max(weight_OD.numel(), 1)
        if MOST_ZEROS < zeros < 1.0:
            raise ModelError(f"{zeros:.0%} of {linear.name} are zeros, and would be lost: permute the dense model")
