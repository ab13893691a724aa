"""Every text and figure of a report, computed once; terminal, Markdown, HTML page and model card only render them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from optima.console import one_line
from optima.patterns import NM, kind, parse_nm
from optima.reporting.record import LinearRecord, Report, geometric_mean, largest, weighted_mean

NUM_NAMED = 5
# Casting to bfloat16 costs about 2^-18 / 3 of an output's energy; a result that is worse by more has another cause.
CAST_ALLOWANCE = 1e-5
# With fewer calibration tokens per input of the widest linear, the solution overfits the text: at 1.3 tokens per input
# SmolLM2-135M at 2:4 went from perplexity 30 to 192.
MIN_TOKENS_PER_INPUT = 4
NO_NOTES = "None: no linear was skipped and no setting was changed during the run."

Linears = Sequence[LinearRecord]


def render_summary(report: Report) -> str:
    """The summary as plain text for a terminal."""
    return re.sub(r"\*\*|`", "", bullets(summary(report))).replace("&lt;", "<")


def summary(report: Report) -> list[str]:
    """What was pruned, the errors, the certificate, tuning, runtimes and warnings: one line of Markdown each."""
    linears = report.linears
    if report.sizes:
        return _shrunk(report)
    if not linears:
        return ["**Nothing was pruned.**"]
    solvers = sorted({name for linear in linears if linear.solved for name in linear.solver.split("+")})
    method = " + ".join([str(report.run.recipe.get("selector", "unnamed selector")), *solvers])
    patterns = sorted({linear.pattern for linear in linears})
    pattern = f"pattern {', '.join(patterns)}"
    if len(patterns) > NUM_NAMED:
        asked = [linear.sparsity_asked for linear in linears]
        pattern = f"layer-wise sparsity from {min(asked):.1%} to {max(asked):.1%}"
    share = f"{report.sparsity:.2%} of the weights of {len(linears)} linear layers pruned"
    headline = f"**{share}** ({pattern}) with **{method}**."
    lines = [headline, _errors(linears), *_certificate(report), *_tuning(report), runtime_note(patterns)]
    return [*lines, *_warnings(report)]


def _shrunk(report: Report) -> list[str]:
    dense, small = report.sizes
    share = small.parameters / dense.parameters
    lines = [
        f"**{share:.1%} of the parameters**: {small.parameters:,} instead of {dense.parameters:,}, "
        f"{num_bytes(small.bytes)} instead of {num_bytes(dense.bytes)}; "
        f"{small.flops / dense.flops:.1%} of the FLOPs of a token."
    ]
    neurons = [unit for unit in report.units if unit.unit == "neurons"]
    blocks = [unit for unit in report.units if unit.unit == "block"]
    if blocks:
        lost = f" ({blocks[-1].error:.3g} before tuning: KL to the dense model in nats per token, or relative change)"
        lines.append(f"Removed blocks: {names_of([unit.name for unit in blocks])}{lost}.")
    if neurons:
        found, worst = geometric_mean(unit.error or 0.0 for unit in neurons), largest(unit.gap for unit in neurons)
        lines.append(
            f"**{neurons[0].kept:,} of {neurons[0].of:,} neurons** stay in each of {len(neurons)} blocks. "
            f"Before tuning, the mean relative error of the linears that read them is {error(found)}, and their rows "
            f"are certified to a relative gap of {gap(worst)}."
        )
    runtime = "Loads in transformers as the dense model does; **smaller and faster in every runtime**."
    return [*lines, *_tuning(report), runtime]


def unit_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """What each block lost: its name, how much stays, the share of Fisher-weighted energy that went, the error."""
    rows = []
    for unit in sorted(report.units, key=lambda unit: unit.block):
        stays = f"{unit.kept:,} of {unit.of:,} neurons" if unit.unit == "neurons" else "removed"
        energy = "100%" if unit.energy is None else f"{unit.energy:.1%}"
        rows.append((unit.name, stays, energy, "" if unit.error is None else error(unit.error)))
    return rows


def runtime_note(patterns: Iterable[str]) -> str:
    """Which runtimes run a model of these patterns faster than the dense model, as Markdown."""
    found = [parse_nm(pattern) for pattern in patterns]
    same = "Loads wherever the dense model loads; in vLLM, SGLang, llama.cpp, MLX and ONNX Runtime **no faster**."
    if any(isinstance(pattern, NM) and 2 * pattern.n <= pattern.m and pattern.m in (2, 4) for pattern in found):
        gpu = "on NVIDIA GPUs with sparse tensor cores (Ampere or later), with `optima.accelerate(model)` or torchao"
        return f"{same} Its 2:4 layers run faster for long prompts and large batches {gpu}."
    return f"{same} Runtimes for unstructured sparsity may be faster: MACKO (GPU, batch size 1), SparAMX (Intel AMX)."


def _errors(linears: Linears) -> str:
    steps = [f"{error(mean(linears, 'error_mask'))} with the mask alone"]
    if any(linear.error_selector != linear.error_mask for linear in linears):
        steps.append(f"{error(mean(linears, 'error_selector'))} with the selector's weights")
    selector, result = mean(linears, "error_selector"), mean(linears, "error")
    by = ""
    if rows_solved(linears) and selector and math.isfinite(ratio := result / selector - 1):
        by = f" ({abs(ratio):.1%} {'lower' if ratio < 0 else 'higher'} than the selector's weights)"
    when = "after the solve, before tuning" if num_tuned(linears) else "in the result"
    return f"Mean relative layer error: {', '.join(steps)}, **{error(result)} {when}**{by}."


def _certificate(report: Report) -> list[str]:
    found, total, tuned = report.gap_max, rows_solved(report.linears), num_tuned(report.linears)
    if found is None:
        return ["No certificate: no solver ran."]
    asked = report.run.recipe.get("gap")
    target = f" to the requested gap of {gap(asked)}" if isinstance(asked, int | float) else ""
    missed = report.rows_not_converged
    missed += sum(linear.rows for linear in report.linears if linear.solved and math.isnan(linear.error))
    share = f"{max(0, total - missed):,} of {total:,} rows" if missed else f"all {total:,} rows"
    most = f"largest gap **{gap(found)}**" if math.isfinite(found) else "**some rows have no certificate**"
    if tuned:
        return [
            f"Certificate of the weights **before tuning**: {share} solved{target}; {most}. Tuning then changed "
            f"{tuned} of {len(report.linears)} linear layers, which carry no certificate as written."
        ]
    lines = [f"Certificate of the solve, before the weights are cast: **{share}** solved{target}; {most}."]
    if report.gap_written_max is not None:
        loss = largest(linear.loss_written for linear in report.linears)
        layer = f"; a whole layer is at most **{gap(loss)}** above its optimum" if loss is not None else ""
        lines.append(f"As written ({report.run.dtype}): largest gap of a row **{gap(report.gap_written_max)}**{layer}.")
    return lines


def tuning_rows(report: Report) -> list[tuple[str, str, str]]:
    """For each tuned block: its name, the held-out loss before and after, and the change."""
    rows = []
    for block in report.blocks:
        if block.tuning:
            before, after = block.tuning[0], block.tuning[block.tuning_epoch]
            unit = " nats" if block.on_logits else ""
            changed = change(before, after) if block.tuning_epoch else "not changed"
            rows.append((block.name, f"{error(before)} → {error(after)}{unit}", changed))
    return rows


def _tuning(report: Report) -> list[str]:
    tuned = [block for block in report.blocks if block.tuning]
    lines = []
    if hidden := [block for block in tuned if not block.on_logits]:
        before = geometric_mean(block.tuning[0] for block in hidden)
        after = geometric_mean(block.tuning[block.tuning_epoch] for block in hidden)
        kept = sum(block.tuning_epoch > 0 for block in hidden)
        lines.append(
            f"Block tuning changed {kept} of {len(hidden)} blocks: held-out loss {change(before, after)} on average."
        )
    lines += [
        f"The last block ({code(block.name)}) was tuned on the logits: KL to the dense model "
        f"{block.tuning[block.tuning_epoch]:.3g} nats per token ({block.tuning[0]:.3g} before tuning)."
        for block in tuned
        if block.on_logits
    ]
    return lines


def _warnings(report: Report) -> list[str]:
    tests: dict[str, Callable[[LinearRecord], bool]] = {
        f"{report.rows_not_converged:,} rows did not converge and keep the best weights found": (
            lambda linear: linear.rows_not_converged > 0
        ),
        "the result is worse than the selector's own weights": (
            lambda linear: linear.solved and linear.error > linear.error_selector + CAST_ALLOWANCE
        ),
        "the error is not a finite number": lambda linear: not math.isfinite(linear.error),
        f"fewer than {MIN_TOKENS_PER_INPUT} calibration tokens per input; use more samples": (
            lambda linear: linear.tokens < MIN_TOKENS_PER_INPUT * linear.shape[1]
        ),
    }
    found = {text: [linear.name for linear in report.linears if test(linear)] for text, test in tests.items()}
    return [f"**Warning:** {text}: {names_of(names)}." for text, names in found.items() if names]


def run_facts(report: Report) -> list[tuple[str, str]]:
    """Source, data, device and cost of the run: a title and a text each."""
    run, total = report.run, report.num_weights
    text = [f"{run.num_tokens:,} tokens", f"seed {run.seed}", f"hash {run.data_hash[:16]}"]
    text += [f"revision {run.dataset_revision}"] if run.dataset_revision else []
    device = run.device if run.processes == 1 else f"{run.processes} processes, the first on {run.device}"
    sparse = [
        ("weights pruned", f"{round(report.sparsity * total):,} of {total:,} in the linear layers to prune"),
        ("sparsity", f"{report.sparsity:.4%}, requested {_asked(report):.4%}"),
    ]
    rows = [
        *([] if report.sizes else sparse),
        ("revision", run.model_revision or ""),
        ("calibration", ", ".join(text)),
        ("device, dtype", f"{device}, {run.dtype}"),
        ("peak memory", num_bytes(run.peak_memory_bytes)),
        ("time", duration(run.seconds)),
        ("finished", run.created),
    ]
    return [row for row in rows if row[1]]


def _asked(report: Report) -> float:
    return weighted_mean(report.linears, "sparsity_asked")


def stage_times(report: Report) -> list[tuple[str, str, str]]:
    """Stages of the run with time and share, largest first, then the time outside of all stages."""
    run = report.run
    stages = sorted(run.stages.items(), key=lambda stage: -stage[1])
    rest = run.seconds - sum(run.stages.values())
    rows = [*stages, ("everything else", rest)] if stages and rest > 0 else stages
    return [(name, duration(seconds), f"{seconds / max(run.seconds, 1e-9):.0%}") for name, seconds in rows]


def by_kind(linears: Linears) -> dict[str, list[LinearRecord]]:
    """Linears of the same role, in the model's order, named by the last part of their names if that is unambiguous."""
    names = [kind(linear.part) for linear in linears]
    lasts = Counter(name.rpartition(".")[2] for name in set(names))
    kinds: dict[str, list[LinearRecord]] = {}
    for linear, name in zip(linears, names, strict=True):
        last = name.rpartition(".")[2]
        kinds.setdefault(last if lasts[last] == 1 else name, []).append(linear)
    return kinds


def names_of(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    shown = ", ".join(map(code, names[:NUM_NAMED]))
    return f"{shown} and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else shown


def num_tuned(linears: Linears) -> int:
    """Number of linears that tuning changed after their solve."""
    return sum(linear.tuned for linear in linears)


def rows_solved(linears: Linears) -> int:
    """Number of rows that a solver worked on."""
    return sum(linear.rows for linear in linears if linear.solved)


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
    return f"`{one_line(name.replace('`', ''))}`"


def bullets(items: Iterable[str]) -> str:
    """A list, one line an item; ``<`` is escaped outside code spans, and control characters are removed."""
    lines = map(one_line, items)
    return "\n".join(f"- {re.sub('(`[^`]*`)|<', lambda found: found[1] or '&lt;', line)}" for line in lines)
