"""Code that comes with a checkpoint: its files are those that are imported, whatever else lies beside them."""

from __future__ import annotations

from pathlib import Path

from optima.models.own_code import imported_files


def test_what_is_imported_in_turn(tmp_path: Path) -> None:
    contents = {
        "model": "from .config import Config\nfrom .layers import Layer\n",
        "layers": "from .config import Config\nfrom .gone import nothing\n",
        "config": "class Config: ...\n",
        "tokenizer": "from .config import Config\n",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.py").write_text(content)
    assert {file.stem for file in imported_files(tmp_path / "model.py")} == {"model", "layers", "config"}
    assert [file.stem for file in imported_files(tmp_path / "tokenizer.py")] == ["tokenizer", "config"]
