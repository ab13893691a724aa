"""Perplexity, layer error and zero-shot accuracy of every method at every pattern, on one model.

    python benchmarks/accuracy.py MODEL --calibration c4.jsonl --evaluation wikitext2_test.txt --output accuracy.json

A method is a selector as published, or a selector with steps: +solve (its mask, survivors re-solved by the sink
objective), +loss (the same by objective loss), +unsolved (+loss without the solve), +shared (sparsity allocated by the
loss), +tune (block tuning, --tuning-epochs); or a preset: fast, balanced, best. Each one prunes a fresh copy of the
model. Prints Markdown.
--held-out also measures on that share of the calibration text, its end, on which nothing is calibrated.
--own-samples adds sequences that the model generates, each from an excerpt of the text.

--output is written after each result, and --resume continues from it. With --keep DIR an interrupted result continues
from its last block, and generated sequences are reused. --resume OTHER.json also takes results of other files with the
same settings. --known-only prints the tables of known results and measures nothing. Results of other weights, texts or
settings are not used; results older than the hash of weights are used, and a line says so.

Presets have their own scope, allocation, damping, gap and sink weight; the options for these do not change them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness.text import split
from harness.zeroshot import accuracies
from pydantic_core import to_jsonable_python
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima import Recipe, prune
from optima.data.datasets import load_documents
from optima.data.generate import generate_tokens
from optima.data.text import calibration_tokens, data_hash, special_tokens
from optima.device import describe_device, find_device
from optima.errors import OptimaError
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.evaluation.tasks import load_tasks
from optima.models.load import find_source, load_model, load_tokenizer
from optima.patterns import SCOPES, Unstructured
from optima.plan import default_scope, make_methods
from optima.recipe import FISHER_FRACTION, SINK_WEIGHT, load_recipe
from optima.reporting.record import library_versions
from optima.run import hash_tensors
from optima.selectors.base import SELECTORS

DENSE = "dense"
OWN = "optima"  # has no published update: its weights come from the solve
STEPS = {"solve", "loss", "unsolved", "shared", "tune"}
PRESETS = ["fast", "balanced", "best"]
METHODS = [*(name for name in SELECTORS if name != OWN), *(f"{name}+solve" for name in SELECTORS), *PRESETS]
PATTERNS = ["0.5", "0.6", "0.7", "2:4"]


@dataclass(frozen=True)
class Bench:
    """What every run shares."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens_NL: Tensor
    windows_NL: Tensor
    held_out_NL: Tensor | None
    options: argparse.Namespace
    fingerprint: str  # of the model's weights

    def recipe(self, method: str, pattern: str) -> Recipe:
        name, *steps = method.split("+")
        options = self.options
        if name in PRESETS:
            return load_recipe(name, seed=options.seed, pattern=[pattern])
        solves = ("solve" in steps or "loss" in steps) and "unsolved" not in steps
        allocation = "uniform" if ":" in pattern else "loss" if "shared" in steps else options.allocation
        objective = "loss" if "loss" in steps else "sink" if "solve" in steps else "plain"
        return Recipe(
            selector=name,
            pattern=[pattern],
            scope=None if ":" in pattern else options.scope,
            allocation=allocation,
            objective=objective,
            tuning_epochs=options.tuning_epochs if "tune" in steps else 0,
            solver="auto" if solves else "none",
            seed=options.seed,
            gap=options.gap,
            damping=options.damping,
            learning_rate=options.learning_rate,
            tuning_fraction=1.0,
        )

    def settings(self, method: str, pattern: str) -> dict[str, Any]:
        """All that decides a result but the code: results of equal settings stand for each other."""
        options = self.options
        evaluation = {
            "model": Path(options.model).name,
            "fingerprint": self.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "windows": list(self.windows_NL.shape),
            "evaluation_hash": data_hash(self.windows_NL),
            **({} if self.held_out_NL is None else {"held_out_hash": data_hash(self.held_out_NL)}),
            "tasks": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in options.tasks.items()},
            "task_limit": options.task_limit if options.tasks else None,
        }
        if method == DENSE:
            return evaluation
        recipe = self.recipe(method, pattern)
        methods = make_methods(recipe)
        recipe = recipe.resolved(scope=default_scope(recipe.resolved_objective, methods.selector))
        applied = recipe.table(recipe.scope or "row").default
        names = ["selector", "pattern", "allocation", "solver", "damping", "seed"]
        names += ["gap"] if recipe.solver != "none" else []
        names += ["objective"] if recipe.objective == "loss" else []
        names += ["tuning_epochs", "learning_rate"] if recipe.tuning_epochs else []
        fraction = {"swept_share": FISHER_FRACTION} if recipe.objective == "loss" else {}
        tuned = {"tuning_share": recipe.tuning_fraction} if recipe.tuning_epochs and recipe.tuning_fraction < 1 else {}
        weight = {"sink_weight": SINK_WEIGHT if recipe.objective == "sink" else None}
        return (
            {name: getattr(recipe, name) for name in names}
            | fraction
            | tuned
            | weight
            | {
                # As applied: what a selector published may change.
                "scope": applied.scope if isinstance(applied, Unstructured) else None,
                "calibration_hash": data_hash(self.tokens_NL),
                "calibration": list(self.tokens_NL.shape),
                **({"own_samples": options.own_samples} if options.own_samples else {}),
                # Earlier results lack these.
                **({"coupling": True} if "coupling" in methods.needs else {}),
                **({"tempered_rows": True} if recipe.objective == "loss" and isinstance(applied, Unstructured) else {}),
                **({"words": True} if recipe.objective == "loss" and recipe.tuning_epochs else {}),
                **({"sensitivity_share": FISHER_FRACTION} if recipe.allocation == "loss" else {}),
                **evaluation,
            }
        )

    def run(self, method: str, pattern: str) -> dict[str, Any]:
        """Prune a copy of the model and measure it."""
        device = find_device(self.options.device)
        result: dict[str, Any] = {"method": method, "pattern": pattern}
        sparse, asked = self.model, self.settings(method, pattern)
        kept = self.options.keep / digest(asked) if self.options.keep and method != DENSE else None
        if method != DENSE:
            sparse = copy.deepcopy(self.model)
            if kept:
                shutil.rmtree(kept, ignore_errors=True)  # whole, but not measured: the process was killed then
            goes_on: dict[str, Any] = {"output_dir": kept, "resume": True} if kept else {}
            goes_on |= {"device": self.options.device, "calibration": self.tokens_NL}
            report = prune(sparse, self.recipe(method, pattern), **goes_on)
            linears, done = report.linears, report.run.recipe
            for name in {"objective", "tuning_epochs"} & asked.keys():
                if done[name] != asked[name]:
                    notes = "; ".join(report.run.notes)
                    raise OptimaError(f"{method} at {pattern} ran with {name} {done[name]}, not {asked[name]}: {notes}")
            result |= {
                "error": report.error_geomean,
                "gap_max": report.gap_max,
                "rows_not_converged": report.rows_not_converged,
                "linears_worse_than_selector": [
                    r.name for r in report.linears if r.error > r.error_selector * 1.000001
                ],
                "sparsity": report.sparsity,
                "notes": report.run.notes,
                "seconds": report.run.seconds,
                "seconds_in_linears": sum(r.seconds for r in linears),
                "stages": report.run.stages,
                "peak_memory_bytes": report.run.peak_memory_bytes,
            }
        result["perplexity"] = perplexity(sparse.to(device), self.windows_NL)
        if self.held_out_NL is not None:
            result["perplexity_held_out"] = perplexity(sparse, self.held_out_NL)
        if self.options.tasks:
            started = time.perf_counter()
            result["tasks"] = accuracies(sparse, self.tokenizer, self.options.tasks, self.options.task_limit)
            result["seconds_in_tasks"] = time.perf_counter() - started
        if kept:
            shutil.rmtree(kept)
        return result | {"settings": asked, "made_with": made_with(self.options)}


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    options.tasks = dict(options.tasks)
    torch.set_num_threads(options.threads)
    if options.output and options.output.exists() and options.resume is None:
        parser.error(f"{options.output} exists: go on from it with --resume, or name another file")
    try:
        results = known_results(options)
        bench = make_bench(options)
        runs = [(DENSE, "-"), *((method, pattern) for pattern in options.patterns for method in options.methods)]
        for method, pattern in [] if options.known_only else runs:
            if find(results, bench, method, pattern) is None:
                results.append(to_jsonable_python(bench.run(method, pattern), inf_nan_mode="strings"))
                print(json.dumps(results[-1]), flush=True)
            save(results, options.output)
    except OptimaError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print_tables(results, bench)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure perplexity on")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="sparsities and n:m patterns")
    parser.add_argument("--methods", nargs="+", default=METHODS, type=method, metavar="METHOD", help="see above")
    parser.add_argument("--held-out", type=float, metavar="SHARE", help="of the calibration text, to measure on too")
    parser.add_argument("--tuning-epochs", type=int, default=4, help="of methods with +tune")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of methods with +tune")
    parser.add_argument("--scope", choices=SCOPES, help="of selectors' sparsities (default: as published)")
    parser.add_argument("--allocation", choices=("uniform", "loss"), default="uniform", help="of selectors' sparsities")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--gap", type=float, default=1e-4, help="of the solves")
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--own-samples", type=int, default=0, help="sequences more, which the model writes itself")
    parser.add_argument("--max-seq-length", type=int, default=512, help="tokens in a calibration sequence")
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window of the evaluation text")
    parser.add_argument("--max-windows", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", type=named_file, default=[], metavar="NAME=FILE", help="lm-eval's tasks")
    parser.add_argument("--task-limit", type=int, help="use the first items of each task only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the model: auto (the checkpoint's own), bfloat16, float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the results as JSON after every run")
    parser.add_argument("--resume", nargs="*", type=Path, metavar="FILE", help="keep the results of --output and these")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keeps blocks and generated text, see above")
    parser.add_argument("--known-only", action="store_true", help="run nothing; print what --resume finds")
    return parser


def method(text: str) -> str:
    """A selector with steps, or a recipe."""
    name, *steps = text.split("+")
    if "unsolved" in steps and "loss" not in steps:
        raise argparse.ArgumentTypeError(f"{text}: unsolved is a part of loss: write {name}+loss+unsolved")
    if text in PRESETS or (name in SELECTORS and STEPS.issuperset(steps)):
        return text
    known = f"{', '.join(SELECTORS)} with any of +{' +'.join(sorted(STEPS))}, or {', '.join(PRESETS)}"
    raise argparse.ArgumentTypeError(f"{text} is none of {known}")


def named_file(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not file:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FILE, as in piqa=piqa_validation.jsonl")
    return name, Path(file)


def make_bench(options: argparse.Namespace) -> Bench:
    """Read all that is needed, so that a mistake shows before the first long run."""
    if options.tasks:
        load_tasks(options.tasks)
    source = find_source(options.model)
    tokenizer = load_tokenizer(source)
    documents: Iterable[str]
    held_out_NL = None
    if options.held_out:
        documents, rest = split(options.calibration, options.held_out, options.seed)
        held_out_NL = evaluation_windows(rest, tokenizer, options.window, options.max_windows)
    else:
        documents = load_documents(options.calibration, seed=options.seed)
    tokens_NL = calibration_tokens(documents, tokenizer, options.num_calibration_samples, options.max_seq_length)
    model = load_model(source, options.dtype)
    hashed = hash_tensors(model.state_dict().items())
    if options.own_samples:
        count, num_special = options.own_samples, len(special_tokens(tokenizer).before)

        def extended() -> Tensor:
            where = {"seed": options.seed, "device": find_device(options.device)}
            return torch.cat([tokens_NL, generate_tokens(model, tokens_NL, count, num_special, **where)])

        of = {
            "model": hashed,
            "dtype": str(model.dtype),
            "read": data_hash(tokens_NL),
            "own": count,
            "of": options.seed,
        }
        tokens_NL = kept_tensor(options.keep, of, extended)
    text = list(load_documents(options.evaluation))
    windows_NL = evaluation_windows(text, tokenizer, options.window, options.max_windows)
    bench = Bench(model, tokenizer, tokens_NL, windows_NL, held_out_NL, options, hashed)
    for pattern in options.patterns:
        for method in options.methods:
            bench.recipe(method, pattern)  # checks itself
    return bench


def digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def kept_tensor(place: Path | None, settings: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` returns, or returned for the same ``settings`` in an earlier process that kept it in ``place``."""
    if place is None:
        return make()
    file = place / f"{digest(settings)}.safetensors"
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": make()}, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
    return load_file(file)["tokens"]


def made_with(options: argparse.Namespace) -> dict[str, Any]:
    """Versions, commit and machine: kept with a result, but no part of what it stands for."""
    versions = library_versions() | ({"lm_eval": version("lm_eval")} if options.tasks else {})
    return {
        "versions": versions,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "device": describe_device(find_device(options.device)),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """The checked-out commit, with a plus if tracked files were changed; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def known_results(options: argparse.Namespace) -> list[dict[str, Any]]:
    files = list(options.resume or [])
    if options.resume is not None and options.output and options.output.exists():
        files.insert(0, options.output)
    results: list[dict[str, Any]] = []
    for file in files:
        results += [result for result in json.loads(file.read_text()) if result not in results]
    return results


def find(results: Sequence[dict[str, Any]], bench: Bench, method: str, pattern: str) -> dict[str, Any] | None:
    wanted = to_jsonable_python(bench.settings(method, pattern), inf_nan_mode="strings")
    without_tasks = {"tasks": {}, "task_limit": None}
    for result in results:
        # A result with tasks also answers for one without.
        settings = result["settings"] | ({} if wanted["tasks"] else without_tasks)
        unknown = "fingerprint" not in settings
        settings |= {"fingerprint": wanted["fingerprint"]} if unknown else {}
        if result["method"] == method and result["pattern"] == pattern and settings == wanted:
            if unknown:
                print(f"{method} {pattern}: taken by the model's name; its weights are not on record", file=sys.stderr)
            return result
    return None


def save(results: list[dict[str, Any]], output: Path | None) -> None:
    """Whole or not at all: a run that is cut off while it writes must not lose what the earlier ones found."""
    if output is not None:
        unfinished = output.with_name(f".{output.name}.unfinished")
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
        unfinished.replace(output)


def print_tables(results: Sequence[dict[str, Any]], bench: Bench) -> None:
    print(f"\nCalibration {data_hash(bench.tokens_NL)[:12]}, {list(bench.windows_NL.shape)} tokens evaluated.")
    print_table("perplexity (layer error)", loss, results, bench)
    if bench.held_out_NL is not None:
        print_table("perplexity of held-out calibration text", held_out, results, bench)
    for task in bench.options.tasks:
        print_table(f"{task}: acc / acc_norm, %", lambda result, task=task: accuracy(result, task), results, bench)
    print_table("seconds to prune", seconds, results, bench)


def loss(result: dict[str, Any]) -> str:
    # float: JSON holds an infinite number as text.
    error = f" ({float(result['error']):.4f})" if "error" in result else ""
    return f"{float(result['perplexity']):.2f}{error}"


def held_out(result: dict[str, Any]) -> str:
    return f"{float(result['perplexity_held_out']):.2f}"


def seconds(result: dict[str, Any]) -> str:
    return f"{result['seconds']:.0f}" if "seconds" in result else ""


def accuracy(result: dict[str, Any], task: str) -> str:
    found = result["tasks"][task]
    return " / ".join(f"{100 * found[metric]:.1f}" for metric in ("acc", "acc_norm") if metric in found)


def print_table(
    title: str, cell: Callable[[dict[str, Any]], str], results: Sequence[dict[str, Any]], bench: Bench
) -> None:
    """One row a method, one column a pattern."""
    patterns = bench.options.patterns
    print(f"\n| {title} | " + " | ".join(patterns) + " |")
    print("| --- |" + " ---: |" * len(patterns))
    for method in [DENSE, *bench.options.methods]:
        found = [find(results, bench, method, "-" if method == DENSE else pattern) for pattern in patterns]
        print(f"| {method} | " + " | ".join("" if result is None else cell(result) for result in found) + " |")


if __name__ == "__main__":
    main()
