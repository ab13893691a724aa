"""Every command and every piece of code on a page runs, see ``tests/snippets.py`` for how."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from snippets import ROOT, Snippet, World, make_models, snippets

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
RUNNABLE = {str(page.relative_to(ROOT)): snippets(page) for page in PAGES if snippets(page)}
MOST_EXCEPTIONS = 9  # blocks that are not run, of all pages


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * page.startswith("docs/howto/")) for page in RUNNABLE]
)
def test_snippets(page: str, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(monkeypatch, *models)
    for snippet in RUNNABLE[page]:
        if "--task" in snippet.text and find_spec("lm_eval") is None:
            continue
        world.run(snippet)


def test_exceptions_are_few_and_have_a_reason() -> None:
    marked: list[tuple[str, Snippet]] = [
        (page, one) for page, own in RUNNABLE.items() for one in own if one.mark == "not run"
    ]
    assert len(marked) <= MOST_EXCEPTIONS, [(page, one.line) for page, one in marked]
    assert all(len(one.about.split()) > 2 for _, one in marked)
