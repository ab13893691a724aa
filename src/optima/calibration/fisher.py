"""Fisher weights: how much the model's loss depends on each token and each output, from one gradient pass.

To second order the loss grows by 1/2 sum_o sum_t g_to^2 (x_t . (v_o - w_o))^2, g the gradient at output o of a linear
on token t, with labels sampled from the model itself (the true Fisher: Martens, JMLR 2020, section 5). The rank-one fit
g_to^2 ~ r_o s_t puts token weights s_t into the Hessian, which all rows go on sharing; row weights r_o let rows compete
in units of the loss (docs/objective.md).

Gradients are heavy-tailed, so squares are tempered: used at a root. Where that leaves fewer than ``EFFECTIVE``
effective tokens an input (Kish: (sum s)^2 / sum s^2), weights are shrunk towards their mean, as far as needed. An input
that all sequences start with, such as BOS, keeps its weight and is not counted: it is one input.

The pass goes from the last block to the first over the dense inputs of every block, one block on the device, on a
fraction of the sequences. Row weights are means over tokens, which a part of them gives. Token weights depend on the
position (first tokens above all): tokens without gradients get the mean weight of their position.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.activations import Activations
from optima.calibration.batch_size import rows_of
from optima.calibration.correlation import correlated_rows, couples, products_of_halves
from optima.calibration.lm_head import at_the_head, head_device
from optima.calibration.probe import hidden_of
from optima.data.batches import words_size
from optima.device import backward_explained, differentiable, give_back_freed_memory
from optima.distributed import Ranks
from optima.errors import NotDifferentiableError
from optima.models.blocks import Block, Stack
from optima.models.inspect import head_of
from optima.models.offload import Resident, Weights

LOGITS = "the cross-entropy of labels sampled from the model"
HIDDEN = "the square of the change of the last hidden states"
# Token weights are s^POWER, row weights r^POWER: the square is the second-order loss, too heavy-tailed to be trusted.
POWER = 0.5
# Effective tokens for each input of a linear, at least.
EFFECTIVE = 8
# Row weights estimated from so many tokens are shrunk halfway to their mean.
FEW_TOKENS = 16
# Gradients are taken of, and blocks are tuned on, so many tokens at least, if there are as many.
LEAST_TOKENS, LEAST_TUNED = 8192, 32768
# The last block's outputs at equal tokens differ by less, relative to their norm, unless they depend on the text.
ALIKE = 0.05
# Of a share times a count.
ROUNDING = 1e-9
NOWHERE = torch.zeros(0, dtype=torch.int32), torch.zeros(0)  # no token of a batch was routed to an expert


def fisher_share(share: float, tokens: int) -> float:
    """The share of the sequences that is used: of so many ``tokens``, when ``share`` of them would do."""
    return min(max(share, LEAST_TOKENS / max(tokens, 1)), 1.0)


def tuned_share(share: float, tokens: int) -> float:
    """As ``fisher_share``, of the sequences that blocks are tuned on."""
    return min(max(share, LEAST_TUNED / max(tokens, 1)), 1.0)


def sensitivity_share(share: float, tokens: int, experts: bool) -> float:
    """As ``fisher_share``, of the sensitivity pass: all where there are experts, each of which gets few tokens."""
    return 1.0 if experts else fisher_share(share, tokens)


def fisher_batches(acts: Activations, share: float) -> list[int]:
    """The batches of this rank that gradients are taken of."""
    return _spread(acts, fisher_share(share, acts.tokens))


def tuned_batches(acts: Activations, share: float) -> list[int]:
    """The batches of this rank that blocks are tuned on."""
    return _spread(acts, tuned_share(share, acts.tokens))


def sensitivity_batches(acts: Activations, share: float, experts: bool) -> list[int]:
    """The batches of this rank that the sensitivity pass takes."""
    return _spread(acts, sensitivity_share(share, acts.tokens, experts))


def _batch_size(acts: Activations) -> int:
    return max(acts.ranks.gather(max((samples for samples, _ in acts.sizes), default=1)))


def _taken(batches: int, share: float) -> int:
    """How many of the first so many ``batches`` are a ``share`` of them; the first one always is."""
    return math.ceil(batches * share - ROUNDING)


def _spread(acts: Activations, share: float) -> list[int]:
    """A share of the batches, evenly spread, counted over all ranks; all if positions of tokens are not known."""
    size, first, chosen = _batch_size(acts), acts.before[0], []
    for batch, (samples, _) in enumerate(acts.sizes):
        place = first // size
        if _taken(place + 1, share) > _taken(place, share) or acts.probe.sequence_first:
            chosen.append(batch)
        first += samples
    return chosen


class Moments(NamedTuple):
    """Of the tempered weights of a linear's tokens.

    Attributes:
        tokens: so many.
        total: sum of their weights.
        squares: sum of the squares of their weights.
        inputs: of the linear; 0: any number of effective tokens will do.
    """

    tokens: float
    total: float
    squares: float
    inputs: int = 0

    @classmethod
    def of(cls, squares: Sequence[Tensor], inputs: int = 0) -> Moments:
        """Of the tokens of several batches, untempered squares (T,)."""
        own = [square_T.pow(POWER) for square_T in squares]
        total, squared = sum(float(own_T.sum()) for own_T in own), sum(float(own_T @ own_T) for own_T in own)
        return cls(sum(map(len, own)), total, squared, inputs)

    def among(self, count: float) -> Moments:
        """Of ``count`` tokens, of which all others have the mean."""
        if not self.total:
            return self._replace(tokens=count)
        mean, others = self.total / self.tokens, count - self.tokens
        return self._replace(tokens=count, total=mean * count, squares=self.squares + others * mean**2)

    @property
    def kept(self) -> float:
        """What is left of the deviations from the mean, 0 to 1."""
        wanted = EFFECTIVE * self.inputs
        effective = self.total**2 / self.squares
        if effective >= wanted:
            return 1.0
        if wanted >= self.tokens:
            return 0.0
        return math.sqrt((self.tokens / wanted - 1.0) / (self.tokens / effective - 1.0))

    @property
    def effective(self) -> float:
        """Effective sample size (Kish) once the weights are shrunk towards their mean."""
        return self.tokens / (1.0 + self.kept**2 * (self.tokens * self.squares / self.total**2 - 1.0))

    def weights(self, square_T: Tensor, start_T: Tensor) -> Tensor:
        """Of tokens of these squares, (T,); of mean 1 over all but those of a shared start, which are not shrunk."""
        own_T = square_T.pow(POWER) * (self.tokens / self.total)
        return torch.where(start_T, own_T, torch.lerp(torch.ones_like(own_T), own_T, self.kept))


def row_weights(square_O: Tensor, tokens: float = math.inf) -> Tensor:
    """Of a linear's rows, (O,), with the mean of their squares; shrunk towards it where ``tokens`` are few."""
    tempered_O = square_O.pow(POWER)
    weight_O = tempered_O * (square_O.mean() / tempered_O.mean())
    return weight_O if tokens == math.inf else torch.lerp(weight_O.mean(), weight_O, tokens / (tokens + FEW_TOKENS))


@dataclass
class FisherWeights:
    """Weights of tokens and rows, tempered and shrunk, by the names of linears and blocks. All on the CPU.

    Attributes:
        loss: whose gradients they are, for the report.
        note: what the report mentions of how they were found.
        tokens: by the name of a group's first linear, or of a block: for each batch (T,), of mean 1. Without names
            whose tokens do not matter, and groups that do not get every token, as experts.
        routed: by the name of an expert's linear: for each batch the tokens that were routed to it, and their weights.
        effective: by the names of both: effective sample size (Kish), (sum s)^2 / sum s^2, over all ranks.
        rows: by the name of a linear: (O,), with the mean over tokens of g_to^2.
        residual: by the name of a block: the mean over tokens of g g^T at its outputs, (E, E).
        coupling: by the name of a linear: correlations of its rows, (O, O), see ``calibration.correlation``.
    """

    loss: str
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    routed: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    effective: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)
    coupling: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""

    def forget(self, names: Collection[str]) -> None:
        """Free what is known of a block and its linears, which are done."""
        known: Any
        for known in (self.tokens, self.routed, self.rows, self.residual, self.coupling):
            for name in names:
                known.pop(name, None)

    def part(self, batches: Sequence[int]) -> FisherWeights:
        """The weights of some batches, as ``Activations.part``."""
        tokens = {name: [own[batch] for batch in batches] for name, own in self.tokens.items()}
        routed = {name: [own[batch] for batch in batches] for name, own in self.routed.items()}
        return replace(self, tokens=tokens, routed=routed)

    def of_tokens(self, name: str) -> list[Tensor] | None:
        """Weights of each batch's tokens, (T,), or None: see ``tokens``."""
        return self.tokens.get(name)

    def of_routed(self, name: str, batch: int, size: int) -> Tensor | None:
        """As ``of_tokens`` at an expert's linear ``name``: of a batch's ``size`` tokens, wherever they were routed.

        A token that the dense model sent elsewhere has the mean of the expert's, which is 1.
        """
        if name not in self.routed:
            return None
        tokens_T, own_T = self.routed[name][batch]
        weight_T = torch.ones(size)
        weight_T[tokens_T.long()] = own_T
        return weight_T

    def effective_tokens(self, name: str) -> float | None:
        """Effective sample size, or None: see ``effective``."""
        return self.effective.get(name)

    def of_rows(self, name: str) -> Tensor | None:
        """Weights of a linear's rows, (O,); None if none matters."""
        return self.rows.get(name)

    def compared(self, name: str, outputs: int) -> Tensor:
        """As ``of_rows``, where linears compete: zeros if none matters, as for an expert that no token reached."""
        row_O = self.rows.get(name)
        return torch.zeros(outputs) if row_O is None else row_O


def fisher_weights(
    model: PreTrainedModel,
    stack: Stack,
    acts: Activations,
    seed: int,
    residual: bool = False,
    weights: Weights | None = None,
    share: float = 1.0,
    progress: Callable[[float], None] = lambda done: None,
    coupled: bool = False,
) -> FisherWeights:
    """Take gradients of the dense model, by one forward pass and one backward pass through its blocks.

    The loss is the cross-entropy of labels sampled from the model's logits. Of a model without an LM head it is the
    square of the change of the last block's output: labels are random signs then (Hutchinson's estimator).

    Args:
        model: the whole model, in evaluation mode.
        stack: the stack that its head reads.
        acts: inputs of the first block, with the calls of all blocks; left as it is.
        seed: of the labels.
        residual: find ``FisherWeights.residual`` too, at a product of E x E entries a token and block.
        weights: brings blocks to the device; None: they are all in main memory.
        share: of the sequences that are used, see ``fisher_share``.
        progress: called with the fraction of the work that is done, 0 to 1.
        coupled: find ``FisherWeights.coupling`` too, see ``calibration.correlation.couples``.

    Raises:
        NotDifferentiableError: if there are no gradients, or they are not finite, on any rank.
    """
    with torch.inference_mode(False), torch.enable_grad(), differentiable(model):
        gradient_pass = _GradientPass(model, stack, acts, weights or Resident(model), fisher_batches(acts, share))
        found = gradient_pass.run(seed, residual, coupled, progress)
    give_back_freed_memory()
    return found


@contextmanager
def _raised_on_all(ranks: Ranks) -> Iterator[None]:
    """A ``NotDifferentiableError`` inside, on one rank, is raised on all."""
    problem = ""
    try:
        yield
    except NotDifferentiableError as error:
        problem = str(error)
    if problem := next(filter(None, ranks.gather(problem)), ""):
        raise NotDifferentiableError(problem)


class _GradientPass:
    """Forward and backward through the dense model, with the inputs of all blocks kept; see ``fisher_weights``.

    ``used``: the numbers of the batches that gradients are taken of, in ``part``.
    """

    def __init__(
        self, model: PreTrainedModel, stack: Stack, acts: Activations, weights: Weights, used: Sequence[int]
    ) -> None:
        self.model, self.stack, self.acts, self.weights, self.used = model, stack, acts, weights, used
        self.part, self.ranks, self.head = acts.part(used), acts.ranks, head_of(model) is not None
        self.found, self.alike = FisherWeights(LOGITS if self.head else HIDDEN), False
        sequences, tokens = sum(size for size, _ in self.part.sizes), sum(map(math.prod, self.part.sizes))
        length, whole = max((length for _, length in acts.sizes), default=0), len(used) == len(acts.sizes)
        every = self.ranks.gather((sequences, tokens, length, whole, acts.probe.routed))
        sequence_counts, counts, lengths, wholes, unordered = zip(*every, strict=True)
        self.first = sum(sequence_counts[: self.ranks.rank])  # number of this rank's first sequence that is used
        self.count, self.length, self.whole = sum(counts), max(lengths), all(wholes)
        self.unordered: frozenset[str] = frozenset().union(*unordered)  # linears that do not get every token

    def run(self, seed: int, residual: bool, coupled: bool, progress: Callable[[float], None]) -> FisherWeights:
        """See ``fisher_weights``."""
        part, blocks, draws, inputs = self.part, self.stack.blocks, self._draws(seed), list[list[Tensor]]()
        with _raised_on_all(self.ranks):
            self._check()
            most = max(map(math.prod, part.sizes), default=0)
            place, self.found.note = head_device(self.model, self.stack, part.device, most)
            for block in blocks:
                inputs.append(list(part.hidden))
                with self.weights.on(block, part.device):
                    part.forward(block)
            gradients = self._at_the_head(draws, place)
        progress(0.25)  # a forward pass is a quarter of the work
        self.alike = start_alike(self.acts, part.hidden)
        # Where tokens are counted before sequences, sequences cannot be split into halves.
        numbers = list(accumulate((size for size, _ in part.sizes), initial=self.first))
        halved = numbers if coupled and not part.probe.sequence_first else None
        for block in reversed(blocks):
            part.hidden = inputs.pop()
            sums = _BlockSums(block, part, self.unordered, halved)
            with _raised_on_all(self.ranks):
                size = self.acts.hidden[0].shape[-1]
                metric_EE = second_moment(gradients, size, part.device) if residual else None
                with self.weights.on(block, part.device):
                    squares = through(block, part, gradients, sums)
            self._finish(block, squares, sums, metric_EE)
            progress(1.0 - 0.75 * len(inputs) / len(blocks))
        return self.found

    def _check(self) -> None:
        for block in self.stack.blocks:
            for batch, hidden in enumerate(self.part.hidden):
                if self.part.states(block, batch):
                    raise NotDifferentiableError("its blocks share keys and values")
                sources = self.part.probe.carried[block.index].values()
                carried = (self.part.carried[batch].get(source) for source in sources)
                if any(each is not None and each.shape[:2] == hidden.shape[:2] for each in carried):
                    raise NotDifferentiableError("its blocks pass on other activations than hidden states")
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise NotDifferentiableError("the model was made inside torch.inference_mode()")

    def _draws(self, seed: int) -> Iterator[torch.Generator]:
        """A generator for the labels of each batch that is used.

        A sequence has the same labels whichever rank it is on, and whichever other sequences are used.
        """
        if self.head:
            counts = [math.prod(words_size(self.model, batch)) for batch in self.acts.batches]
        else:
            counts = [hidden.numel() for hidden in self.acts.hidden]
        lists, generator = self.ranks.gather(counts), torch.Generator().manual_seed(seed)

        def draws() -> Iterator[torch.Generator]:
            for count in (count for own in lists[: self.ranks.rank] for count in own):
                torch.rand(count, generator=generator)
            for batch, count in enumerate(counts):
                if batch in self.used:
                    yield generator  # from which so many numbers are drawn then
                else:
                    torch.rand(count, generator=generator)

        return draws()

    def _at_the_head(self, draws: Iterator[torch.Generator], place: torch.device) -> list[Tensor]:
        """Gradients at the output of the last block."""
        gradients, part = [], self.part
        give_back_freed_memory()  # logits are large
        with self.weights.outside(place):
            for batch, hidden in enumerate(part.hidden):
                generator = next(draws)
                if self.head:
                    drawn_BL = torch.rand(words_size(self.model, part.batches[batch]), generator=generator)
                    gradient = at_the_head(self.model, self.stack, part, batch, drawn_BL)
                else:
                    gradient = torch.randint(0, 2, hidden.shape, generator=generator).mul_(2).sub_(1).to(hidden)
                gradients.append(part.store.keep(gradient))
        return gradients

    def _finish(self, block: Block, squares: list[Tensor], sums: _BlockSums, metric_EE: Tensor | None) -> None:
        """Make the weights of the tokens and rows of a block, over all ranks."""
        found, keep = self.found, self.acts.store.keep
        inputs = {linear.name: linear.shape[1] for linear in block.linears}
        for name, own in {**sums.tokens, block.name: squares}.items():
            placed = [(torch.arange(len(square_T)), square_T) for square_T in self._fill_in(own)]
            if weights := self._weights(name, placed, inputs.get(name, 0)):
                found.tokens[name] = [weight_T for _, weight_T in weights]
        for name, routed in sums.routed.items():
            by_batch = dict(zip(self.used, routed, strict=True))
            every = [by_batch.get(batch, NOWHERE) for batch in range(len(self.acts.sizes))]
            # An expert's tokens of sequences that were not used are to come, with the mean.
            if weights := self._weights(name, every, inputs[name], self.acts.tokens / self.count):
                found.routed[name] = weights
        reached = _all_reduced(sums.reached, self.ranks)
        for name, sum_2O in _all_reduced(sums.rows, self.ranks).items():
            square, tempered = (sum_2O / self.count).sum(dim=1).tolist()
            if tempered:
                few = name in sums.routed or name in self.unordered
                row_O = (sum_2O[1] / self.count * (square / tempered)).float()
                found.rows[name] = row_weights(row_O, float(reached[name]) if few else math.inf)
        if metric_EE is not None:
            found.residual[block.name] = keep(self.ranks.all_reduce(metric_EE) / self.count)
        for name, halves in sums.halves.items():
            total = self.ranks.all_reduce(halves)
            if bool(total.any()):
                found.coupling[name] = keep(correlated_rows(total).half().cpu())

    def _weights(
        self, name: str, squares: Sequence[tuple[Tensor, Tensor]], inputs: int, share: float | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Of the tokens of each batch, places and squares; none if no token matters. ``share``: of those to come."""
        lengths = [length for _, length in self.acts.sizes]
        starts = [
            at_T % length == 0 if self.alike else torch.zeros(len(at_T), dtype=torch.bool)
            for (at_T, _), length in zip(squares, lengths, strict=True)
        ]
        own = Moments.of([square_T[~start_T] for (_, square_T), start_T in zip(squares, starts, strict=True)])
        total = _all_reduced({name: torch.tensor(own[:3], dtype=torch.float64)}, self.ranks)[name].tolist()
        moments = Moments(total[0], total[1], total[2], inputs)
        moments = moments if share is None else moments.among(moments.tokens * share)
        if not moments.total:
            return []
        self.found.effective[name] = moments.effective
        return [
            (at_T, moments.weights(square_T, start_T))
            for (at_T, square_T), start_T in zip(squares, starts, strict=True)
        ]

    def _fill_in(self, squares: Sequence[Tensor]) -> list[Tensor]:
        """Squares of the tokens of every batch, (T,), from those of the batches that were used.

        Other tokens have the mean of their position, of the roots that are used.
        """
        if self.whole:
            return list(squares)
        own, sizes = dict(zip(self.used, squares, strict=True)), self.acts.sizes
        sum_2L = torch.zeros(2, self.length, dtype=torch.float64)
        for batch, square_T in own.items():
            root_BL = square_T.double().pow(POWER).reshape(-1, sizes[batch][1])
            sum_2L[0, : root_BL.shape[1]] += root_BL.sum(dim=0)
            sum_2L[1, : root_BL.shape[1]] += len(root_BL)
        weight_L, count_L = self.ranks.all_reduce(sum_2L)
        mean_L = torch.where(count_L > 0, weight_L / count_L.clamp_min(1), weight_L.sum() / count_L.sum())
        square_L = mean_L.pow(1.0 / POWER).float()
        filled = {size: square_L[: size[1]].repeat(size[0]) for size in set(sizes)}  # batches share them
        return [own.get(batch, filled[size]) for batch, size in enumerate(sizes)]


def first_tokens(acts: Activations, hidden: Tensor) -> Tensor:
    """Hidden states of each sequence's first token, (B, E)."""
    # Gemma 3n has several versions of them. A copy: a view would hold all tokens.
    return hidden.select(acts.probe.token_dims - 1, 0).movedim(acts.probe.sample_dim, 0).flatten(1).clone()


def start_alike(acts: Activations, outputs: Sequence[Tensor]) -> bool:
    """Whether all sequences of all ranks start with one input, such as BOS, which is one in every block.

    It is not where a token sees later ones, or an encoder's output for another text.

    Args:
        acts: inputs of the first block.
        outputs: of the last block, for the batches that were used.
    """
    if acts.probe.sequence_first:
        return False
    starts, ends = ([first_tokens(acts, hidden) for hidden in each] for each in (acts.hidden, outputs))
    everyone = acts.ranks.all_gather((starts[0][:1] if starts else None, ends[0][:1] if ends else None))
    start_1E = next((start for start, _ in everyone if start is not None), torch.empty(0))
    end_1E = next((end for _, end in everyone if end is not None), torch.empty(0)).float()
    ended = sum(acts.ranks.gather(sum(map(len, ends))))  # one says nothing of others
    alike = ended > 1 and all(bool((start_BE == start_1E).all()) for start_BE in starts)
    for end_BE in ends:  # rounded as their batches are
        alike = alike and bool(((end_BE.float() - end_1E).norm(dim=1) <= ALIKE * end_1E.norm(dim=1)).all())
    return all(acts.ranks.gather(alike))


def second_moment(gradients: Sequence[Tensor], size: int, device: torch.device) -> Tensor:
    """The sum over tokens of g g^T, (E, E), on the CPU."""
    product_EE = torch.zeros(size, size, device=device)
    for gradient in gradients:
        flat_TE = gradient.to(device).flatten(0, -2).float()
        product_EE += flat_TE.mT @ flat_TE
    return product_EE.cpu()


class _BlockSums:
    """Squares of the gradients at a block's linears, summed over its batches on this rank.

    Attributes:
        rows: by linear: over tokens, (2, O), of squares and of squares tempered by their token's; float64.
        tokens: by the first linear of a group: for each batch over outputs, (T,).
        routed: by an expert's linear: for each batch the tokens, and the same of each.
        reached: by linear: the number of its tokens.
        halves: by linear: see ``correlation.products_of_halves``.
    """

    def __init__(
        self, block: Block, part: Activations, unordered: Collection[str], numbers: Sequence[int] | None
    ) -> None:
        self._block, self._sizes, self._unordered, self._numbers = block, part.sizes, unordered, numbers or []
        self._leaders = {linear.name: group[0].name for group in part.groups(block) for linear in group}
        self.rows = {each.name: torch.zeros(2, each.shape[0], dtype=torch.float64) for each in block.linears}
        self.routed = {each.name: [NOWHERE] * len(part.sizes) for each in block.linears if each.expert is not None}
        ordered = [n for name, n in self._leaders.items() if name not in unordered and name not in self.routed]
        self.tokens = {name: [torch.zeros(math.prod(size)) for size in part.sizes] for name in dict.fromkeys(ordered)}
        self.reached = {name: torch.zeros((), dtype=torch.float64) for name in self.rows}
        coupled = [linear for linear in block.linears if numbers is not None and couples(linear)]
        self.halves = {each.name: torch.zeros(2, *each.shape[:1] * 2, device=part.device) for each in coupled}

    @contextmanager
    def watch(self, batch: int, part: slice) -> Iterator[None]:
        """Add the gradients of samples of a batch in a backward pass inside, if it gets to its end."""
        noted: list[tuple[str, Tensor, Tensor, Tensor | None, Tensor | None]] = []

        def see(name: str, gradient: Tensor, tokens_T: Tensor | None = None) -> None:
            gradient_TO = gradient.detach().flatten(0, -2)
            square_TO = gradient_TO.float().square()
            sum_T, halves = square_TO.sum(dim=1), None
            factor_T = sum_T.pow(POWER - 1.0).masked_fill_(sum_T == 0.0, 0.0)  # so that few tokens do not decide
            sum_2O = torch.stack((square_TO.sum(dim=0), factor_T @ square_TO))
            if name in self.halves and len(sum_T) == (part.stop - part.start) * self._sizes[batch][1]:
                odd_B = torch.arange(self._numbers[batch] + part.start, self._numbers[batch] + part.stop) % 2
                halves = products_of_halves(gradient_TO, factor_T, odd_B)
            noted.append((name, sum_2O, sum_T.cpu(), tokens_T, halves))

        with ExitStack() as hooks:
            for linear in self._block.linears:
                hooks.callback(linear.watch(partial(see, linear.name)).remove)
            hooks.enter_context(self._block.linearized())
            yield
        for each in noted:
            self._add(batch, part, each)

    def _add(self, batch: int, part: slice, noted: tuple[str, Tensor, Tensor, Tensor | None, Tensor | None]) -> None:
        name, sum_2O, sum_T, tokens_T, halves = noted
        if not bool(sum_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the outputs of {name} are not finite")
        length = self._sizes[batch][1]
        begin, end = part.start * length, part.stop * length
        self.rows[name] += sum_2O.double().cpu()
        self.reached[name] += len(sum_T)
        if name in self.routed:
            if tokens_T is not None:
                known_T, square_T = self.routed[name][batch]
                own_T = (tokens_T.cpu() + begin).int()
                self.routed[name][batch] = torch.cat((known_T, own_T)), torch.cat((square_T, sum_T))
        elif name not in self._unordered and len(sum_T) == end - begin:
            self.tokens[self._leaders[name]][batch][begin:end] += sum_T
        if halves is not None:
            self.halves[name] += halves


def through(block: Block, part: Activations, gradients: list[Tensor], sums: _BlockSums) -> list[Tensor]:
    """Replace ``gradients`` at the block's outputs by those at its inputs, and add those at its linears to ``sums``.

    Returns:
        Squares of the gradients at its outputs: for each batch over the hidden size, (T,).
    """

    def back(batch: int, rows: slice) -> tuple[Tensor, Tensor]:
        gradient = rows_of(gradients[batch], rows, part.sizes[batch][0]).to(part.device)
        square_T = gradient.float().square().flatten(part.probe.token_dims).sum(dim=-1).flatten()
        if not bool(square_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the output of {block.name} are not finite")
        leaves: list[Tensor] = []

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves.append(args[0].detach().requires_grad_(True))
            return block.module(leaves[0], *args[1:], **kwargs)

        with sums.watch(batch, rows):
            output = hidden_of(part.run(block, batch, rows, call))
            if not output.requires_grad:
                raise NotDifferentiableError(f"the output of {block.name} does not depend on its input by a gradient")
            with backward_explained(block.name):
                output.backward(gradient)
        assert leaves[0].grad is not None
        return square_T.cpu(), leaves[0].grad.cpu()

    squares = []
    for batch in range(len(gradients)):
        own, parts = zip(*part.map_microbatches(block, batch, partial(back, batch)), strict=True)
        squares.append(torch.cat(own))
        gradients[batch] = part.store.keep(parts[0] if len(parts) == 1 else torch.cat(parts))
    return squares


def _all_reduced(sums: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sums over all ranks, by one message."""
    if ranks.size == 1 or not sums:
        return dict(sums)
    flat = ranks.all_reduce(torch.cat([own.flatten() for own in sums.values()]))
    parts = flat.split([own.numel() for own in sums.values()])
    return {name: part.view_as(own) for part, (name, own) in zip(parts, sums.items(), strict=True)}
