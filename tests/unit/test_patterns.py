"""Exact counts, whatever the shape, the sparsity and the ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from layers import check_counts, plain_keep
from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import NM, Pattern, PatternTable, Unstructured, parse_table
from optima.selectors.ranking import count_error, kth_lowest, pruned_in_rows, top_scores

SPARSITIES = st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)
NMS = st.sampled_from([NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(3, 8), NM(5, 16), NM(1, 3)])
UNSTRUCTURED = st.builds(Unstructured, SPARSITIES, st.sampled_from(["row", "layer", "group"]), st.integers(1, 50))


def scores(outputs: int, inputs: int, seed: int, distinct: int | None = None) -> Tensor:
    """Random scores; ``distinct`` values only, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    if distinct is None:
        return torch.rand(outputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randint(distinct, (outputs, inputs), generator=generator).double()


@given(
    pattern=NMS | UNSTRUCTURED,
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 40),
    seed=st.integers(0, 99),
    distinct=st.sampled_from([None, 1, 3]),
)
def test_counts_are_exact_and_the_highest_are_kept(
    pattern: Pattern, outputs: int, inputs: int, seed: int, distinct: int | None
) -> None:
    """Against a sort in plain Python, where the first of equals is pruned first."""
    score_OD = scores(outputs, inputs * (pattern.m if isinstance(pattern, NM) else 1), seed, distinct)
    before_OD = score_OD.clone()
    keep_OD = top_scores(score_OD, pattern)
    check_counts(keep_OD, pattern)
    assert torch.equal(keep_OD, plain_keep(score_OD, pattern))
    assert torch.equal(score_OD, before_OD)
    assert not count_error(keep_OD, pattern)
    keep_OD[seed % outputs, 0] = ~keep_OD[seed % outputs, 0]
    assert count_error(keep_OD, pattern)


@pytest.mark.parametrize("rows", [1, 3, 100_000])
def test_rows_of_a_large_linear_add_up(rows: int) -> None:
    counts_R = pruned_in_rows(Unstructured(0.6, "row"), rows, 28_672)
    assert counts_R.sum() == round(0.6 * rows * 28_672)
    assert set(counts_R.tolist()) <= {17_203, 17_204}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_views_and_infinite_scores(dtype: torch.dtype) -> None:
    score_DO = scores(8, 6, 0, distinct=4).to(dtype)
    score_DO[0], score_DO[3] = torch.inf, -torch.inf
    keep_OD = top_scores(score_DO.mT, Unstructured(0.5))
    assert torch.equal(keep_OD, top_scores(score_DO.mT.contiguous(), Unstructured(0.5)))
    assert keep_OD[:, 0].all()
    assert not keep_OD[:, 3].any()


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 30])
def test_every_order_statistic_is_found(size: int) -> None:
    score_RN = scores(42, size, size, distinct=5)
    sorted_RN = score_RN.sort(dim=1).values
    for k in range(1, size + 1):
        assert torch.equal(kth_lowest(score_RN, k), sorted_RN[:, k - 1 : k])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        *((lambda value=value: Unstructured(value), f"got {value}") for value in (0.0, 1.0, -0.1, float("nan"))),
        (lambda: Unstructured(0.5, "column"), "scope 'column'"),  # type: ignore[arg-type]
        *((lambda nm=nm: NM(*nm), f"pattern {nm[0]}:{nm[1]}") for nm in ((0, 4), (4, 4), (5, 4), (0, 0))),
        (lambda: top_scores(scores(2, 6, 0), NM(2, 4)), "2:4 does not divide 6 inputs"),
    ],
)
def test_patterns_that_are_refused(pattern: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pattern()


LINEARS = {"layers.0.self_attn.q_proj": 32, "layers.0.mlp.up_proj": 32, "layers.0.mlp.down_proj": 48}
Q, UP, DOWN = LINEARS


def table(*entries: str) -> PatternTable:
    return parse_table(entries, "row")


def test_a_table_reads_every_form() -> None:
    read = parse_table(["mlp.*=2:4", "self_attn = 0.5", "0.6"], "group")
    assert read.entries == (("mlp.*", NM(2, 4)), ("self_attn ", Unstructured(0.5, "group")))
    assert read.default == Unstructured(0.6, "group")
    assert table(" 02 : 4 ").default == NM(2, 4)


def test_the_first_match_wins_and_the_default_is_for_the_rest() -> None:
    assigned = table("0.7", "down=1:4", "mlp=3:8", "layers.0.mlp|attn=0.5").assign(LINEARS)
    assert assigned == {Q: Unstructured(0.5), UP: NM(3, 8), DOWN: NM(1, 4)}
    assert table("0.7", "up_proj$=2:4").assign(LINEARS)[Q] == Unstructured(0.7)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        (["mlp=2:4"], Q),
        (["up=5:32", "down=5:32", "0.5"], DOWN),
        (["0.5", "mpl=2:4"], "'mpl' decides nothing"),
        (["up_proj=2:4", "up_proj=1:4", "0.5"], "'up_proj' decides nothing"),
    ],
)
def test_a_table_that_does_not_fit_its_linears(entries: list[str], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        table(*entries).assign(LINEARS)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        *((text, repr(text)) for text in ("half", "", "mlp=", "mlp=2/4", "mlp=2:4:8", "=2:4", "(=2:4")),
        ("mlp=4:2", "4:2"),
        ("mlp=1.5", "1.5"),
        ("2:4", "two entries for all linears"),
    ],
)
def test_entries_that_cannot_be_read(entry: str, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        table("0.5", entry)
    assert named in str(caught.value)
