"""Print a plan: what would be pruned, and what it will take."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from optima.models.stacks import Block
from optima.patterns import Pattern
from optima.plan import Plan


def print_plan(plan: Plan, name: str, console: Console) -> None:
    """Print ``plan`` as a table (blocks alike in one group) and a few lines on memory and operations."""
    table = Table(title=f"{name}: what would be pruned", title_justify="left")
    for heading in ("blocks", "linear", "outputs x inputs", "sparsity"):
        table.add_column(heading)
    for _, same in groupby(plan.blocks, key=lambda block: _structure(plan, block)):
        blocks = list(same)
        span = f"{blocks[0].index}" if len(blocks) == 1 else f"{blocks[0].index}-{blocks[-1].index}"
        for linear in blocks[0].linears:
            outputs, inputs = linear.shape
            name_in_blocks, pattern = linear.name.replace(blocks[0].name, "*"), plan.patterns[linear.name]
            table.add_row(span, name_in_blocks, f"{outputs} x {inputs}", str(pattern))
        table.add_section()
    console.print(table)
    share = 100.0 * plan.pruned_parameters / plan.num_parameters
    lines = {
        "weights in these linears": f"{plan.pruned_parameters:,} of {plan.num_parameters:,} parameters ({share:.0f}%)",
        "sparsity of all of them": f"{plan.sparsity:.2%}",
        "model (main memory)": _size(plan.model_bytes),
        "block inputs (main memory)": _size(plan.inputs_bytes),
        "work space (device, peak)": f"{_size(plan.memory_bytes)} (on a GPU {_size(plan.block_bytes)} more: one block)",
        "operations": f"{plan.operations / 1e12:.1f} TFLOP ({plan.operations / 1e12 / 0.2:.0f} s at 0.2 TFLOP/s)",
    }
    for key, value in lines.items():
        console.print(f"{key:28s} {value}", highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _structure(plan: Plan, block: Block) -> list[tuple[str, tuple[int, int], Pattern]]:
    """What the lines of a block show."""
    return [
        (linear.name.removeprefix(block.name), linear.shape, plan.patterns[linear.name]) for linear in block.linears
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
