"""Zero-shot accuracies as the benchmarks keep them: plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.evaluation.tasks import load_tasks, zero_shot


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Path], limit: int | None
) -> dict[str, dict[str, float]]:
    """Task -> ``items``, ``acc``, ``acc_norm`` and the standard error of each, as far as there is one."""
    found: dict[str, dict[str, float]] = {}
    for record in zero_shot(model, tokenizer, load_tasks(tasks), limit=limit):
        found[record.task] = {"items": record.items}
        for metric, estimate in record.metrics.items():
            found[record.task][metric] = estimate.value
            if estimate.stderr is not None:
                found[record.task][f"{metric}_stderr"] = estimate.stderr
    return found
