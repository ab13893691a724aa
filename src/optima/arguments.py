"""The options of the ``optima`` command, and the recipe that they make. No torch is imported here."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import optima
from optima.errors import IdleError, OptimaError
from optima.options import DEMO_MODELS, DTYPES, GROUPS
from optima.recipe import Recipe, recipe_from_dict
from optima.recipe_files import read_recipe, recipe_in
from optima.values import must_be

_logger = logging.getLogger("optima")

EXAMPLES = """To begin with, for a MODEL of the hub or a directory:
  optima plan MODEL
  optima prune MODEL --output-dir DIR --sparsity 0.5
  optima eval MODEL DIR --dataset held-out.txt
optima COMMAND --help lists the options of a command."""

EVAL = (
    "Perplexity of text in non-overlapping windows, and accuracy on tasks by lm-eval (pip install '.[eval]'). Each "
    "model is compared with the first on the same windows and items."
)

CHANNELS = {
    "mlp": "those inside an MLP",
    "heads": "those of a value head, which are turned",
    "hidden": "those of the hidden states, in the whole model",
}

RECIPE_ACTIONS = {
    "list": "those that ship, a line each",
    "show": "the YAML of one, to change and save",
    "validate": "refuse what a run would refuse of a file",
    "schema": "a JSON schema for editors",
}


class _Formatter(argparse.HelpFormatter):
    """Help of 80 columns that breaks no line within an option or the name of a package."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = partial(textwrap.fill, width=width, initial_indent=indent, subsequent_indent=indent)
        return "\n".join(wrap(line, break_on_hyphens=False) for line in text.split("\n"))


class _Parser(argparse.ArgumentParser):
    """One spelling of every option, no guessed abbreviations, errors of one line; what is not given leaves no value."""

    def __init__(self, **options: Any) -> None:
        options |= {"argument_default": argparse.SUPPRESS, "formatter_class": _Formatter}
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if "are required" in message and any(option.option_strings and option.nargs for option in self._actions):
            message += ": put it first, before options that take several values"
        raise OptimaError(f"{message}\nsee {self.prog} --help")

    def unknown(self, flag: str) -> NoReturn:
        """Refuse an option, naming the closest of those that there are."""
        close = difflib.get_close_matches(flag.replace("_", "-"), self._option_string_actions, 1)
        self.error(f"unknown argument {flag}" + (f" (did you mean {close[0]}?)" if close else ""))


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and what was given to it."""
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
    if name in ("prune", "order") and "output_dir" not in given:
        what = "sparse checkpoint and its report are" if name == "prune" else "model with its channels in order is"
        command.error(f"--output-dir is missing: where the {what} written")
    return name, given


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line and that of each command."""
    parser = _Parser(prog="optima", description=optima.__doc__, epilog=EXAMPLES)
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
    text = "upload the output to this hub repository; it is created before the run"
    option("--push-to-hub", metavar="REPO", help=text)
    option("--private", action="store_true", help="create that repository as private; fail if it exists and is public")
    text = "log errors, gaps and seconds of each block to trackers of accelerate: tensorboard, wandb, trackio ..."
    option("--report-to", nargs="+", metavar="NAME", help=text)
    _add_recipe(commands["prune"])

    option = add("plan", "show what would be pruned, and the cost", "MODEL [options]")
    option("model", metavar="MODEL", help="hub id, local directory, or GGUF file; no weights are loaded")
    _add_recipe(commands["plan"])

    option = add(
        "order", "order channels so that a pattern n:m loses less", "MODEL --output-dir DIR --pattern 2:4 [options]"
    )
    option("model", metavar="MODEL", help="hub id, local directory, or GGUF file; all of it is in memory")
    option("--output-dir", metavar="DIR", help="where the same model goes, to be pruned then")
    option("--overwrite", action="store_true", help="replace an earlier output in that place")
    text = f"which of them change places: {_named(CHANNELS)} (default: all)"
    option("--channels", nargs="+", choices=CHANNELS, metavar="NAME", help=text)
    _add_recipe(commands["order"], of_order)

    _add_eval(add("eval", "measure and compare models", "MODEL [MODEL ...] [options]", EVAL))

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

    option = add("push", "publish a pruned checkpoint on the hub", "DIR REPO [options]")
    option("directory", metavar="DIR", help="what optima prune or optima pack wrote")
    option("repo", metavar="REPO", help="name, or owner/name; created if it does not exist")
    option("--private", action="store_true", help="create it as private; fail if it exists and is public")
    option("--message", metavar="TEXT", help="commit message")

    option = add("recipe", "list, show and check recipes", "list | show NAME | validate FILE | schema")
    option("action", choices=RECIPE_ACTIONS, metavar="ACTION", help=_named(RECIPE_ACTIONS))
    option("name", nargs="?", metavar="NAME", help="for show and validate: a recipe that ships, or a file")

    option = add("demo", "prune a real small model from the package registry and compare", "[--model NAME]")
    text = f"{' or '.join(DEMO_MODELS)} (default: {DEMO_MODELS[0]})"
    option("--model", choices=DEMO_MODELS, default=DEMO_MODELS[0], metavar="NAME", help=text)
    text = "where the sparse checkpoint and its report go (default: demo-output)"
    option("--output-dir", default="demo-output", metavar="DIR", help=text)
    text = "calibration sequences of 512 tokens; 32 take about 15 minutes (default: 8)"
    option("--num-calibration-samples", type=int, default=8, metavar="N", help=text)
    return parser, commands


def _add_eval(option: Callable[..., Any]) -> None:
    option("models", nargs="+", metavar="MODEL", help="hub ids, directories or GGUF files, the reference first")
    option(
        "--dataset",
        nargs="+",
        metavar="TEXT",
        help="text for perplexity: local files or hub ids (NAME:CONFIG@REVISION)",
    )
    option("--split", metavar="NAME", help="split of a hub dataset (default: test)")
    text = "where BOS stands: windows: in every window; sparsegpt: once, before the text (default: windows)"
    option("--protocol", choices=("windows", "sparsegpt"), metavar="NAME", help=text)
    option("--max-seq-length", type=int, metavar="N", help="tokens in a window (default: 2048)")
    option("--max-windows", type=int, metavar="N", help="use the first windows only (default: all)")
    text = "KL divergence from the first model, which stays in memory"
    option("--divergence", action="store_true", help=text)
    option("--tasks", nargs="+", metavar="TASK", help="multiple-choice tasks of lm-eval, such as piqa,arc_easy")
    text = "directory with the items: TASK_SPLIT.jsonl, .json or .parquet (default: the hub)"
    option("--task-data", metavar="DIR", help=text)
    option("--task-limit", type=int, metavar="N", help="use the first items of each task only (default: all)")
    text = "windows, or choices, in one forward pass (default: 1 window, 8 choices)"
    option("--batch-size", type=int, metavar="N", help=text)
    option("--revision", metavar="NAME", help="commit, tag or branch of the first model (default: newest)")
    option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    option("--dtype", choices=DTYPES, metavar="NAME", help=f"load in this: {', '.join(DTYPES)} (default: auto)")
    option("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    option("--output", metavar="FILE", help="write the results as JSON")
    option("--overwrite", action="store_true", help="replace earlier results in that file")


def _named(about: Mapping[str, str]) -> str:
    """Names and what they mean, for the help."""
    return "; ".join(f"{name}: {text}" for name, text in about.items())


def _add_output(option: Callable[..., Any], suffix: str) -> None:
    option("--output-dir", metavar="DIR", help=f"where it goes (default: the name with -{suffix} behind)")
    option("--overwrite", action="store_true", help="replace an earlier output in that place")


def of_order(field: dataclasses.Field[Any]) -> bool:
    """Whether a field of a recipe counts where channels are ordered."""
    unused = ("mask", "solve", "tuning")
    return field.name == "pattern" or not (field.metadata["group"] in unused or field.name == "expert_tokens")


def _add_recipe(parser: _Parser, counts: Callable[[dataclasses.Field[Any]], bool] = bool) -> None:
    """An option for each field of a recipe that ``counts``, group by group."""
    text = "YAML file with any of the options below, or one of optima recipe list; the command line overrides it"
    parser.add_argument("--recipe", metavar="NAME", help=text)
    offered = [field for field in dataclasses.fields(Recipe) if counts(field)]
    known = {field.metadata["group"] for field in offered}
    groups = {name: parser.add_argument_group(f"{name} ({about})") for name, about in GROUPS.items() if name in known}
    for field in offered:
        flag, group = f"--{field.name.replace('_', '-')}", groups[field.metadata["group"]]
        text = ": ".join(filter(None, [field.metadata["help"], ", ".join(field.metadata["choices"])]))
        default = getattr(Recipe(), field.name)
        if default is False:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        many = isinstance(default, list)
        shown = field.metadata["shown"] or (" ".join(default) if many else default)
        text = f"{text} (default: {shown})".replace("%", "%%")
        count = "*" if field.name == "ignore" else "+"  # which may be of nothing
        group.add_argument(flag, nargs=count if many else None, metavar=_metavar(field), help=text)


def _metavar(field: dataclasses.Field[Any]) -> str:
    """What stands for a value in the help."""
    names = {"targets": "REGEX", "ignore": "REGEX", "pattern": "PATTERN", "dataset": "TEXT", "mask_from": "PATH"}
    names |= {"memory_budget": "SIZE"}
    text = must_be(Recipe, field.name)
    return names.get(field.name) or ("N" if "whole number" in text else "X" if "number" in text else "NAME")


def recipe_of(given: dict[str, Any]) -> Recipe:
    """The recipe file, if one is named, overridden by what was given."""
    path = given.pop("recipe", None)
    if path is None:
        return recipe_from_dict(given)
    values = read_recipe(path)
    if values.get("trust_remote_code") is True:
        del values["trust_remote_code"]  # a file from elsewhere cannot vouch for the code that it runs
    trusted = {name: value for name, value in given.items() if name == "trust_remote_code"}
    recipe_in(path, values | trusted)
    _drop_patterns(values, given, path)
    if reason := _unshared(given, values):
        _drop_allocation(values, path, reason)
    _drop_other(values, given)
    while True:
        try:
            return recipe_from_dict(values | given)
        except IdleError as error:  # by what was given: the file for itself is in order
            if error.name in given:
                raise
            del values[error.name]


def _drop_patterns(values: dict[str, Any], given: dict[str, Any], path: str) -> None:
    """The two ways to say how sparse exclude each other; the command line decides which one counts."""
    if "pattern" in given:
        values.pop("sparsity", None)
        if all(":" in entry.rpartition("=")[2] for entry in given["pattern"]):
            values.pop("scope", None)  # n:m has none
    if "sparsity" in given and values.pop("pattern", None):
        _logger.warning("recipe %s: its patterns are left out, for sparsity was given", path)
    if given.get("selector") == "external" and not {"sparsity", "pattern"} & given.keys():
        for name in [name for name in ("sparsity", "pattern", "scope") if name in values]:
            del values[name]  # of masks that it did not choose
            _logger.warning("recipe %s: its %s is left out, for masks were given", path, name)


def _objective(values: dict[str, Any], given: dict[str, Any]) -> str:
    """The objective that was given, if only by the solver, see ``Recipe.applied_objective``; else loss."""
    if "objective" in given:
        return str(given["objective"])
    return "plain" if given.get("solver") == "none" and values.get("objective") is None else "loss"


def _drop_other(values: dict[str, Any], given: dict[str, Any]) -> None:
    """What the file says of a selector goes where another was given."""
    if given.get("selector", "external") != "external":
        values.pop("mask_from", None)


def _unshared(given: dict[str, Any], values: dict[str, Any]) -> str:
    """Why the file's allocation ends, which shares one unstructured sparsity by the loss; else empty."""
    if "allocation" in given:
        return ""
    pattern = given.get("pattern", ["0.5"])
    if len(pattern) > 1 or set(":=") & set(pattern[0]):
        return f"pattern {' '.join(pattern)}"
    if given.get("selector") == "external":
        return "selector external"
    objective = _objective(values, given)
    return "" if objective == "loss" else f"objective {objective}"


def _drop_allocation(values: dict[str, Any], path: str, reason: str) -> None:
    """What the file says of an allocation goes, with a warning if it names one."""
    named = values.get("allocation")
    if named not in (None, "uniform"):
        _logger.warning("recipe %s: its allocation %s is left out, for %s was given", path, named, reason)
        del values["allocation"]
