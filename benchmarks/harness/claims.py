"""What the engine promises (issue 3), judged on the entries of one run. Every line names the worst case."""

from __future__ import annotations

from collections.abc import Sequence

from harness.table import Claim, Entry, power

# The promises are about these sizes.
SIZES = range(640, 2049)
# Diagonal CG as published. "diagonal CG, certified" and "oracle stop" are our strengthened forms of it.
ALPS = "diagonal CG as ALPS runs it (torch.mm)"
STRENGTHENED = " (strengthened: our products, rows leave, checks in bfloat16)"


def judge(entries: Sequence[Entry]) -> list[Claim]:
    """All claims that solving rows can bear out."""
    entries = [entry for entry in entries if entry.num_inputs in SIZES]
    claims = [_faster(entries, f"MPAX {form}", 1e-4, 200) for form in ("dense", "repaired", "sparse")]
    claims += [_paper(entries, form) for form in ("dense", "repaired")]
    claims += [
        _faster(entries, ALPS, 1e-4, 2),
        _faster(entries, ALPS, 1e-6, 3),
        _faster(entries, "diagonal CG, certified", 1e-4, 2, STRENGTHENED),
        _faster(entries, "diagonal CG, certified", 1e-6, 3, STRENGTHENED),
        _faster(entries, "diagonal CG, oracle stop", 1e-4, 1, STRENGTHENED),
        _at_least(entries, "share of the solve inside matrix products", "product_share", 0.85),
        _at_least(entries, "rate inside products, of the machine's for that shape", "rate_share", 0.80),
    ]
    return claims


def _faster(entries: Sequence[Entry], method: str, target: float, factor: float, note: str = "") -> Claim:
    """Ours at the same gap against ``method``, smallest ratio over the cases."""
    text = f"at least {factor:g}x faster than {method}, to {power(target)}{note}"
    peers = [entry for entry in entries if entry.method.startswith(method) and entry.target == target]
    ratios = [(entry.ratio, entry) for entry in peers if entry.ratio is not None]
    if not ratios:
        return Claim(text, None, "no such entry in this run")
    found = _range([(ratio, each.case) for ratio, each in ratios])
    below = [each for ratio, each in ratios if ratio < factor]
    if below and all(each.lower_bound for each in below):
        return Claim(text, None, f"{found}; the peer was stopped before it got there")
    return Claim(text, not below, found)


def _range(found: Sequence[tuple[float, str]]) -> str:
    """Worst and best, real layers and synthetic ones apart."""
    parts = []
    for kind in ("real", "synthetic"):
        group = [pair for pair in found if pair[1].startswith("synthetic") == (kind == "synthetic")]
        if group:
            parts.append(f"{kind} {min(group)[0]:.2f}x ({min(group)[1]}) .. {max(group)[0]:.2f}x")
    return ", ".join(parts)


def _paper(entries: Sequence[Entry], form: str) -> Claim:
    """Per case, our fastest setting with a true gap 1,000 times smaller than raPDHG's at the paper's tolerance."""
    text = f"at least 5x faster than MPAX {form} at the paper's eps 1e-2, with a true gap at least 1,000x smaller"
    peers = [entry for entry in entries if entry.method == f"MPAX {form}, eps 1e-2"]
    found: list[tuple[float, str]] = []
    for peer in peers:
        ours = [entry for entry in entries if entry.case == peer.case and entry.ours]
        good = [entry for entry in ours if _tighter(entry, peer, 1000.0)]
        speed = max((entry.rows_per_second / peer.rows_per_second for entry in good), default=0.0)
        found.append((speed, peer.case))
    if not found:
        return Claim(text, None, "no such entry in this run")
    return Claim(text, min(found)[0] >= 5.0, _range(found))


def _tighter(ours: Entry, peer: Entry, factor: float) -> bool:
    assert ours.gap_true is not None
    assert peer.gap_true is not None
    return ours.gap_true * factor <= peer.gap_true


def _at_least(entries: Sequence[Entry], text: str, field: str, threshold: float) -> Claim:
    ours = [entry for entry in entries if entry.ours and getattr(entry, field) is not None]
    if not ours:
        return Claim(text, None, "no such entry in this run")
    worst = min(ours, key=lambda entry: getattr(entry, field))
    value, best = getattr(worst, field), max(getattr(entry, field) for entry in ours)
    text = f"{text} at least {100 * threshold:.0f}%"
    return Claim(text, value >= threshold, f"{100 * value:.0f}% ({worst.case}, {worst.method}) .. {100 * best:.0f}%")
