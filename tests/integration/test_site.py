"""The site builds without a warning, and the pages that are made from the code say what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from optima.errors import RecipeError
from optima.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SITE = ROOT / "tools" / "site"


@pytest.fixture(scope="module")
def errors() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SITE))
    import errors as found

    yield found
    sys.path.remove(str(SITE))


def test_every_class_of_errors_says_something(errors: Any) -> None:
    page = errors.page()
    for name in ("OptimaError", "RecipeError", "ModelError", "CalibrationError", "NumericalError"):
        assert f"## {name}\n" in page
    assert sum(line.startswith("- ") for line in page.splitlines()) > 100


def test_a_message_of_the_code_is_on_the_page(errors: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("no-such-recipe")
    own = str(caught.value)
    shapes = [
        re.sub("‹.*?›", ".+", re.sub(r"([.?*+()\[\]^$|{}])", r"\\\1", text))
        for text in errors.messages()["RecipeError"]
    ]
    assert any(re.fullmatch(shape, own) for shape in shapes if shape.count(".+") < 6)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("material") is None, reason="needs the docs extra")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]),
        "NO_MKDOCS_2_WARNING": "1",
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {
        str(page.parent.relative_to(tmp_path / "site")): page.read_text()
        for page in tmp_path.glob("site/**/index.html")
    }
    assert {
        "tutorial",
        "howto/two-four",
        "reference/cli",
        "reference/errors",
        "reference/python",
        "about/contributing",
    } <= pages.keys()
    assert "optima prune MODEL --output-dir DIR" in pages["reference/cli"]
    assert "<math" in pages["mathematics"]
    assert "num_calibration_samples" in pages["reference/python"]
    requests = [
        url for page in pages.values() for url in re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]*)"', page)
    ]
    assert requests == [], "the site asks no other server for anything"
