"""The whole story on one page: capture block inputs, then for each block calibrate, select, solve, write, propagate.

Shapes: O outputs, D inputs, B sequences in a batch, L tokens in a sequence, E hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optima.calibration.capture import BlockInputs, capture_block_inputs
from optima.calibration.gradient import regional_gradients
from optima.calibration.statistics import HessianCollector
from optima.device import full_precision, on_device
from optima.linalg.statistics import Statistics
from optima.models.stacks import Block, Linear
from optima.patterns import Pattern
from optima.qp import Hessian, RowSolution, Status, make_problem, solve_rows
from optima.qp.rows import rows_per_chunk
from optima.recipe import Recipe
from optima.reporting.progress import Progress
from optima.reporting.record import LinearRecord
from optima.selectors.base import ExpectsTargets, LinearTask, Selection, Selector, Target, needs_of
from optima.swaps.search import Refined

Dump = Callable[[Linear, Hessian], None]
Visit = Callable[[Block, Linear, Hessian | None], None]


@dataclass
class Pruner:
    """Prunes the blocks of a model in place, one block on the device at a time.

    Attributes:
        recipe: what to do.
        device: where blocks are calibrated and solved.
        progress: is told of every linear.
        dump: called with each linear and its Hessian before it is pruned.
        records: one entry a pruned linear.
        notes: what was not done, or deviated from the recipe.
    """

    recipe: Recipe
    device: torch.device
    progress: Progress
    dump: Dump | None = None
    records: list[LinearRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._selector = self.recipe.make_selector()
        self._refinement = self.recipe.make_refinement()
        self._solver = self.recipe.make_solver()
        self._patterns = self.recipe.make_patterns(self._selector)
        # Of the block at hand, by the linear's name; empty unless the selector needs them.
        self._gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> None:
        """Prune ``blocks`` (all of the model's, in order) with the calibration token ``batches``, (B, L) each."""
        expect_targets(self._selector, blocks)
        inputs = capture_block_inputs(model, blocks, batches)
        self._allocate(blocks, BlockInputs(list(inputs.hidden), inputs.calls))
        self._walk(blocks, inputs, self._visit, gradients="gradient" in needs_of(self._selector))

    def _allocate(self, blocks: Sequence[Block], inputs: BlockInputs) -> None:
        """Give each linear its share of the global sparsity, from a survey of the dense model where that takes one."""
        allocation = self.recipe.make_allocation()
        if allocation is None:
            return

        def survey(block: Block, linear: Linear, hessian: Hessian | None) -> None:
            if hessian is not None:
                weight_OD = linear.weight_OD.to(self.device, torch.float32, copy=True)
                with full_precision():
                    allocation.observe(block.index, LinearTask(linear.name, weight_OD, Statistics(hessian)))

        self._walk(blocks, inputs, survey)
        self._patterns = self._patterns.share(allocation.allocate())

    def _walk(self, blocks: Sequence[Block], inputs: BlockInputs, visit: Visit, gradients: bool = False) -> None:
        """Visit each linear of each block, calibrated; ``inputs`` become the outputs of the blocks as visited."""
        self.progress.start(len(blocks), max(len(block.linears) for block in blocks))
        for block in blocks:
            self.progress.block(block.index)
            with on_device(block.module, self.device):
                for hessian, linears in self._calibrate(block, inputs, gradients):
                    for linear in linears:
                        visit(block, linear, hessian)
                self._propagate(block, inputs)

    def _calibrate(
        self, block: Block, inputs: BlockInputs, gradients: bool
    ) -> Iterator[tuple[Hessian | None, list[Linear]]]:
        """One Hessian for each distinct input, with the linears that share it; None for those never reached."""
        if not block.linears:
            return
        assert self.recipe.sink_weight is not None, "a recipe fills in its default"
        collector = HessianCollector(block.linears, self.recipe.sink_weight)
        for batch, hidden_BLE in enumerate(inputs.hidden):
            with collector.batch(*hidden_BLE.shape[:2]), full_precision():
                inputs.run(block, batch, self.device)
        self._note_sinks(block, collector)
        if gradients:
            with full_precision():
                self._gradients = regional_gradients(block, inputs, self.device)
        yield from collector.finish(self.recipe.damping)

    def _visit(self, block: Block, linear: Linear, hessian: Hessian | None) -> None:
        """Prune a linear if it can be."""
        if hessian is None:
            self.notes.append(f"{linear.name} was not pruned: no calibration token reached it")
        else:
            self._prune(block, linear, hessian)

    def _prune(self, block: Block, linear: Linear, hessian: Hessian) -> None:
        """Select, solve and write back one linear, and record what was lost."""
        if self.dump is not None:
            self.dump(linear, hessian)
        started = time.perf_counter()
        pattern = self._patterns.of(linear.name)
        weight_OD = linear.weight_OD.to(self.device, torch.float32, copy=True)
        with full_precision():
            task = LinearTask(linear.name, weight_OD.clone(), Statistics(hessian), self._gradients.get(linear.name))
            selection = self._selector.select(task, pattern)
            selection, refined = self._refine(weight_OD, hessian, selection, pattern)
        solution = self._solve(weight_OD, hessian, selection)
        masked_OD = weight_OD * selection.keep_OD
        selected_OD = masked_OD if selection.weight_OD is None else selection.weight_OD
        linear.write(selected_OD if solution is None else solution.weight_RD)
        error = RelativeError(hessian, weight_OD)
        error_mask = error(masked_OD)
        record = LinearRecord(
            block=block.index,
            name=linear.name,
            shape=linear.shape,
            pattern=str(pattern),
            sparsity_asked=pattern.sparsity,
            sparsity=1.0 - float(selection.keep_OD.double().mean()),
            error_mask=error_mask,
            error_selector=error_mask if selection.weight_OD is None else error(selected_OD.to(linear.weight_OD.dtype)),
            error=error(linear.weight_OD.to(self.device)),
            **certified(solution),
            rows=linear.shape[0],
            damping=hessian.damping,
            seconds=time.perf_counter() - started,
            swaps=None if refined is None else int(refined.swaps_O.sum()),
            rows_swap_optimal=None if refined is None else int(refined.optimal_O.sum()),
        )
        self._note(linear, hessian, solution)
        self.records.append(record)
        self.progress.linear(record)

    def _refine(
        self, weight_OD: Tensor, hessian: Hessian, selection: Selection, pattern: Pattern
    ) -> tuple[Selection, Refined | None]:
        """Improve the selector's mask by swaps if the recipe asks for it."""
        if self._refinement is None:
            return selection, None
        refined = self._refinement.refine(hessian, weight_OD, selection.keep_OD, pattern)
        return Selection(refined.keep_OD, refined.weight_OD), refined

    def _solve(self, weight_OD: Tensor, hessian: Hessian, selection: Selection) -> RowSolution | None:
        """Re-solve the kept weights of every row, from the selector's weights where they are better."""
        if self._solver is None:
            return None
        lower_OD = upper_OD = None
        if self.recipe.max_change is not None:
            room_O1 = self.recipe.max_change * weight_OD.square().mean(dim=1, keepdim=True).sqrt()
            lower_OD, upper_OD = weight_OD - room_O1, weight_OD + room_O1
        problem = make_problem(hessian, weight_OD, selection.keep_OD, selection.weight_OD, lower_OD, upper_OD)
        return solve_rows(self._solver, hessian, problem)

    def _note(self, linear: Linear, hessian: Hessian, solution: RowSolution | None) -> None:
        if hessian.damping != self.recipe.damping:
            self.notes.append(f"{linear.name}: damping raised to {hessian.damping:g} to factorise its hessian")
        if solution is not None and solution.note:
            self.notes.append(f"{linear.name}: {solution.note}")

    def _note_sinks(self, block: Block, collector: HessianCollector) -> None:
        if collector.without_sinks:
            names = ", ".join(collector.without_sinks)
            note = f"{block.name}: sink_weight does not count for {names}: not given one input for each token"
            if note not in self.notes:  # an allocation's survey saw the same
                self.notes.append(note)

    def _propagate(self, block: Block, inputs: BlockInputs) -> None:
        """Replace each batch's hidden states by the pruned block's outputs."""
        for batch in range(len(inputs.hidden)):
            inputs.hidden[batch] = inputs.run(block, batch, self.device).cpu()


def expect_targets(selector: Selector, blocks: Sequence[Block]) -> None:
    """Tell a selector that asks for it of every linear to prune."""
    if isinstance(selector, ExpectsTargets):
        linears = [linear for block in blocks for linear in block.linears]
        selector.expect([Target(linear.name, linear.shape, linear.transposed) for linear in linears])


def certified(solution: RowSolution | None) -> dict[str, Any]:
    """What the solver did and proved, as fields of a ``LinearRecord``."""
    if solution is None:
        nothing = {"iterations_mean": 0.0, "iterations_max": 0, "rows_not_converged": 0}
        return {"solver": "none", "gap_max": None, "gap_median": None} | nothing
    return {
        "solver": solution.solver,
        "gap_max": float(solution.gap_R.max()),
        "gap_median": float(solution.gap_R.median()),
        "iterations_mean": float(solution.iterations_R.double().mean()),
        "iterations_max": int(solution.iterations_R.max()),
        "rows_not_converged": int((solution.status_R != Status.CONVERGED).sum()),
    }


class RelativeError:
    """||X (V - W)^T||_F^2 / ||X W^T||_F^2 from the undamped Hessian, in float64; 0 where both vanish."""

    def __init__(self, hessian: Hessian, dense_OD: Tensor) -> None:
        self._hessian = hessian
        self._dense_OD = dense_OD
        self._energy = self._quadratic(torch.zeros_like(dense_OD))

    def __call__(self, weight_OD: Tensor) -> float:
        """The relative reconstruction error of ``weight_OD``."""
        error = self._quadratic(weight_OD)
        return 0.0 if error == 0.0 else error / self._energy if self._energy else float("inf")

    def _quadratic(self, weight_OD: Tensor) -> float:
        total = 0.0
        chunk = rows_per_chunk(self._hessian.num_inputs)
        for dense, weight in zip(self._dense_OD.split(chunk), weight_OD.split(chunk), strict=True):
            difference = dense.double() - weight
            total += float(torch.linalg.vecdot(difference, difference @ self._hessian.matrix_DD).sum())
        return max(total, 0.0)
