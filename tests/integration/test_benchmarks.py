"""Benchmark scripts run, all but convergence.py, on tiny shapes: the tests check what they print, not their timing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dump import Dumping
from runs import run_script
from safetensors.torch import save_file
from tiny import LINES, make_bert, make_tokenizer, save_model, save_text

from optima import Recipe, prune
from optima.selectors.base import make_selector

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEW = "--num-calibration-samples 8 --max-seq-length 16"
WINDOWS = "--window 16 --max-windows 2"
ACCURACY = f"model --calibration text.txt --evaluation text.txt {FEW} {WINDOWS} --patterns 0.5 2:4"
SINGLE = ("seeds.py", "larger_than_memory.py")  # have no --threads


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts and linears that the scripts read."""
    root = tmp_path_factory.mktemp("benchmarks")
    text = save_text(root / "text.txt").read_text()
    (root / "documents.jsonl").write_text((json.dumps({"text": text}) + "\n") * 5)  # of which scripts hold one out
    sentences = [json.dumps({"text": f"{line}. Another sentence of it."}) for line in LINES * 8]
    (root / "sentences.jsonl").write_text("\n".join(sentences))
    save_model(root / "model")
    make_tokenizer(bos_token="<s>").save_pretrained(root / "model")  # lm-eval needs the name of one
    save_model(root / "encoder", make_bert())
    make_tokenizer(pad_token="<s>").save_pretrained(root / "encoder")
    selector = Dumping(root / "layers", inner=make_selector("wanda"))
    recipe = Recipe(
        selector=selector, solver="none", dataset=[str(root / "text.txt")], num_calibration_samples=8, max_seq_length=16
    )
    prune(str(root / "model"), recipe, output_dir=root / "pruned", progress=False)
    generator = torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(256, 48, generator=generator)
    linear = {"hessian": inputs_TD.T @ inputs_TD / 256, "weight": torch.randn(24, 48, generator=generator).bfloat16()}
    (root / "linears").mkdir()
    save_file(linear, root / "linears" / "block.0.linear.safetensors")
    return root


@pytest.fixture(autouse=True)
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def run(script: str, arguments: str) -> str:
    """What a script prints."""
    threads = [] if script in SINGLE else ["--threads", "1"]
    finished = run_script(BENCHMARKS / script, *arguments.split(), *threads)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def rows_of(printed: str) -> list[list[str]]:
    """The cells of Markdown tables."""
    lines = [line.strip("| ") for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("certificate.py", "--rows 1600 --batch 50 --dump-dir linears --real-rows 8", "PASS  the certificate held on"),
        ("gpu.py", "--device cpu --scale tiny", "NOT RUN  32 blocks under 15 minutes"),
        ("scaling.py", "clusters", "| 70B"),
    ],
)
def test_quick_scripts(script: str, arguments: str, expected: str) -> None:
    assert expected in run(script, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (
            "end_to_end.py", f"model --calibration text.txt --evaluation text.txt --sizes 2x16 --repeats 1 {WINDOWS}",
            "| 2 x 16 | OPTIMA, default |",
        ),
        (
            "distil.py", "model --calibration documents.jsonl --evaluation text.txt --num-calibration-samples 4 "
            f"--max-seq-length 16 {WINDOWS} --epochs 1 --learning-rates 0.003", "| distilled, 1 epochs, rate 0.003",
        ),
        (
            "tuning.py", f"model --calibration documents.jsonl {FEW} --other-samples 4 --blocks 0 1 --dtype float32",
            "| 1 ",
        ),
        (
            "dense_targets.py",
            f"model pruned --calibration text.txt --evaluation text.txt --blocks 1 {FEW} --max-windows 2", "down_proj",
        ),
        ("scaling.py", "measure --samples 2 --scale 0.125", ", MB |"),
        ("stages.py", f"model --calibration text.txt {FEW} --dtype float32", "solve"),
        ("encoder.py", f"encoder --text sentences.jsonl --patterns 0.5 {FEW} --sentences 8", "0.5"),
        (
            "larger_than_memory.py", "--gigabytes 0.002 --width 128 --solver none", "12 files compared, 0 different",
        ),
    ],
)  # fmt: skip
def test_slow_scripts(script: str, arguments: str, expected: str) -> None:
    assert expected in run(script, arguments)


def test_qp(tmp_path: Path) -> None:
    output, markdown = tmp_path / "qp.json", tmp_path / "qp.md"
    few = "--rows 24 --repeats 1"
    run("qp.py", f"--dump-dir linears --synthetic 80 {few} --peers diagonal cholesky --output {output}")
    entries = json.loads(output.read_text())["entries"]
    assert {entry["case"] for entry in entries} == {"block.0.linear", "synthetic-80"}
    for entry in entries:
        if entry["target"] is not None:
            assert entry["gap_true"] <= 1.5 * entry["target"], entry
        if entry["gap_certified"] is not None:
            assert entry["gap_certified"] <= entry["target"], entry
    run("qp.py", f"--synthetic 64 {few} --peers cholesky --output {markdown}")
    assert "| Cholesky float32 |" in markdown.read_text()


@pytest.mark.slow
def test_accuracy_resumes_from_its_output_and_from_others(tmp_path: Path) -> None:
    output, other = tmp_path / "accuracy.json", tmp_path / "other.json"
    run("accuracy.py", f"{ACCURACY} --methods wanda+solve --output {output}")
    run("accuracy.py", f"{ACCURACY} --methods optima+solve --output {other}")
    before = json.loads(output.read_text()) + json.loads(other.read_text())
    run("accuracy.py", f"{ACCURACY} --methods wanda wanda+solve optima+solve --output {output} --resume {other}")
    results = json.loads(output.read_text())
    assert all(result["made_with"] in [each["made_with"] for each in results] for result in before)
    made = [(result["method"], result["pattern"]) for result in results if result not in before]
    assert made == [("wanda", "0.5"), ("wanda", "2:4")]
    errors = {(result["method"], result["pattern"]): result.get("error") for result in results}
    for pattern in ("0.5", "2:4"):
        assert errors["wanda", pattern] > errors["wanda+solve", pattern] > errors["optima+solve", pattern]


def test_seeds(tmp_path: Path) -> None:
    """Means and spreads over seeds, and ratios to the baseline with the same seeds; settings are not mixed."""

    def result(method: str, seed: int, found: float, other: float, **settings: object) -> dict[str, object]:
        settings = {"model": "m", "calibration": [64, 512], "seed": seed} | settings
        figures = {"perplexity": found, "perplexity_held_out": other}
        return {"method": method, "pattern": "0.5", "settings": settings} | figures

    first, second = tmp_path / "a.json", tmp_path / "b.json"
    ours = [result("best", 0, 10, 20), result("best", 1, 12, 20), result("best", 0, 8, 9, damping=0.1)]
    first.write_text(json.dumps([*ours, result("alps", 0, 20, 40)]))
    scopes = [result("wanda", 0, 30, 50, scope="row"), result("wanda", 0, 31, 51, scope="layer")]
    draws = [result("sparsegpt", seed, 70, 80, calibration_hash=str(seed)) for seed in (0, 1)]
    second.write_text(json.dumps(scopes + draws))
    cells = rows_of(run("seeds.py", f"{first} {second}"))
    for method, settings, found in (
        ("best", "", "11.0 ± 1.4 / 20.0 ± 0.0 (0.50 / 0.50)"),
        ("best", "damping 0.1", "8.0 / 9.0 (0.40 / 0.23)"),
        ("alps", "", "20.0 / 40.0"),
        ("wanda", "scope row", "30.0 / 50.0 (1.50 / 1.25)"),
        ("wanda", "scope layer", "31.0 / 51.0 (1.55 / 1.27)"),
        ("sparsegpt", "", "70.0 ± 0.0 / 80.0 ± 0.0 (3.50 / 2.00)"),
    ):
        assert ["m", "64 x 512", method, settings, found] in cells


def test_quantise_keeps_zeros_on_symmetric_grids() -> None:
    size = "--max-seq-length 16 --max-windows 2 --group 16"
    rows = rows_of(run("quantise.py", f"pruned --evaluation text.txt {size} --dump-dir layers"))
    kept = {weights: zeros for _, weights, _, zeros in rows if "int" in weights}
    assert int(kept.pop("int4 with an offset, for 16").removesuffix("%")) < 50
    ways = ["int8, a scale a row", "int4, a scale for 16 inputs", "int4, compensated", "int4, and descended"]
    assert kept == dict.fromkeys(ways, "100%")
