"""Models that live on the hub: the command line against a stand-in hub, each test from an empty cache."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import metadata_load
from standin_hub import COMMIT, Run, StandInHub, command_with, environment_of, serving
from tiny import LINES, make_llama, prune_arguments, save_model, save_text

from optima.reporting.record import load_report

pytestmark = pytest.mark.slow  # each command is a new process

MODEL = "team/model"
WANDA = ("--selector", "wanda", "--solver", "none", "--objective", "plain")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Of a model with its weights in several files, as the hub holds it."""
    directory = save_model(tmp_path_factory.mktemp("hub") / "model")
    make_llama().save_pretrained(directory, max_shard_size="40KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    more = {".gitattributes": b"*.safetensors", "README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"terms"}
    return {path.name: path.read_bytes() for path in directory.iterdir()} | more


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[StandInHub]:
    with serving() as server:
        server.repos[MODEL] = dict(files)
        yield server


@pytest.fixture
def optima(hub: StandInHub, tmp_path: Path) -> Run:
    save_text(tmp_path / "text.txt")
    return command_with(hub, tmp_path)


def test_a_model_is_pruned_again_and_measured(optima: Run, tmp_path: Path) -> None:
    """What a run leaves in the cache is a part of the repository, and enough for the next."""
    for output in ("first", "second"):
        found = optima(*prune_arguments(*WANDA, "--output-dir", output, model=MODEL))
        assert found.returncode == 0, found.stderr
    first = load_report(tmp_path / "first").run
    assert first.model_revision == COMMIT
    assert (tmp_path / "first" / "LICENSE").read_bytes() == b"terms"
    found = optima("eval", MODEL, "second", "--dataset", "text.txt", "--max-seq-length", "16", HF_HUB_OFFLINE="1")
    assert found.returncode == 0, found.stderr


def test_what_is_pruned_behind_another_step_names_its_base(optima: Run, tmp_path: Path) -> None:
    for command, model, output in (("permute", MODEL, "permuted"), ("prune", "permuted", "sparse")):
        _, _, *options = prune_arguments("--pattern", "2:4", "--objective", "plain", "--output-dir", output)
        found = optima(command, model, *options, *(["--selector", "wanda"] if command == "prune" else []))
        assert found.returncode == 0, found.stderr
    assert metadata_load(tmp_path / "sparse" / "README.md")["base_model"] == MODEL


def test_a_node_without_network_has_what_was_fetched(optima: Run, hub: StandInHub, tmp_path: Path) -> None:
    """A cache filled by name lacks the licence: what is not there is not copied."""
    wanted = ["*.json", "*.safetensors"]
    code = f"import huggingface_hub; huggingface_hub.snapshot_download({MODEL!r}, allow_patterns={wanted})"
    subprocess.run([sys.executable, "-c", code], env=environment_of(hub, tmp_path), check=True)
    found = optima(*prune_arguments(*WANDA, model=MODEL), HF_HUB_OFFLINE="1")
    assert found.returncode == 0, found.stderr
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert "of team/model only the files in the cache are used" in found.stderr


def test_the_default_text_is_read_from_the_hub(optima: Run, hub: StandInHub, tmp_path: Path) -> None:
    """allenai/c4 as it lies there: a configuration of compressed records, described by its README."""
    card = {"config_name": "en", "data_files": [{"split": "train", "path": "en/c4-train.*.json.gz"}]}
    records = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in LINES * 30)
    hub.repos["datasets/allenai/c4"] = {
        "README.md": f"---\n{yaml.safe_dump({'configs': [card]})}---\n".encode(),
        "en/c4-train.00000-of-00001.json.gz": gzip.compress(records.encode()),
    }
    size = ("--num-calibration-samples", "4", "--max-seq-length", "16")
    found = optima("prune", MODEL, "--sparsity", "0.5", "--output-dir", "out", *size)
    assert found.returncode == 0, found.stderr
    run = load_report(tmp_path / "out").run
    assert run.dataset_revision == COMMIT
    assert run.num_tokens == 64
