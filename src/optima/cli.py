"""The ``optima`` command: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import optima
from optima.errors import OptimaError
from optima.evaluation import PROTOCOL
from optima.recipe import DTYPES, GROUPS, Recipe, must_be, read_recipe, recipe_from_dict

Arguments = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Returns:
        2 for bad input, 130 when interrupted (128 + n by signal n), 141 when nobody reads the output any more.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command, arguments = _parse(argv)
        COMMANDS[command](arguments)
        sys.stdout.flush()
    except OptimaError as error:
        _print_error(str(error))
        return 2
    except BrokenPipeError:
        # Python flushes stdout once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(f"optima: {str(error) or 'interrupted'}", file=sys.stderr)
        return int(getattr(error, "exit_code", 130))
    return 0


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    # A Text is printed as it is: no markup, no emoji.
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("optima: error:", "bold red"), " ", message))


class _Parser(argparse.ArgumentParser):
    """One spelling of every option, no guessed abbreviations, and errors of one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", partial(argparse.HelpFormatter, max_help_position=26))
        super().__init__(allow_abbrev=False, **options)
        self.options: list[str] = []

    def option(self, group: argparse._ArgumentGroup | None, flag: str, **settings: Any) -> None:
        """Add an option; one that is not given leaves no value."""
        self.options.append(flag)
        (group or self).add_argument(flag, **{"default": argparse.SUPPRESS} | settings)

    def error(self, message: str) -> NoReturn:
        raise OptimaError(f"{message}\nsee {self.prog} --help")


def _parse(argv: Sequence[str]) -> tuple[str, Arguments]:
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
        flag = next((argument for argument in extra if argument.startswith("-")), extra[0]).partition("=")[0]
        close = difflib.get_close_matches(flag.replace("_", "-"), command.options, 1)
        command.error(f"unknown argument {flag}" + (f" (did you mean {close[0]}?)" if close else ""))
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

    def add(name: str, text: str, usage: str, description: str | None = None) -> _Parser:
        about = description or f"{text[0].upper()}{text[1:]}."
        commands[name] = found.add_parser(name, help=text, usage=f"optima {name} {usage}", description=about)
        return commands[name]

    prune = add("prune", "prune a model in one shot", "MODEL --output-dir DIR [options]")
    prune.add_argument("model", metavar="MODEL", help="hub id, local directory, or GGUF file")
    prune.option(None, "--output-dir", metavar="DIR", help="where the sparse checkpoint and its report are written")
    prune.option(None, "--overwrite", action="store_true", help="replace an earlier output in that place")
    prune.option(None, "--dump-layer", metavar="REGEX", help="write hessian and weight of these linears to layers/")
    _add_recipe(prune)

    plan = add("plan", "show what would be pruned, and the cost", "MODEL [options]")
    plan.add_argument("model", metavar="MODEL", help="hub id, local directory, or GGUF file; no weights are loaded")
    plan.add_argument("--measure", action="store_true", help="prune one random linear of each shape: seconds, memory")
    _add_recipe(plan)

    _add_eval(add("eval", "measure perplexity", "MODEL [MODEL ...] --dataset TEXT [options]", PROTOCOL))

    report = add("report", "print the report of a pruned checkpoint", "PATH")
    report.add_argument("path", metavar="PATH", help="the checkpoint's directory, or its report.json")

    demo = add("demo", "prune a real small model from the package registry and compare", "[--output-dir DIR]")
    text = "where the sparse checkpoint and its report go (default: demo-output)"
    demo.option(None, "--output-dir", default="demo-output", metavar="DIR", help=text)
    return parser, commands


def _add_recipe(parser: _Parser) -> None:
    """An option for each field of a recipe, group by group."""
    text = "YAML file with any of the options below; those given on the command line override it"
    parser.option(None, "--recipe", metavar="FILE", help=text)
    groups = {name: parser.add_argument_group(f"{name} ({about})") for name, about in GROUPS.items()}
    defaults = Recipe()
    for field in dataclasses.fields(Recipe):
        metadata = field.metadata
        choices = ", ".join(metadata["choices"])
        default = getattr(defaults, field.name)
        shown = metadata["shown"] or (" ".join(default) if isinstance(default, list) else default)
        text = f"{metadata['help']}{f': {choices}' if choices else ''}"
        settings: dict[str, Any]
        if default is False:
            settings = {"action": "store_true", "help": text}
        else:
            settings = {"help": f"{text} (default: {shown})".replace("%", "%%"), "metavar": _metavar(field)}
        if isinstance(default, list):
            settings["nargs"] = "*"
        parser.option(groups[metadata["group"]], f"--{field.name.replace('_', '-')}", **settings)


def _metavar(field: dataclasses.Field[Any]) -> str:
    """What stands for a value in the help."""
    names = {"targets": "REGEX", "ignore": "REGEX", "pattern": "PATTERN", "dataset": "TEXT", "mask_from": "PATH"}
    text = must_be(field)
    return names.get(field.name) or ("N" if "whole number" in text else "X" if "number" in text else "NAME")


def _add_eval(parser: _Parser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub ids, local directories or GGUF files")
    parser.option(None, "--dataset", nargs="+", metavar="TEXT", help="hub id or local text files")
    parser.option(None, "--dataset-config", metavar="NAME", help="configuration of a hub dataset")
    parser.option(None, "--split", metavar="NAME", help="split of a hub dataset (default: test)")
    parser.option(None, "--text-column", metavar="NAME", help="column that holds the text (default: text)")
    parser.option(None, "--max-seq-length", type=int, metavar="N", help="tokens in a window (default: 2048)")
    parser.option(None, "--max-windows", type=int, metavar="N", help="use the first windows only (default: all)")
    parser.option(None, "--batch-size", type=int, metavar="N", help="windows in one forward pass (default: 1)")
    parser.option(None, "--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    dtypes = ", ".join(DTYPES)
    parser.option(None, "--dtype", choices=DTYPES, metavar="NAME", help=f"load in this: {dtypes} (default: auto)")
    parser.option(None, "--trust-remote-code", action="store_true", help="run the checkpoint's own code")


def _recipe(given: Arguments) -> Recipe:
    """The recipe file, if one is named, overridden by what was given."""
    path = given.pop("recipe", None)
    if path is None:
        return recipe_from_dict(given)
    values = read_recipe(path)
    trusted = {name: given[name] for name in ("trust_remote_code",) if name in given}
    recipe_from_dict(values | trusted, f"recipe {path}")
    # The two ways to say how sparse exclude each other; the command line decides which one counts.
    if "pattern" in given:
        values.pop("sparsity", None)
        if all(":" in entry.rpartition("=")[2] for entry in given["pattern"]):
            values.pop("scope", None)  # n:m has none
    if "sparsity" in given:
        values.pop("pattern", None)
    return recipe_from_dict(values | given)


def _prune(given: Arguments) -> None:
    from optima.reporting.summary import render_summary

    model, output_dir = given.pop("model"), given.pop("output_dir")
    overwrite, dump_layer = given.pop("overwrite", False), given.pop("dump_layer", None)
    recipe = _recipe(given)
    _quiet_libraries()
    report = optima.prune(model, recipe, output_dir=output_dir, overwrite=overwrite, dump_layer=dump_layer)
    print(render_summary(report))
    print(f"checkpoint and report: {output_dir} (report.md, report.json)")


def _plan(given: Arguments) -> None:
    model, measured = given.pop("model"), given.pop("measure", False)
    recipe = _recipe(given)
    _quiet_libraries()
    from rich.console import Console

    from optima.models.source import find_source
    from optima.plan import make_plan, measure
    from optima.plan_table import print_plan

    plan = make_plan(find_source(model, recipe.trust_remote_code, recipe.revision), recipe)
    print_plan(plan, measure(plan, recipe) if measured else None, model, Console(emoji=False))


def _eval(given: Arguments) -> None:
    _quiet_libraries()
    from rich.console import Console

    from optima.evaluation.table import evaluate_models, print_table

    print_table(evaluate_models(**given), Console(emoji=False))


def _report(given: Arguments) -> None:
    from optima.reporting.markdown import render_markdown

    print(render_markdown(optima.load_report(given["path"])))


def _demo(given: Arguments) -> None:
    _quiet_libraries()
    from rich.console import Console

    from optima.demo import run_demo

    run_demo(Path(given["output_dir"]), Console(emoji=False))


COMMANDS = {"prune": _prune, "plan": _plan, "eval": _eval, "report": _report, "demo": _demo}


def _quiet_libraries() -> None:
    """Only our own progress is shown; the libraries' bars and advice would drown it."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
