"""The whole story on one page: capture block inputs, then for each block calibrate, select, solve, write, propagate.

Shapes: O outputs, D inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optima.calibration.activations import BlockInputs, capture_block_inputs
from optima.calibration.hessian import HessianCollector
from optima.models.blocks import Block, Linear
from optima.patterns import Pattern
from optima.qp import Hessian, RowSolver, Status, make_problem, solve_rows
from optima.qp.rows import full_precision, rows_per_chunk
from optima.recipe import Recipe
from optima.reporting.progress import Progress
from optima.reporting.record import LinearRecord
from optima.selectors.base import Selector

Dump = Callable[[Linear, Hessian], None]


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

    @torch.no_grad()
    def run(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]) -> None:
        """Prune ``blocks`` (all of the model's, in order) with the calibration token ``batches``, (B, L) each."""
        selector, solver = self.recipe.make_selector(), self.recipe.make_solver()
        pattern = self.recipe.make_pattern(selector)
        inputs = capture_block_inputs(model, blocks, batches)
        self.progress.start(len(blocks), max(len(block.linears) for block in blocks))
        for block in blocks:
            self.progress.block(block.index)
            with on_device(block.module, self.device):
                for hessian, linears in self._calibrate(block, inputs):
                    for linear in linears:
                        self._prune(block, linear, hessian, selector, solver, pattern)
                self._propagate(block, inputs)

    def _calibrate(self, block: Block, inputs: BlockInputs) -> Iterator[tuple[Hessian, list[Linear]]]:
        """One Hessian for each distinct input, with the linears that share it."""
        if not block.linears:
            return
        collector = HessianCollector(block.linears)
        for batch, hidden in enumerate(inputs.hidden):
            with collector.batch(samples=len(hidden)), full_precision():
                inputs.run(block, batch, self.device)
        for hessian, linears in collector.finish(self.recipe.damping):
            if hessian is None:
                self.notes.extend(
                    f"{linear.name} was not pruned: no calibration token reached it" for linear in linears
                )
            else:
                yield hessian, linears

    def _prune(
        self,
        block: Block,
        linear: Linear,
        hessian: Hessian,
        selector: Selector,
        solver: RowSolver | None,
        pattern: Pattern,
    ) -> None:
        """Select, solve and write back one linear."""
        started = time.perf_counter()
        if self.dump is not None:
            self.dump(linear, hessian)
        weight_OD = linear.weight_OD.to(self.device, torch.float32, copy=True)
        with full_precision():
            selection = selector.select(weight_OD.clone(), hessian, pattern)
        masked_OD = weight_OD * selection.keep_OD
        result_OD = masked_OD if selection.weight_OD is None else selection.weight_OD
        error = RelativeError(hessian, weight_OD)
        error_mask = error(masked_OD)
        error_selector = error_mask if selection.weight_OD is None else error(result_OD)
        solution = None
        if solver is not None:
            problem = make_problem(hessian, weight_OD, selection.keep_OD, selection.weight_OD)
            solution = solve_rows(solver, hessian, problem)
            result_OD = solution.weight_RD
            if solution.note:
                self.notes.append(f"{linear.name}: {solution.note}")
        linear.write(result_OD)
        if hessian.damping != self.recipe.damping:
            self.notes.append(f"{linear.name}: damping raised to {hessian.damping:g} to factorise its hessian")
        record = LinearRecord(
            block=block.index,
            name=linear.name,
            shape=linear.shape,
            pattern=str(pattern),
            sparsity=1.0 - float(selection.keep_OD.float().mean(dtype=torch.float64)),
            error_mask=error_mask,
            error_selector=error_selector,
            error=error(linear.weight_OD.to(self.device)),
            solver="none" if solution is None else solution.solver,
            gap_max=None if solution is None else float(solution.gap_R.max()),
            gap_median=None if solution is None else float(solution.gap_R.median()),
            iterations_mean=0.0 if solution is None else float(solution.iterations_R.double().mean()),
            iterations_max=0 if solution is None else int(solution.iterations_R.max()),
            rows=linear.shape[0],
            rows_not_converged=0 if solution is None else int((solution.status_R != Status.CONVERGED).sum()),
            damping=hessian.damping,
            seconds=time.perf_counter() - started,
        )
        self.records.append(record)
        self.progress.linear(record)

    def _propagate(self, block: Block, inputs: BlockInputs) -> None:
        """Replace each batch's hidden states by the pruned block's outputs."""
        for batch in range(len(inputs.hidden)):
            inputs.hidden[batch] = inputs.run(block, batch, self.device).cpu()


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


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module lives on ``device`` inside this context and returns to where it was."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
