"""Whole blocks: which ones the model misses least.

Blocks are removed one by one. Each is the one without which the model's predictions are nearest to the dense model's,
measured by the KL divergence on a few sequences, and measured again after each removal.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from optima.calibration.activations import Activations
from optima.calibration.lm_head import LmHead
from optima.models.blocks import Stack
from optima.models.forward import rows_of
from optima.state import RunState

SEQUENCES = 8  # that the removals are measured on
CANDIDATES = 12  # blocks that are measured again after the first removal: those that were missed least


@torch.no_grad()
def choose_blocks(stack: Stack, acts: Activations, head: LmHead | None, count: int, run: RunState) -> dict[int, float]:
    """The blocks to remove, in the order of their removal, with the divergence after each. All ranks call it.

    Never the first or the last block.

    Args:
        stack: all blocks.
        acts: the inputs of its first block, with the arguments of all blocks.
        head: the LM head; None: the relative change of the last hidden states is measured.
        count: blocks to remove.
        run: settings.
    """
    batches, samples = [], 0
    for number, batch in enumerate(acts.batches):
        if samples < -(-SEQUENCES // acts.ranks.size):
            batches.append(number)
            samples += len(batch)
    part, dense = acts.part(batches), acts.part(batches)
    run.progress.stage("blocks", count)
    for block in stack.blocks:
        with run.weights.on(block, run.device, run.clock), run.clock("forward"):
            dense.forward(block)
    candidates, chosen = [block.index for block in stack.blocks[1:-1]], dict[int, float]()
    for _ in range(count):
        found = _without_each(stack, part, dense, head, candidates, chosen, run)
        ranked = sorted(found, key=lambda index: found[index])
        chosen[ranked[0]] = found[ranked[0]]
        candidates = ranked[1 : 1 + max(CANDIDATES, count)]
        run.progress.block(stack.blocks[ranked[0]].name)
    return chosen


def _without_each(
    stack: Stack,
    part: Activations,
    dense: Activations,
    head: LmHead | None,
    candidates: Sequence[int],
    removed: Collection[int],
    run: RunState,
) -> dict[int, float]:
    base, ways = part.part(), dict[int, Activations]()
    for block in stack.blocks:
        if block.index in removed:
            continue
        with run.weights.on(block, run.device, run.clock), run.clock("forward"):
            for way in ways.values():
                way.forward(block)
            if block.index in candidates:
                ways[block.index] = base.part()
            base.forward(block)
    return {index: _divergence(way, dense, head) for index, way in ways.items()}


def _divergence(way: Activations, dense: Activations, head: LmHead | None) -> float:
    sums = torch.zeros(2, dtype=torch.float64)
    if head is None:
        for found, target in zip(way.hidden, dense.hidden, strict=True):
            sums += torch.stack([(found.double() - target.double()).square().sum(), target.double().square().sum()])
    else:
        with head.error(way) as cost:
            for microbatch in way.numbered().values():
                found, target = (rows_of(each.hidden[microbatch.batch], *microbatch[1:]) for each in (way, dense))
                sums += torch.tensor([float(cost(found, target, microbatch)), 1.0], dtype=torch.float64)
    lost, whole = way.ranks.all_reduce(sums).tolist()
    return float(lost / whole)
