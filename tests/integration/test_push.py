"""optima push and prune --push-to-hub: what is uploaded, and what is refused before the run."""

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


def test_a_run_publishes_what_it_made_and_so_does_push(hub: type[Hub]) -> None:
    assert main(prune_arguments("--selector", "magnitude", "--push-to-hub", "team/sparse", "--private")) == 0
    assert main(["push", "out", "team/again", "--message", "the first"]) == 0
    first, again = hub.uploads
    assert (first["repo_id"], again["repo_id"], again["commit_message"]) == ("team/sparse", "team/again", "the first")
    assert first["folder_path"] == again["folder_path"] == Path("out")
    assert "layers/*" in first["ignore_patterns"], "statistics stay here"
    assert "*.safetensors" in first["delete_patterns"], "weights of an earlier upload are gone"
    assert main(["push", "out", "team/refused"]) == 2


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [("a/b/c", [], "a/b/c"), ("team/dense", [], "did not write"), ("team/public", ["--private"], "is public")],
)
def test_what_cannot_be_pushed_is_refused_before_the_run(
    hub: type[Hub], cheap: Refused, repo: str, options: list[str], message: str
) -> None:
    assert message in cheap("--push-to-hub", repo, *options)
    assert not Path("out").exists()


def test_what_is_no_output(hub: type[Hub], cheap: Refused) -> None:
    assert "has no report.json" in cheap(arguments=["push", "model", "x"])
    assert "--private is for --push-to-hub" in cheap("--private")
