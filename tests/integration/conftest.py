"""A working directory with a tiny model and a text, and a refusal that leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import WEIGHTS, Refused, prune_arguments, save_model, save_text, snapshot

from optima.cli import main


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model, its tokenizer and a text."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(Path("model"))
    save_text(Path("text.txt"))
    return tmp_path / "here"


@pytest.fixture
def late(root: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Prune, expecting a refusal that leaves the disk as it was; returns the message."""

    def refused(*options: str, model: str = "model", arguments: list[str] | None = None) -> str:
        before = snapshot(root.parent)
        code = main(arguments or prune_arguments(*options, model=model))
        output, message = capsys.readouterr()
        assert code == 2, message
        assert output == ""
        error = message.partition("optima: error: ")[2]  # before it may stand how far the run came
        assert error, message
        assert "Traceback" not in message
        assert snapshot(root.parent) == before
        return error.strip()

    return refused


@pytest.fixture
def cheap(root: Path, late: Refused) -> Refused:
    """The same, with garbage for weights."""
    (root / "model" / WEIGHTS).write_bytes(b"garbage")
    return late
