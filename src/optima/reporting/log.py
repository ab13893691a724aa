"""A run as lines of JSON, one object a line, for programs that watch it. ``docs/reference/log.md`` describes them."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, TextIO

from pydantic_core import to_json

from optima import __version__
from optima.console import explain_log_errors
from optima.errors import OptimaError
from optima.reporting.callbacks import BlockEvent, Callback, RunStart, ShareEvent
from optima.reporting.record import LinearRecord, Report

LOG_VERSION = 1
HANDLING = ("transformers", "datasets", "huggingface_hub", "torch")  # these write to stderr from their import on


def log_line(event: str, **values: Any) -> str:
    """One event. Numbers that JSON cannot hold are the strings ``"Infinity"``, ``"-Infinity"`` and ``"NaN"``."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return to_json({"event": event, "time": time, **values}, inf_nan_mode="strings").decode()


class JsonLog(Callback):
    """Writes each event of a run as one line of JSON.

    Args:
        stream: where to; flushed behind every line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, event: str, **values: Any) -> None:
        """One line."""
        with explain_log_errors():
            self._stream.write(log_line(event, **values) + "\n")
            self._stream.flush()

    def take_over(self) -> None:
        """Turn what libraries log, and Python's warnings, into lines too: nothing else may stand between them."""
        for library in HANDLING:
            import_module(library)
        known = list(logging.root.manager.loggerDict.values())
        for logger in (found for found in known if isinstance(found, logging.Logger)):
            for handler in filter(_is_screen, logger.handlers[:]):
                logger.removeHandler(handler)
                logger.propagate = True
        logging.basicConfig(handlers=[_Handler(self)], level=logging.WARNING, force=True)
        logging.captureWarnings(True)

    def on_start(self, start: RunStart) -> None:
        """The line ``start``."""
        self.write("start", log_version=LOG_VERSION, optima=__version__, **asdict(start))

    def on_stage(self, stage: str, blocks: int, linears_per_block: int, done: int) -> None:
        """The line ``stage``."""
        self.write("stage", stage=stage, blocks=blocks, done=done)

    def on_share(self, share: ShareEvent) -> None:
        """The line ``share``."""
        self.write("share", **asdict(share))

    def on_linear(self, linear: LinearRecord) -> None:
        """The line ``linear``."""
        self.write("linear", **asdict(linear))

    def on_block(self, block: BlockEvent) -> None:
        """The line ``block``."""
        told = asdict(block)
        del told["linears"]  # an earlier log has them
        self.write("block", **told)

    def on_note(self, note: str) -> None:
        """The line ``note``."""
        self.write("note", note=note)

    def on_end(self, report: Report) -> None:
        """The line ``end``."""
        names = ("sparsity", "sparsity_asked", "error_geomean", "gap_max", "gap_written_max", "rows_not_converged")
        totals = {name: getattr(report, name) for name in names}
        run = report.run
        self.write("end", **totals, seconds=run.seconds, peak_memory_bytes=run.peak_memory_bytes, stages=run.stages)


def _is_screen(handler: logging.Handler) -> bool:
    """True if it writes to a stream that is there; files are their owners' business."""
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return False
    return handler.stream is not None


class _Handler(logging.Handler):
    def __init__(self, log: JsonLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # a library's call that is malformed, which must not end a run
            message = f"{record.msg} {record.args}"
        with suppress(OSError, OptimaError):  # a run that writes is told by its own next line
            self._log.write("log", level=record.levelname.lower(), logger=record.name, message=message)
