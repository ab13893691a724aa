"""Killed at any moment: under the output's name there is nothing, or the whole."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import MESSAGES, finish, start
from tiny import make_llama, save_model, save_text, weight_files
from transformers import AutoModelForCausalLM

from optima import load_report

MOMENTS = 20
BLOCKS = 4


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"), make_llama(num_hidden_layers=BLOCKS))
    save_text(Path("text.txt"))
    Path(MESSAGES).touch()
    return tmp_path


def check_whole(out: Path, reference: dict[str, bytes]) -> None:
    assert weight_files(out) == reference
    assert load_report(out).linears
    assert {"config.json", "recipe.yaml", "report.md", "tokenizer.json"} <= set(os.listdir(out))


def moments(seed: int) -> tuple[dict[str, bytes], list[float]]:
    """The weights of an undisturbed run, and moments from its start to a little after its end."""
    started = time.perf_counter()
    assert finish(start("whole")) == 0
    seconds = time.perf_counter() - started
    draw = random.Random(seed)
    return weight_files(Path("whole")), [draw.uniform(0, 1.1 * seconds) for _ in range(MOMENTS)]


SIGNALS = [signal.SIGKILL, signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_nothing_or_the_whole(root: Path, number: signal.Signals) -> None:
    reference, delays = moments(int(number))
    codes = set()
    for run, delay in enumerate(delays):
        out = root / f"out{run}"
        child = start(out.name)
        time.sleep(delay)
        os.kill(child, number)
        code = finish(child)
        codes.add(code)
        if out.exists():
            check_whole(out, reference)
        else:
            assert code != 0
    # Too early for a handler, in the run, after its end.
    assert codes <= {0, -number, 128 + number}
    AutoModelForCausalLM.from_pretrained("whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_earlier_output_is_there_until_the_new_one_is(root: Path, number: signal.Signals) -> None:
    reference, delays = moments(int(number))
    assert finish(start("out", "--sparsity", "0.7")) == 0
    out = root / "out"
    earlier = weight_files(out)
    assert earlier != reference
    for delay in delays[: MOMENTS // 2]:
        # Every run but the first also deletes what the one before it left.
        child = start("out", "--overwrite", "--no-resume")
        time.sleep(delay)
        os.kill(child, number)
        finish(child)
        check_whole(out, reference if weight_files(out) == reference else earlier)
    assert finish(start("out", "--overwrite", "--no-resume")) == 0
    check_whole(out, reference)
    assert not list(root.glob(".*"))


def test_a_term_before_the_first_block_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in(monkeypatch, "optima.plan.open_weights")
    before = set(os.listdir(root))
    assert finish(start("a/out")) == 128 + signal.SIGTERM
    assert set(os.listdir(root)) == before


def test_a_term_after_it_leaves_a_named_partial_that_the_next_run_deletes_if_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir(root))
    with monkeypatch.context() as patch:
        stop_in(patch, "optima.models.save.Writer.publish")
        assert finish(start("out")) == 128 + signal.SIGTERM
    assert set(os.listdir(root)) == {*before, ".out.optima-partial"}
    assert len(Path(".out.optima-partial/journal.jsonl").read_text().splitlines()) == 1 + BLOCKS
    assert finish(start("out")) == 2
    assert finish(start("out", "--no-resume")) == 0
    assert set(os.listdir(root)) == {*before, "out"}
    assert any("an unfinished run" in note for note in load_report(root / "out").run.notes)


def stop_in(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def stop(*args: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    replacement: Callable[..., None] = stop
    monkeypatch.setattr(target, replacement)
