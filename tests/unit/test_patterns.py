"""Exact counts, whatever the shape, the sparsity and the ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import NM, PatternTable, Unstructured, parse_table
from optima.selectors.ranking import pruned_in_rows, top_scores

SPARSITIES = st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)
SIZES = st.integers(1, 40)


def scores(outputs: int, inputs: int, seed: int, distinct: int | None = None) -> Tensor:
    """Random scores; ``distinct`` values only, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    if distinct is None:
        return torch.rand(outputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randint(distinct, (outputs, inputs), generator=generator).double()


@given(
    outputs=SIZES, inputs=SIZES, sparsity=SPARSITIES, seed=st.integers(0, 99), distinct=st.sampled_from([None, 1, 3])
)
def test_row_counts_are_exact(outputs: int, inputs: int, sparsity: float, seed: int, distinct: int | None) -> None:
    score_OD = scores(outputs, inputs, seed, distinct)
    keep_OD = top_scores(score_OD, Unstructured(sparsity, "row"))
    assert keep_OD.dtype == torch.bool
    assert keep_OD.shape == score_OD.shape
    check_spread((~keep_OD).sum(dim=1), sparsity, inputs)
    assert (~keep_OD).sum() == round(sparsity * outputs * inputs)
    for score_D, keep_D in zip(score_OD, keep_OD, strict=True):
        check_highest_are_kept(score_D, keep_D)


@given(
    outputs=SIZES, inputs=SIZES, sparsity=SPARSITIES, seed=st.integers(0, 99), distinct=st.sampled_from([None, 1, 3])
)
def test_layer_count_is_exact(outputs: int, inputs: int, sparsity: float, seed: int, distinct: int | None) -> None:
    score_OD = scores(outputs, inputs, seed, distinct)
    keep_OD = top_scores(score_OD, Unstructured(sparsity, "layer"))
    assert (~keep_OD).sum() == round(sparsity * outputs * inputs)
    check_highest_are_kept(score_OD.flatten(), keep_OD.flatten())


@given(
    outputs=SIZES,
    inputs=SIZES,
    sparsity=SPARSITIES,
    group_size=st.integers(1, 50),
    seed=st.integers(0, 99),
    distinct=st.sampled_from([None, 1, 3]),
)
def test_group_counts_are_exact(
    outputs: int, inputs: int, sparsity: float, group_size: int, seed: int, distinct: int | None
) -> None:
    score_OD = scores(outputs, inputs, seed, distinct)
    keep_OD = top_scores(score_OD, Unstructured(sparsity, "group", group_size))
    assert (~keep_OD).sum() == round(sparsity * outputs * inputs)
    for score_OG, keep_OG in zip(score_OD.split(group_size, 1), keep_OD.split(group_size, 1), strict=True):
        check_spread((~keep_OG).sum()[None], sparsity, keep_OG.numel())
        check_highest_are_kept(score_OG.flatten(), keep_OG.flatten())


def check_spread(pruned_N: Tensor, sparsity: float, size: int) -> None:
    """Each of several equal parts loses its share of the whole, but for what rounding moves between neighbours."""
    assert (pruned_N - sparsity * size).abs().max() <= 1 + 1e-9
    assert pruned_N.max() - pruned_N.min() <= 1


def test_one_group_is_the_layer_and_rows_of_whole_shares_are_alike() -> None:
    score_OD = scores(9, 20, 0)
    layer_OD = top_scores(score_OD, Unstructured(0.37, "layer"))
    assert torch.equal(top_scores(score_OD, Unstructured(0.37, "group", 20)), layer_OD)
    assert torch.equal(top_scores(score_OD, Unstructured(0.37, "group")), layer_OD)
    assert ((~top_scores(score_OD, Unstructured(0.6, "row"))).sum(dim=1) == 12).all()


@pytest.mark.parametrize("rows", [1, 3, 100_000])
def test_rows_of_a_large_linear_add_up(rows: int) -> None:
    counts_R = pruned_in_rows(Unstructured(0.6, "row"), rows, 28_672)
    assert counts_R.sum() == round(0.6 * rows * 28_672)
    assert set(counts_R.tolist()) <= {17_203, 17_204}


@given(
    outputs=SIZES,
    groups=st.integers(1, 9),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (3, 8), (5, 16), (1, 3)]),
    seed=st.integers(0, 99),
    distinct=st.sampled_from([None, 1, 3]),
)
def test_nm_counts_are_exact(outputs: int, groups: int, nm: tuple[int, int], seed: int, distinct: int | None) -> None:
    n, m = nm
    score_OD = scores(outputs, groups * m, seed, distinct)
    keep_OD = top_scores(score_OD, NM(n, m))
    for score_M, keep_M in zip(score_OD.reshape(-1, m), keep_OD.reshape(-1, m), strict=True):
        assert keep_M.sum() == n
        check_highest_are_kept(score_M, keep_M)


def check_highest_are_kept(score_N: Tensor, keep_N: Tensor) -> None:
    """No pruned score is above a kept one, and of equal scores the first are pruned first."""
    if not keep_N.any() or keep_N.all():
        return
    threshold = score_N[keep_N].min()
    assert score_N[~keep_N].max() <= threshold
    tied_N = keep_N[score_N == threshold]
    assert (tied_N.sort(stable=True).values == tied_N).all()


def test_ties_are_broken_by_position() -> None:
    score_OD = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0]])
    expected = [[False, False, True, True], [False, True, False, True]]
    assert top_scores(score_OD, Unstructured(0.5, "row")).tolist() == expected
    assert top_scores(score_OD, NM(2, 4)).tolist() == expected
    assert top_scores(score_OD, Unstructured(0.5, "layer")).tolist() == [
        [False, True, True, True],
        [False, True, False, False],
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_views_and_input_are_left_alone(dtype: torch.dtype) -> None:
    score_DO = scores(8, 6, 0, distinct=4).to(dtype)
    before = score_DO.clone()
    keep_OD = top_scores(score_DO.mT, Unstructured(0.5))
    assert torch.equal(keep_OD, top_scores(score_DO.mT.contiguous(), Unstructured(0.5)))
    assert torch.equal(score_DO, before)


def test_infinite_scores_are_ordered_too() -> None:
    score_OD = torch.tensor([[torch.inf, 0.0, -torch.inf, 1.0]])
    assert top_scores(score_OD, Unstructured(0.5)).tolist() == [[True, False, False, True]]


class TestValues:
    @pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
    def test_sparsity_is_strictly_between_0_and_1(self, sparsity: float) -> None:
        with pytest.raises(RecipeError, match="strictly between 0 and 1, got"):
            Unstructured(sparsity)

    def test_unknown_scope_lists_the_known(self) -> None:
        with pytest.raises(RecipeError, match="unknown scope 'column': known scopes are row, layer, group"):
            Unstructured(0.5, "column")  # type: ignore[arg-type]

    def test_group_size_is_positive(self) -> None:
        with pytest.raises(RecipeError, match="group_size must be at least 1, got 0"):
            Unstructured(0.5, "group", 0)

    @pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (0, 0)])
    def test_nm_keeps_some_and_prunes_some(self, n: int, m: int) -> None:
        with pytest.raises(RecipeError, match=f"pattern {n}:{m} keeps n of m weights and needs 0 < n < m"):
            NM(n, m)


class TestParse:
    @pytest.mark.parametrize("text", ["2:4", " 2 : 4 ", "02:4"])
    def test_reads(self, text: str) -> None:
        assert table(text).default == NM(2, 4)


def test_check_names_the_linear_and_the_option() -> None:
    table("2:4").assign({"a.b": 12})
    table("0.5").assign({"a.b": 13})
    with pytest.raises(RecipeError, match=r"divisible by 4, but a\.b has 13: .* --ignore 'a"):
        table("2:4").assign({"a.b": 13})


LINEARS = {"layers.0.self_attn.q_proj": 32, "layers.0.mlp.up_proj": 32, "layers.0.mlp.down_proj": 48}
Q, UP, DOWN = LINEARS


def table(*entries: str) -> PatternTable:
    return parse_table(entries, "row")


class TestTable:
    def test_reads_every_form(self) -> None:
        read = parse_table(["mlp.*=2:4", "self_attn = 0.5", "0.6"], "group")
        assert read.entries == (("mlp.*", NM(2, 4)), ("self_attn ", Unstructured(0.5, "group")))
        assert read.default == Unstructured(0.6, "group")
        assert read.patterns == [NM(2, 4), Unstructured(0.5, "group"), Unstructured(0.6, "group")]

    def test_first_match_wins_and_the_default_is_for_the_rest(self) -> None:
        assigned = table("0.7", "down=1:4", "mlp=3:8", "layers.0.mlp|attn=0.5").assign(LINEARS)
        assert assigned == {Q: Unstructured(0.5), UP: NM(3, 8), DOWN: NM(1, 4)}
        assert table("0.7", "up_proj$=2:4").assign(LINEARS)[Q] == Unstructured(0.7)

    def test_no_match_and_no_default(self) -> None:
        with pytest.raises(RecipeError, match=r"no entry of pattern matches layers\.0\.self_attn\.q_proj: add one"):
            table("mlp=2:4").assign(LINEARS)

    def test_each_linear_is_checked_against_its_own_pattern(self) -> None:
        table("down=5:16", "0.5").assign(LINEARS)
        with pytest.raises(RecipeError, match=r"pattern 5:32 .* but layers\.0\.mlp\.down_proj has 48"):
            table("up=5:32", "down=5:32", "0.5").assign(LINEARS)

    @pytest.mark.parametrize(
        "entries", [("0.5", "mpl=2:4"), ("mlp=2:4", "up_proj=1:4", "0.5"), ("up_proj=2:4", "up_proj=1:4", "0.5")]
    )
    def test_an_entry_that_decides_nothing(self, entries: tuple[str, ...]) -> None:
        with pytest.raises(RecipeError, match=r"'(mpl|up_proj)' decides nothing: .* the first is layers\.0\.self_attn"):
            table(*entries).assign(LINEARS)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("half", "pattern 'half' is not of the form n:m (2:4), a sparsity (0.6), or REGEX="),
            ("", "pattern '' is not of the form"),
            ("mlp", "pattern 'mlp' is not of the form"),
            ("mlp=", "pattern 'mlp=' is not of the form"),
            ("mlp=2/4", "pattern 'mlp=2/4' is not of the form"),
            ("mlp=2:4:8", "pattern 'mlp=2:4:8' is not of the form n:m"),
            ("mlp=4:2", "pattern 4:2 keeps n of m weights"),
            ("mlp=1.5", "sparsity must be strictly between 0 and 1, got 1.5"),
            ("mlp=nan", "sparsity must be strictly between 0 and 1, got nan"),
            ("=2:4", "pattern '=2:4' has no regex before '='"),
            ("(=2:4", "pattern '(=2:4': '(' is not a regular expression"),
        ],
    )
    def test_unreadable(self, entry: str, message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            table("0.5", entry)
        assert message in str(caught.value)

    def test_two_defaults(self) -> None:
        with pytest.raises(RecipeError, match=r"two entries for all linears, 0\.5 per row and 2:4: keep one"):
            table("0.5", "2:4")
