"""The site builds without a warning, and pages agree with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from optima.errors import RecipeError
from optima.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def test_the_page_of_errors_has_the_messages_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site"))
    import errors

    page = errors.page()
    assert all(f"## {name}\n" in page for name in ("OptimaError", "RecipeError", "ModelError", "CalibrationError"))
    with pytest.raises(RecipeError) as caught:
        load_recipe("no-such-recipe")
    shapes = [
        re.sub("‹.*?›", ".+", re.sub(r"([.?*+()\[\]^$|{}])", r"\\\1", text))
        for text in errors.messages()["RecipeError"]
    ]
    assert any(re.fullmatch(shape, str(caught.value)) for shape in shapes if shape.count(".+") < 6)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("material") is None, reason="needs the docs extra")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path]), "NO_MKDOCS_2_WARNING": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {str(page.parent.relative_to(site)): page.read_text() for page in site.glob("**/index.html")}
    assert "optima prune MODEL --output-dir DIR" in pages["reference/cli"]
    assert "num_calibration_samples" in pages["reference/python"]
    assert "## RecipeError" not in pages["reference/errors"]
    assert "<math" in pages["mathematics"]
    requests = re.compile(r'(?:src|<link[^>]*href)="(https?://[^"]*)"')
    assert not [url for page in pages.values() for url in requests.findall(page)], "no request leaves the site"
