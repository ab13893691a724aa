"""The ``optima`` command: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rich.console import Console
from rich.text import Text

import optima
from optima.console import OwnConsole, printable, say
from optima.errors import OptimaError, RankError
from optima.recipe import (
    GROUPS,
    SELECTOR_NAMES,
    Options,
    Recipe,
    RunOptions,
    Shrink,
    load_options,
    load_recipe,
    recipe_text,
)

EXAMPLES = """examples, for a MODEL of the hub or a directory:
  optima plan MODEL
  optima prune MODEL --output-dir DIR --sparsity 0.5
  optima eval MODEL DIR --dataset held-out.txt
optima COMMAND --help lists the options of a command."""
SELECTORS = f"""selectors: {", ".join(SELECTOR_NAMES[:5])},
{", ".join(SELECTOR_NAMES[5:])}; or package.module:Class with --trust-remote-code"""
DEMO_MODELS = ("smollm2-135m", "gemma-3-270m")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL = "hub id (NAME@REVISION), directory, GGUF file"


class _Parser(argparse.ArgumentParser):
    """One spelling of every option, no guessed abbreviations, errors of one line; absent options leave no value."""

    def __init__(self, **options: Any) -> None:
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=layout, **options)

    def error(self, message: str) -> NoReturn:
        if "are required: MODEL" in message:
            message += ": put it first, before options that take several values"
        raise OptimaError(f"{message}\nsee {self.prog} --help")


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command and the values of its options."""
    parser, commands = _parsers()
    known, extra = parser.parse_known_args(argv)
    values = vars(known)
    name = values.pop("command", None)
    if name is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if extra:
        commands[name].error(f"unknown argument {' '.join(extra)}")
    return name, values


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="optima", description="One-shot pruning of transformers.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"optima {optima.__version__}")
    found = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, _Parser] = {}

    def add(name: str, text: str, usage: str, **more: Any) -> Callable[..., Any]:
        commands[name] = found.add_parser(
            name, help=text, usage=f"optima {name} {usage}", description=f"{text[0].upper()}{text[1:]}.", **more
        )
        return commands[name].add_argument

    def add_device(option: Callable[..., Any]) -> None:
        option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (auto)")
        option("--trust-remote-code", action="store_true", help="run the checkpoint's own code")

    for name, text, kind, epilog in (
        ("prune", "prune a model in one shot", Recipe, SELECTORS),
        ("shrink", "remove neurons and blocks: smaller and faster everywhere", Shrink, ""),
    ):
        option = add(name, text, "MODEL --output-dir DIR [options]", epilog=epilog)
        option("model", metavar="MODEL", help=MODEL)
        option("--output-dir", metavar="DIR", required=True, help="for the new checkpoint and its report")
        option("--resume", action="store_true", help="continue an unfinished run in that place")
        option("--no-resume", dest="resume", action="store_false", help="delete an unfinished run in that place")
        option("--push-to-hub", metavar="REPO", help="upload the output to this hub repository")
        option("--private", action="store_true", help="create that repository as private")
        add_device(option)
        _add_recipe(commands[name], kind)

    option = add("plan", "show what would be done, and its peak memory", "MODEL [options]", epilog=SELECTORS)
    option("model", metavar="MODEL", help=MODEL)
    add_device(option)
    _add_recipe(commands["plan"], Recipe, Shrink)

    option = add("permute", "permute channels so that n:m loses less", "MODEL --output-dir DIR --pattern 2:4 [options]")
    option("model", metavar="MODEL", help=MODEL)
    option("--output-dir", metavar="DIR", required=True, help="for the same model, to be pruned then")
    add_device(option)
    _add_recipe(commands["permute"], Recipe)

    option = add("eval", "measure and compare models", "MODEL [MODEL ...] [options]")
    option("models", nargs="+", metavar="MODEL", help="hub ids, directories or GGUF files, reference first")
    option("--dataset", nargs="+", metavar="TEXT", help="for perplexity: files or NAME:CONFIG@REVISION")
    option("--split", metavar="NAME", help="split of a hub dataset (test)")
    text = "BOS in every window: windows; once: sparsegpt (windows)"
    option("--protocol", choices=("windows", "sparsegpt"), metavar="NAME", help=text)
    option("--max-seq-length", type=int, metavar="N", help="tokens in a window (2048)")
    option("--max-windows", type=int, metavar="N", help="use the first windows only (all)")
    option("--divergence", action="store_true", help="KL divergence from the first model")
    option("--tasks", nargs="+", metavar="TASK", help="of lm-eval, such as piqa,arc_easy")
    option("--task-data", metavar="DIR", help="local items: TASK_SPLIT.jsonl, .json, .parquet (hub)")
    option("--task-limit", type=int, metavar="N", help="use the first items of each task only (all)")
    option("--speed", action="store_true", help="tokens per second of prefill and decoding")
    option("--batch-size", type=int, metavar="N", help="of a forward pass (1 window, 8 choices)")
    add_device(option)
    option("--dtype", choices=DTYPES, metavar="NAME", help=f"{', '.join(DTYPES)} (auto)")
    option("--output", metavar="FILE", help="write the results as JSON")

    option = add("report", "print the report of a run, and its evaluation", "PATH")
    option("path", metavar="PATH", help="a checkpoint's directory, or its report.json")

    for name, text, suffix in (
        ("compress", "store a pruned checkpoint without its zeros", "compressed"),
        ("restore", "restore a compressed checkpoint, bit for bit", "restored"),
    ):
        option = add(name, text, "DIR [--output-dir DIR]")
        option("directory", metavar="DIR", help="the checkpoint, in safetensors format")
        option("--output-dir", metavar="DIR", help=f"where it goes (the name with -{suffix} appended)")

    option = add("push", "publish a pruned checkpoint on the hub", "DIR REPO [options]")
    option("directory", metavar="DIR", help="what optima prune or optima compress wrote")
    option("repo", metavar="REPO", help="name, or owner/name; created if it does not exist")
    option("--private", action="store_true", help="create it as private; fail if it exists and is public")
    option("--message", metavar="TEXT", help="commit message")

    option = add("recipe", "list the presets, or show and check a recipe", "[NAME]")
    option("name", nargs="?", metavar="NAME", help="a preset, or a file")

    option = add("demo", "prune a small real model and compare", "[--model NAME]")
    text = f"{' or '.join(DEMO_MODELS)} ({DEMO_MODELS[0]})"
    option("--model", choices=DEMO_MODELS, default=DEMO_MODELS[0], metavar="NAME", help=text)
    option("--output-dir", default="demo-output", metavar="DIR", help="for the checkpoint and report (demo-output)")
    option("--num-calibration-samples", type=int, default=4, metavar="N", help="sequences of 512 tokens (4)")
    return parser, commands


def _add_recipe(parser: _Parser, *kinds: type[RunOptions]) -> None:
    presets = ", ".join(kinds[0].presets) if kinds[0] is Shrink else "a preset of optima recipe"
    parser.add_argument("--recipe", metavar="NAME", help=f"YAML file, or {presets}")
    fields: dict[str, Any] = {name: field for kind in reversed(kinds) for name, field in kind.model_fields.items()}
    used = {field.json_schema_extra["group"] for field in fields.values()}
    groups = {name: parser.add_argument_group(f"{name} ({text})") for name, text in GROUPS.items() if name in used}
    for name, field in fields.items():
        extra: Any = field.json_schema_extra
        flag, many = f"--{name.replace('_', '-')}", isinstance(field.default, list)
        if field.default is False:
            groups[extra["group"]].add_argument(flag, action="store_true", help=field.description)
            continue
        default = extra["shown"] or (" ".join(field.default) if many else field.default)
        options: dict[str, Any] = {"nargs": "*" if name == "ignore" else "+"} if many else {}
        text = f"{field.description} ({default})".replace("%", "%%")
        groups[extra["group"]].add_argument(flag, metavar=extra["metavar"], help=text, **options)


def _pop_recipe(options: dict[str, Any], kind: type[Options]) -> Options:
    """The options of the file or preset, if one is named, with the flags removed from ``options`` over them."""
    flags = {name: options.pop(name) for name in kind.model_fields.keys() & options.keys()}
    name = options.pop("recipe", None)
    return kind(**flags) if name is None else load_options(kind, name, **flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Returns:
        A status of ``docs/reference/exit-codes.md``: 0 done, 2 bad input, 130 interrupted (128 + n by signal n), 141
        when nobody reads the output any more. A bug ends in a traceback and 1.
    """
    # How many compiled products torch and oneDNN keep on a CPU: a thousand each take 13 MB a block of SmolLM2.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what its encoding lacks is no reason to lose the rest
            stream.reconfigure(errors="backslashreplace")
    try:
        command, arguments = parse(list(sys.argv[1:] if argv is None else argv))
        COMMANDS[command](**arguments)
        if sys.stdout is not None:  # a daemon has none
            sys.stdout.flush()
    except OptimaError as error:
        # A Text is printed as it is: no markup, no emoji.
        message = Text.assemble(("optima: error:", "bold red"), " ", printable(str(error)))
        return _end(2, error, message)
    except BrokenPipeError:
        _close(sys.stdout, sys.stderr)
        return 141
    except KeyboardInterrupt as error:
        return _end(getattr(error, "exit_code", 130), error, Text(f"optima: {str(error) or 'interrupted'}"))
    return 0


def _end(status: int, error: BaseException, message: Text) -> int:
    # Of torchrun's processes on a machine all have the same to say, but for those that are left when another has died.
    if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
        try:
            Console(stderr=True, soft_wrap=True).print(message)
        except OSError:  # a full disk: the status says it too
            _close(sys.stderr)
    return status


def _close(*streams: TextIO) -> None:
    """Point them at the null device, for Python flushes them once more at its exit."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    print(printable(text))


def _prune(model: str, **options: Any) -> None:
    _run(model, "prune", _pop_recipe(options, Recipe), **options)


def _shrink(model: str, **options: Any) -> None:
    _run(model, "shrink", _pop_recipe(options, Shrink), **options)


def _run(
    model: str,
    verb: str,
    recipe: RunOptions,
    output_dir: str,
    push_to_hub: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> None:
    from optima.reporting.summary import render_summary

    _quiet_console()
    if push_to_hub is not None:  # what the hub refuses is refused before the run
        from optima.hub import open_repo

        push_to_hub = open_repo(push_to_hub, private)
    try:
        report = getattr(optima, verb)(model, recipe, output_dir=output_dir, **options)
    except RankError:  # the launcher stops this process too: not before it has said so
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    if report.run.processes > 1 and os.environ["RANK"] != "0":
        return
    _say(render_summary(report))
    _say(f"checkpoint and report: {output_dir} (report.html, report.md, report.json)")
    if push_to_hub is not None:
        _push(output_dir, push_to_hub, private=private)


def _push(directory: str, repo: str, **options: Any) -> None:
    _say(f"published: {optima.push(directory, repo, **options)}")


def _plan(model: str, device: str = "auto", trust_remote_code: bool = False, **options: Any) -> None:
    verb, kind = ("shrink", Shrink) if {"neurons", "blocks"} & options.keys() else ("prune", Recipe)
    recipe: RunOptions = _pop_recipe(options, kind)
    if options:
        raise OptimaError(f"--{min(options).replace('_', '-')} is not an option of optima {verb}")
    console = _quiet_console()
    from optima.models.load import find_source
    from optima.plan import make_plan, print_plan

    print_plan(make_plan(find_source(model, trust_remote_code), recipe, device), model, console)


def _permute(model: str, **options: Any) -> None:
    recipe = _pop_recipe(options, Recipe)
    _quiet_console()
    _say(str(optima.permute(model, recipe, **options)))
    _say(f"the same model, its channels permuted: {options['output_dir']}; prune it next")


def _eval(models: Sequence[str], output: str | None = None, **options: Any) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptimaError("optima eval runs in one process: start it without torchrun")
    from optima.evaluation.record import check_output

    if output is not None:
        check_output(output)
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


def _report(path: str) -> None:
    from optima.evaluation.record import EVALUATION_NAME, load_evaluation
    from optima.evaluation.table import render_evaluation
    from optima.reporting.markdown import render_markdown

    report, place = optima.load_report(path), Path(path) if Path(path).is_dir() else Path(path).parent
    evaluated = (place / EVALUATION_NAME).is_file()
    _say(render_markdown(report, render_evaluation(load_evaluation(place)) if evaluated else ""))


def _compress(directory: str, **options: Any) -> None:
    _say(str(optima.compress(directory, **options)))


def _restore(directory: str, **options: Any) -> None:
    _say(f"{optima.restore(directory, **options)}, every checksum right")


def _recipe(name: str | None = None) -> None:
    if name is None:
        width = max(map(len, Recipe.presets))
        _say("\n".join(f"{preset:{width}}  {recipe_text(preset).splitlines()[0][2:]}" for preset in Recipe.presets))
    else:
        load_recipe(name)
        _say(recipe_text(name).rstrip())


def _demo(model: str, output_dir: str, num_calibration_samples: int) -> None:
    console = _quiet_console()
    from optima.demo import run_demo

    run_demo(optima.prune, model, Path(output_dir), num_calibration_samples, console)


COMMANDS: dict[str, Callable[..., None]] = {
    name: globals()[f"_{name}"]
    for name in (
        "prune",
        "shrink",
        "plan",
        "permute",
        "eval",
        "report",
        "compress",
        "restore",
        "push",
        "recipe",
        "demo",
    )
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
    return OwnConsole(emoji=False, markup=False)
