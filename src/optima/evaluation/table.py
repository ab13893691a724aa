"""An evaluation as Markdown tables, which are legible in a terminal too."""

from __future__ import annotations

from optima.evaluation.record import Estimate, Evaluation
from optima.reporting.markdown import table


def render_evaluation(found: Evaluation) -> str:
    """The tables of an evaluation, each with a note."""
    models, first = found.models, found.models[0].model
    texts = [(model.model, model.perplexity) for model in models if model.perplexity is not None]
    change = {each.model: each.loss_difference for each in found.comparisons}
    parts = []

    def add(header: list[str], rows: list[list[str]], notes: list[str], num_left: int = 1) -> None:
        if rows:
            parts.append(f"{table(header, rows, num_left)}\n\n{'; '.join(dict.fromkeys(notes))}.")

    add(
        ["model", "perplexity", "±", "Δ loss"],
        [
            [name, f"{t.perplexity:.3f}", "" if t.stderr is None else f"{t.stderr:.3f}", _cell(change.get(name), ".4f")]
            for name, t in texts
        ],
        [
            *(f"{t.windows} windows of {t.length} tokens, protocol {t.protocol}" for _, t in texts),
            *(
                f"{name} reads other tokens than {first}: do not compare their perplexities"
                for name, t in texts
                if t.data_hash != texts[0][1].data_hash
            ),
            "±: standard error over windows; Δ loss: paired difference from the first model in nats a token",
        ],
    )
    add(
        ["model", "KL", "same top-1"],
        [[m.model, _cell(m.divergence.kl, ".4f"), _cell(m.divergence.top1, ".2%")] for m in models if m.divergence],
        [f"KL divergence from {first} in nats a token, and how often both predict the same token"],
    )
    speeds = [(model.model, model.speed) for model in models if model.speed is not None]
    add(
        ["model", "prefill, tokens/s", "decode, tokens/s", "prefill ratio", "decode ratio"],
        [
            [
                *(name, f"{speed.prefill:.0f}", "" if speed.decode is None else f"{speed.decode:.1f}"),
                f"{speed.prefill / speeds[0][1].prefill:.2f}",
                f"{(speed.decode or 0.0) / speeds[0][1].decode:.2f}" if speeds[0][1].decode else "",
            ]
            for name, speed in speeds
        ],
        [f"medians, models in turn: {speed.prompt} tokens read, {speed.new} generated" for _, speed in speeds],
    )
    add(
        ["task", "metric", "items", *(model.model for model in models)],
        [
            [same[0].task, metric, str(same[0].items), *(_cell(task.metrics[metric], ".2%") for task in same)]
            for same in zip(*(model.tasks for model in models), strict=True)
            for metric in same[0].metrics
        ],
        ["accuracy ± standard error"],
        num_left=2,
    )
    add(
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
        [
            f"Δ: accuracy minus that of {first}, with its bootstrap interval over items; only one: items that only "
            f"{first} / only the other model answers correctly; p: McNemar's exact test"
        ],
        num_left=3,
    )
    return "\n\n".join([*parts, f"Measured {found.created} on {found.device}."])


def _cell(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    return format(estimate.value, form) + ("" if estimate.stderr is None else f" ± {format(estimate.stderr, form)}")
