"""Benchmark scripts run on tiny shapes: the tests check that they print their tables, not what they measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import run_script
from safetensors.torch import save_file
from tiny import LINES, make_bert, make_llama, make_tokenizer, save_model, save_text

from optima import Recipe, prune

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEW = "--num-calibration-samples 8 --max-seq-length 16"
WINDOWS = "--window 16 --max-windows 2"
SINGLE = ("dump.py", "seeds.py", "larger_than_memory.py")  # have no --threads


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts and linears that the scripts read."""
    root = tmp_path_factory.mktemp("benchmarks")
    save_text(root / "text.txt")
    sentences = [json.dumps({"text": f"{line}. Another sentence of it."}) for line in LINES * 8]
    (root / "sentences.jsonl").write_text("\n".join(sentences))
    for name, model in (("model", make_llama()), ("encoder", make_bert())):
        save_model(root / name, model)
        make_tokenizer(bos_token="<s>", pad_token="<s>").save_pretrained(root / name)
    recipe = Recipe(selector="wanda", solver="none", objective="sink", num_calibration_samples=8, max_seq_length=16)
    tokens_NL = torch.randint(4, 200, (8, 16), generator=torch.Generator().manual_seed(0))
    prune(str(root / "model"), recipe, output_dir=root / "pruned", calibration=tokens_NL, progress=False)
    inputs_TD = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))
    linear = {"hessian": inputs_TD.T @ inputs_TD / 256, "weight": inputs_TD[:24].bfloat16()}
    (root / "linears").mkdir()
    save_file(linear, root / "linears" / "block.0.linear.safetensors")
    return root


@pytest.fixture(autouse=True)
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def run(script: str, arguments: str) -> str:
    threads = [] if script in SINGLE else ["--threads", "1"]
    finished = run_script(BENCHMARKS / script, *arguments.split(), *threads)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("certificate.py", "--rows 1600 --batch 50 --dump-dir linears --real-rows 8", "PASS"),
        ("gpu.py", "--device cpu --scale tiny", "NOT RUN"),
        ("qp.py", "--dump-dir linears --synthetic 64 --rows 24 --repeats 1", "Cholesky, float64"),
        ("quantise.py", "pruned --evaluation text.txt --max-seq-length 16 --max-windows 2 --group 16", "100%"),
    ],
)
def test_quick_scripts(script: str, arguments: str, expected: str) -> None:
    assert expected in run(script, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("encoder.py", f"encoder --text sentences.jsonl --patterns 0.5 {FEW} --sentences 8", "0.5"),
        (
            "end_to_end.py", f"model --calibration text.txt --evaluation text.txt --sizes 2x16 --repeats 1 {WINDOWS}",
            "| 2 x 16 |",
        ),
        ("larger_than_memory.py", "--gigabytes 0.002 --width 128 --solver none", "0 different"),
    ],
)  # fmt: skip
def test_slow_scripts(script: str, arguments: str, expected: str) -> None:
    assert expected in run(script, arguments)


@pytest.mark.slow
def test_dump_and_quantise_with_its_hessians() -> None:
    run("dump.py", f"model --dataset text.txt --dump-dir dumped {FEW}")
    size = "--max-seq-length 16 --max-windows 2 --group 16"
    printed = run("quantise.py", f"pruned --evaluation text.txt {size} --dump-dir dumped").splitlines()
    assert sum(line.startswith("| pruned") and "100%" in line for line in printed) == 5  # all but int4 with an offset


@pytest.mark.slow
def test_accuracy_resumes_and_seeds_reads_its_results() -> None:
    command = f"model --calibration text.txt --evaluation text.txt {FEW} {WINDOWS} --patterns 0.5 2:4"
    run("accuracy.py", f"{command} --methods wanda+solve --output results.json")
    before = json.loads(Path("results.json").read_text())
    run("accuracy.py", f"{command} --methods wanda wanda+solve --output results.json --resume")
    after = json.loads(Path("results.json").read_text())
    assert after[: len(before)] == before
    assert [(one["method"], one["pattern"]) for one in after[len(before) :]] == [("wanda", "0.5"), ("wanda", "2:4")]
    assert "wanda+solve" in run("seeds.py", "results.json --baseline wanda")
