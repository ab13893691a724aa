"""The tutorial of docs/selectors.md works, and its table names every selector."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from layers import PATTERNS, hessian_of, layer_of, make_layer, plain_keep
from tiny import blocks_of, make_llama, make_tokens

from optima import Recipe, prune
from optima.patterns import Pattern
from optima.plan import make_methods
from optima.recipe import SELECTOR_NAMES
from optima.selectors.base import Selector

PAGE = (Path(__file__).parents[2] / "docs" / "selectors.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's two files, in the current directory."""
    for name, code in re.findall(r"<!-- file: (\w+)\.py -->\n```python\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)


def loaded(path: str) -> Selector:
    return make_methods(Recipe(selector=path), trust_remote_code=True).selector


def test_it_is_20_lines() -> None:
    assert len(Path("surgeon.py").read_text().splitlines()) <= 20


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_your_own_selector(pattern: Pattern) -> None:
    weight_OD, inputs_TD = make_layer(dead=(3, 5))
    selection = loaded("surgeon:Surgeon").select(layer_of(weight_OD, inputs_TD), pattern)
    inverse_DD = torch.linalg.inv(hessian_of(inputs_TD).damped(0.01))
    score_OD = weight_OD**2 / inverse_DD.diagonal()
    score_OD[:, [3, 5]] = 0
    assert torch.equal(selection.keep_OD, plain_keep(score_OD, pattern))


def test_it_prunes_a_model() -> None:
    model = make_llama()
    recipe = Recipe(selector="surgeon:Surgeon", pattern=["2:4"], max_seq_length=16)
    report = prune(model, recipe, calibration=make_tokens(), trust_remote_code=True)
    assert report.run.recipe["selector"] == "surgeon:Surgeon"
    for block in blocks_of(model):
        for linear in block.linears:
            assert ((linear.read() != 0).reshape(-1, 4).sum(dim=1) == 2).all()


def test_the_table_names_every_selector() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == set(SELECTOR_NAMES)
