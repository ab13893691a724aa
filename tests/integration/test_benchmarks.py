"""Benchmark scripts run, all but convergence.py, on tiny shapes: the tests check what they print, not their timing."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from dump import Dumping
from runs import run_script
from safetensors.torch import save_file
from tiny import LINES, make_bert, make_tokenizer, save_model, save_text

from optima import Recipe, prune
from optima.core.hessian import Hessian
from optima.selectors.base import make_selector

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEW = ["--num-calibration-samples", "8", "--max-seq-length", "16"]


def run(script: str, *arguments: str, threads: bool = True) -> str:
    """What a script prints."""
    finished = run_script(BENCHMARKS / script, *["--threads", "1"] * threads, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def rows_of(printed: str, part: str = "| ") -> list[list[str]]:
    """The cells of the rows of Markdown tables that contain ``part``."""
    lines = [line.strip() for line in printed.splitlines() if line.startswith("|") and part in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """A layer as dump.py writes it."""
    generator = torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(256, 48, generator=generator)
    weight_OD = torch.randn(24, 48, generator=generator).bfloat16()
    directory = tmp_path / "layers"
    directory.mkdir()
    save_file({"hessian": inputs_TD.T @ inputs_TD / 256, "weight": weight_OD}, directory / "block.0.linear.safetensors")
    return directory


@pytest.fixture
def accuracy(tmp_path: Path) -> list[str]:
    """Arguments of accuracy.py: a tiny model, and two patterns."""
    text = str(save_text(tmp_path / "text.txt"))
    size = ["--num-calibration-samples", "4", "--max-seq-length", "16", "--window", "16", "--max-windows", "2"]
    model = save_model(tmp_path / "model")
    make_tokenizer(bos_token="<s>").save_pretrained(model)  # lm-eval needs the name of one
    return [str(model), "--calibration", text, "--evaluation", text, *size, "--patterns", "0.5", "2:4"]


@pytest.fixture
def documents(tmp_path: Path) -> str:
    """Five documents, the last of which scripts hold out."""
    file = tmp_path / "documents.jsonl"
    file.write_text((json.dumps({"text": save_text(tmp_path / "one.txt").read_text()}) + "\n") * 5)
    return str(file)


def test_qp(dump: Path, tmp_path: Path) -> None:
    output, markdown = tmp_path / "qp.json", tmp_path / "qp.md"
    few = ["--rows", "24", "--repeats", "1"]
    cases = ["--dump-dir", str(dump), "--synthetic", "80", *few, "--peers", "diagonal", "cholesky"]
    run("qp.py", *cases, "--output", str(output))
    entries = json.loads(output.read_text())["entries"]
    assert {entry["case"] for entry in entries} == {"block.0.linear", "synthetic-80"}
    for entry in entries:
        if entry["target"] is not None:
            assert entry["gap_true"] <= 1.5 * entry["target"], entry
        if entry["gap_certified"] is not None:
            assert entry["gap_certified"] <= entry["target"], entry
    run("qp.py", "--synthetic", "64", *few, "--peers", "cholesky", "--output", str(markdown))
    assert "| Cholesky float32 |" in markdown.read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mpax") is None, reason="needs the bench extra")
def test_qp_runs_mpax_to_the_true_gap(tmp_path: Path) -> None:
    output = tmp_path / "qp.json"
    arguments = ["--synthetic", "64", "--rows", "16", "--mpax-rows", "8", "--repeats", "1", "--peers", "mpax"]
    run("qp.py", *arguments, "--output", str(output))
    entries = {entry["method"]: entry for entry in json.loads(output.read_text())["entries"]}
    for form in ("dense", "repaired"):
        assert entries[f"MPAX {form}, true gap 1e-4"]["gap_true"] <= 1e-4


def test_certificate(dump: Path) -> None:
    arguments = ["--rows", "1600", "--batch", "50", "--dump-dir", str(dump), "--real-rows", "8"]
    assert "PASS  the certificate held on" in run("certificate.py", *arguments)


def test_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    printed = run("gpu.py", "--device", "cpu", "--scale", "tiny", "--output", str(output))
    record = json.loads(output.read_text())
    assert [line["name"] for line in record["linears"]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert all(line["peak_bytes"] > 0 and line["open_rows"] == 0 for line in record["linears"])
    assert "NOT RUN  32 blocks under 15 minutes" in printed


@pytest.mark.slow
def test_accuracy_resumes_from_its_output_and_from_others(accuracy: list[str], tmp_path: Path) -> None:
    output, other = tmp_path / "accuracy.json", tmp_path / "other.json"
    run("accuracy.py", *accuracy, "--methods", "wanda+solve", "--output", str(output))
    run("accuracy.py", *accuracy, "--methods", "optima+solve", "--output", str(other))
    first, second = json.loads(output.read_text()), json.loads(other.read_text())
    methods, resumed = ["wanda", "wanda+solve", "optima+solve"], ["--output", str(output), "--resume", str(other)]
    run("accuracy.py", *accuracy, "--methods", *methods, *resumed)
    results = json.loads(output.read_text())
    kept = [result["made_with"] for result in results]
    assert all(result["made_with"] in kept for result in first + second)
    made = [result for result in results if result not in first + second]
    assert [(result["method"], result["pattern"]) for result in made] == [("wanda", "0.5"), ("wanda", "2:4")]
    errors = {(result["method"], result["pattern"]): result.get("error") for result in results}
    for pattern in ("0.5", "2:4"):
        assert errors["wanda", pattern] > errors["wanda+solve", pattern] > errors["optima+solve", pattern]


@pytest.mark.slow
def test_accuracy_of_tasks_and_generated_text(accuracy: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="needs the bench extra", exc_type=ImportError)
    task, output = tmp_path / "piqa.jsonl", tmp_path / "accuracy.json"
    item = {"goal": "Pack the box.", "sol1": "with jugs", "sol2": "with the lazy dog", "label": 1}
    task.write_text("".join(json.dumps(item | {"label": i % 2}) + "\n" for i in range(4)))
    arguments = ["--methods", "magnitude", "--tasks", f"piqa={task}", "--task-limit", "2", "--output", str(output)]
    assert "| piqa: acc / acc_norm, % | 0.5 | 2:4 |" in run("accuracy.py", *accuracy, *arguments, "--own-samples", "3")
    dense, *pruned = json.loads(output.read_text())
    assert "own_samples" not in dense["settings"]
    assert all(result["settings"]["calibration"] == [7, 16] for result in pruned)
    for result in (dense, *pruned):
        assert result["tasks"]["piqa"]["items"] == 2
        assert result["tasks"]["piqa"]["acc"] == 0.5  # the same two choices, each the right one once


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--methods", "alps+unsolved"], "+loss+unsolved"),
        (["--held-out", "1.5"], "1.5"),
        (["--output", "results.json"], "--resume"),
    ],
)
def test_accuracy_refuses(
    accuracy: list[str], options: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.json").write_text("[]")
    found = run_script(BENCHMARKS / "accuracy.py", *accuracy, *options)
    assert found.returncode == 2
    assert named in found.stderr
    assert Path("results.json").read_text() == "[]"


def test_seeds(tmp_path: Path) -> None:
    """Means and spreads over seeds, and ratios to the baseline with the same seeds; settings are not mixed."""

    def result(method: str, seed: int, found: float, other: float, **settings: object) -> dict[str, object]:
        settings = {"model": "m", "calibration": [64, 512], "seed": seed} | settings
        figures = {"perplexity": found, "perplexity_held_out": other}
        return {"method": method, "pattern": "0.5", "settings": settings} | figures

    dense = {"method": "dense", "pattern": "-", "perplexity": 5, "perplexity_held_out": 6, "settings": {"model": "m"}}
    ours = [result("best", 0, 10, 20), result("best", 1, 12, 20), result("best", 0, 8, 9, damping=0.1)]
    (tmp_path / "a.json").write_text(json.dumps([dense, *ours, result("alps", 0, 20, 40)]))
    others = [result("wanda", 0, 30, 50, scope="row"), result("wanda", 0, 31, 51, scope="layer")]
    others += [result("sparsegpt", seed, 70, 80, calibration_hash=str(seed)) for seed in (0, 1)]
    (tmp_path / "b.json").write_text(json.dumps(others))
    cells = rows_of(run("seeds.py", str(tmp_path / "a.json"), str(tmp_path / "b.json"), threads=False))
    for method, settings, found in (
        ("best", "", "11.0 ± 1.4 / 20.0 ± 0.0 (0.50 / 0.50)"),
        ("best", "damping 0.1", "8.0 / 9.0 (0.40 / 0.23)"),
        ("alps", "", "20.0 / 40.0"),
        ("wanda", "scope row", "30.0 / 50.0 (1.50 / 1.25)"),
        ("wanda", "scope layer", "31.0 / 51.0 (1.55 / 1.27)"),
        ("sparsegpt", "", "70.0 ± 0.0 / 80.0 ± 0.0 (3.50 / 2.00)"),
    ):
        assert ["m", "64 x 512", method, settings, found] in cells
    assert any(row[0] == "m" and row[-1] == "5.0 / 6.0" for row in cells)


def test_seeds_prints_the_published_results() -> None:
    file = BENCHMARKS / "results" / "gemma-3-270m.json"
    published = [result for result in json.loads(file.read_text()) if "+" not in result["method"]]
    found = set(re.findall(r"[\d,]+\.\d", run("seeds.py", str(file), threads=False)))
    assert {f"{result['perplexity']:,.1f}" for result in published} <= found


@pytest.mark.slow
def test_end_to_end(accuracy: list[str]) -> None:
    texts = accuracy[1:5]
    sizes = ["--sizes", "2x16", "--repeats", "1", "--window", "16", "--max-windows", "2"]
    printed = run("end_to_end.py", accuracy[0], *texts, *sizes)
    assert "| 2 x 16 | OPTIMA, fast |" in printed
    assert "| 2 x 16 | OPTIMA, default |" in printed


@pytest.mark.slow
def test_distil(accuracy: list[str], documents: str) -> None:
    arguments = [accuracy[0], "--calibration", documents, *accuracy[3 : accuracy.index("--patterns")]]
    printed = run("distil.py", *arguments, "--epochs", "1", "--learning-rates", "0.003")
    assert [row[0] for row in rows_of(printed)][2:] == [
        "dense",
        "mask found, solved",
        "solved and tuned by blocks, 1 epochs, rate 0.003",
        "distilled, 1 epochs, rate 0.003",
    ]


@pytest.mark.slow
def test_tuning(accuracy: list[str], documents: str) -> None:
    arguments = ["--calibration", documents, *FEW, "--other-samples", "4", "--blocks", "0", "1", "--dtype", "float32"]
    rows = rows_of(run("tuning.py", accuracy[0], *arguments))[2:]
    assert [row[0] for row in rows] == ["0", "1"]
    assert float(rows[0][1].split("/")[0]) == 0.0  # nothing is pruned before the first block
    for _, dense, *_, tuned in rows:
        assert float(dense.split("/")[0]) < 1.0
        assert float(tuned.split("/")[0]) < 1.0


@pytest.mark.slow
def test_dense_targets(accuracy: list[str], tmp_path: Path) -> None:
    dense, text, pruned = accuracy[0], accuracy[2], tmp_path / "pruned"
    recipe = Recipe(dataset=[text], num_calibration_samples=8, max_seq_length=16, objective="plain")
    prune(dense, recipe, output_dir=pruned, progress=False)
    arguments = [dense, str(pruned), "--calibration", text, "--evaluation", text, "--blocks", "1"]
    rows = rows_of(run("dense_targets.py", *arguments, *FEW, "--max-windows", "2"), "_proj")
    assert len(rows) == 7 * 2 * 2  # linears, amounts of text, dampings
    for _, _, _, error, _, best, whole in rows:
        assert float(error) > 0
        assert float(whole) <= float(best) <= 1


def test_quantise(accuracy: list[str], tmp_path: Path) -> None:
    model, text = accuracy[0], accuracy[2]
    recipe = Recipe(
        pattern=["2:4"], selector=Dumping(tmp_path / "layers", inner=make_selector("wanda")), objective="sink",
        dataset=[text], num_calibration_samples=8, max_seq_length=16, tuning_epochs=0,
    )  # fmt: skip
    pruned = tmp_path / "pruned"
    prune(model, recipe, output_dir=pruned, progress=False)
    size = ["--max-seq-length", "16", "--max-windows", "2", "--group", "16"]
    output = run("quantise.py", str(pruned), "--evaluation", text, *size, "--dump-dir", str(tmp_path / "layers"))
    kept = {weights: zeros for _, weights, _, zeros in rows_of(output, "int")}
    assert int(kept.pop("int4 with an offset, for 16").removesuffix("%")) < 50
    ways = ["int8, a scale a row", "int4, a scale for 16 inputs", "int4, compensated", "int4, and descended"]
    assert kept == dict.fromkeys(ways, "100%")


def test_rounding_by_the_hessian_keeps_zeros_and_lowers_the_error() -> None:
    from harness.rounding import compensated, descended, nearest, scales

    generator = torch.Generator().manual_seed(0)
    inputs_ND = torch.randn(400, 192, generator=generator) @ torch.randn(192, 192, generator=generator)
    hessian = Hessian(inputs_ND.T @ inputs_ND / 400)
    weight_OD = torch.randn(24, 192, generator=generator) * (torch.rand(24, 192, generator=generator) < 0.5)
    scale_OD = scales(weight_OD, 4, 32)

    def error(rounded_OD: torch.Tensor) -> float:
        change_OD = (rounded_OD - weight_OD).double()
        return float((change_OD @ hessian.damped_DD * change_OD).sum())

    plain_OD = nearest(weight_OD, scale_OD, 4)
    compensated_OD = compensated(weight_OD, scale_OD, 4, hessian)
    descended_OD = descended(weight_OD, compensated_OD, scale_OD, 4, hessian)
    assert error(descended_OD) < error(compensated_OD) < error(plain_OD)
    for rounded_OD in (plain_OD, compensated_OD, descended_OD):
        assert not rounded_OD[weight_OD == 0].any()
        steps_OD = rounded_OD / scale_OD
        assert float((steps_OD - steps_OD.round()).abs().max()) < 1e-4
        assert float(steps_OD.abs().max()) < 7.5


def test_scaling_predicts_clusters() -> None:
    hours = [float(row[-2]) for row in rows_of(run("scaling.py", "clusters"), "| 70B")]
    assert hours[0] > hours[1] > hours[2] > 0
    assert hours[3] > hours[4] > hours[5] > 0


@pytest.mark.slow
def test_scaling_compares_its_prediction_with_a_run() -> None:
    rows = rows_of(run("scaling.py", "measure", "--samples", "8", "--scale", "0.25"), ", MB |")
    assert len(rows) == 2
    for _, _, predicted, measured, _, *_ in rows:
        assert float(predicted) == pytest.approx(float(measured), rel=0.35, abs=0.02)


@pytest.mark.slow
def test_stages(accuracy: list[str]) -> None:
    printed = run("stages.py", *accuracy[:3], *FEW, "--dtype", "float32")
    assert {"forward", "hessian", "solve"} <= set(re.findall(r"\w+", printed))


@pytest.mark.slow
def test_encoder(tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "bert", make_bert()), tmp_path / "text.jsonl"
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(model)
    text.write_text("\n".join(json.dumps({"text": f"{line}. Another sentence of it."}) for line in LINES * 8))
    printed = run("encoder.py", str(model), "--text", str(text), "--patterns", "0.5", *FEW, "--sentences", "8")
    assert "0.5" in printed


@pytest.mark.slow
def test_a_model_larger_than_the_memory() -> None:
    arguments = ["--gigabytes", "0.002", "--width", "128", "--solver", "none"]
    assert "13 files compared, 0 different" in run("larger_than_memory.py", *arguments, threads=False)
