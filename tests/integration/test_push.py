"""optima push: what is uploaded, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Refused, prune_arguments

from optima.cli import main


class Hub:
    """In the place of ``HfApi``: repositories by name, their files, and arguments of uploads."""

    endpoint = "https://hub"
    repos: dict[str, list[str]]
    uploads: list[dict[str, Any]]

    def create_repo(self, repo: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        if repo.count("/") > 1:
            raise ValueError(f"Repo id must be in the form 'owner/name': {repo}")
        self.repos.setdefault(repo, [".gitattributes"])
        return SimpleNamespace(repo_id=repo)

    def repo_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=repo != "team/public")

    def list_repo_files(self, repo: str) -> list[str]:
        return self.repos[repo]

    def upload_folder(self, **arguments: Any) -> None:
        if arguments["repo_id"] == "team/refused":
            raise ValueError("Invalid metadata in README.md")
        self.uploads.append(arguments)


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.repos, Hub.uploads = {"team/dense": ["model.safetensors"], "team/public": []}, []
    monkeypatch.setattr("optima.hub.HfApi", Hub)
    return Hub


@pytest.fixture
def out(hub: type[Hub]) -> Path:
    assert main(prune_arguments("--selector", "magnitude")) == 0
    return Path("out")


def test_the_output_is_uploaded(hub: type[Hub], out: Path) -> None:
    assert main(["push", "out", "team/sparse", "--private", "--message", "the first"]) == 0
    (upload,) = hub.uploads
    assert (upload["repo_id"], upload["commit_message"], upload["folder_path"]) == ("team/sparse", "the first", out)
    assert "*.safetensors" in upload["delete_patterns"], "weights of an earlier upload are gone"


def test_a_run_publishes_or_is_refused_before_it_begins(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    options = "--selector", "magnitude", "--push-to-hub"
    assert main(prune_arguments(*options, "team/dense")) == 2
    assert "team/dense" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main(prune_arguments(*options, "team/sparse")) == 0
    assert [upload["repo_id"] for upload in hub.uploads] == ["team/sparse"]


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("a/b/c", [], "a/b/c"),
        ("team/dense", [], "did not write"),
        ("team/public", ["--private"], "is public"),
        ("team/refused", [], "Invalid metadata"),
    ],
)
def test_what_cannot_be_pushed(
    hub: type[Hub], out: Path, cheap: Refused, repo: str, options: list[str], message: str
) -> None:
    assert message in cheap(arguments=["push", "out", repo, *options])
    assert not hub.uploads


def test_what_is_no_output(hub: type[Hub], cheap: Refused) -> None:
    assert "has no report.json" in cheap(arguments=["push", "model", "x"])
    assert "there is no directory nope" in cheap(arguments=["push", "nope", "x"])
