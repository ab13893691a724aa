"""Every text and figure of a report, computed once; terminal, Markdown, HTML page and model card only render them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from optima.console import printable
from optima.names import kind
from optima.patterns import NM, parse_nm
from optima.reporting.record import (
    LinearRecord,
    Report,
    gap_written,
    geometric_mean,
    largest,
    name_in_block,
    weighted_mean,
)

NUM_NAMED = 5
# Casting to bfloat16 costs about 2^-18 / 3 of an output's energy; beyond this a worse result is not the cast's doing.
CAST_ALLOWANCE = 1e-5
# With fewer calibration tokens per input of the widest linear, the solution overfits the text: at 1.3 tokens per input
# SmolLM2-135M at 2:4 went from perplexity 30 to 192.
THIN_TEXT = 4
NO_NOTES = "None: no linear was skipped and no setting was changed during the run."

Linears = Sequence[LinearRecord]
Figure = tuple[str, str, str]  # a label, a value and a detail


def render_summary(report: Report) -> str:
    """The summary as plain text for a terminal."""
    return re.sub(r"\*\*|`", "", bullets(summary(report))).replace("&lt;", "<")


def summary(report: Report) -> list[str]:
    """The headline and the warnings, a line of Markdown each."""
    linears, run = report.linears, report.run
    if not linears:
        return ["**Nothing was pruned.**"]
    solvers = sorted({name for linear in linears if solved(linear) for name in linear.solver.split("+")})
    method = " + ".join([str(run.recipe.get("selector", "unnamed selector")), *solvers])
    patterns = sorted({linear.pattern for linear in linears})
    pattern = f"pattern {', '.join(patterns)}"
    if len(patterns) > NUM_NAMED:
        asked = [linear.sparsity_asked for linear in linears]
        pattern = f"layer-wise sparsity from {min(asked):.1%} to {max(asked):.1%}"
    share = f"{report.sparsity:.2%} of the weights of {len(linears)} linear layers pruned"
    headline = f"**{share}** ({pattern}) with **{method}**."
    note = runtime_note(linear.pattern for linear in linears)
    return [headline, _errors(linears), *_certificate(report), *_tuning(report), note, *_warnings(report)]


def runtime_note(patterns: Iterable[str]) -> str:
    """Which runtimes run a model of these patterns faster than the dense model, as Markdown."""
    found = [parse_nm(pattern) for pattern in patterns]
    same = "Loads wherever the dense model loads; in vLLM, SGLang, llama.cpp, MLX and ONNX Runtime **no faster**."
    if any(isinstance(pattern, NM) and 2 * pattern.n <= pattern.m and pattern.m in (2, 4) for pattern in found):
        gpu = "on NVIDIA GPUs with sparse tensor cores (Ampere or later), with `optima.accelerate(model)` or torchao"
        return f"{same} Its 2:4 layers run faster for long prompts and large batches {gpu}."
    return f"{same} Runtimes for unstructured sparsity may be faster: MACKO (GPU, batch size 1), SparAMX (Intel AMX)."


def _errors(linears: Linears) -> str:
    mask, selector, result = (mean(linears, name) for name in ("error_mask", "error_selector", "error"))
    steps = [f"{error(mask)} with the mask alone"]
    if any(map(updated, linears)):
        steps.append(f"{error(selector)} with the selector's weights")
    by = _versus_selector(linears)
    plain = f"; {error(mean(linears, 'error_plain'))} with uniform token weights" if weighted(linears) else ""
    what = "after the solve, before tuning" if tuned(linears) else "in the result"
    return (
        f"Mean relative layer error: {', '.join(steps)}, **{error(result)} {what}**{f' ({by})' if by else ''}{plain}."
    )


def _versus_selector(linears: Linears) -> str:
    selector, result = mean(linears, "error_selector"), mean(linears, "error")
    if not any(map(solved, linears)) or not selector or not math.isfinite(result / selector):
        return ""
    change = result / selector - 1
    return f"{abs(change):.1%} {'lower' if change < 0 else 'higher'} than the selector's weights"


def _certificate(report: Report) -> list[str]:
    """What is proven of the solution, and whether that is still true of the file."""
    found, total, missed = report.gap_max, rows_solved(report.linears), report.rows_not_converged
    moved = tuned(report.linears)
    if found is None:
        return ["No certificate: no solver ran."]
    asked = report.run.recipe.get("gap")
    target = f" to the requested gap of {gap(asked)}" if isinstance(asked, int | float) else ""
    wrong = sum(linear.rows for linear in report.linears if solved(linear) and math.isnan(linear.error))
    share = f"all {total:,} rows" if not missed + wrong else f"{max(0, total - missed - wrong):,} of {total:,} rows"
    most = f"largest gap **{gap(found)}**" if math.isfinite(found) else "**some rows have no certificate**"
    if moved:
        lines = [
            f"Certificate of the weights **before tuning**: {share} solved{target}; {most}. Tuning then changed "
            f"{len(moved)} of {len(report.linears)} linear layers, which carry no certificate as written."
        ]
    else:
        lines = [f"Certificate of the solve, before the weights are cast: **{share}** solved{target}; {most}."]
    written = report.gap_written_max
    if written is not None:
        losses = [linear.loss_written for linear in report.linears if linear.loss_written is not None]
        together = f"; a whole layer is at most **{gap(max(losses))}** above its optimum" if losses else ""
        lines.append(f"As written ({report.run.dtype}): largest gap of a row **{gap(written)}**{together}.")
    return lines


def tuning_rows(report: Report) -> list[tuple[str, str, str]]:
    """For each tuned block: its name, the held-out loss before and after, and the change."""
    rows = []
    for block in report.blocks:
        if block.tuning:
            before, after = block.tuning[0], block.tuning[block.tuning_epoch]
            unit = " nats" if block.on_logits else ""
            change_text = change(before, after) if block.tuning_epoch else "not changed"
            rows.append((block.name, f"{error(before)} → {error(after)}{unit}", change_text))
    return rows


def _tuning(report: Report) -> list[str]:
    blocks = [block for block in report.blocks if block.tuning]
    if not blocks:
        return []
    kept = [block for block in blocks if block.tuning_epoch > 0 and not block.on_logits]
    hidden = [block for block in blocks if not block.on_logits]
    lines = []
    if hidden:
        before, after = (geometric_mean(block.tuning[at(block)] for block in hidden) for at in (_first, _kept))
        won = f"held-out loss {change(before, after)} on average" if before and math.isfinite(after) else "no change"
        lines.append(f"Block tuning changed {len(kept)} of {len(hidden)} blocks: {won}.")
    for block in blocks:
        if block.on_logits:
            before, after = block.tuning[0], block.tuning[block.tuning_epoch]
            lines.append(
                f"The last block ({code(block.name)}) was tuned on the logits: KL to the dense model {after:.3g} nats "
                f"per token ({before:.3g} before tuning)."
            )
    return lines


def _first(_: object) -> int:
    return 0


def _kept(block: object) -> int:
    return int(getattr(block, "tuning_epoch", 0))


def _warnings(report: Report) -> list[str]:
    linears = report.linears
    found = {
        f"{report.rows_not_converged:,} rows did not converge and keep the best weights found": [
            linear for linear in linears if linear.rows_not_converged
        ],
        "the result is worse than the selector's own weights": [
            linear for linear in linears if solved(linear) and linear.error > linear.error_selector + CAST_ALLOWANCE
        ],
        "the error is not a finite number": [linear for linear in linears if not math.isfinite(linear.error)],
        "every weight is pruned": [linear for linear in linears if linear.sparsity == 1],
        "no weight is pruned": [linear for linear in linears if linear.sparsity == 0],
        "the sparsity as written is not the requested one": [
            # A weight more or less in each row or group is the rounding of counts.
            linear for linear in linears
            if 0 < linear.sparsity < 1
            and abs(linear.sparsity - linear.sparsity_asked) * linear.size > max(linear.rows, 1)
        ],
        "the mask costs nothing because inputs or weights are zero": [
            linear for linear in linears if linear.error_mask == 0 and linear.sparsity > 0
        ],
        f"fewer than {THIN_TEXT} calibration tokens per input; use more samples": [
            linear for linear in linears if linear.tokens < THIN_TEXT * linear.shape[1]
        ],
    }  # fmt: skip
    return [
        f"**Warning:** {what}: {names_of([linear.name for linear in where])}." for what, where in found.items() if where
    ]


def figures(report: Report) -> list[Figure]:
    """The headline: label, value, detail."""
    run, linears = report.run, report.linears
    by, moved = _versus_selector(linears), tuned(linears)
    rows: list[Figure] = [
        ("sparsity", f"{report.sparsity:.2%}", f"requested {report.sparsity_asked:.2%}"),
        ("mean layer error" + (" before tuning" if moved else ""), error(report.error_geomean), by),
    ]
    if moved:
        rows.append(("certified gap before tuning", gap(report.gap_max) or "–", "tuned weights carry no certificate"))
    elif report.gap_max is not None:
        rows.append(("largest certified gap", gap(report.gap_written_max), f"{gap(report.gap_max)} before the cast"))
    rows.append(("time", duration(run.seconds), on_linears(report, "on linear layers")))
    return [*rows, ("peak memory", num_bytes(run.peak_memory_bytes), run.device)]


def run_facts(report: Report) -> list[tuple[str, str]]:
    """What a run worked on and what it took, a title and a text each."""
    run, total = report.run, report.num_weights
    source = [f"revision {run.model_revision}"] if run.model_revision else []
    text = [f"{run.num_tokens:,} tokens", f"seed {run.seed}", f"hash {run.data_hash[:16]}"]
    text += [f"revision {run.dataset_revision}"] if run.dataset_revision else []
    device = run.device if run.processes == 1 else f"{run.processes} processes, the first on {run.device}"
    rows = [
        ("weights pruned", f"{round(report.sparsity * total):,} of {total:,} in the linear layers to prune"),
        ("sparsity", f"{report.sparsity:.4%}, requested {report.sparsity_asked:.4%}"),
        ("source", ", ".join(part for part in source if part)),
        ("calibration", ", ".join(text)),
        ("device, dtype", f"{device}, {run.dtype}"),
        ("peak memory", num_bytes(run.peak_memory_bytes)),
        ("time", ", ".join(filter(None, [duration(run.seconds), on_linears(report, "of it on linear layers")]))),
        ("finished", run.created),
    ]
    return [row for row in rows if row[1]]


def on_linears(report: Report, what: str) -> str:
    """The seconds of all linears, and ``what``. Empty for several processes, which work on them at the same time."""
    return f"{duration(sum(linear.seconds for linear in report.linears))} {what}" if report.run.processes == 1 else ""


def stage_times(report: Report) -> list[tuple[str, float, float]]:
    """Stages of the run with seconds and share, largest first, then the time outside of all stages."""
    run = report.run
    stages = sorted(run.stages.items(), key=lambda stage: -stage[1])
    rest = run.seconds - sum(run.stages.values())
    rows = [*stages, ("everything else", rest)] if stages and rest > 0 else stages
    return [(name, seconds, seconds / max(run.seconds, 1e-9)) for name, seconds in rows]


def by_kind(linears: Linears) -> dict[str, list[LinearRecord]]:
    """Linears of the same role, in the model's order, named by the last part of their names if that is unambiguous."""
    names = {linear: kind(name_in_block(linear)) for linear in linears}
    lasts = Counter(name.rpartition(".")[2] for name in set(names.values()))
    kinds: dict[str, list[LinearRecord]] = {}
    for linear, name in names.items():
        last = name.rpartition(".")[2]
        kinds.setdefault(last if lasts[last] == 1 else name, []).append(linear)
    return kinds


def _iterations(linears: Linears) -> str:
    rows = rows_solved(linears)
    total = sum(linear.iterations_mean * linear.rows for linear in linears if solved(linear))
    return f"{total / rows:.1f} ({max(linear.iterations_max for linear in linears)})" if rows else ""


def _not_converged(linears: Linears) -> str:
    missed = sum(linear.rows_not_converged for linear in linears)
    return f"{missed:,} of {rows_solved(linears):,}" if missed else ""


# Columns of the tables; each cell describes one linear or several. Empty columns are left out.
COLUMNS: dict[str, Callable[[Linears], str]] = {
    "sparsity": lambda linears: f"{weighted_mean(linears, 'sparsity'):.2%}",
    "mask": lambda linears: error(mean(linears, "error_mask")),
    "selector": lambda linears: error(mean(linears, "error_selector")) if any(map(updated, linears)) else "",
    "result": lambda linears: error(mean(linears, "error")),
    "uniform": lambda linears: error(mean(linears, "error_plain")) if weighted(linears) else "",
    "change": lambda linears: (
        change(mean(linears, "error_selector"), mean(linears, "error")) if any(map(solved, linears)) else ""
    ),
    "gap": lambda linears: gap(largest(linear.gap_max for linear in linears)),
    "gap written": lambda linears: "tuned" if tuned(linears) else gap(gap_written(linears)),
    "iterations (max)": _iterations,
    "not converged": _not_converged,
    "seconds": lambda linears: f"{sum(linear.seconds for linear in linears):.2f}",
}


def names_of(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    shown = ", ".join(map(code, names[:NUM_NAMED]))
    return f"{shown} and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else shown


def solved(linear: LinearRecord) -> bool:
    """Whether a solver ran."""
    return linear.gap_max is not None


def updated(linear: LinearRecord) -> bool:
    """Whether the selector changed surviving weights itself."""
    return linear.error_selector != linear.error_mask


def tuned(linears: Linears) -> list[LinearRecord]:
    """Those that tuning changed after their solve."""
    return [linear for linear in linears if linear.tuned]


def weighted(linears: Linears) -> bool:
    """Whether tokens have different weights."""
    return any(linear.error_plain != linear.error for linear in linears)


def rows_solved(linears: Linears) -> int:
    """Rows that a solver worked on."""
    return sum(linear.rows for linear in linears if solved(linear))


def mean(linears: Linears, field: str) -> float:
    """Geometric mean of an error."""
    return geometric_mean(getattr(linear, field) for linear in linears)


def error(value: float) -> str:
    """A relative error."""
    return f"{value:.4f}" if value == 0 or value >= 1e-3 else f"{value:.1e}"


def gap(value: float | None) -> str:
    """A gap: empty where no solver ran, ``none`` where nothing is certified."""
    return "" if value is None else f"{value:.1e}" if math.isfinite(value) else "none"


def change(before: float, after: float) -> str:
    """The relative change of an error."""
    return f"{after / before - 1:+.1%}".replace("-0.0%", "+0.0%") if before else ""


def duration(seconds: float) -> str:
    """A time: 48.0 s, 12 min 5 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def num_bytes(count: int) -> str:
    """A size in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if round(count / 2**20) >= 1024 else f"{count / 2**20:.0f} MiB"


def code(name: str) -> str:
    """A name as a code span of Markdown: without backticks, control characters and line breaks."""
    return f"`{' '.join(printable(name).replace('`', '').split())}`"


def bullets(items: Iterable[str]) -> str:
    """A list, one line an item; ``<`` is escaped outside code spans, and control characters are removed."""
    lines = (" ".join(printable(item).split()) for item in items)
    return "\n".join(f"- {''.join(_escaped(part) for part in re.split(r'(`[^`]*`)', line))}" for line in lines)


def _escaped(part: str) -> str:
    return part if part.startswith("`") else part.replace("<", "&lt;")
