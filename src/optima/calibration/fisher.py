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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optima.calibration.activations import Activations, moved
from optima.calibration.weights import (
    POWER,
    FisherWeights,
    Moments,
    correlated_rows,
    couples,
    products_of_halves,
    row_weights,
)
from optima.device import backward_explained, give_back_freed_memory
from optima.distributed import Ranks
from optima.errors import NotDifferentiableError
from optima.models.blocks import Block, Stack
from optima.models.forward import differentiable, hidden_of, label_size, rows_of
from optima.models.inspect import head_of
from optima.models.logits import exponentials, sampled_tokens, sliced_head
from optima.models.offload import MAIN, Weights, outside_device

LOGITS = "the cross-entropy of labels sampled from the model"
HIDDEN = "the square of the change of the last hidden states"
# Gradients are taken of, and blocks are tuned on, so many tokens at least, if there are as many.
LEAST_TOKENS, LEAST_TUNED = 8192, 32768
ALIKE = 0.05  # the last block's outputs at equal tokens differ by less, relative to their norm, but for the text
ROUNDING = 1e-9  # of a share times a count
UNSEEN = -1.0  # the square of a token that was not routed to an expert


def chosen_batches(acts: Activations, share: float, tuned: bool = False) -> list[int]:
    """A share of this rank's batches: those that gradients are taken of, or those that blocks are ``tuned`` on.

    They are evenly spread, counted over all ranks; the first one is always among them.
    """
    share = min(max(share, (LEAST_TUNED if tuned else LEAST_TOKENS) / acts.tokens), 1.0)
    size = max(acts.ranks.gather(max(map(len, acts.batches), default=1)))
    first, chosen = acts.before, []
    for batch, samples in enumerate(map(len, acts.batches)):
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
        share: of the sequences that are used, see ``chosen_batches``.
        progress: called with the fraction of the work that is done.
        coupled: find ``FisherWeights.coupling`` too.

    Raises:
        NotDifferentiableError: if there are no gradients, or they are not finite, on any rank.
    """
    with torch.enable_grad(), differentiable(model):
        gradient_pass = _GradientPass(model, stack, acts, weights or Weights(model), share)
        found = gradient_pass.run(seed, residual, coupled, progress)
    give_back_freed_memory()
    return found


class _GradientPass:
    """Forward and backward through the dense model, with the inputs of all blocks kept; see ``fisher_weights``."""

    def __init__(self, model: PreTrainedModel, stack: Stack, acts: Activations, weights: Weights, share: float) -> None:
        self.model, self.stack, self.acts, self.weights, self.ranks = model, stack, acts, weights, acts.ranks
        self.used = chosen_batches(acts, share)  # of ``acts``: these are in ``part``
        self.part, self.head = acts.part(self.used), head_of(model) is not None
        self.found = FisherWeights(LOGITS if self.head else HIDDEN)
        self.starts: list[Tensor] = []  # of each batch, (T,): the tokens of a start that all sequences share

    def run(self, seed: int, residual: bool, coupled: bool, progress: Callable[[float], None]) -> FisherWeights:
        """See ``fisher_weights``."""
        part, blocks, inputs = self.part, self.stack.blocks, list[list[Tensor]]()
        with self.ranks.raised_on_all(NotDifferentiableError):
            if self.acts.probe.shared_states:
                raise NotDifferentiableError("its blocks share keys and values")
            if any(parameter.is_inference() for parameter in self.model.parameters()):
                raise NotDifferentiableError("the model was made inside torch.inference_mode()")
            for block in blocks:
                inputs.append(list(part.hidden))
                with self.weights.on(block, part.device):
                    part.forward(block)
            gradients = self._at_the_head(seed)
        progress(0.25)  # a forward pass is a quarter of the work
        alike = start_alike(self.acts, part.hidden)
        self.starts = [
            (torch.arange(len(batch) * part.length) % part.length == 0) & alike for batch in self.acts.batches
        ]
        for block in reversed(blocks):
            part.hidden = inputs.pop()
            sums = _BlockSums(block, part, self.acts.hidden[0].shape[-1] if residual else 0, coupled)
            with self.ranks.raised_on_all(NotDifferentiableError), self.weights.on(block, part.device):
                sums.backward(gradients)
            self._finish(block, sums)
            progress(1.0 - 0.75 * len(inputs) / len(blocks))
        return self.found

    def _at_the_head(self, seed: int) -> list[Tensor]:
        """Gradients at the output of the last block, at labels drawn by random numbers.

        A sequence has the same labels whichever rank it is on, and whichever other sequences are used.
        """
        gradients = list[Tensor]()
        part, generator = self.part, torch.Generator().manual_seed(seed)
        draw: Callable[..., Tensor] = torch.rand if self.head else partial(torch.randint, 0, 2)
        shapes = [
            label_size(self.model, tokens_BL) if self.head else hidden.shape
            for tokens_BL, hidden in zip(self.acts.batches, self.acts.hidden, strict=True)
        ]
        for _ in range(self.acts.before):
            draw((math.prod(shapes[0]) // len(self.acts.batches[0]),), generator=generator)
        give_back_freed_memory()  # logits are large
        # Gradients of an encoder come back through the blocks of the decoder, which stay where they are.
        place = MAIN if self.stack.part == "encoder" else outside_device(self.model, part.device)
        with self.weights.outside(place):
            for batch, shape in enumerate(shapes):
                drawn, number = draw(shape, generator=generator), len(gradients)
                if batch in self.used:
                    if self.head:
                        gradient = at_the_head(self.model, self.stack, part, number, drawn)
                    else:
                        gradient = drawn.mul_(2).sub_(1).to(part.hidden[number])
                    gradients.append(part.store.keep(gradient))
        return gradients

    def _finish(self, block: Block, sums: _BlockSums) -> None:
        found, keep, tokens = self.found, self.acts.store.keep, self.part.tokens
        inputs = {linear.name: linear.shape[1] for linear in block.linears}
        for name, own in sums.squares.items():
            routed = name in sums.experts
            squares = self._fill_in(own, routed)
            pairs = list(zip(squares, self.starts, strict=True))
            counted = [square_T[(square_T >= 0.0) & ~start_T] for square_T, start_T in pairs]
            totals = self.ranks.all_reduce(torch.tensor(Moments.of(counted)[:3], dtype=torch.float64))
            moments = Moments(*totals.tolist())._replace(inputs=inputs.get(name, 0))
            if not moments.total:
                continue
            if routed:  # its tokens of sequences that were not used are to come, with the mean
                moments = moments.among(moments.tokens * self.acts.tokens / tokens)
            weights = [moments.weights(square_T, start_T) for square_T, start_T in pairs]
            if routed:
                places = [(square_T >= 0.0).nonzero()[:, 0].int() for square_T in squares]
                found.routed[name] = [(at_T, own_T[at_T]) for at_T, own_T in zip(places, weights, strict=True)]
            else:
                found.tokens[name] = weights
        reached = _all_reduced(sums.reached, self.ranks)
        for name, sum_2O in _all_reduced(sums.rows, self.ranks).items():
            square, tempered = (sum_2O / tokens).sum(dim=1).tolist()
            if tempered:
                few = name in sums.experts or name in self.acts.probe.routed
                row_O = (sum_2O[1] / tokens * (square / tempered)).float()
                found.rows[name] = row_weights(row_O, float(reached[name]) if few else math.inf)
        if sums.residual_EE is not None:
            found.residual[block.name] = keep(self.ranks.all_reduce(sums.residual_EE.cpu()) / tokens)
        for name, halves in sums.halves.items():
            total = self.ranks.all_reduce(halves)
            if bool(total.any()):
                found.coupling[name] = keep(correlated_rows(total).half().cpu())

    def _fill_in(self, squares: Sequence[Tensor], routed: bool) -> list[Tensor]:
        """Squares of the tokens of every batch, (T,), from those of the batches that were used.

        Other tokens have the mean of their position, of the roots that are used. It is not known where they are routed.
        """
        own, sizes = dict(zip(self.used, squares, strict=True)), list(map(len, self.acts.batches))
        length = self.acts.length
        square_L = torch.full((length,), UNSEEN)
        if not routed:
            sum_L = torch.zeros(length, dtype=torch.float64)
            for square_T in squares:
                sum_L += square_T.double().pow(POWER).reshape(-1, length).sum(dim=0)
            mean_L = self.ranks.all_reduce(sum_L) / (self.part.tokens // length)
            square_L = mean_L.pow(1.0 / POWER).float()
        filled = {size: square_L.repeat(size) for size in set(sizes)}  # batches share them
        return [own.get(batch, filled[size]) for batch, size in enumerate(sizes)]


def at_the_head(model: PreTrainedModel, stack: Stack, acts: Activations, batch: int, drawn_BL: Tensor) -> Tensor:
    """The gradient of -log p(label) at the last block's output, labels drawn from p by uniform numbers.

    Args:
        model: runs where its embedding is; of its own blocks none is called.
        stack: the one that its head reads.
        acts: outputs of its last block.
        batch: number of the batch.
        drawn_BL: uniform in [0, 1), see ``label_gradient``.

    Returns:
        In the layout of ``acts.hidden``, on the CPU.

    Raises:
        NotDifferentiableError: if its logits do not depend on what leaves that block.
    """
    home, inputs = next(model.parameters()).device, acts.batches[batch]
    samples, length = drawn_BL.shape
    # Of an encoder, autograd keeps a whole decoder of each sample.
    most = 1 if stack.part == "encoder" else samples

    def backward(rows: slice) -> Tensor:
        leaf = rows_of(acts.hidden[batch], rows, samples).to(home, copy=True).requires_grad_(True)
        for at_C, logits_TV in sliced_head(
            model, stack, acts.probe.outputs, leaf, inputs[rows], torch.arange(length), most
        ):
            if not logits_TV.requires_grad:
                raise NotDifferentiableError("its logits do not depend on its last block by a gradient")
            gradient_TV = label_gradient(logits_TV.detach(), drawn_BL[rows][:, at_C].flatten().to(home))
            with backward_explained("its head"):
                logits_TV.backward(gradient_TV)
        assert leaf.grad is not None
        return leaf.grad.cpu()

    parts = acts.batch_size.map(samples, backward, most)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def label_gradient(logits_TV: Tensor, drawn_T: Tensor) -> Tensor:
    """The gradient of -log p(label) at the logits, p less one at a label that is drawn from p.

    Args:
        logits_TV: any float dtype, which the result has too.
        drawn_T: uniform in [0, 1), see ``sampled_tokens``.
    """
    weight_TV = exponentials(logits_TV)
    label_T1, total_T1 = sampled_tokens(weight_TV, drawn_T)
    weight_TV /= total_T1
    weight_TV.scatter_add_(1, label_T1, torch.full_like(label_T1, -1.0, dtype=weight_TV.dtype))
    return weight_TV.to(logits_TV.dtype)


def start_alike(acts: Activations, outputs: Sequence[Tensor]) -> bool:
    """Whether all sequences of all ranks start with one input, such as BOS, which is one in every block.

    It is not where a token sees later ones, or an encoder's output for another text.

    Args:
        acts: inputs of the first block.
        outputs: of the last block, for the batches that were used.
    """
    if len(acts.hidden[0]) != len(acts.batches[0]):  # hidden states are not (B, L, ...)
        return False

    def near(hidden: Sequence[Tensor], tolerance: float) -> bool:
        starts = [each[:, 0].flatten(1).float() for each in hidden]
        first_1E = acts.ranks.on_rank0(lambda: starts[0][:1].clone())
        most = tolerance * first_1E.norm()
        return all(bool(((start_BE - first_1E).norm(dim=1) <= most).all()) for start_BE in starts)

    alike = near(acts.hidden, 0.0), near(outputs, ALIKE), sum(map(len, outputs))
    inputs, last, counts = zip(*acts.ranks.gather(alike), strict=True)
    return all(inputs) and all(last) and sum(counts) > 1  # one sequence says nothing of others


class _BlockSums:
    """Squares of the gradients at a block's linears, summed over its batches on this rank.

    Attributes:
        rows: by linear: over tokens, (2, O), of squares and of squares tempered by their token's; float64.
        squares: by the first linear of a group, by expert, and by block: for each batch over outputs, (T,).
        experts: names of the experts' linears.
        reached: by linear: the number of its tokens.
        residual_EE: the sum over tokens of g g^T at the block's outputs of size ``residual``; None if that is 0.
        halves: by linear: see ``weights.products_of_halves``.
    """

    def __init__(self, block: Block, part: Activations, residual: int, coupled: bool) -> None:
        self._block, self._part, sizes = block, part, list(map(len, part.batches))
        self.rows = {each.name: torch.zeros(2, each.shape[0], dtype=torch.float64) for each in block.linears}
        self.reached = {name: torch.zeros((), dtype=torch.float64) for name in self.rows}
        self.experts = {linear.name for linear in block.linears if linear.expert is not None}
        leaders = {linear.name: group[0].name for group in part.groups(block) for linear in group}
        self._keys = {name: leader for name, leader in leaders.items() if name not in part.probe.routed}
        self._keys |= {name: name for name in self.experts}
        self.squares = {
            key: [torch.full((size * part.length,), UNSEEN if key in self.experts else 0.0) for size in sizes]
            for key in dict.fromkeys([*self._keys.values(), block.name])
        }
        self.residual_EE = torch.zeros(residual, residual, device=part.device) if residual else None
        linears = [each for each in block.linears if coupled and couples(each) and each.name in self._keys]
        self.halves = {each.name: torch.zeros(2, *each.shape[:1] * 2, device=part.device) for each in linears}
        # The number of each batch's first sequence, over all ranks.
        self._numbers = list(accumulate(sizes, initial=part.before))

    def backward(self, gradients: list[Tensor]) -> None:
        """Replace ``gradients`` at the block's outputs by those at its inputs."""
        for batch in range(len(gradients)):
            parts = self._part.map_microbatches(batch, partial(self._backward, gradients[batch], batch))
            gradients[batch] = self._part.store.keep(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _backward(self, gradient: Tensor, batch: int, rows: slice) -> Tensor:
        block, part = self._block, self._part
        gradient = moved(rows_of(gradient, rows, len(part.batches[batch])), part.device)
        tokens = slice(rows.start * part.length, rows.stop * part.length)
        odd_B = torch.arange(self._numbers[batch] + rows.start, self._numbers[batch] + rows.stop) % 2
        leaves: list[Tensor] = []
        noted: list[tuple[Any, ...]] = []  # arguments of ``_add``, on the device

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves.append(args[0].detach().requires_grad_(True))
            return block.module(leaves[0], *args[1:], **kwargs)

        with ExitStack() as hooks:
            for linear in block.linears:
                hooks.callback(linear.watch(partial(self._note, noted, odd_B, linear.name)).remove)
            hooks.enter_context(block.linearized())
            output = hidden_of(part.run(block, batch, rows, call))
            if not output.requires_grad:
                raise NotDifferentiableError(f"the output of {block.name} does not depend on its input by a gradient")
            with backward_explained(block.name):
                output.backward(gradient)
        # What follows comes after the pass, which may have been out of memory.
        square_T = gradient.float().square().flatten(2).sum(dim=-1).flatten().cpu()
        self.squares[block.name][batch][tokens] = _finite(square_T, f"output of {block.name}")
        if self.residual_EE is not None:
            flat_TE = gradient.flatten(0, -2).float()
            self.residual_EE += flat_TE.mT @ flat_TE
        for each in noted:
            self._add(batch, tokens, *each)
        assert leaves[0].grad is not None
        return leaves[0].grad.cpu()

    def _note(
        self, noted: list[tuple[Any, ...]], odd_B: Tensor, name: str, gradient: Tensor, tokens_T: Tensor | None = None
    ) -> None:
        gradient_TO = gradient.detach().flatten(0, -2)
        square_TO = gradient_TO.float().square()
        sum_T = square_TO.sum(dim=1)
        factor_T = sum_T.pow(POWER - 1.0).masked_fill_(sum_T == 0.0, 0.0)  # so that few tokens do not decide
        sum_2O = torch.stack((square_TO.sum(dim=0), factor_T @ square_TO))
        halves = products_of_halves(gradient_TO, factor_T, odd_B) if name in self.halves else None
        noted.append((name, sum_2O, sum_T, tokens_T, halves))

    def _add(
        self, batch: int, tokens: slice, name: str, sum_2O: Tensor, sum_T: Tensor, tokens_T: Any, halves: Any
    ) -> None:
        sum_T = _finite(sum_T.cpu(), f"outputs of {name}")
        self.rows[name] += sum_2O.double().cpu()
        self.reached[name] += len(sum_T)
        own_T = self.squares[self._keys.get(name, self._block.name)][batch][tokens]
        if tokens_T is not None:
            own_T[tokens_T.cpu()] = sum_T
        elif name in self._keys and len(sum_T) == len(own_T):
            own_T += sum_T
        if halves is not None:
            self.halves[name] += halves


def _finite(square_T: Tensor, where: str) -> Tensor:
    if not bool(square_T.isfinite().all()):
        raise NotDifferentiableError(f"gradients at the {where} are not finite")
    return square_T


def _all_reduced(sums: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    if ranks.size == 1 or not sums:
        return dict(sums)
    flat = ranks.all_reduce(torch.cat([own.flatten() for own in sums.values()]))
    parts = flat.split([own.numel() for own in sums.values()])
    return {name: part.view_as(own) for part, (name, own) in zip(parts, sums.items(), strict=True)}
