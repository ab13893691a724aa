"""The result of a benchmark: entries, and the three forms they are written in."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One method on one case; None where a figure does not exist for it.

    Attributes:
        rows: how many rows were timed; ``rows_per_second`` is comparable between different counts.
        seconds: everything from H to the weights, median.
        prepare_seconds: of it, what all rows share, measured on its own.
        ratio: how many times longer a row takes than with ours at ``against``, the gap it is compared with.
        gap_true: largest relative suboptimality against the float64 oracle.
        product_share: share of the solve inside matrix products; ``dense_share`` counts triangular solves too.
        floor_share: time that the same products take alone, relative to the solve.
        rate_share: rate inside products relative to the machine's for the whole batch.
    """

    case: str
    num_inputs: int
    method: str
    rows: int
    seconds: float
    prepare_seconds: float = 0.0
    repeats: int = 1
    target: float | None = None
    against: float | None = None
    ratio: float | None = None
    iterations: str = ""
    gap_certified: float | None = None
    gap_true: float | None = None
    product_share: float | None = None
    dense_share: float | None = None
    floor_share: float | None = None
    rate_share: float | None = None
    lower_bound: bool = False
    ours: bool = False
    note: str = ""

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


@dataclass(frozen=True)
class Claim:
    """A sentence of the goal, and whether this run bears it out. ``passed`` None: not measured here."""

    text: str
    passed: bool | None
    figure: str

    @property
    def verdict(self) -> str:
        return {True: "PASS", False: "FAIL", None: "NOT RUN"}[self.passed]


COLUMNS = (
    "case", "D", "method", "rows", "seconds", "of it prepare", "rows/s", "x ours", "iterations",
    "gap certified", "gap true", "in products", "products alone", "of matmul rate", "note",
)  # fmt: skip


def power(value: float) -> str:
    """1e-4 rather than 0.0001 or 1e-04."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def cells(entry: Entry) -> list[str]:
    """The entry as the strings of ``COLUMNS``."""
    at_least = ">" if entry.lower_bound else ""
    return [
        entry.case, str(entry.num_inputs), entry.method, str(entry.rows),
        f"{at_least}{entry.seconds:.3g}", f"{entry.prepare_seconds:.2g}" if entry.prepare_seconds else "",
        f"{entry.rows_per_second:,.0f}",
        "" if entry.ratio is None else f"{at_least}{entry.ratio:.2f}", entry.iterations,
        _power(entry.gap_certified), _power(entry.gap_true), _percent(entry.product_share),
        _percent(entry.floor_share), _percent(entry.rate_share), entry.note,
    ]  # fmt: skip


def _power(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def machine(device: torch.device, threads: int) -> str:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(console: Console, title: str, entries: Sequence[Entry]) -> None:
    """Print the entries of one case."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for position, column in enumerate(COLUMNS):
        if column not in ("case", "D"):
            table.add_column(column, justify="left" if position in (2, 14) else "right", overflow="fold")
    for entry in entries:
        table.add_row(*cells(entry)[2:])
    console.print(table)


def wide_console() -> Console:
    """A console that fits the table also where its output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def show_claims(console: Console, claims: Sequence[Claim]) -> None:
    for claim in claims:
        console.print(f"{claim.verdict:7}  {claim.text}: {claim.figure}", markup=False, highlight=False)


def write(path: Path, header: str, entries: Sequence[Entry], claims: Sequence[Claim]) -> None:
    """Write JSON if the name ends in .json, Markdown otherwise."""
    if path.suffix == ".json":
        record = {
            "machine": header,
            "entries": [asdict(entry) | {"rows_per_second": entry.rows_per_second} for entry in entries],
            "claims": [asdict(claim) for claim in claims],
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
        return
    lines = [header, "", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(entry)) + " |" for entry in entries]
    lines += ["", *(f"- **{claim.verdict}** {claim.text}: {claim.figure}" for claim in claims)]
    path.write_text("\n".join(lines) + "\n")
