"""An evaluation in a model's card: results in its head, tables in its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from optima.evaluation.record import Evaluation, ModelRecord
from optima.evaluation.table import render_evaluation
from optima.options import is_file
from optima.reporting.model_card import add_results, short_name


def update_card(directory: Path, found: Evaluation, model: str) -> bool:
    """Put what was measured of ``model`` into the card in its ``directory``; False where there is no card.

    Raises:
        ModelError: if the card's head cannot be read.
    """
    record = next(each for each in found.models if each.model == model)
    results = list(_results(record, found.settings))
    return add_results(directory, directory.resolve().name, results, render_evaluation(_without_paths(found)))


def _results(record: ModelRecord, settings: dict[str, Any]) -> Iterator[EvalResult]:
    if (text := record.perplexity) is not None:
        read = settings.get("dataset") or []
        name, of_hub = ", ".join(map(short_name, read or ["text"])), not any(map(is_file, read))
        yield EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            dataset_split=settings.get("split") if of_hub else None,
            metric_type="perplexity",
            metric_name=f"perplexity, protocol {text.protocol}, {text.windows} windows of {text.length} tokens",
            metric_value=round(text.perplexity, 4),
        )
    for task in record.tasks:
        for metric, estimate in task.metrics.items():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=task.task,
                dataset_name=task.task,
                metric_type=metric,
                metric_name=f"{metric}, zero-shot, {task.items} items",
                metric_value=round(estimate.value, 4),
            )


def _without_paths(found: Evaluation) -> Evaluation:
    """A card is published: of paths it has the last part, and of those of one name their place among the models."""
    names = [short_name(each.model) for each in found.models]
    alike = {name for name in names if names.count(name) > 1}
    told = [f"{name} (model {place})" if name in alike else name for place, name in enumerate(names, 1)]
    return replace(
        found,
        models=tuple(replace(each, model=name) for each, name in zip(found.models, told, strict=True)),
        comparisons=tuple(replace(each, model=name) for each, name in zip(found.comparisons, told[1:], strict=True)),
    )
