"""A rehearsal of a run: its own stages on one random block of each structure and a little text, scaled up to the run.

The whole model is there, as its own code runs it, and blocks of one structure share one set of random weights. What a
stage takes whatever the text, and what of each batch, is told apart by one batch and a few.

Linears are pruned on hessians that are made up: those of random weights are better conditioned than those of a trained
model, and solved sooner.

Shapes: B sequences in a batch, L tokens in a sequence, O outputs, D inputs, F factors of a made-up hessian.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optima.activations import METRIC_BYTES
from optima.build import build_allocation, build_tuning
from optima.calibration.capture import capture
from optima.calibration.correlation import couples, coupling, coupling_bytes, finished
from optima.calibration.fisher import FisherWeights, fisher_numbers, kept_bytes, second_moment, through
from optima.calibration.halving import Halving
from optima.calibration.lm_head import at_the_head, embedding_device, head_device, looked_at, positions_at_once
from optima.calibration.statistics import why_not_in_turn
from optima.calibration.streams import Streams
from optima.data.batches import words_size
from optima.device import PeakMemory, Stopwatch, differentiable, on_device, one_memory_error
from optima.errors import NotDifferentiableError
from optima.linalg.hessian import Hessian
from optima.linalg.statistics import Statistics
from optima.linear import prune_linear
from optima.memory import attention_numbers, by_words, held_bytes, in_turn, words_bytes
from optima.models.experts import ExpertLinear
from optima.models.random_weights import alike
from optima.models.reading import head_of, is_encoder_decoder
from optima.models.stacks import Block, Linear, Stack
from optima.models.weights import Resident
from optima.options import SINK_WEIGHT
from optima.pipeline import Job
from optima.plan import Plan
from optima.selectors.base import LinearTask
from optima.tune import OUT_OF_MEMORY, BlockError, tune

# Of a made-up hessian: common factors of the inputs, and what each input has to itself. Conjugate gradients take about
# as many iterations as on most linears of trained models.
FACTORS, OWN_SHARE = 64, 0.5
BATCHES = 3  # that a stage is timed on
LONG = 2.0  # seconds that tell enough, without a second look
TUNED = 4  # sequences that tuning is timed on, at least: one is held out, and looked at twice
HEAD_TOKENS = 512  # that the head is timed on, at least
WORDS_PASSES = 3.0 / 2.0  # of the sweep at the head: forward, back, and forward for the words of the dense model

Work = Callable[[Streams, Stopwatch], None]


@dataclass
class Waiting:
    """Bytes of activations that wait during a phase: those of a run, and of the rehearsal.

    ``held``: how many more a run holds where it computes.
    """

    of_run: float
    here: int
    held: float = 0.0


class Peak:
    """Highest memory of a run, from that of its phases in a rehearsal.

    Args:
        device: where blocks run. Another than the CPU holds what it holds in a run.
        weights_bytes: of weights, what the rehearsal holds.
        left_bytes: most activations that a run holds; the rest is in files.

    Attributes:
        num_bytes: so far.
    """

    def __init__(self, device: torch.device, weights_bytes: int, left_bytes: int) -> None:
        self._device, self._weights_bytes, self._left_bytes = device, weights_bytes, left_bytes
        self.num_bytes = 0

    @contextmanager
    def phase(self, weights: int, of_run: float = 0.0, here: int = 0) -> Iterator[Waiting]:
        """Inside, a run holds so many bytes of weights; what is given of activations may also be set inside."""
        memory, waiting = PeakMemory(self._device), Waiting(of_run, here)
        yield waiting
        found = memory.peak() + int(waiting.held)
        if self._device.type == "cpu":
            found += weights - self._weights_bytes + min(int(waiting.of_run), self._left_bytes) - waiting.here
        self.num_bytes = max(self.num_bytes, found)


def extrapolated(one: Mapping[str, float], few: Mapping[str, float], count: int, batches: float) -> dict[str, float]:
    """Seconds of each stage for all ``batches``: what those of one and of ``count`` share, and the rest of each."""
    found = {}
    for stage, seconds in few.items():
        each = seconds / count
        if stage in one and count > 1:
            each = min(max((seconds - one[stage]) / (count - 1), 0.0), each)
        found[stage] = seconds + each * (batches - count)
    return found


class Rehearsal:
    """Runs the stages of a run, and adds up what all of it would take.

    Args:
        plan: of the run, its recipe with the number of sequences in a batch; its model has random weights.
        device: where blocks run.
        tokens_NL: calibration tokens, at least as many as are looked at.
        peak: of its memory.

    Attributes:
        seconds: of each stage of the run.
        notes: what could not be rehearsed.
    """

    def __init__(self, plan: Plan, device: torch.device, tokens_NL: Tensor, peak: Peak) -> None:
        recipe = plan.recipe
        assert recipe.batch_size is not None
        assert recipe.num_calibration_samples is not None
        self.plan, self.recipe, self.device, self.peak = plan, recipe, device, peak
        samples = min(recipe.batch_size, recipe.num_calibration_samples)
        self.batches = recipe.num_calibration_samples / samples
        self.shares = plan.shares
        self._few = tokens_NL[: samples * min(BATCHES, int(self.batches))].split(samples)
        self._known: dict[tuple[object, ...], tuple[float, Tensor]] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.notes: list[str] = []

    @torch.no_grad()
    def stack(self, stack: Stack) -> None:
        """Rehearse a stack."""
        recipe = self.recipe
        self.by_loss, self.tuning = recipe.applied_objective == "loss", build_tuning(recipe)
        self.allocation, self._sink = build_allocation(recipe), recipe.sink_weight or 0.0
        model, outside, whole = self.plan.model, self.plan.held_bytes(), self.by_loss
        one, few = (Stopwatch(self.device) for _ in range(2))
        place = embedding_device(model, self.device, self._few)
        with self.peak.phase(outside) as waiting:
            for clock, batches in ((one, self._few[:1]), (few, self._few)):
                with clock("forward"), Resident(model).outside(place):
                    streams = capture(model, stack, batches, whole, halving=Halving(self.device))
            assert recipe.num_calibration_samples is not None
            # Some models' batches come in single sequences.
            self._all, self._taken = recipe.num_calibration_samples / streams.sizes[0][0], len(streams.hidden)
            waiting.here = _bytes(streams.hidden)
            inputs = waiting.of_run = waiting.here * self._all / self._taken
        self._count(extrapolated(one.seconds, few.seconds, len(self._few), self.batches))
        swept = 0.0
        if self.by_loss:
            # Behind the way there, the inputs of all blocks wait, and the gradients.
            swept = inputs + min((len(stack.blocks) + 1) * inputs * self.shares.swept, kept_bytes())
            swept += coupling_bytes(stack.blocks, self.plan.methods.needs)
            if self.tuning is not None:
                swept += METRIC_BYTES * streams.hidden[0].shape[-1] ** 2 * len(stack.blocks)
            with self.peak.phase(outside, swept, _bytes(streams.hidden)), self._or_by_sink():
                self._head(stack, streams)
        # Without a sweep nothing behind the last block to prune runs, or was recorded.
        known = stack.blocks if whole else stack.blocks[: stack.needed]
        structures = {blocks[0].index: blocks for blocks in alike(known)}
        for block in stack.blocks[: max(structures) + 1]:
            with on_device(block.module, self.device, unplaced=block.unplaced):
                if block.index in structures:
                    self._structure(stack, structures[block.index], streams, (inputs, swept))
                if block.index < max(structures):
                    streams.advance(block)

    def _structure(self, stack: Stack, blocks: Sequence[Block], streams: Streams, waiting: tuple[float, float]) -> None:
        """Rehearse the first of ``blocks``, for all of them; ``waiting``: bytes of inputs, and behind a sweep."""
        block, (inputs, swept) = blocks[0], waiting
        weights, here = self.plan.held_bytes(block), _bytes(streams.hidden)
        words = self._by_words(blocks[-1])
        weights += self.plan.held_bytes() if words and self.plan.streamed else 0
        needed = [block for block in blocks if block.index < stack.needed]
        loss = None
        if self.by_loss:
            with self.peak.phase(weights, swept, here):
                loss = self._sweep(block, streams, len(blocks))
        job = Job(self.plan.methods, self.plan.found.patterns, self.device, self.recipe.damping, self._sink, loss=loss)
        # Of the loss every block's tokens are known, and for tuning a matrix.
        told = 0.0 if loss is None else self._told(loss, len(stack.blocks))
        # As optima.activations counts, but for what blocks are called with besides hidden states.
        routed = any(isinstance(linear, ExpertLinear) for each in blocks for linear in each.linears)
        again = max(self.shares.surveyed, self.shares.tuned * (self.tuning is not None)) + routed
        with self.peak.phase(weights, inputs * (1 + again) + told, here) as phase:
            # Its linears are not pruned inside a rehearsed pass: the memory of one at work comes on top in a run.
            attention = attention_numbers(self.plan.model, self.recipe.max_seq_length)
            logits = words_bytes(self.plan.model, self.recipe) if words else 0
            phase.held = held_bytes(block, self.recipe, self.plan.dtype, attention) + logits
            self._passes(block, job, streams, len(needed), needed[-1:] == [stack.blocks[stack.needed - 1]])
            keeps = self._linears(block, job, streams, len(needed))
            if self.tuning is not None and keeps and needed:
                try:
                    with one_memory_error():
                        self._tune(block, keeps, streams, len(needed))
                except torch.OutOfMemoryError:  # as in a run
                    self.notes += [note for note in [OUT_OF_MEMORY] if note not in self.notes]

    def _head(self, stack: Stack, streams: Streams) -> None:
        """The gradients at the model's head, from some positions of a batch."""
        model, batch, hidden = self.plan.model, streams.batches[0], streams.hidden[0]
        assert isinstance(batch, Tensor)
        if head_of(model) is None:
            return
        samples, length = words_size(model, batch)
        positions = length
        if streams.probe.sample_dim == 0 and not is_encoder_decoder(model):
            # As many as a slice of logits has, and more than one slice of a small vocabulary.
            positions = min(length, -(-max(positions_at_once(model, 1), HEAD_TOKENS) // samples))
            batch, hidden = batch[:, :positions], hidden[:, :positions]
        drawn_BL, clock = torch.rand(samples, positions), Stopwatch(self.device)
        place, _ = head_device(model, stack, self.device, samples * length)
        with self._gradients(), Resident(model).outside(place), clock("sweep"):
            at_the_head(model, stack, replace(streams.part([0]), hidden=[hidden], batches=[batch]), 0, drawn_BL)
        seconds = clock.total * self._all / positions  # of a position of every sequence
        self.seconds["sweep"] += seconds * self.shares.swept * length
        if self._by_words(stack.blocks[-1]):
            seconds *= WORDS_PASSES * (self.recipe.tuning_epochs or 0)
            self.seconds["tune"] += seconds * self.shares.tuned * looked_at(model, length)

    def _by_words(self, block: Block) -> bool:
        """Whether it is tuned by the words of the model."""
        return self.by_loss and by_words(self.plan.model, self.plan.found.blocks, self.recipe) == block.name

    def _sweep(self, block: Block, streams: Streams, count: int) -> FisherWeights | None:
        """The sweep there and back through ``count`` such blocks, and what it finds of the sample."""
        found = FisherWeights("")

        def work(part: Streams, clock: Stopwatch) -> None:
            nonlocal found
            found = FisherWeights("")
            gradients = [torch.randn_like(hidden) for hidden in part.hidden]
            with self._gradients(), clock("sweep"):
                part.copy().advance(block)
                if self.tuning is not None:
                    found.residual[block.name] = second_moment(gradients, self.device)
                coupled = "coupling" in self.plan.methods.needs
                numbers = fisher_numbers(part, 1.0) if coupled else None
                through(block, part, gradients, found, numbers=numbers)
            found.coupling = {name: finished(each.to(self.device)).cpu() for name, each in found.coupling.items()}

        with self._or_by_sink():
            self._add(work, streams, count * self.shares.swept)
        # Where one batch took long enough, no other was looked at.
        return _repeated(found, len(streams.hidden)) if self.by_loss else None

    @contextmanager
    def _or_by_sink(self) -> Iterator[None]:
        """What the loss would weigh, if there are gradients; else the run goes by the sink weight, and so does this."""
        try:
            yield
        except NotDifferentiableError as error:
            self.by_loss, self._sink = False, SINK_WEIGHT
            untuned, self.tuning = "" if self.tuning is None else ", and blocks are not tuned", None
            self.allocation = None if self.recipe.allocation == "loss" else self.allocation
            self.notes.append(
                f"objective sink will take the place of objective loss{untuned}: there are no gradients: {error}"
            )

    def _passes(self, block: Block, job: Job, streams: Streams, count: int, last: bool) -> None:
        """Statistics, and outputs carried on; ``last``: the last of the ``count`` blocks hands on nothing."""

        loss = job.loss
        turns = in_turn(block, self.recipe) and not why_not_in_turn(block, streams)
        carried = turns and self.tuning is None

        def observed(onward: bool, turns: bool, part: Streams, clock: Stopwatch) -> None:
            job.loss = None if loss is None else loss.part(range(len(part.hidden)))
            with clock("hessian"):
                for _ in job.observe(block, part, clock, onward=onward, in_turn=turns):
                    pass

        def advanced(part: Streams, clock: Stopwatch) -> None:
            with clock("forward"):
                part.advance(block)

        if self.allocation is not None:
            self._add(partial(observed, True, False), streams, count * (1.0 if loss is None else self.shares.surveyed))
        self._add(partial(observed, carried, turns), streams, count)
        job.loss = loss
        self._add(
            advanced,
            streams,
            (count - last) * (not carried) + count * self.shares.tuned * (self.tuning is not None),
        )

    def _linears(self, block: Block, job: Job, streams: Streams, count: int) -> dict[str, Tensor]:
        """One of each shape and pattern; the masks of all, by name."""
        keeps = {}
        for found in job.observe(block, streams, Stopwatch(self.device)):
            for linear in found.linears:
                seconds, keeps[linear.name] = self._linear(linear, found.statistics, job)
                self.seconds["linears"] += seconds * count
        return keeps

    def _linear(self, linear: Linear, statistics: Statistics | None, job: Job) -> tuple[float, Tensor]:
        pattern = job.patterns[linear.name]
        key = (linear.shape, type(pattern), round(pattern.sparsity, 1))  # masks from elsewhere differ by a little
        if key not in self._known:
            stored = linear.read()
            weight_OD = stored.to(self.device, torch.float32, copy=True)
            hessian = Hessian(made_up_hessian(linear.shape[1]).to(self.device), self.recipe.damping)
            statistics = Statistics(hessian) if statistics is None else replace(statistics, hessian=hessian)
            rows_O = torch.rand(len(weight_OD), device=self.device) if self.by_loss else None
            # External masks are found by the name.
            coupling_OO = None
            if self.by_loss and "coupling" in job.methods.needs and couples(linear):
                coupling_OO = coupling(made_up_hessian(linear.shape[0]).expand(2, -1, -1).clone()).to(self.device)
            task = LinearTask(linear.name, weight_OD, statistics, torch.rand_like(weight_OD), rows_O, coupling_OO)
            if not self._known and self.device.type != "cpu":  # its libraries load at first use, once in a run
                fresh = replace(statistics, hessian=Hessian(hessian.matrix_DD, self.recipe.damping))
                prune_linear(replace(task, statistics=fresh), pattern, job.methods, stored.dtype)
            clock = Stopwatch(self.device)
            with clock("linears"):
                result = prune_linear(task, pattern, job.methods, stored.dtype)
                if self.allocation is not None:
                    self.allocation.measure(task, pattern)
            self._known[key] = clock.total, result.keep_OD
        return self._known[key]

    def _tune(self, block: Block, keeps: Mapping[str, Tensor], streams: Streams, count: int) -> None:
        assert self.tuning is not None
        epoch, epochs = replace(self.tuning, epochs=1), self.tuning.epochs

        def work(part: Streams, clock: Stopwatch) -> None:
            dense = part.copy()
            dense.advance(block)
            with clock("tune"):
                cost = BlockError.by_channel(dense.hidden)
                tune(block, keeps, part, dense.hidden, cost, epoch)

        # One piece alone would be held out, and no step made.
        self._add(work, streams, count * epochs * self.shares.tuned, -(-TUNED // len(streams.part([0]).pieces(block))))

    def _add(self, work: Work, streams: Streams, count: float, times: int = 1) -> None:
        """Do some of the work that a run does ``count`` times on all batches; here each ``times`` over."""
        if not count:
            return
        timed: list[dict[str, float]] = []
        for batches in (1, 1, len(streams.hidden)):  # the first time libraries compile
            work(streams.part(list(range(batches)) * times), clock := Stopwatch(self.device))
            timed.append({stage: seconds / times for stage, seconds in clock.seconds.items()})
            if clock.total > LONG:
                break
        one = timed[-2] if len(timed) == 3 else {}
        self._count(extrapolated(one, timed[-1], batches, self._all), count)

    def _count(self, seconds: Mapping[str, float], times: float = 1) -> None:
        """Add up seconds of stages."""
        for stage, found in seconds.items():
            self.seconds[stage] += found * times

    def _told(self, loss: FisherWeights, blocks: int) -> float:
        """Bytes that a run keeps of the loss: of each block its tokens, for tuning a matrix, and those of its rows."""
        tokens = sum(_bytes(own) for own in loss.tokens.values())
        tokens += sum(_bytes([each for pair in own for each in pair]) for own in loss.routed.values())
        matrices = [*loss.residual.values(), *loss.coupling.values()]
        return blocks * (tokens * self._all / self._taken + _bytes(matrices))

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.enable_grad(), differentiable(self.plan.model):
            yield


def _repeated(loss: FisherWeights, batches: int) -> FisherWeights:
    """The weights of so many batches, of which some were looked at; all have one size."""

    def over(own: list[Any]) -> list[Any]:
        return (own * batches)[:batches]

    tokens = {name: over(own) for name, own in loss.tokens.items()}
    return replace(loss, tokens=tokens, routed={name: over(own) for name, own in loss.routed.items()})


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def made_up_hessian(inputs: int) -> Tensor:
    """(D, D): a few common factors of all inputs, and what each has to itself."""
    factors_FD = torch.randn(min(FACTORS, inputs), inputs, generator=torch.Generator().manual_seed(0))
    hessian_DD = factors_FD.mT @ factors_FD / len(factors_FD)
    hessian_DD.diagonal().add_(OWN_SHARE)
    return hessian_DD
