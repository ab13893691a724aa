"""The typed record of a run: its settings, the error and gap of each linear, seconds and memory.

``report.json`` is standard JSON. A number that JSON cannot hold is written as the string ``"Infinity"``,
``"-Infinity"`` or ``"NaN"`` and read back as that number. An infinite gap means that a row has no certificate;
``null`` means that no solver ran or that nothing is known.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from optima import __version__
from optima.errors import OptimaError

SCHEMA_VERSION = 5
REPORT_NAME = "report.json"
Int = Annotated[int, Strict()]


class Record:
    """A base whose fields are checked when a file is read."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class LinearRecord(Record):
    """One pruned linear.

    Errors are relative reconstruction errors ||X (V - W)^T||_F^2 / ||X W^T||_F^2 on the calibration inputs, with the
    Hessian's token weights. "As written" means in the checkpoint's dtype.
    """

    block: Int  # index of the block in the model
    name: str  # full module name
    shape: tuple[Int, Int]  # (outputs, inputs)
    pattern: str  # the sparsity pattern asked for, as text
    sparsity_asked: float  # share of the weights that the pattern prunes
    sparsity: float  # share of the weights that are zero as written
    error_mask: float  # of the mask alone, the surviving weights at their dense values
    error_selector: float  # of the selector's own weights, cast; ``error_mask`` when it only selects
    error: float  # of the result as written; before tuning if ``tuned``
    solver: str  # the solver that ran, or ``none``
    gap_max: float | None  # largest certified gap of a row, before cast and tuning; None when no solver ran
    iterations_mean: float  # iterations of a row, on average
    iterations_max: Int  # iterations of the slowest row
    rows: Int  # rows of the linear (its outputs)
    rows_not_converged: Int  # rows whose certified gap is above the requested one
    damping: float  # damping used, after any escalation, relative to the mean of the hessian's diagonal
    seconds: float  # time of selection, solve and measurement
    gap_written_max: float | None  # largest gap of a row as written; None when no solver ran, or if tuned
    loss_written: float | None  # damped loss as written above the certified least (or floor), relative; None likewise
    tokens: Int  # calibration tokens that reached the linear
    tuned: bool = False  # tuning changed the weights after the solve: errors and gaps were measured before tuning

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        """The name without the path of its block: ``mlp.up_proj`` of ``model.layers.3.mlp.up_proj``."""
        return re.split(r"(?:^|\.)\d+\.", self.name, maxsplit=1)[-1]

    @property
    def solved(self) -> bool:
        """Whether a solver ran."""
        return self.gap_max is not None


@dataclass(frozen=True)
class UnitRecord(Record):
    """The structures of one kind that ``optima shrink`` removed in one place."""

    block: Int  # index of the block in the dense model
    name: str  # full name of the module
    unit: str  # neurons, or block
    kept: Int  # how many stay
    of: Int  # how many there were
    error: float | None = None  # of the reader before tuning, as of a linear; of a block: KL divergence without it
    gap: float | None = None  # largest certified gap of a row of the reader, before cast and tuning
    energy: float | None = None  # share of the Fisher-weighted energy of the neurons that went
    seconds: float = 0.0  # time of choice and solve


@dataclass(frozen=True)
class Size(Record):
    """The size of a model."""

    parameters: Int  # tied ones once
    bytes: Int  # of the checkpoint
    flops: Int  # of a forward pass, per token, in linear layers and the LM head; without attention scores


@dataclass(frozen=True)
class BlockRecord(Record):
    """Seconds and tuning of one block."""

    index: Int  # of the block in the model
    name: str  # full module name
    seconds: dict[str, float]  # by stage: read, forward, hessian, reduce, select, solve, round, share, tune, write
    tuning: tuple[float, ...] = ()  # error on held-out sequences before tuning and after each epoch
    tuning_epoch: Int = 0  # the epoch whose weights were kept; 0: those before tuning
    on_logits: bool = False  # that error is the KL divergence of the logits from the dense model's, in nats per token


@dataclass(frozen=True)
class BlockDone(Record):
    """A block's part of the report, as the journal keeps it."""

    block: BlockRecord
    linears: tuple[LinearRecord, ...]
    units: tuple[UnitRecord, ...]
    notes: tuple[str, ...]
    batch_sizes: tuple[int | None, ...] = ()  # sequences that ran together at most, by process; None: no limit
    peak_bytes: Int = 0  # memory, in any process, from the start of the run that did it
    write_seconds: float = 0.0  # of all commits before this block's

    def to_dict(self) -> Any:
        """Plain values of standard JSON, see the head of this file."""
        return from_json(to_json(self, inf_nan_mode="strings"))

    @classmethod
    def from_dict(cls, values: Any) -> BlockDone:
        """The inverse of ``to_dict``."""
        return TypeAdapter(cls).validate_python(values)


@dataclass(frozen=True)
class RunRecord(Record):
    """The settings of a run and where it ran."""

    model: str  # the model's id or path
    recipe: dict[str, Any]  # the resolved recipe as plain values
    versions: dict[str, str]  # library name -> version, see ``library_versions``
    seed: Int  # seed of the calibration draw
    data_hash: str  # hash of the calibration tokens
    num_tokens: Int  # calibration tokens used
    device: str  # where blocks were pruned
    dtype: str  # dtype of the checkpoint's weights; of several, all
    peak_memory_bytes: Int  # peak memory of the device, or of the process on a CPU
    seconds: float  # wall time of the run
    created: str  # when the run ended, ISO 8601 in UTC
    notes: tuple[str, ...]  # what was not done, or not as requested: escalated damping, skipped modules
    stages: dict[str, float] = field(default_factory=dict)  # seconds of the whole run, blocks included, by stage
    model_revision: str | None = None  # commit of a hub model; None if unknown
    dataset_revision: str | None = None  # commit of a hub dataset; None if unknown
    processes: Int = 1  # that shared the work
    calibration_given: bool = False  # the caller passed the calibration data; the recipe's dataset was not read
    selector_is_object: bool = False  # the caller passed a selector object; recipe.yaml has its class alone
    weights_left_out: tuple[str, ...] = ()  # tensors of the source that the model's class has no place for


@dataclass(frozen=True)
class Report(Record):
    """The record of a run, of every linear it pruned and of every block it went through."""

    run: RunRecord
    linears: tuple[LinearRecord, ...]
    blocks: tuple[BlockRecord, ...] = ()
    units: tuple[UnitRecord, ...] = ()
    sizes: tuple[Size, ...] = ()  # of the dense and of the smaller model, if structures were removed
    schema_version: Int = SCHEMA_VERSION

    @property
    def num_weights(self) -> int:
        """Number of weights of the pruned linears."""
        return sum(linear.size for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Share of ``num_weights`` that is zero as written."""
        return weighted_mean(self.linears, "sparsity")

    @property
    def error_geomean(self) -> float:
        """Geometric mean of ``error`` over the linears, see ``geometric_mean``."""
        return geometric_mean(linear.error for linear in self.linears)

    @property
    def rows_not_converged(self) -> int:
        """Number of rows whose certified gap is above the requested one."""
        return sum(linear.rows_not_converged for linear in self.linears)

    @property
    def gap_max(self) -> float | None:
        """Largest certified gap of any row, before the cast; None when no solver ran."""
        return largest(linear.gap_max for linear in self.linears)

    @property
    def gap_written_max(self) -> float | None:
        """Largest gap of any row as written; None when no solver ran, or if tuning changed a linear after its solve."""
        tuned = any(linear.tuned for linear in self.linears)
        return None if tuned else largest(linear.gap_written_max for linear in self.linears)

    def save(self, path: str | Path) -> Path:
        """Write the report and return its file: ``path`` itself if it ends in .json, else ``path/report.json``.

        In the recipe tuples become lists and paths become text.
        """
        path = Path(path).expanduser()
        file = path if path.suffix == ".json" else path / REPORT_NAME
        file.write_bytes(to_json(self, indent=2, inf_nan_mode="strings") + b"\n")
        return file


def load_report(path: str | Path) -> Report:
    """Read a report from its file, or from the directory that holds ``report.json``.

    Raises:
        OptimaError: if there is no report, it is not JSON, its schema version is another one, or a field is missing,
            unknown or of the wrong type (the message names it).
    """
    return load_record(path, Report, REPORT_NAME, SCHEMA_VERSION)


Kind = TypeVar("Kind", bound=Record)


def load_record(path: str | Path, kind: type[Kind], name: str, version: int) -> Kind:
    """Read the file of a record, or the one called ``name`` in a directory; errors: see ``load_report``."""
    file = Path(path).expanduser()
    file = file / name if file.is_dir() else file
    try:
        content = from_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise OptimaError(
            f"cannot read {file} ({error}): pass the {name} of a run, or the output directory that has it"
        ) from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != version:
        raise OptimaError(f"{file} has schema_version {found!r}, and this version of OPTIMA reads {version}: run again")
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise OptimaError(f"{file} is malformed: {field}: {first['msg']}, got {str(first['input'])[:80]!r}") from error


def library_versions() -> dict[str, str]:
    """Versions of OPTIMA, Python and the libraries that decide the numbers."""
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"optima": __version__, "python": platform.python_version(), **libraries}


def weighted_mean(linears: Iterable[LinearRecord], field: str) -> float:
    """Mean of a field of the linears weighted by their sizes, 0 for no linears."""
    sizes = [(getattr(linear, field), linear.size) for linear in linears]
    total = sum(size for _, size in sizes)
    return math.fsum(value * size for value, size in sizes) / total if total else 0.0


def largest(values: Iterable[float | None]) -> float | None:
    """The largest of the values that are known, NaN if one is; None for none."""
    known = [value for value in values if value is not None]
    return math.nan if any(map(math.isnan, known)) else max(known, default=None)


def geometric_mean(errors: Iterable[float]) -> float:
    """Geometric mean of the errors that are not zero; 0 if all are, NaN if one is NaN."""
    lost = [error for error in errors if error != 0]
    return math.exp(math.fsum(map(math.log, lost)) / len(lost)) if lost else 0.0
