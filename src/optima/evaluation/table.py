"""An evaluation as tables, for a terminal and for the Markdown report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from optima.evaluation.record import Estimate, Evaluation, ModelRecord
from optima.evaluation.settings import PROTOCOLS
from optima.reporting import markdown

LEFT = ("model", "task", "metric")  # columns of text
NAME_WIDTH = 8


Rows = list[list[str]]
Figure = tuple[str, str, str]


def print_tables(found: Evaluation, console: Console) -> None:
    """Print one row a model, then the tasks, then each model against the first."""
    for heading, rows, note in tables(found):
        table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for title, *cells in zip(heading, *rows, strict=True):  # in a narrow terminal names alone go over several lines
            least = NAME_WIDTH if title == "model" else max(map(len, cells))
            table.add_column(title, justify="left" if title in LEFT else "right", min_width=least, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print(note, soft_wrap=True)


def render_evaluation(found: Evaluation) -> str:
    """The same as Markdown."""
    parts = [
        f"{markdown.table(heading, rows, sum(title in LEFT for title in heading))}\n\n{note}."
        for heading, rows, note in tables(found)
    ]
    return "\n\n".join([*parts, f"Measured {found.created} on {found.device}."])


def headlines(found: Mapping[Path, Evaluation], dense: Mapping[Path, str | None]) -> dict[Path, list[Figure]]:
    """The perplexity of the model in each directory, with that of the first of its evaluation: label, value, detail.

    Nothing of a directory if none of the models is known to be in it. Figures on different texts have different labels.

    Args:
        found: the evaluations in some directories.
        dense: the fingerprints of the weights that the models in these were made of.
    """
    own = {place: _own(evaluation, place, dense[place]) for place, evaluation in found.items()}
    texts = {place: each.perplexity for place, each in own.items() if each is not None and each.perplexity is not None}
    several = len({(text.protocol, text.data_hash) for text in texts.values()}) > 1
    figures: dict[Path, list[Figure]] = {}
    for place, text in texts.items():
        first = found[place].models[0]
        other = None if first is own[place] else first.perplexity
        detail = "" if other is None else f"{other.perplexity:.2f} of {first.model}"
        which = f", {text.protocol} {text.data_hash[:6]}" if several else ""
        figures[place] = [(f"perplexity{which}", f"{text.perplexity:.2f}", detail)]
    return figures


def _own(found: Evaluation, directory: Path, dense: str | None) -> ModelRecord | None:
    """What was measured of the model in ``directory``: a dense model may have the same name, or have had its place."""
    here = directory.resolve()
    pruned = [model for model in found.models if dense is None or model.fingerprint != dense]
    at_place = [model for model in pruned if Path(model.model).expanduser().resolve() == here]
    mine = at_place or [model for model in pruned if Path(model.model).name == here.name]  # moved since, or elsewhere
    return mine[0] if len(mine) == 1 else None


def tables(found: Evaluation) -> Iterator[tuple[list[str], Rows, str]]:
    """Heading, rows and a note of each table that has something to say; columns without a cell are left out."""
    text = [model.perplexity for model in found.models if model.perplexity is not None]
    protocols = sorted({f"protocol {each.protocol} ({PROTOCOLS[each.protocol]})" for each in text})
    lengths = sorted({f"{each.windows} windows of {each.length} tokens" for each in text})
    lengths += _other_tokens(found)
    first = found.models[0].model
    for (heading, rows), note in (
        (text_table(found), f"{', '.join([*protocols, *lengths])}; ± standard error over windows"),
        (divergence_table(found), f"from the predictions of {first}, token by token, ± standard error over windows"),
        (task_table(found), task_note(found)),
        (comparison_table(found), comparison_note(found)),
    ):
        kept = [i for i in range(len(heading)) if any(row[i] for row in rows)]
        if kept:
            yield [heading[i] for i in kept], [[row[i] for i in kept] for row in rows], note


def _other_tokens(found: Evaluation) -> list[str]:
    """Which models read the text as other tokens than the first: their perplexities do not compare."""
    read = [(model.model, model.perplexity.data_hash) for model in found.models if model.perplexity is not None]
    others = [name for name, data_hash in read if data_hash != read[0][1]]
    return [f"{', '.join(others)}: other tokens than those of {read[0][0]}, so do not compare"] if others else []


def text_table(found: Evaluation) -> tuple[list[str], Rows]:
    """Heading and rows of what each model makes of the text."""
    heading = ["model", "perplexity", "±", "loss - first"]
    differences = [None, *(each.loss_difference for each in found.comparisons)]
    rows = []
    for model, difference in zip(found.models, differences, strict=True):
        if (text := model.perplexity) is None:
            continue
        rows.append([
            model.model,
            f"{text.perplexity:.3f}",
            "" if text.stderr is None else f"{text.stderr:.3f}",
            "" if difference is None else with_error(difference, ".4f"),
        ])  # fmt: skip
    return heading, rows


def divergence_table(found: Evaluation) -> tuple[list[str], Rows]:
    """Heading and rows of how far predictions are from the first model's."""
    apart = [(model.model, model.divergence) for model in found.models if model.divergence is not None]
    rows = [[name, with_error(each.kl, ".4f"), with_error(each.top1, ".2%")] for name, each in apart]
    return ["model", "KL", "top-1 same"], rows


def task_table(found: Evaluation) -> tuple[list[str], Rows]:
    """Heading and rows of accuracies, in percent; one column a model."""
    heading = ["task", "metric", "items", *(model.model for model in found.models)]
    rows = []
    # A model whose tasks were not done has none.
    for same in zip_longest(*(model.tasks for model in found.models)):
        known = next(filter(None, same))
        for metric in known.metrics:
            values = ["" if task is None else with_error(task.metrics[metric], ".2%").replace("%", "") for task in same]
            rows.append([known.task, metric, str(known.items), *values])
    return heading, rows


def task_note(found: Evaluation) -> str:
    """What the numbers of ``task_table`` are, and of which choices a model did not see the whole prompt."""
    cut = {f"{each.cut} of {each.task} on {model.model}": each.cut for model in found.models for each in model.tasks}
    told = [text for text, count in cut.items() if count]
    note = "zero-shot accuracy in percent, ± standard error"
    if not told:
        return note
    return f"{note}; choices behind a prompt that lost its beginning, for the model reads no more: {', '.join(told)}"


def comparison_table(found: Evaluation) -> tuple[list[str], Rows]:
    """Heading and rows of the paired comparisons, differences in percentage points."""
    heading = ["model", "task", "metric", "change", "95% interval", "only one", "p"]
    rows = []
    for comparison in found.comparisons:
        name = comparison.model if len(found.comparisons) > 1 else ""
        for each in comparison.tasks:
            difference, low, high = (f"{100 * value:+.2f}" for value in (each.difference, each.low, each.high))
            only = f"{each.only_reference} / {each.only_model}"
            rows.append([name, each.task, each.metric, difference, f"{low} .. {high}", only, f"{each.p_value:.2g}"])
    return heading, rows


def comparison_note(found: Evaluation) -> str:
    """What stands in the columns of ``comparison_table``."""
    first = found.models[0].model
    what = f"{found.comparisons[0].model} against {first}" if len(found.comparisons) == 1 else f"against {first}"
    return (
        f"{what}: percentage points, with a 95% bootstrap interval over items; items that only the first / only the "
        "other model has right; p by McNemar's exact test"
    )


def with_error(estimate: Estimate, form: str) -> str:
    """A mean and its standard error."""
    error = "" if estimate.stderr is None else f" ± {format(estimate.stderr, form)}"
    return f"{format(estimate.value, form)}{error}"
