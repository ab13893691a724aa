"""Experiment trackers: TensorBoard, trackio, Weights & Biases. None is imported before it is asked for."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from optima.errors import OptimaError, RecipeError
from optima.names import kind
from optima.reporting.callbacks import BlockEvent, Callback, RunStart
from optima.reporting.record import LinearRecord, Report, geometric_mean, largest, name_in_block

PROJECT = "optima"


class Tracker(Protocol):
    """A run in an experiment tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep numbers of one block, or of the whole run behind the last."""

    def finish(self, failed: bool) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in ``runs/``, in a directory whose name has the time and the output's name."""

    def __init__(self, module: Any, name: str, config: Mapping[str, Any]) -> None:
        self._writer = module.SummaryWriter(comment=f"-{name}")
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``Tracker``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        """See ``Tracker``."""
        self._writer.close()


class Trackio:
    """A local run of trackio, in the project that TRACKIO_PROJECT names."""

    def __init__(self, module: Any, name: str, config: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``Tracker``."""
        self._module.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        """See ``Tracker``."""
        self._module.finish()


class WandB:
    """A run of Weights & Biases, in the project that WANDB_PROJECT names; its own variables count too."""

    def __init__(self, module: Any, name: str, config: Mapping[str, Any]) -> None:
        self._run = module.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``Tracker``."""
        self._run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        """See ``Tracker``."""
        self._run.finish(exit_code=int(failed))


# The name of each, the module to import, the package that brings it, and the class.
TRACKERS: dict[str, tuple[str, str, Callable[[Any, str, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", TensorBoard),
    "trackio": ("trackio", "trackio", Trackio),
    "wandb": ("wandb", "wandb", WandB),
}


class Tracking(Callback):
    """Gives a tracker one point a block: errors and gaps by kind of linear, seconds; then the totals of the run."""

    def __init__(self, open_tracker: Callable[[str, Mapping[str, Any]], Tracker]) -> None:
        self._open = open_tracker
        self._tracker: Tracker | None = None
        self._linears: list[LinearRecord] = []
        self._step = 0

    def on_start(self, start: RunStart) -> None:
        """The tracker's run is named after the output, or the model that stays in memory."""
        name = Path(start.output_dir or start.model).name
        self._tracker = self._open(name, {**start.recipe, "model": start.model, "device": start.device})

    def on_linear(self, linear: LinearRecord) -> None:
        """See ``Callback``."""
        self._linears.append(linear)

    def on_block(self, block: BlockEvent) -> None:
        """See ``Callback``."""
        self._step += block.record is not None  # over all stacks: ``done`` begins anew with each
        if self._tracker is None or block.record is None or block.resumed:
            return
        kinds: dict[str, list[LinearRecord]] = defaultdict(list)
        for linear in self._linears:
            kinds[kind(name_in_block(linear))].append(linear)
        values = {"block/seconds": sum(block.record.seconds.values())}
        for name, linears in kinds.items():
            values[f"error/{name}"] = geometric_mean(linear.error for linear in linears)
            gap = largest(linear.gap_max for linear in linears)
            values |= {} if gap is None else {f"gap/{name}": gap}
        if block.record.tuning:
            values["tuning/before"] = block.record.tuning[0]
            values["tuning/kept"] = block.record.tuning[block.record.tuning_epoch]
        self._linears = []
        self._tracker.log(values, self._step)

    def on_end(self, report: Report) -> None:
        """See ``Callback``."""
        assert self._tracker is not None
        values = {
            "run/sparsity": report.sparsity,
            "run/error": report.error_geomean,
            "run/seconds": report.run.seconds,
            "run/peak_memory_bytes": float(report.run.peak_memory_bytes),
            "run/rows_not_converged": float(report.rows_not_converged),
        }
        self._tracker.log(values, self._step)

    def close(self, error: BaseException | None) -> None:
        """See ``Callback``."""
        if self._tracker is not None:
            self._tracker.finish(error is not None)


def find_trackers(names: Sequence[str]) -> list[Tracking]:
    """A callback for each tracker named; ``none`` is none.

    Raises:
        RecipeError: if a name is unknown, or its package is not installed.
    """
    if "none" in names and len(names) > 1:
        raise RecipeError(f"--report-to none excludes {' '.join(name for name in names if name != 'none')}")
    return [_find(name) for name in names if name != "none"]


def _find(name: str) -> Tracking:
    if name not in TRACKERS:
        raise RecipeError(f"--report-to {name} is unknown: choose among none, {', '.join(TRACKERS)}")
    module_name, package, make = TRACKERS[name]
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise RecipeError(f"--report-to {name} needs the package {package} ({error}): pip install {package}") from error
    failures = (OSError, RuntimeError, ValueError, getattr(getattr(module, "errors", None), "Error", OSError))

    def begin(run: str, config: Mapping[str, Any]) -> Tracker:
        try:
            return make(module, run, config)
        except failures as error:
            text = " ".join(str(error).split())
            raise OptimaError(f"--report-to {name} cannot begin ({text}): repair that, or leave it out") from error

    return Tracking(begin)
