"""Records of runs that never were."""

from __future__ import annotations

from dataclasses import replace

from optima.reporting.record import BlockRecord, LinearRecord, Report, RunRecord

LINEAR = LinearRecord(
    block=0,
    name="model.layers.0.mlp.up_proj",
    shape=(8, 4),
    pattern="0.5 per row",
    sparsity_asked=0.5,
    sparsity=0.5,
    error_mask=0.2,
    error_selector=0.2,
    error=0.1,
    solver="low-rank-cg",
    gap_max=5e-5,
    iterations_mean=6.5,
    iterations_max=9,
    rows=8,
    rows_not_converged=0,
    damping=0.01,
    seconds=0.25,
    gap_written_max=2e-3,
    loss_written=1e-3,
    tokens=1024,
)
BLOCK = BlockRecord(0, "model.layers.0", {"forward": 0.5, "solve": 0.25})
RUN = RunRecord(
    model="tiny/model",
    recipe={"selector": "wanda", "solver": "low-rank-cg", "gap": 1e-4, "targets": [".*"]},
    versions={"optima": "0.1.0", "torch": "2.6"},
    seed=0,
    data_hash="abc",
    num_tokens=1024,
    device="cpu",
    dtype="float32",
    peak_memory_bytes=3 * 2**30,
    seconds=62.0,
    created="2025-01-01T00:00:00+00:00",
    notes=(),
)


def linear(name: str = "mlp.up_proj", block: int = 0, **changes: object) -> LinearRecord:
    return replace(LINEAR, block=block, name=f"model.layers.{block}.{name}", **changes)


def report(*linears: LinearRecord, **changes: object) -> Report:
    return Report(replace(RUN, **changes), linears or (LINEAR,), (BLOCK,))


def unsolved(**changes: object) -> LinearRecord:
    nothing = {"solver": "none", "gap_max": None, "iterations_mean": 0.0, "iterations_max": 0}
    nothing |= {"gap_written_max": None, "loss_written": None}
    return linear(**{**nothing, "error": 0.2, **changes})
