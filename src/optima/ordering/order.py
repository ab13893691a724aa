"""One run from a checkpoint to the same model with its channels in another order: an ordinary checkpoint too.

Shapes: O outputs, D inputs, R rows, H heads, W channels of a head, E hidden size.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.calibration.capture import capture
from optima.calibration.halving import Halving
from optima.calibration.inputs import Batch
from optima.calibration.places import embedding_device
from optima.calibration.probe import forward
from optima.calibration.store import Store
from optima.calibration.streams import Streams
from optima.device import evaluating, full_precision, memory_explained, unswitched
from optima.distributed import joined
from optima.errors import ModelError, RecipeError
from optima.linalg.scaling import saliency_unit, scaled_weight
from optima.linalg.statistics import Statistics
from optima.models.companions import to_save
from optima.models.ordered import ORDERING_NAME, mark_ordered
from optima.models.source import load_tokenizer
from optima.models.stacks import Block, Linear, Stack
from optima.models.weights import Weights
from optima.models.writer import open_writer, prepare
from optima.names import kind
from optima.ordering.channels import KINDS, Channels, Kind, inner_channels, reorder
from optima.ordering.hidden import hidden_channels, why_not_hidden
from optima.ordering.search import best_order, lost
from optima.ordering.trial import computes_the_same
from optima.patterns import NM, Pattern
from optima.pipeline import Job
from optima.preflight.checks import check_finite, chosen_stacks, known_orders
from optima.preflight.opening import Checked, check, claim, read, store_of, written
from optima.recipe import Recipe
from optima.reporting.callbacks import Listeners
from optima.reporting.progress import Progress, make_progress
from optima.stopping import interruptible
from optima.weighing import sweep

HIDDEN_STAY = "hidden channels stay where they are"
# Of the rows of all linears that order the hidden channels: evenly chosen rows, if they are larger.
HIDDEN_BYTES = 2**29
# Rows of one linear that order the channels inside a block.
INNER_ROWS = 2**12
# Most that the model's outputs may change, relative to them, in units of rounding to its dtype; and what many blocks
# make of the roundings of float32.
ROUNDINGS, DEEP = 16, 1e-3
CHECKED_TOKENS = 128
REMEDY = "lower --batch-size, then --max-seq-length; --objective sink needs no gradients"


@dataclass(frozen=True)
class Ordered:
    """What became of channels.

    Attributes:
        kind, name: see ``Channels``.
        lost: what the pattern would prune of their readers' saliency, relative to before; of hidden channels on the
            rows that decided.
        order: for each head and place the number that its channel had there.
    """

    kind: Kind
    name: str
    lost: float
    order: list[list[int]]


@dataclass(frozen=True)
class Ordering:
    """What ``order`` did, as in ``ordering.json``.

    Attributes:
        model: as it was named.
        recipe: as resolved.
        channels: those that have another order now.
        notes: which stay where they were, and why.
        seconds: of the whole run.
    """

    model: str
    recipe: dict[str, Any]
    channels: tuple[Ordered, ...]
    notes: tuple[str, ...]
    seconds: float

    def summary(self) -> list[tuple[Kind, int, float]]:
        """Each kind, how many of it are ordered, and the mean of ``lost``."""
        own = {kind: [each.lost for each in self.channels if each.kind == kind] for kind in KINDS}
        return [(kind, len(lost), sum(lost) / len(lost)) for kind, lost in own.items() if lost]


def order(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Tensor | Iterable[str] | None = None,
    channels: Collection[Kind] = KINDS,
    overwrite: bool = False,
    progress: bool = True,
) -> Ordering:
    """Write a model with its channels where patterns n:m lose less: the same function, to be pruned afterwards.

    Weights of the linears with a pattern n:m count by what the loss feels of their removal, as far as a diagonal tells
    (``optima.linalg.scaling.saliency_unit``), on inputs of the dense model. Every block is tried in a random order
    first, and the model as a whole in the end.

    Args:
        model: a hub id, a local directory, a GGUF file, all of which is read into memory; or a model in memory, which
            is changed in place.
        recipe: its patterns, calibration and objective count.
        output_dir: where the checkpoint and ``ordering.json`` are written; may be None for a model in memory.
        tokenizer: for a model in memory; a path brings its own.
        calibration: instead of the recipe's dataset: documents, or token ids of shape (samples, length).
        channels: the kinds to order: those inside an MLP, inside value heads, and the hidden ones.
        overwrite: replace an earlier output.
        progress: tell of each block.

    Raises:
        OptimaError: for anything that cannot be done. Nothing is left half-written; of a model in memory some channels
            may have another order.
    """
    started = time.perf_counter()
    _check_channels(channels)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined())
        if ranks.size > 1:
            raise RecipeError("channels are ordered by one process: start it without torchrun")
        stack.enter_context(unswitched())
        checked = check(model, recipe, output_dir, calibration, None, ranks)
        if known_orders(checked.source, checked.structure) is not None:
            name = "the model in memory" if checked.source is None else checked.source.name
            raise ModelError(f"the channels of {name} are in order already: order the model as it came")
        if not any(isinstance(pattern, NM) for pattern in checked.found.patterns.values()):
            raise RecipeError("the order of channels matters to patterns n:m alone: add --pattern 2:4, for example")
        stack.enter_context(memory_explained(checked.device, REMEDY))
        destination = None
        if output_dir is not None:
            stack.enter_context(interruptible())
            destination = stack.enter_context(claim(checked, output_dir, overwrite, {}, None))
        reader = load_tokenizer(checked.source) if checked.source is not None and tokenizer is None else tokenizer
        shown = stack.enter_context(Listeners([make_progress() if progress else Progress()]))
        network, weights, origin, text = read(checked, reader, ranks, "its channels change places")
        if destination is not None:
            saved = to_save(checked.source, tokenizer, reader)
            prepare(network, saved, checked.source, destination.directory)
        text = written(checked, network, reader, text, ranks, shown)
        recipe = checked.recipe
        assert recipe.batch_size is not None
        run = _Run(
            checked, network, weights, shown, frozenset(channels), store_of(checked, weights, destination, ranks)
        )
        with evaluating(network):
            try:
                run.order(text.batches(recipe.batch_size))
            finally:
                if run.done:
                    mark_ordered(network, [asdict(each) for each in run.done])
        seconds = time.perf_counter() - started
        notes = (*weights.notes, *text.notes, *run.notes)
        found = Ordering(origin["model"], recipe.to_dict(), tuple(run.done), notes, seconds)
        if destination is not None:
            content = json.dumps({"schema_version": 1, **asdict(found)})
            writer = open_writer(network, checked.found.blocks, destination, {}, weights)
            writer.publish(lambda directory: (directory / ORDERING_NAME).write_text(content, encoding="utf-8"))
    return found


def _check_channels(channels: Collection[Kind]) -> None:
    known = ", ".join(KINDS)
    if isinstance(channels, str):
        raise RecipeError(f"channels must be a list of kinds, got {channels!r}: for example {KINDS[:1]}")
    if not channels:
        raise RecipeError(f"channels is empty, and nothing would be ordered: choose among {known}")
    if unknown := sorted(set(channels) - set(KINDS)):
        raise RecipeError(f"there are no channels {unknown[0]!r}: choose among {known}")


@dataclass
class _Run:
    """Orders the channels of a model in memory."""

    checked: Checked
    network: PreTrainedModel
    weights: Weights
    shown: Listeners
    kinds: frozenset[Kind]
    store: Store
    done: list[Ordered] = field(default_factory=list)
    read: list[Channels] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.checked.recipe.seed)
        self.patterns: dict[str, Pattern] = self.checked.found.patterns
        self.parameters: dict[str, Tensor] = dict(self.network.named_parameters())

    def order(self, batches: Sequence[Batch]) -> None:
        """All stacks; the model computes the same afterwards, which is checked."""
        stacks = chosen_stacks(self.network, self.checked.recipe)
        for block in (block for stack in stacks for block in stack.blocks):
            check_finite(block.linears)
        self.place = embedding_device(self.network, self.checked.device, batches)
        self.sample, self.outputs = batches[0], self._outputs(batches[0])
        hidden = why_not_hidden(self.network, stacks)
        for stack in (stack for stack in stacks if stack.needed):
            self._stack(stack, batches, hidden)
        covered = {name for each in self.read for name in each.readers}
        left = Counter(kind(name) for name in sorted(self._by_pattern() - covered))
        if left:
            names = ", ".join(f"{name} ({count})" for name, count in left.items())
            self.notes.append(f"the inputs of these linears are where they were: {names}")
        self.notes = list(dict.fromkeys(self.notes))  # experts have one name

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Tensor:
        """Of the beginning of one sequence: logits, or what the model returns first."""
        given = batch[:1, :CHECKED_TOKENS] if isinstance(batch, Tensor) else batch
        with self.weights.outside(self.place), full_precision():
            found: Tensor = forward(self.network, given)[0]
        return found.float()

    def _changed(self) -> float:
        """How far the model is from computing the same, relative to the most that rounding explains."""
        change = (self._outputs(self.sample) - self.outputs).norm() / self.outputs.norm()
        return float(change) / max(ROUNDINGS * torch.finfo(self.network.dtype).eps, DEEP)

    def _stack(self, stack: Stack, batches: Sequence[Batch], hidden: str) -> None:
        recipe, device = self.checked.recipe, self.checked.device
        with self.weights.outside(self.place):
            streams = capture(self.network, stack, batches, whole=True, store=self.store, halving=Halving(device))
        methods = replace(self.checked.methods, needs=frozenset())  # saliencies ask for none of what a selector needs
        sink = recipe.sink_weight or 0.0
        job = Job(methods, self.patterns, device, recipe.damping, sink, progress=self.shown, weights=self.weights)
        if recipe.objective == "loss" and (told := sweep(job, self.network, stack, streams, recipe)):
            self.notes.append(told)
        every = self._hidden(stack, streams, hidden)
        read_by = set(every.readers) & self._by_pattern() if every is not None else set()
        rows: list[Tensor] = []
        most = HIDDEN_BYTES // (4 * streams.hidden[0].shape[-1])
        self.shown.start(len(stack.blocks), 1, stage="order")
        for block in stack.blocks:
            with self.weights.on(block, device, job.clock):
                inner = self._inner(block, streams)
                saliencies = self._observed(block, streams, job, inner, read_by)
                felt = read_by if job.loss is None else {name for name in read_by if job.loss.of_rows(name) is not None}
                for name in [name for name in saliencies if name in felt]:
                    rows.append(self._some(saliencies[name], most // len(read_by)).cpu())
                for each in inner:
                    self._reorder(each, [saliencies[name] for name in each.readers if name in saliencies], block)
            self.shown.block(block.name)
        if not self._changed() <= 1.0:
            raise ModelError(
                f"with its channels in another order {type(self.network).__name__} computes something else: leave "
                "some as they are, for example by --channels mlp"
            )
        if every is not None and rows:
            order_1E = self._reorder(every, rows)
            if order_1E is not None and not self._changed() <= 1.0:
                reorder(every, order_1E.argsort(dim=1), self.parameters)
                del self.done[-1], self.read[-1]
                self.notes.append(f"{HIDDEN_STAY}: outside its blocks the model does not compute the same then")
        self.notes += job.notes

    def _by_pattern(self) -> set[str]:
        """Names of the linears with a pattern n:m."""
        return {name for name, pattern in self.patterns.items() if isinstance(pattern, NM)}

    def _hidden(self, stack: Stack, streams: Streams, reason: str) -> Channels | None:
        """The hidden channels, if they are to be ordered and every block computes the same with them elsewhere."""
        if "hidden" not in self.kinds:
            return None
        size = streams.hidden[0].shape[-1]
        found = reason or hidden_channels(self.network, stack, size)
        if isinstance(found, Channels):
            if not set(found.readers) & self._by_pattern():
                return None
            trial = streams.part([0])
            for block in stack.blocks:
                with self.weights.on(block, self.checked.device):
                    if not computes_the_same(block, [found], trial):
                        found = f"{block.name} does not compute the same with them elsewhere"
                        break
                    trial.advance(block)
        if isinstance(found, str):
            self.notes.append(f"{HIDDEN_STAY}: {found}")
            return None
        return found

    def _inner(self, block: Block, streams: Streams) -> list[Channels]:
        """Channels inside the block that are to be ordered, and may be."""
        readers = {linear.name for linear in block.linears} & self._by_pattern()
        candidates = []
        for ways in inner_channels(block, self.network.config.get_text_config()):
            first = ways[0]
            if first.kind in self.kinds and set(first.readers) & readers:
                readers -= set(first.readers)
                if first.kind == "heads" and streams.states(block, 0):
                    self.notes.append(f"{first.name}: other blocks may read its values, whose channels stay")
                elif first.width % self._pattern(first).m:
                    pattern = self._pattern(first)
                    self.notes.append(f"{first.name}: {first.width} channels make no groups of {pattern}, and stay")
                else:
                    candidates.append(ways)
        together: defaultdict[tuple[Kind, str], list[list[Channels]]] = defaultdict(list)
        for ways in candidates:
            together[ways[0].kind, kind(ways[0].name)].append(ways)  # experts are many
        found: list[Channels] = []
        for own in together.values():
            tried = (list(each) for each in zip(*own, strict=False))
            same = (each for each in tried if computes_the_same(block, each, streams))
            if (alike := next(same, None)) is not None:
                found += alike
                continue
            self.notes += [
                f"{first.name}: its {first.kind} channels stay where they are: the block does not compute the same "
                "with them elsewhere"
                for first, *_ in own
            ]
        return found

    def _pattern(self, channels: Channels) -> NM:
        """Of the readers: that of the largest groups."""
        own = [pattern for name in channels.readers if isinstance(pattern := self.patterns.get(name), NM)]
        return max(own, key=lambda pattern: (pattern.m, pattern.n))

    def _observed(
        self, block: Block, streams: Streams, job: Job, inner: Iterable[Channels], read_by: Collection[str]
    ) -> dict[str, Tensor]:
        """The saliencies of the linears that count, (R, D), by name; ``streams`` are behind the block then."""
        wanted = {*read_by, *(name for each in inner for name in each.readers)}
        found: dict[str, Tensor] = {}
        for each in job.observe(block, streams, job.clock, onward=True):
            if (statistics := each.statistics) is not None:
                own = [linear for linear in each.linears if linear.name in wanted]
                found |= {linear.name: self._saliency(linear, statistics, job) for linear in own}
        return found

    def _saliency(self, linear: Linear, statistics: Statistics, job: Job) -> Tensor:
        """Of each weight, squared and in units of the loss where it is known, (O, D)."""
        weight_OD = linear.read().to(self.checked.device, torch.float32)
        unit_D = saliency_unit(statistics.hessian)
        saliency_OD = scaled_weight(weight_OD, statistics.hessian, unit_D).square()
        if job.loss is not None and (row_O := job.loss.of_rows(linear.name)) is not None:
            saliency_OD *= row_O[:, None].to(saliency_OD)
        return saliency_OD

    def _some(self, saliency_OD: Tensor, count: int) -> Tensor:
        """At most ``count`` rows, which stand for all."""
        outputs = len(saliency_OD)
        if outputs <= count:
            return saliency_OD
        chosen_R = torch.randperm(outputs, generator=self.generator)[: max(count, 1)].sort().values
        return saliency_OD[chosen_R.to(saliency_OD.device)] * (outputs / len(chosen_R))

    def _reorder(self, channels: Channels, saliencies: list[Tensor], block: Block | None = None) -> Tensor | None:
        """Give channels the order in which their readers lose least, which is returned; None if nothing is known."""
        if not saliencies:
            self.notes.append(f"{channels.name}: no calibration token reached it: its channels stay")
            return None
        pattern = self._pattern(channels)
        whole_RD = torch.cat(saliencies).to(self.checked.device)
        orders, order_D = [], torch.arange(whole_RD.shape[1])
        for starts in channels.read:
            head_RW = torch.cat([whole_RD[:, start : start + channels.width] for start in starts])
            order_W = best_order(head_RW if block is None else self._some(head_RW, INNER_ROWS), pattern, self.generator)
            for start in starts:
                order_D[start : start + channels.width] = start + order_W
            orders.append(order_W)
        order_HW = torch.stack(orders)
        reorder(channels, order_HW, self.parameters)
        before, after = lost(whole_RD, pattern), lost(whole_RD[:, order_D.to(whole_RD.device)], pattern)
        share = after / before if before else 1.0
        self.done.append(Ordered(channels.kind, channels.name, share, order_HW.tolist()))
        self.read.append(channels)
        return order_HW
