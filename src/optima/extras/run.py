"""The channels of a model in memory are ordered, and the values of its heads turned, block by block.

Shapes: O outputs, D inputs, R rows, H heads, W channels of a head, E hidden size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.activations import Activations, capture
from optima.calibration.batch_size import BatchSize
from optima.calibration.lm_head import outside_device
from optima.calibration.store import Store
from optima.calibration.weights import FisherWeights
from optima.core.hessian import Hessian
from optima.core.products import all_finite
from optima.core.shifted import saliency_unit, scaled_weight
from optima.device import full_precision
from optima.errors import ModelError, NumericalError
from optima.extras.channels import Channels, Kind, inner_channels, reorder
from optima.extras.permute import best_order, lost
from optima.extras.record import Ordered
from optima.extras.rotate import Part, best_turn, part_of
from optima.extras.trial import TOLERANCE, difference
from optima.models.blocks import Block, Stack
from optima.models.fingerprint import hash_tensors
from optima.models.inputs import Batch, forward
from optima.models.inspect import head_of
from optima.models.offload import Weights
from optima.names import kind
from optima.patterns import NM, Pattern
from optima.plan import Plan, chosen_stacks
from optima.prune import collect_hessians, find_fisher_weights
from optima.reporting.callbacks import Callbacks
from optima.state import RunState

MOST_ZEROS = 0.1  # of a linear that nobody pruned
CHANNELS_STAY = "{}: its {} channels stay where they are: {}"
UNREACHED = "{}: no calibration token reached it: its channels stay"
# Rows of one linear that order the channels inside a block.
INNER_ROWS = 2**12
# Most that the model's outputs may change, relative to them, in units of rounding to its dtype; and what many blocks
# make of the roundings of float32.
ROUNDINGS, DEEP = 8, 1e-3
CHECKED_TOKENS = 128
# A logit below it is of a token that the model rules out: some models give these the least number there is.
RULED_OUT = -3e4


@dataclass
class Run:
    """Orders the channels of a model in memory."""

    plan: Plan
    network: PreTrainedModel
    weights: Weights
    shown: Callbacks
    kinds: frozenset[Kind]
    store: Store
    done: list[Ordered] = field(default_factory=list)
    read: list[Channels] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.plan.recipe.seed)
        self.patterns: dict[str, Pattern] = self.plan.patterns
        self.parameters: dict[str, Tensor] = dict(self.network.named_parameters())

    def order(self, batches: Sequence[Batch]) -> None:
        """All stacks; the model computes the same afterwards, which is checked."""
        stacks = chosen_stacks(self.network, self.plan.recipe)
        for block in (block for stack in stacks for block in stack.blocks):
            _check_dense(block)
        self.place = outside_device(self.network, self.plan.device, batches)
        self.sample, self.outputs = batches[0], self._outputs(batches[0])
        if not all_finite(self.outputs):
            raise NumericalError(
                f"{type(self.network).__name__} computes NaN or Inf of the calibration text as it is, with channels in "
                "any order: repair the checkpoint"
            )
        for stack in (stack for stack in stacks if stack.needed):
            self._stack(stack, batches)
        covered = {name for each in self.read for name in each.readers}
        left = Counter(kind(name) for name in sorted(self._by_pattern() - covered))
        if left:
            names = ", ".join(f"{name} ({count})" for name, count in left.items())
            self.notes.append(f"the inputs of these linears are where they were: {names}")
        self.notes = list(dict.fromkeys(self.notes))  # experts have one name

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Tensor:
        """Of the beginning of one sequence: logits, whose mean no softmax sees, or what the model returns first."""
        given = batch[:1, :CHECKED_TOKENS] if isinstance(batch, Tensor) else batch
        with self.weights.outside(self.place), full_precision():
            found: Tensor = forward(self.network, given)[0].float()
        if head_of(self.network) is None:
            return found
        ruled_out = found <= RULED_OUT
        mean = found.masked_fill(ruled_out, 0.0).sum(-1, keepdim=True) / (~ruled_out).sum(-1, keepdim=True)
        return (found - mean).masked_fill(ruled_out, 0.0)

    def _changed(self) -> float:
        """How far the model is from computing the same, relative to the most that rounding explains."""
        change = (self._outputs(self.sample) - self.outputs).norm() / self.outputs.norm()
        return float(change) / max(ROUNDINGS * torch.finfo(self.network.dtype).eps, DEEP)

    def _stack(self, stack: Stack, batches: Sequence[Batch]) -> None:
        recipe, device = self.plan.recipe, self.plan.device
        with self.weights.outside(self.place):
            acts = capture(self.network, stack, batches, whole=True, store=self.store, batch_size=BatchSize(device))
        methods = replace(self.plan.methods, needs=frozenset())  # saliencies ask for none of what a selector needs
        run = RunState(recipe, methods, device, weights=self.weights, progress=self.shown)
        fisher = find_fisher_weights(self.network, stack, acts, run)[0] if recipe.objective == "loss" else None
        self.shown.stage("permute", len(stack.blocks))
        for block in stack.blocks:
            with self.weights.on(block, device, run.clock):
                inner = self._inner(block, acts)
                saliencies, parts = self._observed(block, acts, fisher, run, inner)
                for each in inner:
                    if each.kind == "heads":
                        self._turn(each, parts[each.name])
                    else:
                        self._reorder(each, [saliencies[name] for name in each.readers if name in saliencies])
            self.shown.block(block.name)
        if not self._changed() <= 1.0:
            raise ModelError(
                f"with its channels in another order {type(self.network).__name__} computes something else: leave "
                "some as they are, for example by --channels mlp"
            )
        self.notes += run.notes

    def _by_pattern(self) -> set[str]:
        """Names of the linears with a pattern n:m."""
        return {name for name, pattern in self.patterns.items() if isinstance(pattern, NM)}

    def _deciding(self, channels: Channels) -> set[str]:
        """Names of the linears by whose patterns it is decided where the channels go."""
        own = {channels.writer, *channels.readers} if channels.kind == "heads" else set(channels.readers)
        return own & self._by_pattern()

    def _inner(self, block: Block, acts: Activations) -> list[Channels]:
        """Channels inside the block that are to be ordered or turned, and may be."""
        taken: set[str] = set()
        candidates = []
        for ways in inner_channels(block, self.network.config.get_text_config()):
            first = ways[0]
            if first.kind in self.kinds and self._deciding(first) and not taken & set(first.readers):
                taken |= set(first.readers)
                if reason := self._why_not(first, block, acts):
                    self.notes.append(CHANNELS_STAY.format(first.name, first.kind, reason))
                else:
                    candidates.append(ways)
        together: defaultdict[tuple[Kind, str], list[list[Channels]]] = defaultdict(list)
        for ways in candidates:
            together[ways[0].kind, kind(ways[0].name)].append(ways)  # experts are many
        found: list[Channels] = []
        for own in together.values():
            tried = [list(each) for each in zip(*own, strict=False)]
            differences = [difference(block, each, acts) for each in tried]
            if (least := min(differences)) <= TOLERANCE:
                found += tried[differences.index(least)]
                continue
            reason = "the block does not compute the same with them elsewhere"
            self.notes += [CHANNELS_STAY.format(first.name, first.kind, reason) for first, *_ in own]
        return found

    def _why_not(self, channels: Channels, block: Block, acts: Activations) -> str:
        """Why channels inside a block must stay as they are; empty if they may be tried elsewhere."""
        pattern = self._pattern(channels)
        if any(place.name.removeprefix(f"{block.name}.") in block.common for place in channels.places):
            return "other blocks share weights of theirs"
        if channels.kind == "heads" and acts.probe.shared_states:
            return "other blocks may read these values"
        if pattern is not None and channels.width % pattern.m:
            return f"{channels.width} of them make no groups of {pattern}"
        return ""

    def _pattern(self, channels: Channels) -> NM | None:
        """Of the readers: that of the largest groups; None if none is n:m."""
        own = [pattern for name in channels.readers if isinstance(pattern := self.patterns.get(name), NM)]
        return max(own, key=lambda pattern: (pattern.m, pattern.n), default=None)

    def _observed(
        self, block: Block, acts: Activations, fisher: FisherWeights | None, run: RunState, inner: Iterable[Channels]
    ) -> tuple[dict[str, Tensor], dict[str, list[Part]]]:
        """What decides about the channels; ``acts`` are behind the block then.

        Returns:
            the saliencies, (R, D), of linears whose inputs change places, by name; and what linears are to values that
            are turned, by the name of the attention.
        """
        turned = {name: each for each in inner if each.kind == "heads" for name in self._deciding(each)}
        wanted = {name for each in inner if each.kind != "heads" for name in each.readers}
        saliencies: dict[str, Tensor] = {}
        parts: defaultdict[str, list[Part]] = defaultdict(list)
        for each in collect_hessians(block, acts, fisher, run, run.clock, onward=True):
            if (statistics := each.statistics) is None:
                continue
            for linear in each.linears:
                if linear.name not in wanted and linear.name not in turned:
                    continue
                weight_OD, hessian = linear.read().to(self.plan.device, torch.float32), statistics.hessian
                row_O = None if fisher is None else fisher.rows.get(linear.name)
                if linear.name in wanted:
                    saliencies[linear.name] = _saliency(weight_OD, hessian, row_O)
                if (channels := turned.get(linear.name)) is not None:
                    pattern = self.patterns[linear.name]
                    assert isinstance(pattern, NM)
                    parts[channels.name].append(part_of(channels, linear.name, weight_OD, hessian, row_O, pattern))
        return saliencies, parts

    def _some(self, saliency_OD: Tensor, count: int) -> Tensor:
        """At most ``count`` rows, which stand for all."""
        outputs = len(saliency_OD)
        if outputs <= count:
            return saliency_OD
        chosen_R = torch.randperm(outputs, generator=self.generator)[: max(count, 1)].sort().values
        return saliency_OD[chosen_R.to(saliency_OD.device)] * (outputs / len(chosen_R))

    def _reorder(self, channels: Channels, saliencies: list[Tensor]) -> None:
        """Permute the channels such that their readers lose least."""
        if not saliencies:
            self.notes.append(UNREACHED.format(channels.name))
            return
        pattern = self._pattern(channels)
        assert pattern is not None
        whole_RD = torch.cat(saliencies).to(self.plan.device)
        order_D = best_order(self._some(whole_RD, INNER_ROWS), pattern, self.generator)
        reorder(channels, order_D[None], self.parameters)
        before, after = lost(whole_RD, pattern), lost(whole_RD[:, order_D.to(whole_RD.device)], pattern)
        share = after / before if before else 1.0
        self.done.append(Ordered(channels.kind, channels.name, share, order_D.tolist()))
        self.read.append(channels)

    def _turn(self, channels: Channels, parts: Sequence[Part]) -> None:
        """Turn the values of heads as it costs what writes and what reads them least."""
        if not parts:
            self.notes.append(UNREACHED.format(channels.name))
            return
        begin_HWW = torch.randn(channels.heads, channels.width, channels.width, generator=self.generator)
        turn_HWW, share = best_turn(parts, begin_HWW.to(self.plan.device))
        reorder(channels, turn_HWW, self.parameters)
        digest = hash_tensors([("turn", turn_HWW)])
        self.done.append(Ordered(channels.kind, channels.name, share, turn=digest))
        self.read.append(channels)


def _check_dense(block: Block) -> None:
    """Raise ``ModelError`` if a linear was pruned: a turn would fill its zeros, and no order would keep groups."""
    for linear in block.linears:
        weight_OD = linear.read()
        zeros = 1.0 - int(weight_OD.count_nonzero()) / max(weight_OD.numel(), 1)
        if MOST_ZEROS < zeros < 1.0:
            raise ModelError(
                f"{zeros:.0%} of {linear.name} are zeros: this model was pruned, and its zeros would be lost. Order "
                "the dense model, then prune"
            )


def _saliency(weight_OD: Tensor, hessian: Hessian, row_O: Tensor | None) -> Tensor:
    """Of each weight, squared and in units of the loss where ``row_O`` tells them, (O, D)."""
    saliency_OD = scaled_weight(weight_OD, hessian, saliency_unit(hessian)).square()
    return saliency_OD if row_O is None else saliency_OD.mul_(row_O[:, None].to(saliency_OD))
