"""The first lines of a report: what came out, what is certified of it, and what must not be missed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from optima.names import kind
from optima.patterns import Pattern
from optima.reporting.record import LinearRecord, Report, geometric_mean, name_in_block
from optima.runtimes import in_words, named_pattern, weights_of

NUM_NAMED = 5
# Casting to bfloat16 costs about 2^-18 / 3 of an output's energy; beyond this a worse result is not the cast's doing.
CAST_ALLOWANCE = 1e-5
# Fewer calibration tokens than this for each input of the widest linear, and the fit is to the text rather than to
# the language: at 1.3 tokens an input SmolLM2-135M at 2:4 went from perplexity 30 to 192.
THIN_TEXT = 4

Linears = Sequence[LinearRecord]


def render_summary(report: Report) -> str:
    """The summary as plain text for a terminal."""
    text = bullets(summary(report)).replace("**", "").replace("`", "")
    return re.sub(r"\[([^]]+)\]\(#[a-z-]+\)", r"\1, in the report", text)


def summary(report: Report) -> list[str]:
    """The headline and the warnings, a line of Markdown each."""
    linears, run = report.linears, report.run
    if not linears:
        return ["**Nothing was pruned.**"]
    solvers = sorted({name for linear in linears if solved(linear) for name in linear.solver.split("+")})
    swapped = [linear for linear in linears if linear.swaps is not None]
    selector = [str(run.recipe.get("selector", "unnamed selector")), *(["swaps"] if swapped else [])]
    method = " + ".join([*selector, *solvers])
    patterns = sorted({linear.pattern for linear in linears})
    asked = sorted(linear.sparsity_asked for linear in linears)
    shown = f"pattern {', '.join(patterns)}"
    if len(patterns) > NUM_NAMED:
        shown = f"{len(patterns)} patterns, from {asked[0]:.1%} to {asked[-1]:.1%} a linear"
    dense = f", {len(run.kept_dense)} of them kept dense" if run.kept_dense else ""
    share = f"{report.sparsity:.2%} of the weights of {len(linears) + len(run.kept_dense)} linears pruned{dense}"
    headline = f"**{share}** ({shown}) by **{method}**."
    facts = [headline, _errors(linears), *_swaps(swapped), *_certificate(report), *_tuning(report)]
    return [*facts, in_words(pattern_weights(linears)), *_warnings(report)]


def pattern_weights(linears: Linears) -> dict[Pattern, int]:
    """How many weights the linears of each pattern have."""
    return weights_of((named_pattern(linear.pattern, linear.sparsity), linear.size) for linear in linears)


def _errors(linears: Linears) -> str:
    mask, selector, result = (mean(linears, name) for name in ("error_mask", "error_selector", "error"))
    steps = [f"{error(mask)} by the mask alone"]
    if any(map(updated, linears)):
        whose = "selector's own" if all(linear.swaps is None for linear in linears) else "swaps'"
        steps.append(f"{error(selector)} by the {whose} weights")
    by = f" ({change(selector, result)} from the selector's)" if any(map(solved, linears)) and selector else ""
    plain = mean(linears, "error_plain")
    alike = f"; {error(plain)} with every token alike" if weighted(linears) else ""
    what = "before tuning" if any(linear.tuned for linear in linears) else "in the result"
    return f"Mean relative error: {', '.join(steps)}, **{error(result)} {what}**{by}{alike}."


def _swaps(swapped: Linears) -> list[str]:
    """What swaps did to the masks, and of how many rows it is proven that no other would help."""
    made = sum(linear.swaps or 0 for linear in swapped)
    rows, proven = sum(linear.rows for linear in swapped), sum(linear.rows_swap_optimal or 0 for linear in swapped)
    return [f"Swaps: {made:,} made; {proven:,} of {rows:,} rows are at a 1-swap local optimum."] if swapped else []


def _certificate(report: Report) -> list[str]:
    """What is proven of the solution, and what is left of that in the file."""
    found, total, missed = report.gap_max, rows_solved(report.linears), report.rows_not_converged
    if found is None:
        return ["No solver ran, so nothing is certified of the weights."]
    asked = report.run.recipe.get("gap")
    target = f" to the asked gap of {gap(asked)}" if isinstance(asked, int | float) else ""
    share = f"all {total:,} rows" if not missed else f"{total - missed:,} of {total:,} rows"
    most = (
        f"the largest gap is **{gap(found)}**" if math.isfinite(found) else "**some rows have no certificate at all**"
    )
    since = "the cast and tuning" if any(linear.tuned for linear in report.linears) else "the cast"
    lines = [f"Certified{target} before {since}: **{share}** that a solver worked on; {most}."]
    written = report.gap_written_max
    if written is not None:
        losses = [linear.loss_written for linear in report.linears if linear.loss_written is not None]
        together = f", all rows of a linear together at most **{gap(max(losses))}** above the optimum" if losses else ""
        lines.append(f"As written ({report.run.dtype}): the largest gap of a row is **{gap(written)}**{together}.")
    return lines


def _tuning(report: Report) -> list[str]:
    """What tuning won, and of how many linears errors and gaps are no longer those of the file."""
    blocks, tuned = [block for block in report.blocks if block.tuning], [x for x in report.linears if x.tuned]
    if not blocks:
        return []
    before = geometric_mean(block.tuning[0] for block in blocks)
    after = geometric_mean(block.tuning[block.tuning_epoch] for block in blocks)
    kept = sum(block.tuning_epoch > 0 for block in blocks)
    won = f"{kept} of {len(blocks)} blocks are closer to the dense ones on held-out sequences"
    moved = f"; **errors and gaps of {len(tuned)} linears are from before it**" if tuned else ""
    words = [block for block in blocks if block.words]
    lines = [f"Tuned: {won} (cost {change(before, after)} on average){moved}."]
    lines += [
        f"{block.name} was tuned by the words that the model predicts behind it: they diverge from the dense model's "
        f"by {block.tuning[block.tuning_epoch]:.3g} nats a token, and by {block.tuning[0]:.3g} before."
        for block in words
    ]
    return lines


def _warnings(report: Report) -> list[str]:
    """What must not be missed."""
    linears = report.linears
    thin = [linear for linear in linears if linear.tokens < THIN_TEXT * linear.shape[1]]
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
        "the sparsity as written is not the one asked for": [
            # A weight more or less in each row or group is the rounding of counts.
            linear for linear in linears
            if 0 < linear.sparsity < 1
            and abs(linear.sparsity - linear.sparsity_asked) * linear.size > max(linear.rows, 1)
        ],
        "nothing was measured, the mask costs nothing (inputs or weights are zero)": [
            linear for linear in linears if linear.error_mask == 0 and linear.sparsity > 0
        ],
        f"little calibration text, fewer than {THIN_TEXT} tokens for each input; more samples will help": thin,
    }  # fmt: skip
    return [f"**Warning:** {what}: {names(where)}." for what, where in found.items() if where]


def run_facts(report: Report) -> list[tuple[str, str]]:
    """What a run worked on and what it took, a title and a text each."""
    run, total = report.run, report.num_weights
    source = [f"revision {run.model_revision}" if run.model_revision else None, run.model_fingerprint]
    text = [f"{run.num_tokens:,} tokens", f"seed {run.seed}", f"hash {run.data_hash[:16]}"]
    text += [f"revision {run.dataset_revision}"] if run.dataset_revision else []
    device = run.device if run.processes == 1 else f"{run.processes} processes, the first on {run.device}"
    rows = [
        ("weights pruned", f"{round(report.sparsity * total):,} of {total:,} in linears to prune"),
        ("sparsity", f"{report.sparsity:.4%}, asked {report.sparsity_asked:.4%}"),
        ("source", ", ".join(part for part in source if part)),
        ("calibration", ", ".join(text)),
        ("device, dtype", f"{device}, {run.dtype}"),
        ("peak memory", num_bytes(run.peak_memory_bytes)),
        ("time", ", ".join(filter(None, [duration(run.seconds), on_linears(report, "of it on linears")]))),
        ("finished", run.created),
    ]
    return [row for row in rows if row[1]]


def on_linears(report: Report, what: str) -> str:
    """The seconds of all linears, and ``what``. Nothing of several processes: theirs are no part of the run's."""
    return f"{duration(sum(linear.seconds for linear in report.linears))} {what}" if report.run.processes == 1 else ""


def stage_times(report: Report) -> list[tuple[str, float, float]]:
    """Stages across the run with seconds and share, largest first, and what no stage claims; none if none is known."""
    run = report.run
    stages = sorted(run.stages.items(), key=lambda stage: -stage[1])
    rest = run.seconds - sum(run.stages.values())
    rows = [*stages, ("everything else", rest)] if stages and rest > 0 else stages
    return [(name, seconds, seconds / max(run.seconds, 1e-9)) for name, seconds in rows]


def by_kind(linears: Linears) -> dict[str, list[LinearRecord]]:
    """Linears that play the same part, in the model's order, named by the last part of their names if that says all."""
    names = {linear: kind(name_in_block(linear)) for linear in linears}
    lasts = Counter(name.rpartition(".")[2] for name in set(names.values()))
    kinds: dict[str, list[LinearRecord]] = {}
    for linear, name in names.items():
        last = name.rpartition(".")[2]
        kinds.setdefault(last if lasts[last] == 1 else name, []).append(linear)
    return kinds


def names(linears: Linears) -> str:
    """The first of them, and how many more."""
    shown = ", ".join(code(linear.name) for linear in linears[:NUM_NAMED])
    return f"{shown} and {len(linears) - NUM_NAMED} more" if len(linears) > NUM_NAMED else shown


def solved(linear: LinearRecord) -> bool:
    """Whether a solver ran."""
    return linear.gap_max is not None


def updated(linear: LinearRecord) -> bool:
    """Whether the selector moved weights itself."""
    return linear.error_selector != linear.error_mask


def weighted(linears: Linears) -> bool:
    """Whether some token weighs more than others."""
    return any(linear.error_plain != linear.error for linear in linears)


def rows_solved(linears: Linears) -> int:
    """Rows that a solver worked on."""
    return sum(linear.rows for linear in linears if solved(linear))


def mean(linears: Linears, field: str) -> float:
    """Geometric mean of an error."""
    return geometric_mean(getattr(linear, field) for linear in linears)


def error(value: float) -> str:
    """A relative error in words."""
    return f"{value:.4f}" if value == 0 or value >= 1e-3 else f"{value:.1e}"


def gap(value: float | None) -> str:
    """A gap in words: nothing where no solver ran, ``none`` where nothing is certified."""
    return "" if value is None else f"{value:.1e}" if math.isfinite(value) else "none"


def change(before: float, after: float) -> str:
    """By how much an error changed."""
    return f"{after / before - 1:+.1%}" if before else ""


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def num_bytes(count: int) -> str:
    """A size in words."""
    return f"{count / 2**30:.2f} GiB" if round(count / 2**20) >= 1024 else f"{count / 2**20:.0f} MiB"


def code(name: str) -> str:
    """A name as Markdown shows it."""
    return f"`{name}`"


def bullets(items: Iterable[str]) -> str:
    """A list, one line an item."""
    return "\n".join(f"- {' '.join(item.split())}" for item in items)
