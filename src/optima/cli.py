"""The ``optima`` command: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.text import Text

import optima
from optima.errors import OptimaError
from optima.evaluation.settings import ABOUT, CHOICES, PROTOCOLS, SUITES, WINDOWS, EvaluationSettings
from optima.recipe import DTYPES, GROUPS, SHIPPED, Recipe, must_be, read_recipe, recipe_from_dict

if TYPE_CHECKING:
    from optima.reporting.record import Report

Command = Callable[..., None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Returns:
        2 for bad input, 130 when interrupted (128 + n by signal n), 141 when nobody reads the output any more.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_here()
        command, arguments = _parse(argv)
        COMMANDS[command](**arguments)
        if sys.stdout is not None:  # a daemon has none
            with _writing():
                sys.stdout.flush()
    except OptimaError as error:
        # A Text is printed as it is: no markup, no emoji.
        message = Text.assemble(("optima: error:", "bold red"), " ", str(error))
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes on a machine, all have the same to say
            Console(stderr=True, soft_wrap=True).print(message)
        return 2
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except KeyboardInterrupt as error:
        print(f"optima: {str(error) or 'interrupted'}", file=sys.stderr)
        return int(getattr(error, "exit_code", 130))
    return 0


def _give_up_stdout() -> None:
    """Python flushes stdout once more at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _writing() -> Iterator[None]:
    """Standard output that is full or closed is one clear error; one that nobody reads stays a ``BrokenPipeError``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _give_up_stdout()
        raise OptimaError(
            f"the standard output cannot be written ({error.strerror}): free some space, or send it elsewhere"
        ) from error


class _Console(Console):
    """A console for our own output alone. Nothing is markup, and who leaves a pipe gets no exit status of rich's."""

    def __init__(self) -> None:
        super().__init__(emoji=False, markup=False)

    def print(self, *objects: Any, **options: Any) -> None:
        with _writing():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Called where the error is handled."""
        raise


def _say(text: str) -> None:
    with _writing():
        print(text)


def _check_here() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:  # which the libraries do not survive
        raise OptimaError("the current directory has been deleted: change to another") from None


class _Parser(argparse.ArgumentParser):
    """One spelling of every option, no guessed abbreviations, errors of one line; what is not given leaves no value."""

    def __init__(self, **options: Any) -> None:
        narrow = partial(argparse.HelpFormatter, max_help_position=26)
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=narrow, **options)

    def error(self, message: str) -> NoReturn:
        raise OptimaError(f"{message}\nsee {self.prog} --help")

    def unknown(self, flag: str) -> NoReturn:
        """Refuse an option, naming the closest of those that there are."""
        close = difflib.get_close_matches(flag.replace("_", "-"), self._option_string_actions, 1)
        self.error(f"unknown argument {flag}" + (f" (did you mean {close[0]}?)" if close else ""))


def _parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and what was given to it."""
    for argument in argv:
        if "\0" in argument or any(0xD800 <= ord(letter) <= 0xDFFF for letter in argument):
            raise OptimaError(f"the argument {argument!a} holds bytes that are no text here: rename the file")
    parser, commands = _parsers()
    known, extra = parser.parse_known_args(argv)
    given = vars(known)
    name = given.pop("command", None)
    if name is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    command = commands[name]
    if extra:
        command.unknown(next((text for text in extra if text.startswith("-")), extra[0]).partition("=")[0])
    if name == "prune" and "output_dir" not in given:
        command.error("--output-dir is missing: where the sparse checkpoint and its report are written")
    return name, given


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line and that of each command."""
    parser = _Parser(prog="optima", description=optima.__doc__)
    parser.add_argument("--version", action="version", version=f"optima {optima.__version__}")
    found = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, _Parser] = {}

    def add(name: str, text: str, usage: str, about: str | None = None) -> Callable[..., Any]:
        about = about or f"{text[0].upper()}{text[1:]}."
        commands[name] = found.add_parser(name, help=text, usage=f"optima {name} {usage}", description=about)
        return commands[name].add_argument

    option = add("prune", "prune a model in one shot", "MODEL --output-dir DIR [options]")
    option("model", metavar="MODEL", help="hub id, local directory, or GGUF file")
    option("--output-dir", metavar="DIR", help="where the sparse checkpoint and its report are written")
    option("--overwrite", action="store_true", help="replace an earlier output in that place")
    text = "go on with an unfinished run in that place; --no-resume: delete it and begin again"
    option("--resume", action=argparse.BooleanOptionalAction, help=text)
    option("--dump-layer", metavar="REGEX", help="write hessian and weight of these linears to layers/")
    _add_recipe(commands["prune"])

    option = add("plan", "show what would be pruned, and the cost", "MODEL [options]")
    option("model", metavar="MODEL", help="hub id, local directory, or GGUF file; no weights are loaded")
    option("--measure", action="store_true", help="prune one random linear of each shape: seconds, memory")
    _add_recipe(commands["plan"])

    _add_eval(add("eval", "measure and compare models", "MODEL [MODEL ...] [options]", ABOUT))

    option = add(
        "report", "print the report of a pruned checkpoint, or compare several", "PATH [PATH ...] [--html FILE]"
    )
    option("paths", nargs="+", metavar="PATH", help="a checkpoint's directory, or its report.json")
    option("--html", metavar="FILE", help="write one page of all of them, each compared with the first")

    option = add("pack", "store a pruned checkpoint without its zeros", "DIR [--output-dir DIR]")
    option("directory", metavar="DIR", help="the checkpoint, in safetensors format")
    option("--code-exponents", action="store_true", help="code bfloat16 exponents too: smaller, slower")
    _add_output(option, "packed")

    option = add("unpack", "restore a packed checkpoint, bit for bit", "DIR [--output-dir DIR]")
    option("directory", metavar="DIR", help="what optima pack wrote")
    _add_output(option, "unpacked")

    option = add("demo", "prune a real small model from the package registry and compare", "[--output-dir DIR]")
    text = "where the sparse checkpoint and its report go (default: demo-output)"
    option("--output-dir", default="demo-output", metavar="DIR", help=text)
    return parser, commands


def _add_eval(option: Callable[..., Any]) -> None:
    option("models", nargs="+", metavar="MODEL", help="hub ids, directories or GGUF files, the reference first")
    option("--dataset", nargs="+", metavar="TEXT", help="text for perplexity: hub id or local text files")
    option("--dataset-config", metavar="NAME", help="configuration of a hub dataset")
    option("--split", metavar="NAME", help="split of a hub dataset (default: test)")
    option("--text-column", metavar="NAME", help="column that holds the text (default: text)")
    protocols = "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items())
    option("--protocol", metavar="NAME", help=f"{protocols} (default: {next(iter(PROTOCOLS))})")
    option("--max-seq-length", type=int, metavar="N", help="tokens in a window (default: 2048)")
    option("--max-windows", type=int, metavar="N", help="use the first windows only (default: all)")
    text = "KL divergence from the first model and share of equal top-1 predictions; two models are in memory at once"
    option("--divergence", action="store_true", help=text)
    option("--tasks", nargs="+", metavar="TASK", help="multiple-choice tasks of lm-eval, such as piqa,arc_easy")
    suites = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in SUITES.items())
    option("--suite", metavar="NAME", help=f"several tasks by one name; {suites}")
    text = "read items from DIR/TASK_SPLIT.jsonl (or .json, .parquet) instead of the hub"
    option("--task-data", metavar="DIR", help=text)
    option("--task-limit", type=int, metavar="N", help="use the first items of each task only (default: all)")
    text = f"windows, or choices, in one forward pass (default: {WINDOWS} window, {CHOICES} choices)"
    option("--batch-size", type=int, metavar="N", help=text)
    option("--seed", type=int, metavar="N", help="seed of the bootstrap (default: 0)")
    option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    option("--dtype", choices=DTYPES, metavar="NAME", help=f"load in this: {', '.join(DTYPES)} (default: auto)")
    option("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    option("--save", action="store_true", help="write the results to evaluation.json in each MODEL that OPTIMA made")
    option("--output", metavar="FILE", help="write the results as JSON to this file")
    option("--overwrite", action="store_true", help="replace results that were written before")


def _add_output(option: Callable[..., Any], suffix: str) -> None:
    option("--output-dir", metavar="DIR", help=f"where it goes (default: the name with -{suffix} behind)")
    option("--overwrite", action="store_true", help="replace an earlier output in that place")


def _add_recipe(parser: _Parser) -> None:
    """An option for each field of a recipe, group by group."""
    text = f"YAML file with any of the options below, or {', '.join(SHIPPED)}; the command line overrides it"
    parser.add_argument("--recipe", metavar="NAME", help=text)
    groups = {name: parser.add_argument_group(f"{name} ({about})") for name, about in GROUPS.items()}
    for field in dataclasses.fields(Recipe):
        flag, group = f"--{field.name.replace('_', '-')}", groups[field.metadata["group"]]
        text = ": ".join(filter(None, [field.metadata["help"], ", ".join(field.metadata["choices"])]))
        default = getattr(Recipe(), field.name)
        if default is False:
            group.add_argument(flag, action="store_true", help=text)
            continue
        many = isinstance(default, list)
        shown = field.metadata["shown"] or (" ".join(default) if many else default)
        text = f"{text} (default: {shown})".replace("%", "%%")
        group.add_argument(flag, nargs="*" if many else None, metavar=_metavar(field), help=text)


def _metavar(field: dataclasses.Field[Any]) -> str:
    """What stands for a value in the help."""
    names = {"targets": "REGEX", "ignore": "REGEX", "pattern": "PATTERN", "dataset": "TEXT", "mask_from": "PATH"}
    text = must_be(field.name)
    return names.get(field.name) or ("N" if "whole number" in text else "X" if "number" in text else "NAME")


def _recipe(given: dict[str, Any]) -> Recipe:
    """The recipe file, if one is named, overridden by what was given."""
    path = given.pop("recipe", None)
    if path is None:
        return recipe_from_dict(given)
    values = read_recipe(path)
    if values.get("trust_remote_code") is True:
        del values["trust_remote_code"]  # a file from elsewhere cannot vouch for the code that it runs
    trusted = {name: value for name, value in given.items() if name == "trust_remote_code"}
    recipe_from_dict(values | trusted, f"recipe {path}")
    # The two ways to say how sparse exclude each other; the command line decides which one counts.
    if "pattern" in given:
        values.pop("sparsity", None)
        if all(":" in entry.rpartition("=")[2] for entry in given["pattern"]):
            values.pop("scope", None)  # n:m has none
    if "sparsity" in given:
        values.pop("pattern", None)
    # What belongs to a method goes with it.
    for option, method, own in (
        ("selector", "external", "mask_from"),
        ("allocation", "owl", "allocation_spread"),
        ("objective", "sink", "sink_weight"),
    ):
        if given.get(option, method) != method:
            values.pop(own, None)
    return recipe_from_dict(values | given)


def _prune(model: str, output_dir: str, **given: Any) -> None:
    from optima.reporting.summary import render_summary

    options = {name: given.pop(name) for name in ("overwrite", "resume", "dump_layer") if name in given}
    recipe = _recipe(given)
    _quiet_console()
    report = optima.prune(model, recipe, output_dir=output_dir, **options)
    if report.run.processes > 1 and os.environ["RANK"] != "0":
        return
    _say(render_summary(report))
    _say(f"checkpoint and report: {output_dir} (report.html, report.md, report.json)")


def _plan(model: str, measure: bool = False, **given: Any) -> None:
    recipe = _recipe(given)
    console = _quiet_console()
    from optima import plan
    from optima.models.source import find_source
    from optima.plan_table import print_plan

    found = plan.make_plan(find_source(model, recipe.trust_remote_code, recipe.revision), recipe)
    print_plan(found, plan.measure(found, recipe) if measure else None, model, console)


def _eval(save: bool = False, output: str | None = None, overwrite: bool = False, **given: Any) -> None:
    for name in given.keys() & {"models", "dataset"}:
        given[name] = tuple(given[name])
    if "tasks" in given:
        given["tasks"] = tuple(task for text in given["tasks"] for task in text.split(",") if task)
    settings = EvaluationSettings(**given)
    places = _places(settings.models, save, output, overwrite)
    console = _quiet_console()
    from optima.evaluation.evaluate import evaluate
    from optima.evaluation.table import print_tables

    found = evaluate(settings)
    try:
        files = [found.save(place) for place in places]
    finally:
        print_tables(found, console)  # hours of work, whatever becomes of the files
    if files:
        console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True)


def _places(models: Sequence[str], save: bool, output: str | None, overwrite: bool) -> list[Path]:
    """Where an evaluation is written; refused now if it cannot be."""
    from optima.evaluation.record import check_free
    from optima.reporting.record import REPORT_NAME

    places = [Path(model).expanduser() for model in models] if save else []
    places = [place for place in places if (place / REPORT_NAME).is_file()]
    if save and not places:
        raise OptimaError(f"--save: none of {', '.join(models)} is an output of optima prune; use --output FILE")
    places += [Path(output).expanduser()] if output else []
    for place in places:
        check_free(place, overwrite)
    return places


def _report(paths: Sequence[str], html: str | None = None) -> None:
    from optima.evaluation.record import EVALUATION_NAME, load_evaluation
    from optima.evaluation.table import headline, render_evaluation
    from optima.reporting.markdown import render_markdown

    reports = {path: optima.load_report(path) for path in paths}
    beside = [(Path(path) if Path(path).is_dir() else Path(path).parent) / EVALUATION_NAME for path in paths]
    found = [load_evaluation(file) if file.is_file() else None for file in beside]
    if html is not None:
        _write_page(reports, Path(html).expanduser(), [headline(own) if own else [] for own in found])
    elif len(paths) > 1:
        raise OptimaError("several reports are compared on a page: name its file by --html FILE")
    else:
        _say(render_markdown(reports[paths[0]], render_evaluation(found[0]) if found[0] else ""))


def _write_page(reports: dict[str, Report], file: Path, more: Sequence[Sequence[tuple[str, str, str]]]) -> None:
    from optima.models.files import explain_write_errors, write_whole
    from optima.reporting.html import render_html

    if os.path.lexists(file):
        raise OptimaError(f"{file} exists and is not replaced: name another file by --html, or remove it")
    if len(reports) == 1:
        reports = {report.run.model: report for report in reports.values()}
    with explain_write_errors(file, "free some space or name another file by --html"):
        write_whole(file, render_html(reports, more).encode())
    _say(f"page: {file}")


def _pack(**given: Any) -> None:
    print(optima.pack(**given))


def _unpack(**given: Any) -> None:
    print(f"{optima.unpack(**given) / 1e6:,.1f} MB restored, every checksum right")


def _demo(output_dir: str) -> None:
    console = _quiet_console()
    from optima.demo import run_demo

    run_demo(Path(output_dir), console)


COMMANDS: dict[str, Command] = {
    "prune": _prune,
    "plan": _plan,
    "eval": _eval,
    "report": _report,
    "pack": _pack,
    "unpack": _unpack,
    "demo": _demo,
}


def _quiet_console() -> Console:
    """A console for our own output alone; the libraries' bars and advice would drown it."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; some bars have no other switch
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return _Console()
