"""The ``optima`` command: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import HfArgumentParser

from optima.errors import OptimaError
from optima.recipe import DTYPES, Recipe, read_recipe, recipe_from_dict

RECIPE_HELP = "YAML file with any of these options; those given on the command line override it"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for bad input, 130 when interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        arguments = vars(_parser(argv).parse_args(argv))
        command = arguments.pop("command")
        run = {"prune": _prune, "eval": _eval, "plan": _plan, "report": _report, "demo": _demo}[command]
        run(arguments)
    except OptimaError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]optima: error:[/] {escape(str(error))}", highlight=False)
        return 2
    except KeyboardInterrupt as error:
        print(f"optima: {error}" if str(error) else "optima: interrupted", file=sys.stderr)
        return int(getattr(error, "exit_code", 130))
    return 0


class _ExactParser(HfArgumentParser):
    """Abbreviated options would escape the look for --recipe, --pattern and --sparsity below."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    from optima.evaluation.perplexity import PROTOCOL

    parser = argparse.ArgumentParser(prog="optima", description=sys.modules["optima"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_ExactParser)

    prune = commands.add_parser("prune", help="prune a model in one shot", dataclass_types=[Recipe])
    prune.add_argument("model", help="hub id, local directory, or GGUF file")
    prune.add_argument("--output-dir", required=True, help="where the sparse checkpoint and its report are written")
    prune.add_argument("--overwrite", action="store_true", help="replace the output directory if it exists")
    prune.add_argument("--dump-layer", metavar="REGEX", help="write hessian and weight of matching linears to layers/")

    plan = commands.add_parser("plan", help="show what would be pruned, and the cost", dataclass_types=[Recipe])
    plan.add_argument("model", help="hub id, local directory, or GGUF file; its weights are not loaded")
    for command in (prune, plan):
        command.add_argument("--recipe", metavar="FILE", help=RECIPE_HELP)
        command.set_defaults(**_recipe_defaults(argv))

    evaluate = commands.add_parser("eval", help="measure perplexity", description=PROTOCOL)
    evaluate.add_argument("models", nargs="+", help="hub ids, local directories or GGUF files; one table for all")
    evaluate.add_argument("--dataset", nargs="+", required=True, help="hub id or local text file(s)")
    evaluate.add_argument("--dataset-config", help="configuration of a hub dataset")
    evaluate.add_argument("--split", default="test", help="split of the dataset")
    evaluate.add_argument("--text-column", default="text", help="column that holds the text")
    evaluate.add_argument("--max-seq-length", type=int, default=2048, help="tokens in a window")
    evaluate.add_argument("--max-windows", type=int, help="use only the first windows")
    evaluate.add_argument("--batch-size", type=int, default=1, help="windows in one forward pass")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    evaluate.add_argument("--dtype", default="auto", choices=DTYPES, help="load the models in this dtype")
    evaluate.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")

    report = commands.add_parser("report", help="print the report of a pruned checkpoint")
    report.add_argument("path", help="the checkpoint's directory, or its report.json")

    demo = commands.add_parser("demo", help="prune a real small model from the package registry and compare")
    demo.add_argument("--output-dir", default="demo-output", help="where the sparse checkpoint and its report go")
    return parser


def _recipe_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Values of the recipe file named in ``argv``, as defaults that the other options override."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    finder.add_argument("--pattern", nargs="*")
    finder.add_argument("--sparsity", nargs="?", const="")
    given = finder.parse_known_args(list(argv))[0]
    if given.recipe is None:
        return {}
    # Only what the file names: the other defaults may depend on options that override it.
    named = read_recipe(given.recipe)
    checked = recipe_from_dict(named, f"recipe {given.recipe}").to_dict()
    values = {name: checked[name] for name in named}
    # The two ways to say how sparse exclude each other; the command line decides which one counts.
    if given.pattern is not None:
        values["sparsity"] = None
        if all(":" in entry.rpartition("=")[2] for entry in given.pattern):
            values["scope"] = None  # n:m has none
    if given.sparsity is not None:
        values["pattern"] = []
    return values


def _recipe(arguments: dict[str, Any]) -> Recipe:
    arguments.pop("recipe")
    return recipe_from_dict(arguments)


def _prune(arguments: dict[str, Any]) -> None:
    from optima.reporting.markdown import render_summary
    from optima.run import prune

    model, output_dir = arguments.pop("model"), arguments.pop("output_dir")
    overwrite, dump_layer = arguments.pop("overwrite"), arguments.pop("dump_layer")
    recipe = _recipe(arguments)
    report = prune(model, recipe, output_dir=output_dir, overwrite=overwrite, dump_layer=dump_layer)
    print(render_summary(report))
    print(f"checkpoint and report: {output_dir} (report.md, report.json)")


def _plan(arguments: dict[str, Any]) -> None:
    from optima.models.source import find_source
    from optima.plan import make_plan
    from optima.plan_table import print_plan

    model = arguments.pop("model")
    recipe = _recipe(arguments)
    plan = make_plan(find_source(model, recipe.trust_remote_code), recipe)
    print_plan(plan, model, Console())


def _eval(arguments: dict[str, Any]) -> None:
    from optima.evaluation.table import evaluate_models, print_table

    results = evaluate_models(**arguments)
    print_table(results, Console())


def _report(arguments: dict[str, Any]) -> None:
    from optima.reporting.markdown import render_markdown
    from optima.reporting.record import load_report

    print(render_markdown(load_report(Path(arguments["path"]))))


def _demo(arguments: dict[str, Any]) -> None:
    from optima.demo import run_demo

    run_demo(Path(arguments["output_dir"]), Console())


def _quiet_libraries() -> None:
    """Only our own progress is shown; the libraries' bars and advice would drown it."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
