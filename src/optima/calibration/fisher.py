"""Fisher weights: how much the model's loss depends on each token and each output, from one gradient pass.

To second order the loss grows by 1/2 sum_o sum_t g_to^2 (x_t . (v_o - w_o))^2, g the gradient at output o of a linear
on token t, with labels sampled from the model itself (the true Fisher: Martens, JMLR 2020, section 5). The rank-one fit
g_to^2 ~ r_o s_t puts token weights s_t into the Hessian, which all rows go on sharing; row weights r_o let rows compete
in units of the loss (docs/objective.md). Both are tempered and shrunk, see ``calibration.weights``.

The pass goes from the last block to the first over the dense inputs of every block, one block on the device, on a
fraction of the sequences. Row weights are means over tokens, which a part of them gives. Token weights depend on the
position (first tokens above all): tokens without gradients get the mean weight of their position.

Shapes: B sequences in a batch, L tokens in a sequence, T tokens, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.activations import Activations, hidden_of, moved
from optima.calibration.correlation import correlated_rows, couples, products_of_halves
from optima.calibration.lm_head import at_the_head, outside_device
from optima.calibration.weights import POWER, FisherWeights, Moments, row_weights
from optima.device import backward_explained, differentiable, give_back_freed_memory
from optima.distributed import Ranks
from optima.errors import NotDifferentiableError
from optima.models.blocks import Block, Stack
from optima.models.inputs import label_size, rows_of
from optima.models.inspect import head_of
from optima.models.offload import MAIN, Weights

LOGITS = "the cross-entropy of labels sampled from the model"
HIDDEN = "the square of the change of the last hidden states"
# Gradients are taken of, and blocks are tuned on, so many tokens at least, if there are as many.
LEAST_TOKENS, LEAST_TUNED = 8192, 32768
# The last block's outputs at equal tokens differ by less, relative to their norm, unless they depend on the text.
ALIKE = 0.05
# Of a share times a count.
ROUNDING = 1e-9
NOWHERE = torch.zeros(0, dtype=torch.int32), torch.zeros(0)  # no token of a batch was routed to an expert


def fisher_share(share: float, tokens: int) -> float:
    """The share of the sequences that gradients are taken of: at least ``LEAST_TOKENS`` of so many ``tokens``."""
    return min(max(share, LEAST_TOKENS / max(tokens, 1)), 1.0)


def fisher_batches(acts: Activations, share: float) -> list[int]:
    """The batches of this rank that gradients are taken of."""
    return _spread(acts, fisher_share(share, acts.tokens))


def tuned_batches(acts: Activations, share: float) -> list[int]:
    """The batches of this rank that blocks are tuned on."""
    return _spread(acts, min(max(share, LEAST_TUNED / max(acts.tokens, 1)), 1.0))


def _spread(acts: Activations, share: float) -> list[int]:
    """A share of the batches, evenly spread, counted over all ranks; the first one is always among them."""
    size = max(acts.ranks.gather(max((samples for samples, _ in acts.sizes), default=1)))
    first, chosen = acts.before[0], []
    for batch, (samples, _) in enumerate(acts.sizes):
        before, after = (math.ceil((first // size + more) * share - ROUNDING) for more in (0, 1))
        if after > before:
            chosen.append(batch)
        first += samples
    return chosen


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
        acts: inputs of the first block, with the arguments of all blocks; not changed.
        seed: of the labels.
        residual: find ``FisherWeights.residual`` too.
        weights: brings blocks to the device; None: they are all in main memory.
        share: of the sequences that are used, see ``fisher_share``.
        progress: called with the fraction of the work that is done.
        coupled: find ``FisherWeights.coupling`` too.

    Raises:
        NotDifferentiableError: if there are no gradients, or they are not finite, on any rank.
    """
    with torch.inference_mode(False), torch.enable_grad(), differentiable(model):
        gradient_pass = _GradientPass(model, stack, acts, weights or Weights(model), fisher_batches(acts, share))
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
        self.ranks, self.head = acts.ranks, head_of(model) is not None
        self.part = acts.part(used).counted()
        self.found, self.alike = FisherWeights(LOGITS if self.head else HIDDEN), False
        self.count = self.part.tokens
        length, whole = max((length for _, length in acts.sizes), default=0), len(used) == len(acts.sizes)
        lengths, wholes = zip(*self.ranks.gather((length, whole)), strict=True)
        self.length, self.whole = max(lengths), all(wholes)

    def run(self, seed: int, residual: bool, coupled: bool, progress: Callable[[float], None]) -> FisherWeights:
        """See ``fisher_weights``."""
        part, blocks, inputs = self.part, self.stack.blocks, list[list[Tensor]]()
        counts = self.ranks.gather(self._draws())
        with _raised_on_all(self.ranks):
            if self.acts.probe.shared_states:
                raise NotDifferentiableError("its blocks share keys and values")
            if any(parameter.is_inference() for parameter in self.model.parameters()):
                raise NotDifferentiableError("the model was made inside torch.inference_mode()")
            for block in blocks:
                inputs.append(list(part.hidden))
                with self.weights.on(block, part.device):
                    part.forward(block)
            gradients = self._at_the_head(seed, counts)
        progress(0.25)  # a forward pass is a quarter of the work
        self.alike = start_alike(self.acts, part.hidden)
        for block in reversed(blocks):
            part.hidden = inputs.pop()
            sums = _BlockSums(block, part, coupled)
            metric_EE = None
            with _raised_on_all(self.ranks):
                if residual:
                    metric_EE = second_moment(gradients, self.acts.hidden[0].shape[-1], part.device)
                with self.weights.on(block, part.device):
                    squares = sums.backward(gradients)
            self._finish(block, squares, sums, metric_EE)
            progress(1.0 - 0.75 * len(inputs) / len(blocks))
        return self.found

    def _draws(self) -> list[int]:
        """How many random numbers the labels of each batch of this rank take."""
        if self.head:
            return [math.prod(label_size(self.model, batch)) for batch in self.acts.batches]
        return [hidden.numel() for hidden in self.acts.hidden]

    def _at_the_head(self, seed: int, counts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Gradients at the output of the last block, at labels drawn by uniform random numbers.

        A sequence has the same labels whichever rank it is on, and whichever other sequences are used.
        """
        gradients: list[Tensor] = []
        part, generator = self.part, torch.Generator().manual_seed(seed)
        for count in (count for own in counts[: self.ranks.rank] for count in own):
            torch.rand(count, generator=generator)
        give_back_freed_memory()  # logits are large
        # Gradients of an encoder come back through the blocks of the decoder, which stay where they are.
        place = MAIN if self.stack.part == "encoder" else outside_device(self.model, part.device)
        with self.weights.outside(place):
            for batch, count in enumerate(counts[self.ranks.rank]):
                if batch not in self.used:
                    torch.rand(count, generator=generator)
                    continue
                number = len(gradients)
                if self.head:
                    drawn_BL = torch.rand(label_size(self.model, part.batches[number]), generator=generator)
                    gradient = at_the_head(self.model, self.stack, part, number, drawn_BL)
                else:
                    hidden = part.hidden[number]
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
                few = name in sums.routed or name in self.acts.probe.routed
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
        starts = [
            at_T % length == 0 if self.alike else torch.zeros(len(at_T), dtype=torch.bool)
            for (at_T, _), (_, length) in zip(squares, self.acts.sizes, strict=True)
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


def start_alike(acts: Activations, outputs: Sequence[Tensor]) -> bool:
    """Whether all sequences of all ranks start with one input, such as BOS, which is one in every block.

    It is not where a token sees later ones, or an encoder's output for another text.

    Args:
        acts: inputs of the first block.
        outputs: of the last block, for the batches that were used.
    """
    if not acts.probe.batch_first:
        return False
    starts, ends = ([hidden[:, 0].flatten(1) for hidden in each] for each in (acts.hidden, outputs))
    everyone = acts.ranks.all_gather([each[0][:1].clone() if each else None for each in (starts, ends)])
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
        flat_TE = moved(gradient, device).flatten(0, -2).float()
        product_EE += flat_TE.mT @ flat_TE
    return product_EE.cpu()


# Of a linear's gradients in a backward pass, on the device: its name, sums over tokens (2, O) and over outputs (T,),
# the tokens of an expert, and the products of halves.
_Noted = tuple[str, Tensor, Tensor, Tensor | None, Tensor | None]


class _BlockSums:
    """Squares of the gradients at a block's linears, summed over its batches on this rank.

    Attributes:
        rows: by linear: over tokens, (2, O), of squares and of squares tempered by their token's; float64.
        tokens: by the first linear of a group: for each batch over outputs, (T,).
        routed: by an expert's linear: for each batch the tokens, and the same of each.
        reached: by linear: the number of its tokens.
        halves: by linear: see ``correlation.products_of_halves``.
    """

    def __init__(self, block: Block, part: Activations, coupled: bool) -> None:
        self._block, self._part = block, part
        self._leaders = {linear.name: group[0].name for group in part.groups(block) for linear in group}
        self.rows = {each.name: torch.zeros(2, each.shape[0], dtype=torch.float64) for each in block.linears}
        self.routed = {each.name: [NOWHERE] * len(part.sizes) for each in block.linears if each.expert is not None}
        unordered = part.probe.routed | self.routed.keys()
        ordered = [leader for name, leader in self._leaders.items() if name not in unordered]
        self.tokens = {name: [torch.zeros(math.prod(size)) for size in part.sizes] for name in dict.fromkeys(ordered)}
        self.reached = {name: torch.zeros((), dtype=torch.float64) for name in self.rows}
        linears = [linear for linear in block.linears if coupled and couples(linear)]
        self.halves = {each.name: torch.zeros(2, *each.shape[:1] * 2, device=part.device) for each in linears}
        # The number of each batch's first sequence, over all ranks.
        self._numbers = list(accumulate((samples for samples, _ in part.sizes), initial=part.before[0]))

    def backward(self, gradients: list[Tensor]) -> list[Tensor]:
        """Replace ``gradients`` at the block's outputs by those at its inputs.

        Returns:
            Squares of the gradients at its outputs: for each batch over the hidden size, (T,).
        """
        squares = []
        for batch in range(len(gradients)):
            run = partial(self._backward, gradients[batch], batch)
            own, parts = zip(*self._part.map_microbatches(batch, run), strict=True)
            squares.append(torch.cat(own))
            gradients[batch] = self._part.store.keep(parts[0] if len(parts) == 1 else torch.cat(parts))
        return squares

    def _backward(self, gradient: Tensor, batch: int, rows: slice) -> tuple[Tensor, Tensor]:
        block, part = self._block, self._part
        gradient = moved(rows_of(gradient, rows, part.sizes[batch][0]), part.device)
        square_T = gradient.float().square().flatten(2).sum(dim=-1).flatten().cpu()
        if not bool(square_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the output of {block.name} are not finite")
        leaves: list[Tensor] = []
        noted: list[_Noted] = []

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves.append(args[0].detach().requires_grad_(True))
            return block.module(leaves[0], *args[1:], **kwargs)

        with ExitStack() as hooks:
            for linear in block.linears:
                hooks.callback(linear.watch(partial(self._note, noted, batch, rows, linear.name)).remove)
            hooks.enter_context(block.linearized())
            output = hidden_of(part.run(block, batch, rows, call))
            if not output.requires_grad:
                raise NotDifferentiableError(f"the output of {block.name} does not depend on its input by a gradient")
            with backward_explained(block.name):
                output.backward(gradient)
        for each in noted:  # once the pass has got to its end, and not been out of memory
            self._add(batch, rows, each)
        assert leaves[0].grad is not None
        return square_T, leaves[0].grad.cpu()

    def _note(
        self,
        noted: list[_Noted],
        batch: int,
        rows: slice,
        name: str,
        gradient: Tensor,
        tokens_T: Tensor | None = None,
    ) -> None:
        gradient_TO = gradient.detach().flatten(0, -2)
        square_TO = gradient_TO.float().square()
        sum_T, halves = square_TO.sum(dim=1), None
        factor_T = sum_T.pow(POWER - 1.0).masked_fill_(sum_T == 0.0, 0.0)  # so that few tokens do not decide
        sum_2O = torch.stack((square_TO.sum(dim=0), factor_T @ square_TO))
        if name in self.halves and len(sum_T) == (rows.stop - rows.start) * self._part.sizes[batch][1]:
            odd_B = torch.arange(self._numbers[batch] + rows.start, self._numbers[batch] + rows.stop) % 2
            halves = products_of_halves(gradient_TO, factor_T, odd_B)
        noted.append((name, sum_2O, sum_T, tokens_T, halves))

    def _add(self, batch: int, rows: slice, noted: _Noted) -> None:
        name, sum_2O, sum_T, tokens_T, halves = noted
        sum_T = sum_T.cpu()
        if not bool(sum_T.isfinite().all()):
            raise NotDifferentiableError(f"gradients at the outputs of {name} are not finite")
        length = self._part.sizes[batch][1]
        begin, end = rows.start * length, rows.stop * length
        self.rows[name] += sum_2O.double().cpu()
        self.reached[name] += len(sum_T)
        if name in self.routed:
            if tokens_T is not None:
                known_T, square_T = self.routed[name][batch]
                own_T = (tokens_T.cpu() + begin).int()
                self.routed[name][batch] = torch.cat((known_T, own_T)), torch.cat((square_T, sum_T))
        elif name not in self._part.probe.routed and len(sum_T) == end - begin:
            self.tokens[self._leaders[name]][batch][begin:end] += sum_T
        if halves is not None:
            self.halves[name] += halves


def _all_reduced(sums: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sums over all ranks, by one message."""
    if ranks.size == 1 or not sums:
        return dict(sums)
    flat = ranks.all_reduce(torch.cat([own.flatten() for own in sums.values()]))
    parts = flat.split([own.numel() for own in sums.values()])
    return {name: part.view_as(own) for part, (name, own) in zip(parts, sums.items(), strict=True)}
