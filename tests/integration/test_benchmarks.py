"""Benchmark scripts run, all but convergence.py, on tiny shapes: their working is tested, and never their timing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from dump import Dumping
from runs import on_call, raising, run_script
from safetensors.torch import save_file
from tiny import LINES, make_bert, make_tokenizer, save_model, save_text

from optima import Recipe, prune
from optima.core.hessian import Hessian
from optima.models.save import Writer
from optima.selectors.base import make_selector

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FULL_SIZE_ONLY = "NOT RUN"


def run(script: str, *arguments: str) -> str:
    return read(script, "--threads", "1", *arguments)


def read(script: str, *arguments: str) -> str:
    """What a script prints; one that computes is given its threads by ``run``."""
    finished = run_script(BENCHMARKS / script, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


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


def test_qp_compares_methods_on_dumped_and_synthetic_layers(dump: Path, tmp_path: Path) -> None:
    output = tmp_path / "qp.json"
    arguments = ["--dump-dir", str(dump), "--synthetic", "80", "--rows", "24", "--repeats", "1"]
    run("qp.py", *arguments, "--peers", "diagonal", "cholesky", "--output", str(output))
    entries = json.loads(output.read_text())["entries"]
    assert {entry["case"] for entry in entries} == {"block.0.linear", "synthetic-80"}
    for entry in entries:
        if entry["target"] is not None:
            assert entry["gap_true"] <= 1.5 * entry["target"], entry
        if entry["gap_certified"] is not None:
            assert entry["gap_certified"] <= entry["target"], entry


def test_qp_writes_markdown(tmp_path: Path) -> None:
    output = tmp_path / "qp.md"
    run("qp.py", "--synthetic", "64", "--rows", "16", "--repeats", "1", "--peers", "cholesky", "--output", str(output))
    assert "| Cholesky float32 |" in output.read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mpax") is None, reason="needs the bench extra")
def test_qp_runs_mpax_to_the_true_gap(tmp_path: Path) -> None:
    output = tmp_path / "qp.json"
    arguments = ["--synthetic", "64", "--rows", "16", "--mpax-rows", "8", "--repeats", "1", "--peers", "mpax"]
    run("qp.py", *arguments, "--output", str(output))
    entries = {entry["method"]: entry for entry in json.loads(output.read_text())["entries"]}
    for form in ("dense", "repaired"):
        assert entries[f"MPAX {form}, true gap 1e-4"]["gap_true"] <= 1e-4


def test_certificate_holds_on_generated_and_dumped_rows(dump: Path) -> None:
    arguments = ["--rows", "1600", "--batch", "50", "--dump-dir", str(dump), "--real-rows", "8"]
    assert "PASS  the certificate held on" in run("certificate.py", *arguments)


def test_gpu_script_runs_a_tiny_block_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    printed = run("gpu.py", "--device", "cpu", "--scale", "tiny", "--output", str(output))
    record = json.loads(output.read_text())
    assert [line["name"] for line in record["linears"]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert all(line["peak_bytes"] > 0 and line["open_rows"] == 0 for line in record["linears"])
    assert f"{FULL_SIZE_ONLY}  32 blocks under 15 minutes" in printed


@pytest.fixture
def accuracy(tmp_path: Path) -> list[str]:
    """Arguments of accuracy.py with a tiny model, and two patterns."""
    text = str(save_text(tmp_path / "text.txt"))
    size = ["--num-calibration-samples", "4", "--max-seq-length", "16", "--window", "16", "--max-windows", "2"]
    model = save_model(tmp_path / "model")
    make_tokenizer(bos_token="<s>").save_pretrained(model)  # lm-eval needs the name of one
    return [str(model), "--calibration", text, "--evaluation", text, *size, "--patterns", "0.5", "2:4"]


@pytest.mark.slow
def test_accuracy_goes_on_from_its_output_and_from_others(accuracy: list[str], tmp_path: Path) -> None:
    output, other = tmp_path / "accuracy.json", tmp_path / "other.json"
    run("accuracy.py", *accuracy, "--methods", "wanda+solve", "--output", str(output))
    run("accuracy.py", *accuracy, "--methods", "optima+solve", "--output", str(other))
    first, second = json.loads(output.read_text()), json.loads(other.read_text())
    methods = ["wanda", "wanda+solve", "optima+solve"]
    resumed = ["--output", str(output), "--resume", str(other)]
    printed = run("accuracy.py", *accuracy, "--methods", *methods, *resumed)
    results = json.loads(output.read_text())
    kept = [result["made_with"] for result in results]
    assert all(result["made_with"] in kept for result in first + second)
    made = [result for result in results if result not in first + second]
    assert [(result["method"], result["pattern"]) for result in made] == [("wanda", "0.5"), ("wanda", "2:4")]
    errors = {(result["method"], result["pattern"]): result.get("error") for result in results}
    for pattern in ("0.5", "2:4"):
        assert errors["wanda", pattern] > errors["wanda+solve", pattern] > errors["optima+solve", pattern]
    assert sum(line.startswith("| wanda |") for line in printed.splitlines()) == 2  # perplexity and seconds
    other_settings = run("accuracy.py", *accuracy, "--methods", "wanda", *resumed, "--seed", "1")
    assert len(json.loads(output.read_text())) == len(results) + 2, other_settings


@pytest.mark.slow
def test_accuracy_goes_on_from_a_block(accuracy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*accuracy[:-1], "--methods", "optima+loss+tune", "--own-samples", "2"]
    once, again, keep = (tmp_path / name for name in ("once.json", "again.json", "keep"))
    run("accuracy.py", *asked, "--output", str(once))
    goes_on = ["--output", str(again), "--resume", "--keep", str(keep)]
    with monkeypatch.context() as context:
        killed = on_call(2, Writer.commit, lambda: os.kill(os.getpid(), signal.SIGKILL))
        context.setattr(Writer, "commit", killed)
        assert run_script(BENCHMARKS / "accuracy.py", *asked, *goes_on).returncode == -signal.SIGKILL
    monkeypatch.setattr("optima.data.generate.generate_tokens", raising(AssertionError("it is written again")))
    run("accuracy.py", *asked, *goes_on)
    found, expected = (json.loads(file.read_text())[-1] for file in (again, once))
    assert any("resumed after" in note for note in found["notes"])
    same = ("perplexity", "error", "settings")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert [path.suffix for path in keep.iterdir()] == [".safetensors"]


def test_seeds_gives_means_spreads_and_ratios_of_the_seeds_of_both(tmp_path: Path) -> None:
    def result(method: str, seed: int, found: float, other: float, **settings: object) -> dict[str, object]:
        settings = {"model": "m", "calibration": [64, 512], "seed": seed} | settings
        found_on = {"perplexity": found, "perplexity_held_out": other}
        return {"method": method, "pattern": "0.5", "settings": settings} | found_on

    dense = {"method": "dense", "pattern": "-", "perplexity": 5, "perplexity_held_out": 6, "settings": {"model": "m"}}
    ours = [result("best", 0, 10, 20), result("best", 1, 12, 20)]
    (tmp_path / "a.json").write_text(json.dumps([dense, *ours, result("alps", 0, 20, 40)]))
    others = [result("wanda", 0, 30, 50, scope="row"), result("wanda", 0, 31, 51, scope="layer")]
    others += [result("ria", 0, 40, 60, scope="row"), result("ria", 1, 41, 61, scope="layer")]  # no two seeds of one
    others += [result("sparsegpt", seed, 70, 80, calibration_hash=str(seed)) for seed in (0, 1)]
    own = result("best", 0, 9, 19, calibration=[128, 512], own_samples=64, calibration_hash="own")
    others += [own, result("gradient", 0, 9, 19, evaluation_hash="another text")]
    others += [result("ours", 0, 10, 10, tempered_rows=True), result("alps", 0, 40, 40, tempered_rows=True)]
    others += [result("ours", 1, 30, 30, damping=0.1, tempered_rows=True)]
    again = [result("best", 0, 99, 99), result("best", 0, 8, 9, damping=0.1)]
    (tmp_path / "b.json").write_text(json.dumps([*again, *others]))
    printed = read("seeds.py", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in printed.splitlines()]
    assert ["m", "64 x 512", "best", "", "11.0 ± 1.4 / 20.0 ± 0.0 (0.50 / 0.50)"] in cells
    assert ["m", "64 x 512", "best", "damping 0.1", "8.0 / 9.0 (0.40 / 0.23)"] in cells
    assert ["m", "64 x 512", "alps", "", "20.0 / 40.0"] in cells
    for scope, found in (("row", "30.0 / 50.0 (1.50 / 1.25)"), ("layer", "31.0 / 51.0 (1.55 / 1.27)")):
        assert ["m", "64 x 512", "wanda", f"scope {scope}", found] in cells
    for scope, found in (("row", "40.0 / 60.0 (2.00 / 1.50)"), ("layer", "41.0 / 61.0")):
        assert ["m", "64 x 512", "ria", f"scope {scope}", found] in cells
    assert ["m", "64 x 512", "sparsegpt", "", "70.0 ± 0.0 / 80.0 ± 0.0 (3.50 / 2.00)"] in cells
    assert ["m", "64 x 512", "best", "own_samples 64", "9.0 / 19.0 (0.45 / 0.47)"] in cells
    assert ["m", "64 x 512", "gradient", "", "9.0 / 19.0"] in cells  # alps was measured on other text
    assert ["m", "64 x 512", "ours", "tempered_rows True", "10.0 / 10.0 (0.25 / 0.25)"] in cells
    assert any(row[0] == "m" and row[-1] == "5.0 / 6.0" for row in cells)
    both = read("seeds.py", str(tmp_path / "b.json"), "--ignore", "tempered_rows", "damping", "--baseline", "ours")
    assert re.search(r"\| ours +\| +\| +20.0 ± 14.1 / 20.0 ± 14.1 \|", both)


def test_seeds_prints_results_of_settings_that_are_no_longer_the_default() -> None:
    file = BENCHMARKS / "results" / "gemma-3-270m.json"
    published = [result for result in json.loads(file.read_text()) if "+" not in result["method"]]
    found = set(re.findall(r"[\d,]+\.\d", read("seeds.py", str(file))))
    assert {f"{result['perplexity']:,.1f}" for result in published} <= found


@pytest.mark.slow
def test_end_to_end_runs_from_checkpoint_to_checkpoint(accuracy: list[str]) -> None:
    model, *rest = accuracy
    texts = rest[rest.index("--calibration") : rest.index("--calibration") + 4]
    sizes = ["--sizes", "2x16", "--repeats", "1", "--window", "16", "--max-windows", "2"]
    printed = run("end_to_end.py", model, *texts, *sizes)
    assert "| 2 x 16 | OPTIMA, fast |" in printed
    assert "| 2 x 16 | OPTIMA, default |" in printed


@pytest.mark.parametrize(("method", "message"), [("alps+unsolved", "+loss+unsolved")])
def test_steps_that_do_not_go_together(method: str, message: str) -> None:
    arguments = ["model", "--calibration", "text", "--evaluation", "text", "--methods", method]
    found = run_script(BENCHMARKS / "accuracy.py", *arguments)
    assert found.returncode == 2
    assert message in found.stderr


def test_what_cannot_be_held_out_is_refused(accuracy: list[str], tmp_path: Path) -> None:
    for share, text, message in (
        ("1.5", accuracy[2], "share above 0 and below 1, not 1.5"),
        ("0.2", str(accuracy[2]), "1 documents cannot be split"),
        ("0.2", "allenai/c4", "allenai/c4 is read to its end"),
    ):
        arguments = [accuracy[0], "--calibration", text, "--held-out", share, *accuracy[3:]]
        found = run_script(BENCHMARKS / "accuracy.py", *arguments, "--threads", "1")
        assert found.returncode == 2
        assert message in found.stderr


def test_distil_compares_treatments_of_one_mask(accuracy: list[str], tmp_path: Path) -> None:
    arguments = accuracy[: accuracy.index("--patterns")]
    lines = [json.dumps({"text": Path(arguments[2]).read_text()})] * 5  # the last is held out
    arguments[2] = str(tmp_path / "documents.jsonl")
    Path(arguments[2]).write_text("\n".join(lines))
    printed = run("distil.py", *arguments, "--epochs", "1", "--learning-rates", "0.003")
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "dense",
        "mask found, solved",
        "solved and tuned by blocks, 1 epochs, rate 0.003",
        "distilled, 1 epochs, rate 0.003",
    ]


@pytest.mark.slow
def test_tuning_tells_of_each_block_that_was_asked_for(accuracy: list[str], tmp_path: Path) -> None:
    model, text = accuracy[0], tmp_path / "documents.jsonl"
    text.write_text("\n".join([json.dumps({"text": Path(accuracy[2]).read_text()})] * 5))
    size = ["--num-calibration-samples", "8", "--other-samples", "4", "--max-seq-length", "16"]
    printed = run("tuning.py", model, "--calibration", str(text), *size, "--blocks", "0", "1", "--dtype", "float32")
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert [row[1].strip() for row in rows] == ["0", "1"]
    for _, _, dense, *_, tuned, _ in rows:
        assert float(dense.split("/")[0]) < 1.0
        assert float(tuned.split("/")[0]) < 1.0
    assert float(rows[0][2].split("/")[0]) == 0.0  # nothing is pruned before the first block
    with pytest.raises(AssertionError, match="--blocks 9"):
        run("tuning.py", model, "--calibration", str(text), *size, "--blocks", "0", "9")


def test_accuracy_does_not_overwrite_results(accuracy: list[str], tmp_path: Path) -> None:
    output = tmp_path / "accuracy.json"
    output.write_text("[]")
    finished = run_script(BENCHMARKS / "accuracy.py", *accuracy, "--output", str(output))
    assert finished.returncode == 2
    assert "--resume" in finished.stderr
    assert output.read_text() == "[]"


def test_accuracy_takes_text_of_the_models_own(accuracy: list[str], tmp_path: Path) -> None:
    output = tmp_path / "accuracy.json"
    run("accuracy.py", *accuracy, "--methods", "wanda", "--own-samples", "3", "--output", str(output))
    dense, *pruned = (result["settings"] for result in json.loads(output.read_text()))
    assert "own_samples" not in dense
    assert [(each["own_samples"], each["calibration"]) for each in pruned] == [(3, [7, 16])] * 2


@pytest.mark.slow
def test_accuracy_asks_tasks(accuracy: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="needs the bench extra", exc_type=ImportError)
    task, output = tmp_path / "piqa.jsonl", tmp_path / "accuracy.json"
    item = {"goal": "Pack the box.", "sol1": "with jugs", "sol2": "with the lazy dog", "label": 1}
    task.write_text("".join(json.dumps(item | {"label": i % 2}) + "\n" for i in range(4)))
    arguments = ["--methods", "magnitude", "--tasks", f"piqa={task}", "--task-limit", "2", "--output", str(output)]
    assert "| piqa: acc / acc_norm, % | 0.5 | 2:4 |" in run("accuracy.py", *accuracy, *arguments)
    for result in json.loads(output.read_text()):
        assert result["tasks"]["piqa"]["items"] == 2
        assert result["tasks"]["piqa"]["acc"] == 0.5  # the same two choices, each the right one once
    before = output.read_text()
    known = run("accuracy.py", *accuracy, "--methods", "wanda", "magnitude", "--resume", str(output), "--known-only")
    assert "| wanda |  |  |" in known
    assert re.search(r"\| magnitude \| *[\d.]+", known), "results with tasks stand for results without"
    assert output.read_text() == before


def test_dense_targets_make_up_for_a_part_of_the_error(tmp_path: Path) -> None:
    dense, pruned = save_model(tmp_path / "dense"), tmp_path / "pruned"
    text = str(save_text(tmp_path / "text.txt"))
    size = ["--num-calibration-samples", "8", "--max-seq-length", "16"]
    recipe = Recipe(dataset=[text], num_calibration_samples=8, max_seq_length=16, objective="plain")
    prune(str(dense), recipe, output_dir=pruned, progress=False)
    arguments = [str(dense), str(pruned), "--calibration", text, "--evaluation", text, "--blocks", "1"]
    printed = run("dense_targets.py", *arguments, *size, "--max-windows", "2")
    rows = [line.split("|") for line in printed.splitlines() if "_proj" in line]
    assert len(rows) == 7 * 2 * 2  # linears, amounts of text, dampings
    for _, _, _, _, error, _, best, whole, _ in rows:
        assert float(error) > 0
        assert float(whole) <= float(best) <= 1


def test_quantise_counts_zeros_and_measures(tmp_path: Path) -> None:
    dense, text, model = save_model(tmp_path / "dense"), save_text(tmp_path / "text.txt"), tmp_path / "model"
    dumping = Dumping(tmp_path / "layers", inner=make_selector("wanda"))
    recipe = Recipe(selector=dumping, solver="none", dataset=[str(text)], num_calibration_samples=8, max_seq_length=16)
    prune(str(dense), recipe, output_dir=model, progress=False)
    size = ["--max-seq-length", "16", "--max-windows", "2", "--group", "16"]
    output = run("quantise.py", str(model), "--evaluation", str(text), *size, "--dump-dir", str(tmp_path / "layers"))
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| ")][1:]
    kept = {weights.strip(): zeros.strip() for _, _, weights, _, zeros, _ in rows if "int" in weights}
    assert int(kept.pop("int4 with an offset, for 16").removesuffix("%")) < 50
    ways = ["int8, a scale a row", "int4, a scale for 16 inputs", "int4, compensated", "int4, and descended"]
    assert kept == dict.fromkeys(ways, "100%")


def test_rounding_by_the_hessian_holds_zeros_and_lowers_the_error() -> None:
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
    swept_OD = compensated(weight_OD, scale_OD, 4, hessian)
    found_OD = descended(weight_OD, swept_OD, scale_OD, 4, hessian)
    assert error(descended(weight_OD, plain_OD, scale_OD, 4, hessian)) < 0.8 * error(plain_OD)
    assert error(found_OD) < error(swept_OD) < error(plain_OD)
    for rounded_OD in (plain_OD, swept_OD, found_OD):
        assert not rounded_OD[weight_OD == 0].any()
        steps_OD = rounded_OD / scale_OD
        assert float((steps_OD - steps_OD.round()).abs().max()) < 1e-4
        assert float(steps_OD.abs().max()) < 7.5
    independent = Hessian(torch.diag(torch.rand(192, generator=generator) + 0.1))
    assert torch.equal(descended(weight_OD, plain_OD, scale_OD, 4, independent), plain_OD)
    assert torch.equal(compensated(weight_OD, scale_OD, 4, independent), plain_OD)


def test_scaling_carries_its_account_to_clusters() -> None:
    rows = [line.split(" | ") for line in run("scaling.py", "clusters").splitlines() if line.startswith("| 70B")]
    hours = [float(row[-2]) for row in rows]
    assert hours[0] > hours[1] > hours[2] > 0
    assert hours[3] > hours[4] > hours[5] > 0


@pytest.mark.slow
def test_scaling_compares_its_account_with_a_run() -> None:
    printed = run("scaling.py", "measure", "--samples", "8", "--scale", "0.25")
    moved = [line.split("|") for line in printed.splitlines() if ", MB |" in line]
    assert len(moved) == 2
    for _, _, _, predicted, measured, _, _ in moved:
        assert float(predicted) == pytest.approx(float(measured), rel=0.35, abs=0.02)


@pytest.mark.slow
def test_the_stages_of_a_run(tmp_path: Path) -> None:
    model, text = str(save_model(tmp_path / "model")), str(save_text(tmp_path / "text.txt"))
    size = ["--num-calibration-samples", "8", "--max-seq-length", "16"]
    printed = run("stages.py", model, "--calibration", text, *size, "--dtype", "float32")
    assert {"forward", "hessian", "solve"} <= {
        word for line in printed.splitlines() for word in re.findall(r"\w+", line)
    }


@pytest.mark.slow
def test_sentences_of_an_encoder(tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "bert", make_bert()), tmp_path / "text.jsonl"
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(model)
    text.write_text("\n".join(json.dumps({"text": f"{line}. Another sentence of it."}) for line in LINES * 8))
    size = ["--num-calibration-samples", "8", "--max-seq-length", "16", "--sentences", "8"]
    printed = run("encoder.py", str(model), "--text", str(text), "--patterns", "0.5", *size)
    assert "0.5" in printed


@pytest.mark.slow
def test_a_model_larger_than_the_memory() -> None:
    printed = read("larger_than_memory.py", "--gigabytes", "0.002", "--width", "128", "--solver", "none")
    assert "13 files compared, 0 different" in printed
