"""An evaluation as Markdown tables, which are legible in a terminal too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optima.evaluation.record import Estimate, Evaluation
from optima.reporting import markdown

LEFT = ("model", "task", "metric")  # columns of text


def render_evaluation(found: Evaluation) -> str:
    """The tables of an evaluation, each with a note."""
    parts = [
        f"{markdown.table(heading, rows, sum(title in LEFT for title in heading))}\n\n{note}."
        for heading, rows, note in _tables(found)
        if rows
    ]
    return "\n\n".join([*parts, f"Measured {found.created} on {found.device}."])


def headline(found: Evaluation, directory: Path) -> list[tuple[str, str, str]]:
    """Label, value and detail of the perplexity of the model in ``directory``, for the report page."""
    name = directory.resolve().name
    mine = [each for each in found.models if Path(each.model).expanduser().resolve().name == name]
    if not mine or (text := mine[-1].perplexity) is None:  # the dense model, with the same name elsewhere, is first
        return []
    first, label = found.models[0], f"perplexity, {text.windows} x {text.length} tokens ({text.data_hash[:6]})"
    dense = (
        "" if mine[-1] is first or first.perplexity is None else f"{first.perplexity.perplexity:.2f} of {first.model}"
    )
    return [(label, f"{text.perplexity:.2f}", dense)]


def _tables(found: Evaluation) -> Iterator[tuple[list[str], list[list[str]], str]]:
    """Heading, rows and a note of each table; columns without a cell are left out by ``markdown.table``."""
    models, first = found.models, found.models[0].model
    texts = [(model.model, model.perplexity) for model in models if model.perplexity is not None]
    change = {each.model: each.loss_difference for each in found.comparisons}
    yield (
        ["model", "perplexity", "±", "Δ loss"],
        [
            [
                name,
                f"{t.perplexity:.3f}",
                f"{t.stderr:.3f}" if t.stderr is not None else "",
                _cell(change.get(name), ".4f"),
            ]
            for name, t in texts
        ],
        "; ".join(
            [
                *dict.fromkeys(f"{t.windows} windows of {t.length} tokens, protocol {t.protocol}" for _, t in texts),
                *(
                    f"{name} reads other tokens than {first}: do not compare their perplexities"
                    for name, t in texts
                    if t.data_hash != texts[0][1].data_hash
                ),
                "±: standard error over windows; Δ loss: paired difference from the first model in nats a token",
            ]
        ),
    )
    yield (
        ["model", "KL", "same top-1"],
        [[m.model, _cell(m.divergence.kl, ".4f"), _cell(m.divergence.top1, ".2%")] for m in models if m.divergence],
        f"KL divergence from {first} in nats a token, and how often both predict the same token",
    )
    yield (
        ["task", "metric", "items", *(model.model for model in models)],
        [
            [same[0].task, metric, str(same[0].items), *(_cell(task.metrics[metric], ".2%") for task in same)]
            for same in zip(*(model.tasks for model in models), strict=True)
            for metric in same[0].metrics
        ],
        "accuracy ± standard error",
    )
    yield (
        ["model", "task", "metric", "Δ", "95% interval", "only one", "p"],
        [
            [
                *(comparison.model, each.task, each.metric, f"{each.difference:+.2%}"),
                f"{each.low:+.2%} .. {each.high:+.2%}",
                f"{each.only_reference} / {each.only_model}",
                f"{each.p_value:.2g}",
            ]
            for comparison in found.comparisons
            for each in comparison.tasks
        ],
        f"Δ: accuracy minus that of {first}, with its bootstrap interval over items; only one: items that only {first} "
        "/ only the other model answers correctly; p: McNemar's exact test",
    )


def _cell(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    return format(estimate.value, form) + (f" ± {format(estimate.stderr, form)}" if estimate.stderr is not None else "")
