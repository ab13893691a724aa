"""The ``optima`` command: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.text import Text

import optima
from optima.arguments import parse, recipe_of
from optima.console import OwnConsole, printable, say
from optima.errors import OptimaError, RankError

if TYPE_CHECKING:
    from optima.reporting.record import Report

Command = Callable[..., None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Returns:
        A status of ``docs/reference/exit-codes.md``: 0 done, 2 bad input, 130 interrupted (128 + n by signal n), 141
        when nobody reads the output any more. A bug ends in a traceback and 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what its encoding lacks is no reason to lose the rest
            stream.reconfigure(errors="backslashreplace")
    try:
        command, arguments = parse(argv)
        COMMANDS[command](**arguments)
        if sys.stdout is not None:  # a daemon has none
            with _writing():
                sys.stdout.flush()
    except OptimaError as error:
        # A Text is printed as it is: no markup, no emoji.
        message = Text.assemble(("optima: error:", "bold red"), " ", printable(str(error)))
        return _end(2, error, message)
    except BrokenPipeError:
        _give_up(sys.stdout, sys.stderr)
        return 141
    except KeyboardInterrupt as error:
        return _end(getattr(error, "exit_code", 130), error, Text(f"optima: {str(error) or 'interrupted'}"))
    return 0


def _end(status: int, error: BaseException, message: Text) -> int:
    """Print why a command ends; returns the exit status."""
    # Of torchrun's processes on a machine all have the same to say, but for those that are left when another has died.
    if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, RankError):
        return status
    try:
        Console(stderr=True, soft_wrap=True).print(message)
    except (OSError, OptimaError):  # a full disk: the status has to do
        _give_up(sys.stderr)
    return status


def _give_up(*streams: TextIO) -> None:
    """Point them at the null device, for Python flushes them once more at its exit."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _writing() -> Iterator[None]:
    """Standard output that is full or closed is one clear error; one that nobody reads stays a ``BrokenPipeError``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _give_up(sys.stdout)
        raise OptimaError(
            f"the standard output cannot be written ({error.strerror}): free some space, or send it elsewhere"
        ) from error


class _Console(OwnConsole):
    """A console for our own output alone. Nothing is markup."""

    def __init__(self) -> None:
        super().__init__(emoji=False, markup=False)

    def print(self, *objects: Any, **options: Any) -> None:
        with _writing():
            super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)


def _say(text: str) -> None:
    with _writing():
        print(printable(text))


def _prune(model: str, output_dir: str, report_to: Sequence[str] = (), **given: Any) -> None:
    from optima.reporting.callbacks import Trackers
    from optima.reporting.summary import render_summary

    options = {name: given.pop(name) for name in ("overwrite", "resume") if name in given}
    repo, private = given.pop("push_to_hub", None), given.pop("private", None)
    callbacks = [Trackers(report_to)] if report_to else []
    recipe = recipe_of(given)
    _quiet_console()
    if repo is not None:
        from optima.hub import open_repo

        repo = open_repo(repo, private)
    elif private:
        raise OptimaError("--private is for --push-to-hub REPO: add it, or leave this out")
    try:
        report = optima.prune(model, recipe, output_dir=output_dir, callbacks=callbacks, **options)
    except RankError:  # the launcher stops this process too: not before it has said so
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    if report.run.processes > 1 and os.environ["RANK"] != "0":
        return
    _say(render_summary(report))
    _say(f"checkpoint and report: {output_dir} (report.html, report.md, report.json)")
    if repo is not None:
        _push(output_dir, repo, private=private)


def _push(directory: str, repo: str, **given: Any) -> None:
    _say(f"published: {optima.push(directory, repo, **given)}")


def _plan(model: str, **given: Any) -> None:
    recipe = recipe_of(given)
    console = _quiet_console()
    from optima import plan
    from optima.models.load import find_source
    from optima.plan_table import print_plan

    source = find_source(model, recipe.trust_remote_code, recipe.revision)
    found = plan.make_plan(source, recipe)
    print_plan(found, model, console)


def _order(
    model: str, output_dir: str, overwrite: bool = False, channels: Sequence[str] | None = None, **given: Any
) -> None:
    recipe = recipe_of(given)
    options: dict[str, Any] = {} if channels is None else {"channels": channels}
    _quiet_console()
    found = optima.order(model, recipe, output_dir=output_dir, overwrite=overwrite, **options)
    for kind, count, lost in found.summary():
        done = "turned" if kind == "heads" else "ordered"
        _say(f"{kind}: {count} {done}; of their saliency the pattern prunes {1 - lost:.1%} less")
    for note in found.notes:
        _say(f"note: {note}")
    _say(f"the same model, its channels ordered: {output_dir} (ordering.json); prune it next")


def _eval(models: Sequence[str], output: str | None = None, overwrite: bool = False, **options: Any) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptimaError("optima eval runs in one process: start it without torchrun")
    from optima.evaluation.record import check_output

    if output is not None:
        check_output(output, overwrite)
    _quiet_console()
    from optima.evaluation.evaluate import evaluate
    from optima.evaluation.table import render_evaluation

    options["tasks"] = [task for text in options.pop("tasks", ()) for task in text.split(",") if task]
    console = OwnConsole(stderr=True)
    if output is not None:
        options["save"] = lambda found: found.save(output)
    _say(render_evaluation(evaluate(models, **options, log=lambda line: say(console, line))))
    if output is not None:
        _say(f"written: {output}")


def _report(paths: Sequence[str], html: str | None = None) -> None:
    from optima.evaluation.record import EVALUATION_NAME, load_evaluation
    from optima.evaluation.table import headline, render_evaluation
    from optima.files import usable_path
    from optima.reporting.markdown import render_markdown

    paths = list(dict.fromkeys(paths))
    reports = {path: optima.load_report(path) for path in paths}
    places = [Path(path) if Path(path).is_dir() else Path(path).parent for path in paths]
    found = {place: load_evaluation(place) for place in places if (place / EVALUATION_NAME).is_file()}
    if html is not None:
        figures = [headline(found[place], place) if place in found else [] for place in places]
        _write_page(reports, usable_path(html, "--html", "name another file"), figures)
    elif len(paths) > 1:
        raise OptimaError("several reports are compared on a page: name its file by --html FILE")
    else:
        _say(render_markdown(reports[paths[0]], "".join(map(render_evaluation, found.values()))))


def _write_page(reports: dict[str, Report], file: Path, more: Sequence[Sequence[tuple[str, str, str]]]) -> None:
    from optima.files import explain_write_errors, write_whole
    from optima.reporting.html import render_html

    if os.path.lexists(file):
        raise OptimaError(f"{file} exists and is not replaced: name another file by --html, or remove it")
    if len(reports) == 1:
        reports = {report.run.model: report for report in reports.values()}
    with explain_write_errors(file, "free some space or name another file by --html"):
        write_whole(file, render_html(reports, more).encode())
    _say(f"page: {file}")


def _pack(directory: str, output_dir: str | None = None, **given: Any) -> None:
    from optima.packing import place_for

    size = optima.pack(directory, output_dir, **given)
    _say(f"{size}: {place_for(directory, output_dir, '-packed')}")


def _unpack(directory: str, output_dir: str | None = None, **given: Any) -> None:
    from optima.packing import place_for

    restored = optima.unpack(directory, output_dir, **given)
    place = place_for(directory, output_dir, "-unpacked")
    _say(f"{restored / 1e6:,.1f} MB restored, every checksum right: {place}")


def _recipe(action: str, name: str | None = None) -> None:
    from optima.recipe_files import describe_shipped, load_recipe, recipe_schema, recipe_text

    if name is None and action in ("show", "validate"):
        raise OptimaError(f"optima recipe {action} needs a name: one of optima recipe list, or a file")
    if name is not None and action in ("list", "schema"):
        raise OptimaError(f"optima recipe {action} takes no name, got {name}")
    if action == "list":
        found = describe_shipped()
        width = max(map(len, found))
        _say("\n".join(f"{shipped:{width}}  {text}" for shipped, text in found.items()))
    elif action == "show":
        _say(recipe_text(str(name)).rstrip())
    elif action == "schema":
        _say(json.dumps(recipe_schema(), indent=2))
    else:
        # No file says that for itself.
        trust = " --trust-remote-code" if load_recipe(str(name)).trust_remote_code else ""
        _say(f"{name} is a valid recipe; what depends on the model, optima plan MODEL --recipe {name}{trust} checks")


def _demo(model: str, output_dir: str, num_calibration_samples: int) -> None:
    console = _quiet_console()
    from optima.demo import run_demo

    run_demo(model, Path(output_dir), num_calibration_samples, console)


COMMANDS: dict[str, Command] = {
    "prune": _prune,
    "plan": _plan,
    "order": _order,
    "eval": _eval,
    "report": _report,
    "pack": _pack,
    "unpack": _unpack,
    "push": _push,
    "recipe": _recipe,
    "demo": _demo,
}


def _quiet_console() -> Console:
    """A console for our own output alone; the libraries' bars and advice would drown it.

    Those of downloads stay in a terminal, of one process.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; some bars have no other switch
    import datasets
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    downloads = sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0" and not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # which are the hub's too
    if downloads:
        enable_progress_bars()
    datasets.disable_progress_bars()
    return _Console()
