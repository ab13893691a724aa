"""optima push and prune --push-to-hub, with huggingface_hub's own client against a stand-in hub on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from standin_hub import OWNER, Run, StandInHub, command_with, serving
from tiny import prune_arguments, save_model, save_text

from optima.cli import main

pytestmark = pytest.mark.slow  # each command is a new process


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its text, and a pruned output."""
    root = tmp_path_factory.mktemp("push")
    save_model(root / "model")
    save_text(root / "text.txt")
    before = Path.cwd()
    os.chdir(root)
    assert main(prune_arguments("--selector", "wanda", "--pattern", "2:4")) == 0
    os.chdir(before)
    return root


@pytest.fixture
def optima(hub: StandInHub, place: Path) -> Run:
    return command_with(hub, place)


def test_the_repository_holds_the_output_to_the_byte(hub: StandInHub, optima: Run, place: Path) -> None:
    (place / "out" / "layers").mkdir(exist_ok=True)
    (place / "out" / "layers" / "dump.safetensors").write_bytes(b"a hessian")
    found = optima("push", "out", "sparse", "--private", "--message", "the first")
    assert found.returncode == 0, found.stderr
    assert f"published: {hub.url}/{OWNER}/sparse" in found.stdout
    files = hub.repos[f"{OWNER}/sparse"]
    written = {
        path.name: path.read_bytes() for path in (place / "out").iterdir() if path.is_file() and path.name[0] != "."
    }
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == written
    assert {"README.md", "report.json", "recipe.yaml", "model.safetensors.index.json"} <= set(files)
    assert hub.private == {f"{OWNER}/sparse"}
    assert hub.messages == ["the first"]
    card = ModelCard(files["README.md"].decode())
    assert {"pruning", "sparse", "2:4"} <= set(card.data.tags)

    hub.repos["team/sparse"] = dict(files) | {"model-00009-of-00009.safetensors": b"old", "plot.png": b"theirs"}
    assert optima("push", "out", "team/sparse").returncode == 0
    assert hub.repos["team/sparse"].keys() == files.keys() | {"plot.png"}, "weights of an earlier push are gone"


def test_a_run_publishes_what_it_made(hub: StandInHub, optima: Run) -> None:
    arguments = prune_arguments("--selector", "magnitude", "--output-dir", "second")
    found = optima(*arguments, "--push-to-hub", "team/second")
    assert found.returncode == 0, found.stderr
    assert "report.json" in hub.repos["team/second"]
    assert not hub.private


@pytest.mark.parametrize(
    ("repo", "settings", "message"),
    [
        ("a/b/c", {}, "a/b/c"),
        ("x", {"HF_TOKEN": "hf_wrong"}, "Invalid"),
        ("x", {"HF_HUB_OFFLINE": "1"}, "offline"),
        ("team/dense", {}, "did not write"),
        ("team/public", {}, "is public"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_run(
    hub: StandInHub, optima: Run, place: Path, repo: str, settings: dict[str, str], message: str
) -> None:
    hub.repos["team/dense"] = {"model.safetensors": b"dense", ".gitattributes": b""}
    hub.repos["team/public"] = {".gitattributes": b""}
    private = ["--private"] if "public" in repo else []
    found = optima(*prune_arguments("--output-dir", "never"), "--push-to-hub", repo, *private, **settings)
    assert found.returncode == 2, found.stderr
    assert message in found.stderr
    assert not (place / "never").exists()
    assert hub.repos["team/dense"]["model.safetensors"] == b"dense"


def test_a_card_that_the_hub_refuses(hub: StandInHub, optima: Run, place: Path) -> None:
    shutil.copytree(place / "out", place / "edited")
    (place / "edited" / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    found = optima("push", "edited", "x")
    assert found.returncode == 2, found.stderr
    assert "base_model is no id" in found.stderr


def test_what_is_no_output(optima: Run) -> None:
    found = optima("push", "model", "x")
    assert found.returncode == 2
    assert "has no report.json" in found.stderr
    found = optima(*prune_arguments("--private", "--output-dir", "never"))
    assert "--private is for --push-to-hub" in found.stderr
