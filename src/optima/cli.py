"""The ``optima`` command: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

import optima
from optima.errors import OptimaError
from optima.evaluation import PROTOCOL
from optima.recipe import DTYPES, GROUPS, Recipe, must_be, read_recipe, recipe_from_dict

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
            sys.stdout.flush()
    except OptimaError as error:
        # A Text is printed as it is: no markup, no emoji.
        message = Text.assemble(("optima: error:", "bold red"), " ", str(error))
        Console(stderr=True, soft_wrap=True).print(message)
        return 2
    except BrokenPipeError:
        # Python flushes stdout once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(f"optima: {str(error) or 'interrupted'}", file=sys.stderr)
        return int(getattr(error, "exit_code", 130))
    return 0


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
    if name == "eval" and not given.get("dataset"):
        command.error("--dataset is missing: a hub id or local text files")
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

    option = add(
        "eval", "measure perplexity", "MODEL [MODEL ...] --dataset TEXT [options]", f"Measure perplexity: {PROTOCOL}."
    )
    option("models", nargs="+", metavar="MODEL", help="hub ids, local directories or GGUF files")
    option("--dataset", nargs="+", metavar="TEXT", help="hub id or local text files")
    option("--dataset-config", metavar="NAME", help="configuration of a hub dataset")
    option("--split", metavar="NAME", help="split of a hub dataset (default: test)")
    option("--text-column", metavar="NAME", help="column that holds the text (default: text)")
    option("--max-seq-length", type=int, metavar="N", help="tokens in a window (default: 2048)")
    option("--max-windows", type=int, metavar="N", help="use the first windows only (default: all)")
    option("--batch-size", type=int, metavar="N", help="windows in one forward pass (default: 1)")
    option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    option("--dtype", choices=DTYPES, metavar="NAME", help=f"load in this: {', '.join(DTYPES)} (default: auto)")
    option("--trust-remote-code", action="store_true", help="run the checkpoint's own code")

    option = add("report", "print the report of a pruned checkpoint", "PATH")
    option("path", metavar="PATH", help="the checkpoint's directory, or its report.json")

    option = add("demo", "prune a real small model from the package registry and compare", "[--output-dir DIR]")
    text = "where the sparse checkpoint and its report go (default: demo-output)"
    option("--output-dir", default="demo-output", metavar="DIR", help=text)
    return parser, commands


def _add_recipe(parser: _Parser) -> None:
    """An option for each field of a recipe, group by group."""
    text = "YAML file with any of the options below; those given on the command line override it"
    parser.add_argument("--recipe", metavar="FILE", help=text)
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
    for option, method, own in (("selector", "external", "mask_from"), ("allocation", "owl", "allocation_spread")):
        if given.get(option, method) != method:
            values.pop(own, None)
    return recipe_from_dict(values | given)


def _prune(model: str, output_dir: str, **given: Any) -> None:
    from optima.reporting.summary import render_summary

    options = {name: given.pop(name) for name in ("overwrite", "resume", "dump_layer") if name in given}
    recipe = _recipe(given)
    _quiet_console()
    report = optima.prune(model, recipe, output_dir=output_dir, **options)
    print(render_summary(report))
    print(f"checkpoint and report: {output_dir} (report.md, report.json)")


def _plan(model: str, measure: bool = False, **given: Any) -> None:
    recipe = _recipe(given)
    console = _quiet_console()
    from optima import plan
    from optima.models.source import find_source
    from optima.plan_table import print_plan

    found = plan.make_plan(find_source(model, recipe.trust_remote_code, recipe.revision), recipe)
    print_plan(found, plan.measure(found, recipe) if measure else None, model, console)


def _eval(**given: Any) -> None:
    console = _quiet_console()
    from optima.evaluation.table import evaluate_models, print_table

    print_table(evaluate_models(**given), console)


def _report(path: str) -> None:
    from optima.reporting.markdown import render_markdown

    print(render_markdown(optima.load_report(path)))


def _demo(output_dir: str) -> None:
    console = _quiet_console()
    from optima.demo import run_demo

    run_demo(Path(output_dir), console)


COMMANDS: dict[str, Command] = {"prune": _prune, "plan": _plan, "eval": _eval, "report": _report, "demo": _demo}


def _quiet_console() -> Console:
    """A console for our own output alone; the libraries' bars and advice would drown it."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return Console(emoji=False, markup=False)
