"""Selectors against a few lines of float64 written from their papers, which share nothing with the package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_close_in_norm
from layers import DAMPING, PATTERNS, layer_of, lowest, make_layer, plain_keep, row_counts, steps
from torch import Tensor

from optima.errors import RecipeError
from optima.patterns import NM, Pattern, Unstructured
from optima.recipe import SELECTOR_NAMES
from optima.selectors.base import SELECTORS, load_foreign, make_selector
from optima.selectors.scores import RIA, Magnitude, Wanda
from optima.selectors.sparsegpt import SparseGPT
from optima.selectors.thanos import Thanos


def plain_sparsegpt(weight_OD: Tensor, inputs_TD: Tensor, pattern: Pattern, blocksize: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, column by column: the columns before j are fixed, the rest has the inverse Hessian
    inv(H[j:, j:]), inverted anew in every column. Removing w_j costs w_j^2 / inv_jj (up to a factor) and moves the
    columns from j by -w_j / inv_jj times its first row. A block's mask is chosen when the sweep reaches it.
    """
    weight_OD = weight_OD.clone()
    outputs, inputs = weight_OD.shape
    hessian_DD = inputs_TD.T @ inputs_TD / len(inputs_TD)
    dead = hessian_DD.diagonal() == 0
    hessian_DD += DAMPING * hessian_DD.diagonal()[~dead].mean() * torch.eye(inputs, dtype=torch.float64)
    hessian_DD[dead, dead] = 1
    weight_OD[:, dead] = 0
    inverses = [torch.linalg.inv(hessian_DD[j:, j:]) for j in range(inputs)]
    pruned_OD = torch.zeros_like(weight_OD, dtype=torch.bool)
    width = blocksize
    if isinstance(pattern, NM):
        width = pattern.m
    elif pattern.scope == "group":
        width = pattern.group_size
    for j in range(inputs):
        if j % width == 0:
            block = range(j, min(j + width, inputs))
            score_OB = torch.stack([weight_OD[:, i] ** 2 / inverses[i][0, 0] for i in block], dim=1)
            end = block[-1] + 1
            if isinstance(pattern, NM):
                pruned_OD[:, j:end] = lowest(score_OB, pattern.m - pattern.n)
            elif pattern.scope == "row":
                shares = [count / inputs for count in row_counts(pattern, outputs, inputs)]
                pruned_OD[:, j:end] = lowest(score_OB, [round(share * end) - round(share * j) for share in shares])
            else:
                (count,) = steps(pattern.sparsity, [outputs * j, outputs * end])
                pruned_OD[:, j:end] = lowest(score_OB.reshape(1, -1), count).reshape(outputs, -1)
        error_O = weight_OD[:, j] * pruned_OD[:, j] / inverses[j][0, 0]
        weight_OD[:, j:] -= error_O[:, None] * inverses[j][0]
        weight_OD[pruned_OD[:, j], j] = 0
    return ~pruned_OD, weight_OD


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores(pattern: Pattern) -> None:
    """RIA: the share of a weight in its row plus that in its column, times the root of the norm of its input."""
    weight_OD, inputs_TD = make_layer(dead=(3, 47))
    weight_OD[2] = 0
    weight_OD[:, 5] = 0
    size_OD, norm_D = weight_OD.abs(), torch.stack([column.norm(p=2) for column in inputs_TD.T])
    share_OD = torch.nan_to_num(size_OD / size_OD.sum(1, keepdim=True)) + torch.nan_to_num(size_OD / size_OD.sum(0))
    scores = {Magnitude(): size_OD, Wanda(): size_OD * norm_D, RIA(): share_OD * norm_D.sqrt()}
    for selector, score_OD in scores.items():
        selection = selector.select(layer_of(weight_OD, inputs_TD), pattern)
        assert torch.equal(selection.keep_OD, plain_keep(score_OD, pattern))
        assert selection.weight_OD is None


# Blocks as wide as the layer, wider, dividing it, and leaving a remainder; 12 is no multiple of 8.
@pytest.mark.parametrize("blocksize", [48, 128, 16, 12, 20, 1])
@pytest.mark.parametrize("dead", [(), (0, 3, 4, 5, 6, 40), tuple(range(16, 32))], ids=["live", "some", "a block"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt(pattern: Pattern, dead: tuple[int, ...], blocksize: int) -> None:
    weight_OD, inputs_TD = make_layer(dead=dead)
    before = weight_OD.clone()
    selection = SparseGPT(blocksize).select(layer_of(weight_OD, inputs_TD), pattern)
    keep_OD, expected_OD = plain_sparsegpt(weight_OD, inputs_TD, pattern, blocksize)
    assert torch.equal(selection.keep_OD, keep_OD)
    assert selection.weight_OD is not None
    assert_close_in_norm(selection.weight_OD, expected_OD, 2.0**13)  # as many as the condition
    assert torch.equal(weight_OD, before), "the dense weight is the caller's"


def test_the_page_names_every_selector() -> None:
    page = (Path(__file__).parents[2] / "docs" / "selectors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(SELECTOR_NAMES)


def test_published_settings() -> None:
    assert SparseGPT() == SparseGPT(blocksize=128)
    assert Thanos() == Thanos(blocksize=128, nm_blocksize=512)
    scopes = {name: make_selector(name).published_scope for name in SELECTORS}
    assert scopes == {
        "magnitude": "layer", "wanda": "row", "ria": "layer", "sparsegpt": "group",
        "thanos": "layer", "admm": "layer", "alps": "layer", "optima": "layer",
    }  # fmt: skip


OWN = """
from dataclasses import dataclass

from optima.selectors.ranking import top_scores
from optima.selectors.base import Selection


class Mine:
    published_scope = "row"

    def select(self, layer, pattern):
        return Selection(top_scores(layer.weight_OD, pattern))


class Needy(Mine):
    def __init__(self, threshold):
        self.threshold = threshold


class Empty:
    pass
"""


class TestOwnSelector:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_selectors.py").write_text(OWN)
        (tmp_path / "torn_selectors.py").write_text("class Mine(\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "own_selectors", raising=False)

    def test_found_in_the_current_directory(self) -> None:
        weight_OD, inputs_TD = make_layer()
        path = list(sys.path)
        selector = load_foreign("own_selectors:Mine")
        assert sys.path == path
        selection = selector.select(layer_of(weight_OD, inputs_TD), Unstructured(0.5))
        assert torch.equal(selection.keep_OD, plain_keep(weight_OD, Unstructured(0.5)))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module:Mine", "No module named 'no_such_module'"),
            ("own_selectors:Yours", "has no attribute 'Yours'"),
            ("own_selectors:Needy", "missing 1 required positional argument"),
            ("own_selectors:Empty", "is not a selector"),
            (":Mine", "write module:Class"),
            ("./own_selectors.py:Mine", "write module:Class"),
            ("torn_selectors:Mine", r"torn_selectors\.py, line 1"),
        ],
    )
    def test_refused(self, name: str, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            load_foreign(name)
