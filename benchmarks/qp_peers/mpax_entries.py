"""MPAX's part of the table: at the paper's tolerance, and at the tolerance that reaches a true gap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from harness.table import Entry, power
from harness.timing import Timed, timed

from qp_peers.mpax_pdhg import PAPER_EPS, PAPER_SLACK, STRETCH, Form, MpaxRows, masked_weight

if TYPE_CHECKING:
    from qp import Bench

# 128 sequences of 2,048 tokens, the paper's calibration set: the scale between X^T X / T and X^T X.
PAPER_TOKENS = 128 * 2048
UNLIMITED = 10**6
# The package's default form is so slow that few rows of small layers have to do.
SPARSE_ROWS, SPARSE_INPUTS = 4, 1024
# A run that reached its gap sooner than this is timed again.
SHORT_SECONDS = 3.0
CPU = torch.device("cpu")
Answer = Timed[tuple[np.ndarray, np.ndarray]]


def mpax_entries(bench: Bench, target: float) -> list[Entry]:
    """All entries of one case; ``credit`` favours MPAX by what larger batches would gain it."""
    rows = min(bench.options.mpax_rows, bench.case.num_rows, len(bench.optimal_R))
    runner = _Runner(bench, rows)
    credit = runner.credit()
    entries = [runner.paper(form, credit) for form in ("dense", "repaired")]
    entries.append(runner.paper("repaired", credit, PAPER_TOKENS))
    for form in ("dense", "repaired"):
        entries.append(runner.reach(form, target, credit))
    if bench.case.num_inputs <= SPARSE_INPUTS:
        entries.append(runner.sparse(entries[-2]))
    return entries


@dataclass
class _Runner:
    bench: Bench
    rows: int

    def build(self, slack: float, scale: float = 1.0, rows: int | None = None) -> MpaxRows:
        part = self.bench.problem.rows(slice(0, rows or self.rows))
        return MpaxRows.build(self.bench.hessian, part, slack, scale)

    def run(self, problem: MpaxRows, form: Form, eps: float, stretches: int, repeats: int = 1) -> Answer:
        """Timed after a short run has compiled the same shapes."""
        problem.solve(form, eps, 1)
        return timed(lambda: problem.solve(form, eps, stretches), CPU, repeats, warm=False)

    def credit(self) -> float:
        """rows/s of a batch four times as large over rows/s of the batch that is timed, at equal iterations."""
        larger = min(4 * self.rows, self.bench.case.num_rows)
        small, large = (
            self.run(self.build(0.0, rows=rows), "repaired", 0.0, 4, self.bench.options.repeats).seconds
            for rows in (self.rows, larger)
        )
        return max((larger / large) / (self.rows / small), 1.0)

    def gap(self, answer: Answer) -> float:
        part = self.bench.problem.rows(slice(0, self.rows))
        return self.bench.true_gap(masked_weight(part, answer.result[0]))

    def entry(self, method: str, answer: Answer, credit: float, against: float, note: str) -> Entry:
        counts = answer.result[1]
        return self.bench.entry(
            method, self.rows, answer.seconds / credit, against, target=against, repeats=answer.repeats,
            gap_true=self.gap(answer), iterations=f"{counts.mean():.0f}, max {counts.max()}", note=note,
        )  # fmt: skip

    def paper(self, form: Form, credit: float, scale: float = 1.0) -> Entry:
        """The paper's tolerance and slack; against our loosest gap."""
        answer = self.run(self.build(PAPER_SLACK, scale), form, PAPER_EPS, UNLIMITED, self.bench.options.repeats)
        name = f"MPAX {form}, eps 1e-2" + ("" if scale == 1.0 else ", H not averaged")
        note = f"larger-batch credit {credit:.2f}"
        return replace(self.entry(name, answer, credit, max(self.bench.ours), note), target=None)

    def reach(self, form: Form, target: float, credit: float) -> Entry:
        """The loosest eps, to half a decade and with exact bounds, whose true gap is at most ``target``."""
        problem, eps = self.build(0.0), PAPER_EPS
        probe = self.run(problem, form, 0.0, 4)
        stretches = max(int(4 * self.bench.options.mpax_seconds / probe.seconds), 1)

        def attempt(eps: float) -> tuple[Answer, bool]:
            answer = self.run(problem, form, eps, stretches)
            return answer, self.gap(answer) <= target

        answer, reached = attempt(eps)
        while not reached and int(answer.result[1].max()) < stretches * STRETCH:
            eps /= 10.0
            answer, reached = attempt(eps)
        if reached and eps < PAPER_EPS:
            looser, enough = attempt(eps * 10**0.5)
            if enough:
                answer, eps = looser, eps * 10**0.5
        if reached and answer.seconds < SHORT_SECONDS:
            answer = self.run(problem, form, eps, stretches, self.bench.options.repeats)
        note = f"eps {eps:.0e}" if reached else "stopped by --mpax-seconds"
        note = f"{note}, larger-batch credit {credit:.2f}"
        entry = self.entry(f"MPAX {form}, true gap {power(target)}", answer, credit, target, note)
        return entry if reached else replace(entry, lower_bound=True)

    def sparse(self, dense: Entry) -> Entry:
        """``create_qp``'s default takes the same iterations as ``dense``; its time per iteration and row is measured.

        On few rows: it gains nothing from more, and holds a copy of the matrix for each.
        """
        problem = self.build(0.0, rows=SPARSE_ROWS)
        few = {stretches: self.run(problem, "sparse", 0.0, stretches).seconds for stretches in (1, 3)}
        dense_few = {stretches: self.run(self.build(0.0), "dense", 0.0, stretches).seconds for stretches in (1, 9)}
        per_row = (few[3] - few[1]) / 2 / SPARSE_ROWS
        dense_per_row = (dense_few[9] - dense_few[1]) / 8 / self.rows
        factor = max(per_row / dense_per_row, 1.0)
        return self.bench.entry(
            dense.method.replace("dense", "sparse"),
            self.rows,
            dense.seconds * factor,
            float(dense.against or 0),
            target=dense.target,
            gap_true=dense.gap_true,
            iterations=dense.iterations,
            lower_bound=dense.lower_bound,
            note=f"the package's default: {factor:.0f}x dense per iteration, measured on {SPARSE_ROWS} rows",
        )
