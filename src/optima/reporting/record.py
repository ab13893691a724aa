"""The typed record of a run: what was asked, what was done to each linear, and what it cost.

``report.json`` is standard JSON. A number that JSON cannot hold is written as the string ``"Infinity"``,
``"-Infinity"`` or ``"NaN"`` and read back as that number: an infinite gap means that a row has no certificate. ``null``
means something else: no solver ran.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from optima.errors import OptimaError

SCHEMA_VERSION = 1
REPORT_NAME = "report.json"

_NON_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class LinearRecord:
    """What was done to one linear, and what it lost.

    The three errors are relative reconstruction errors ||X (V - W)^T||_F^2 / ||X W^T||_F^2 on the calibration inputs.

    Attributes:
        block: index of the block in the model.
        name: full module name.
        shape: (outputs, inputs).
        pattern: the sparsity pattern asked for, as text.
        sparsity_asked: share of the weights that the pattern asks to prune.
        sparsity: share of the weights that is pruned, counted from ``keep``.
        error_mask: error of the mask alone, the surviving weights at their dense values.
        error_selector: error of the selector's own weights, cast likewise; ``error_mask`` when it only selects.
        error: error of the result as cast to the checkpoint's dtype.
        solver: the solver that ran, or ``none``.
        gap_max: largest certified gap of a row; None when no solver ran.
        gap_median: median certified gap of the rows; None when no solver ran.
        iterations_mean: iterations of a row, on average.
        iterations_max: iterations of the slowest row.
        rows: rows of the linear (its outputs).
        rows_not_converged: rows whose certified gap did not reach the one asked for.
        damping: damping used, after any escalation, relative to the mean of the Hessian's diagonal.
        seconds: time of selection, refinement and solve.
        swaps: swaps made by the refinement of the mask; None if it was not refined.
        rows_swap_optimal: rows of which it is proven that no single swap lowers the error; None likewise.
    """

    block: int
    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity_asked: float
    sparsity: float
    error_mask: float
    error_selector: float
    error: float
    solver: str
    gap_max: float | None
    gap_median: float | None
    iterations_mean: float
    iterations_max: int
    rows: int
    rows_not_converged: int
    damping: float
    seconds: float
    swaps: int | None = None
    rows_swap_optimal: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """What a run was asked and where it ran.

    Attributes:
        model: the model's id or path, as given.
        recipe: the resolved recipe as plain values.
        versions: library name -> version, see ``library_versions``.
        seed: seed of the calibration draw.
        data_hash: hash of the calibration tokens.
        num_tokens: calibration tokens used.
        device: where blocks were pruned.
        dtype: dtype of the checkpoint's weights.
        peak_memory_bytes: peak memory of the device, or of the process on a CPU.
        seconds: wall time of the run.
        created: when the run ended, ISO 8601 in UTC.
        notes: what was not done or deviated: escalated damping, skipped modules, halved chunks.
    """

    model: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    seed: int
    data_hash: str
    num_tokens: int
    device: str
    dtype: str
    peak_memory_bytes: int
    seconds: float
    created: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The record of a run and of every linear it pruned."""

    run: RunRecord
    linears: tuple[LinearRecord, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def sparsity(self) -> float:
        """Share of all weights of the pruned linears that is pruned."""
        return weighted_sparsity(self.linears)

    @property
    def sparsity_asked(self) -> float:
        """Share of all weights of the pruned linears that their patterns ask to prune."""
        return _weighted((linear.sparsity_asked, linear) for linear in self.linears)

    @property
    def error_geomean(self) -> float:
        """Geometric mean of ``error`` over the linears, see ``geometric_mean``."""
        return geometric_mean(linear.error for linear in self.linears)

    @property
    def rows(self) -> int:
        """Rows of all pruned linears."""
        return sum(linear.rows for linear in self.linears)

    @property
    def rows_not_converged(self) -> int:
        """Rows whose certified gap did not reach the one asked for."""
        return sum(linear.rows_not_converged for linear in self.linears)

    @property
    def gap_max(self) -> float | None:
        """Largest certified gap of any row; None when no solver ran."""
        return largest_gap(self.linears)

    def save(self, path: Path) -> Path:
        """Write the report and return its file: ``path`` itself if it ends in .json, else ``path/report.json``.

        The file appears whole or not at all. In the recipe tuples become lists and paths become text.
        """
        file = path if path.suffix == ".json" else path / REPORT_NAME
        text = json.dumps(plain_values(self), indent=2, allow_nan=False) + "\n"
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return file


def load_report(path: Path) -> Report:
    """Read a report from its file, or from the directory that holds ``report.json``.

    Raises:
        OptimaError: if there is no report, it is not JSON, its schema version is another one, or a field is missing,
            unknown or of the wrong type (the message names it).
    """
    file = path / REPORT_NAME if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptimaError(
            f"cannot read the report {file} ({error.strerror}): give report.json or the output directory of a run"
        ) from error
    except ValueError as error:
        raise OptimaError(f"{file} is not JSON ({error}): give the report.json of a run, unedited") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION or isinstance(found, bool):
        raise OptimaError(
            f"{file} has schema_version {found!r} and this version of OPTIMA reads {SCHEMA_VERSION}: "
            "read it with the version that wrote it (under run.versions.optima), or run again"
        )
    try:
        return _from_json(Report, content, "report")
    except TypeError as error:
        raise OptimaError(f"{file} is malformed: {error}; give the report.json of a run, unedited") from error


def library_versions() -> dict[str, str]:
    """Versions of OPTIMA, Python and the libraries that decide the numbers."""
    distributions = ("torch", "transformers", "safetensors")
    return {
        "optima": _version("optima-prune"),
        "python": platform.python_version(),
        **{name: _version(name) for name in distributions},
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"  # a source tree on sys.path


def name_in_block(linear: LinearRecord) -> str:
    """The linear's name without the path of its block: ``mlp.up_proj`` of ``model.layers.3.mlp.up_proj``."""
    return linear.name.split(f".{linear.block}.", 1)[-1]


def weighted_sparsity(linears: Iterable[LinearRecord]) -> float:
    """Share of the linears' weights that is pruned, 0 for no linears."""
    return _weighted((linear.sparsity, linear) for linear in linears)


def _weighted(values: Iterable[tuple[float, LinearRecord]]) -> float:
    """Mean of the values weighted by the sizes of their linears, 0 for none."""
    sizes = [(value, math.prod(linear.shape)) for value, linear in values]
    total = sum(size for _, size in sizes)
    return math.fsum(value * size for value, size in sizes) / total if total else 0.0


def largest_gap(linears: Iterable[LinearRecord]) -> float | None:
    """Largest certified gap of any row, None when no solver ran on any of the linears."""
    gaps = [linear.gap_max for linear in linears if linear.gap_max is not None]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=None)


def geometric_mean(errors: Iterable[float]) -> float:
    """Geometric mean of the positive errors; 0 if none is positive, NaN if one is NaN.

    Errors that are exactly zero (a linear that lost nothing) are left out: one of them would make the mean zero and
    hide all others.
    """
    lost = [error for error in errors if error != 0]
    return math.exp(math.fsum(map(math.log, lost)) / len(lost)) if lost else 0.0


def plain_values(value: Any) -> Any:
    """``value`` as JSON and YAML hold it: records become objects, tuples lists, paths text, see the file's top."""
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: plain_values(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, PurePath) else value


def _from_json(record: type[_Record], content: Any, where: str) -> _Record:
    """Build the dataclass ``record`` from ``content``; TypeError names the field that does not fit."""
    if not isinstance(content, dict):
        raise TypeError(f"{where} must be an object, got {content!r:.80}")
    types = get_type_hints(record)
    if missing := types.keys() - content.keys():
        raise TypeError(f"{where} has no {', '.join(sorted(missing))}")
    if unknown := content.keys() - types.keys():
        raise TypeError(f"{where} has unknown {', '.join(sorted(unknown))}")
    return record(**{name: _value(types[name], content[name], f"{where}.{name}") for name in types})


def _value(kind: Any, content: Any, where: str) -> Any:
    """``content`` as the annotated type ``kind``: a scalar, a record, or a tuple, dict or optional of these."""
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        present = next(argument for argument in arguments if argument is not NoneType)
        return None if content is None else _value(present, content, where)
    if hasattr(kind, "__dataclass_fields__"):
        return _from_json(kind, content, where)
    if get_origin(kind) is tuple and isinstance(content, list):
        kinds = [arguments[0]] * len(content) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(content):
            return tuple(_value(kinds[i], item, f"{where}[{i}]") for i, item in enumerate(content))
    if get_origin(kind) is dict and isinstance(content, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in content.items()}
    if kind is Any or (kind in (int, str) and type(content) is kind):
        return content
    if kind is float and type(content) in (int, float):
        return float(content)
    if kind is float and isinstance(content, str) and content in _NON_FINITE:
        return _NON_FINITE[content]
    raise TypeError(f"{where} must be {getattr(kind, '__name__', kind)}, got {content!r:.80}")
