"""Evaluate several models on the same text and print one table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from optima.calibration.text import Documents, TextSource
from optima.device import find_device
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.models.source import find_source, load_model, load_tokenizer


@dataclass(frozen=True)
class Result:
    """Perplexity of one model.

    Attributes:
        model: as the user named it.
        perplexity: by the protocol of ``optima.evaluation.perplexity``.
        windows: windows evaluated.
        seconds: time of the evaluation, loading excluded.
    """

    model: str
    perplexity: float
    windows: int
    seconds: float


def evaluate_models(
    models: Sequence[str],
    *,
    dataset: Sequence[str],
    dataset_config: str | None = None,
    split: str = "test",
    text_column: str = "text",
    max_seq_length: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[Result]:
    """Perplexity of each model; sources, text and tokenizers are checked before any weights are loaded."""
    place = find_device(device)
    sources = [find_source(model, trust_remote_code) for model in models]
    documents = list(Documents(TextSource(tuple(dataset), dataset_config, split, text_column)))
    windows = [evaluation_windows(documents, load_tokenizer(source), max_seq_length, max_windows) for source in sources]
    results = []
    for source, tokens in zip(sources, windows, strict=True):
        model = load_model(source, dtype)
        started = time.perf_counter()
        value = perplexity(model, tokens, device=place, batch_size=batch_size)
        results.append(Result(source.name, value, len(tokens), time.perf_counter() - started))
        del model
    return results


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print one row a model."""
    table = Table()
    for heading in ("model", "perplexity", "windows", "seconds"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for result in results:
        table.add_row(result.model, f"{result.perplexity:.3f}", str(result.windows), f"{result.seconds:.1f}")
    console.print(table)
