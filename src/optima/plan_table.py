"""Print a plan: what would be pruned, and what it will take."""

from __future__ import annotations

from itertools import groupby

import torch
from rich.console import Console
from rich.table import Column, Table

from optima.device import REMEDY, is_there
from optima.memory import on_cpu
from optima.models.blocks import Block
from optima.names import kind
from optima.patterns import Pattern
from optima.plan import Plan
from optima.reporting.summary import runtime_note


def print_plan(plan: Plan, name: str, console: Console) -> None:
    """Print ``plan`` as a table (blocks alike in one group) and a few lines on memory."""
    table = Table(title=f"{name}: what would be pruned", title_justify="left")
    for heading in ("blocks", "linear", "outputs x inputs", "sparsity"):
        table.add_column(heading)
    for _, same in groupby(plan.found.blocks, key=lambda block: _structure(plan, block)):
        blocks = list(same)
        span = f"{blocks[0].index}" if len(blocks) == 1 else f"{blocks[0].index}-{blocks[-1].index}"
        for row, names in _rows(plan, blocks[0]).items():
            named = names[0] if len(names) == 1 else f"{row[0]} ({len(names)})"
            table.add_row(span, named.replace(blocks[0].name, "*").replace(kind(blocks[0].name), "*"), *row[1:])
        table.add_section()
    console.print(table)
    share = 100.0 * plan.pruned_parameters / plan.num_parameters
    held = min(plan.inputs_bytes, plan.left_bytes)
    lines = {
        "weights in these linears": f"{plan.pruned_parameters:,} of {plan.num_parameters:,} parameters ({share:.0f}%)",
        "sparsity of all of them": f"{plan.sparsity:.2%}",
        "main memory": f"at most {_size(plan.host.total + held)}: libraries and weights {_size(plan.host.least)}, "
        f"work {_size(plan.host.total - plan.host.least)}, block inputs {_size(held)}",
        "disk": f"{_size(plan.model_bytes)} for the result"
        + (f", {_size(plan.beside_bytes)} for experts during the run" if plan.beside_bytes else "")
        + (f", {_size(plan.inputs_bytes - held)} for block inputs during the run" if plan.inputs_bytes > held else ""),
        "passes": f"{plan.passes} over the calibration text; weights are read {plan.reads} times",
        "work space (device)": f"at most {_size(plan.work_bytes)}"
        + (" (for a GPU: --device cuda)" if on_cpu(plan.recipe) else f", and {_size(plan.block_bytes)} for a block"),
    }
    grid = Table.grid(Column(no_wrap=True, min_width=28), padding=(0, 1))  # a long value is wrapped in its column
    for key, value in lines.items():
        grid.add_row(key, value)
    console.print(grid, highlight=False)
    for advice in _advice(plan):
        console.print(f"does not fit: {advice}", highlight=False, markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    note = runtime_note(str(pattern) for pattern in plan.found.patterns.values())
    console.print(f"runtimes: {note}".replace("**", "").replace("`", ""), highlight=False, markup=False)


def _advice(plan: Plan) -> list[str]:
    """What to change if main memory or the card does not hold what the plan takes."""
    short = plan.host.shortage()
    lines = [short] if short else []
    device = torch.device("cuda" if plan.recipe.device == "auto" else plan.recipe.device)
    if device.type == "cuda" and is_there(device):
        room, _ = torch.cuda.mem_get_info(device)  # beside other processes and the driver's own
        if plan.work_bytes + plan.block_bytes > room:
            lines.append(f"the card has {_size(room)} free: {REMEDY}")
    return lines


def _rows(plan: Plan, block: Block) -> dict[tuple[str, str, str], list[str]]:
    """Names of a block's linears that differ in a number alone, as experts do, by what a row shows of them."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for linear in block.linears:
        outputs, inputs = linear.shape
        row = (kind(linear.name), f"{outputs} x {inputs}", str(plan.found.patterns[linear.name]))
        rows.setdefault(row, []).append(linear.name)
    return rows


def _structure(plan: Plan, block: Block) -> list[tuple[str, tuple[int, int], Pattern]]:
    """What the lines of a block show."""
    return [
        (linear.name.removeprefix(block.name), linear.shape, plan.found.patterns[linear.name])
        for linear in block.linears
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
