"""What a run computes and moves, from a model's shapes: the one account that is both checked here and carried on.

Shapes: T tokens, D inputs, O outputs, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from optima.calibration.fisher import LEAST_TOKENS
from optima.calibration.hessians import share_out
from optima.calibration.weights import MOST_ROWS
from optima.core.problem import chunk_rows
from optima.recipe import FISHER_FRACTION
from optima.selectors.optima import Optima


@dataclass(frozen=True)
class Counts:
    """Of a recipe: of selecting, and of the rest, which can be shared and was counted at 512 and 1,024 inputs.

    Attributes:
        selector: of the package; None if what it takes is not worth counting.
        rows: products of a linear's rows with a D x D matrix.
        cubes: products of two such matrices; a Cholesky and an inverse take as long as one.
    """

    selector: Optima | None
    rows: float = 32
    cubes: float = 2

    def select(self, outputs: int, inputs: int, coupled: bool) -> tuple[float, float]:
        """Operations of one linear's mask: products, and eigendecompositions of its rows."""
        if self.selector is None:
            return 0.0, 0.0
        stages, iterations = self.selector.stages, self.selector.iterations
        product = 2.0 * outputs * inputs**2
        if coupled:  # two products on either side
            both = 2 * product + 4.0 * outputs**2 * inputs
            return stages * iterations * both + 2.0 * outputs**3, 2.0 * outputs**3
        factor = 2.0 if inputs <= iterations * outputs else 1.0 / 3.0  # with its inverse, or without
        return stages * (iterations * product + factor * inputs**3), 0.0


DEFAULT = Counts(Optima())
WANDA = Counts(None)


@dataclass(frozen=True)
class Group:
    """Linears of a block with one input. ``copies`` of the group are alike; ``share`` of the tokens reaches each."""

    inputs: int
    outputs: tuple[int, ...]
    copies: int = 1
    share: float = 1.0

    @property
    def weights(self) -> int:
        return self.inputs * sum(self.outputs)

    @property
    def cost(self) -> float:
        """As ``optima.calibration.hessians.owners_of`` shares work out."""
        return float(self.inputs**3 + 10 * self.weights * self.inputs)

    def coupled(self, counts: Counts) -> list[int]:
        """Outputs of the linears whose rows are coupled: see ``optima.calibration.weights.couples``."""
        most = min(self.inputs, MOST_ROWS) if counts.selector is not None and self.copies == 1 else 0
        return [outputs for outputs in self.outputs if outputs <= most]

    def chunks(self, device: str) -> int:
        """Into which the rows of its largest linear fall apart."""
        outputs = max(self.outputs)
        return -(-outputs // chunk_rows(self.inputs, outputs, torch.device(device)))

    def solve(self, counts: Counts, share: float) -> tuple[float, float]:
        """Operations of a process that has a share of the rows: products, and eigendecompositions."""
        coupled = self.coupled(counts)
        selects = [counts.select(outputs, self.inputs, outputs in coupled) for outputs in self.outputs]
        products = 2 * (counts.cubes * self.inputs**3 + counts.rows * share * self.weights * self.inputs)
        eigen = 2.0 * self.inputs**3 * bool(coupled)
        return products + sum(product for product, _ in selects), eigen + sum(rows for _, rows in selects)


@dataclass(frozen=True)
class Model:
    """A decoder of like blocks.

    Attributes:
        attention: width of all heads together.
        groups: of a block.
    """

    name: str
    blocks: int
    hidden: int
    attention: int
    vocabulary: int
    groups: tuple[Group, ...]

    @property
    def parameters(self) -> float:
        return self.blocks * self.block_weights + 2.0 * self.vocabulary * self.hidden

    @property
    def block_weights(self) -> float:
        return float(sum(group.copies * group.weights for group in self.groups))

    def forward_flops(self, tokens: int, length: int) -> float:
        """Of one block."""
        products = sum(group.copies * group.share * group.weights for group in self.groups)
        return 2.0 * tokens * products + 4.0 * tokens * length * self.attention


def llama(name: str, sizes: Mapping[str, int]) -> Model:
    """A dense decoder with grouped queries and gates."""
    hidden, middle = sizes["hidden"], sizes["middle"]
    heads = sizes.get("heads", hidden)
    pair = sizes["pair"]  # outputs of keys, and of values
    groups = (
        Group(hidden, (heads, pair, pair)),
        Group(heads, (hidden,)),
        Group(hidden, (middle, middle)),
        Group(middle, (hidden,)),
    )
    return Model(name, sizes["blocks"], hidden, heads, sizes["vocabulary"], groups)


@dataclass(frozen=True)
class Work:
    """What the busiest process does in a whole run, and what the processes exchange.

    Attributes:
        gradients: floating-point operations of the gradient pass.
        forward: of the passes over the pruned blocks.
        hessian: of the products X^T X, both triangles.
        solve: of select, solve and rounding, but for
        eigen: eigendecompositions, as products of their size.
        reduced: bytes of statistics that the processes bring together, counted once.
        shared: bytes of weights and masks that go to the others, counted once.
        activations: bytes of a block's inputs in a process.
    """

    gradients: float
    forward: float
    hessian: float
    solve: float
    eigen: float
    reduced: float
    shared: float
    activations: float


def work(model: Model, tokens_of: tuple[int, int], processes: int, itemsize: int, counts: Counts = DEFAULT) -> Work:
    """A run by objective loss, without tuning or sensitivity pass; ``tokens_of``: sequences, and the length of one."""
    samples, length = tokens_of
    own = -(-samples // processes)
    tokens = own * length
    one = model.forward_flops(tokens, length)
    last = 2.0 * tokens * sum(group.copies * group.share * group.weights for group in model.groups[-1:])
    head = 2.0 * tokens * model.vocabulary * model.hidden
    fraction = min(max(FISHER_FRACTION, LEAST_TOKENS / math.prod(tokens_of)), 1.0)
    coupling = 2.0 * tokens * sum(outputs**2 for group in model.groups for outputs in group.coupled(counts))
    gram = sum(2.0 * group.copies * group.share * tokens * group.inputs**2 for group in model.groups)
    each = [group for group in model.groups for _ in range(group.copies)]
    device = "cuda" if itemsize == 2 else "cpu"  # here float32 on a CPU, there bfloat16 on cards
    owners = share_out([group.cost for group in each], processes, [group.chunks(device) > 1 for group in each])
    load, eigen = [0.0] * processes, [0.0] * processes
    reduced = shared = 0.0
    for group, owner in zip(each, owners, strict=True):
        chunks = group.chunks(device)
        share = -(-chunks // processes) / chunks if owner is None else 1.0
        for rank in range(processes) if owner is None else [owner]:
            products, spectrum = group.solve(counts, share)
            load[rank] += products
            eigen[rank] += spectrum
        reduced += 8.0 * group.inputs**2  # a float64 Hessian
        reduced += sum(8 * outputs * (outputs + 1) for outputs in group.coupled(counts))
        # Where all have rows, the mask goes out before.
        shared += group.weights * (itemsize + (1 if owner is not None else 2))
    alone = processes == 1
    return Work(
        gradients=(model.blocks * (3 * one + coupling) + 2 * head) * fraction,
        forward=model.blocks * (2 * one - last) - one,
        hessian=model.blocks * gram,
        solve=model.blocks * max(load),
        eigen=model.blocks * max(eigen),
        reduced=0.0 if alone else model.blocks * reduced,
        shared=0.0 if alone else model.blocks * shared,
        activations=float(tokens * model.hidden * itemsize),
    )
