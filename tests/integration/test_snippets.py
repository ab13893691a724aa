"""The commands and the code of every page run; ``tests/snippets.py`` says how."""

from __future__ import annotations

from pathlib import Path

import pytest
from snippets import ROOT, World, make_models, snippets

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])  # test_contributing.py runs CONTRIBUTING.md
RUNNABLE = {str(page.relative_to(ROOT)): snippets(page) for page in PAGES if snippets(page)}
QUICK = ("README.md", "docs/tutorial.md", "docs/selectors.md", "docs/howto/extend.md")  # the others are slow
MOST_NOT_RUN = 8  # blocks, of all pages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page not in QUICK)) for page in RUNNABLE]
)
def test_snippets(page: str, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(monkeypatch, *models)
    for snippet in RUNNABLE[page]:
        world.run(snippet)


def test_few_blocks_are_not_run() -> None:
    not_run = [(page, one.about) for page, own in RUNNABLE.items() for one in own if one.mark == "not run"]
    assert len(not_run) <= MOST_NOT_RUN, not_run
