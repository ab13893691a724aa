"""The seam: what ``prune_linear`` returns is true of the tensors it returns, whatever the selector answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from closeness import assert_close_in_norm
from layers import layer_of, make_layer
from torch import Tensor

from optima.core import Auto
from optima.device import Stopwatch
from optima.errors import RecipeError
from optima.linear import Methods, prune_linear
from optima.patterns import NM, Pattern, Unstructured
from optima.selectors.base import LinearTask, Selection
from optima.selectors.scores import Wanda
from optima.selectors.sparsegpt import SparseGPT

HALF = Unstructured(0.5, "row")


@dataclass
class Answers:
    """A foreign selector that answers ``selection`` to everything."""

    selection: Any
    published_scope = "row"

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        return self.selection


def loss(change_OD: Tensor, inputs_TD: Tensor) -> float:
    return float((inputs_TD.double() @ change_OD.double().mT).square().sum())


@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.6, "layer"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("solver", [None, Auto()], ids=["published", "solved"])
@pytest.mark.parametrize("selector", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
def test_the_record_is_true_of_the_written_weights(
    selector: Wanda | SparseGPT, solver: Auto | None, pattern: Pattern
) -> None:
    weight_OD, inputs_TD = make_layer(24, 64, dtype=torch.float32)
    task = layer_of(weight_OD, inputs_TD)
    result = prune_linear(task, pattern, Methods(selector, solver=solver), torch.bfloat16)
    written_OD, record = result.weight_OD, result.record
    assert written_OD.dtype == torch.bfloat16
    assert not written_OD[~result.keep_OD].view(torch.int16).any()  # no negative zero among them
    assert record.sparsity == float((written_OD == 0).double().mean()) == pytest.approx(pattern.sparsity, abs=0.02)
    energy = loss(weight_OD, inputs_TD)
    assert record.error == pytest.approx(loss(written_OD - weight_OD, inputs_TD) / energy, rel=1e-4)
    assert record.error_mask == pytest.approx(
        loss(weight_OD * result.keep_OD - weight_OD, inputs_TD) / energy, rel=1e-4
    )
    assert (record.gap_max is None) == (record.gap_written_max is None) == (solver is None)
    assert torch.equal(task.weight_OD, weight_OD), "the dense weight is the caller's"


def wrong_answers() -> dict[str, Any]:
    keep_OD = torch.arange(64).expand(8, 64) % 2 == 0
    return {
        "nothing": None,
        "keeps everything": Selection(torch.ones(8, 64, dtype=torch.bool)),
        "keeps nothing": Selection(torch.zeros(8, 64, dtype=torch.bool)),
        "one too many": Selection(keep_OD | (torch.arange(64) == 1)),
        "another shape": Selection(keep_OD[:, :32]),
        "no mask": Selection(keep_OD.float()),
        "weights off the mask": Selection(keep_OD, torch.ones(8, 64)),
        "nan off the mask": Selection(keep_OD, torch.where(keep_OD, 1.0, torch.nan)),
        "nan on the mask": Selection(keep_OD, torch.where(keep_OD, torch.nan, 0.0)),
        "weights that are no tensor": Selection(keep_OD, keep_OD.double().numpy()),
        "weights of another shape": Selection(keep_OD, torch.ones(8, 32)),
        "weights of one row": Selection(keep_OD, torch.zeros(1, 64)),
        "whole numbers": Selection(keep_OD, keep_OD.long()),
    }


@pytest.mark.parametrize("name", wrong_answers())
def test_a_selector_that_breaks_its_contract_is_named(name: str) -> None:
    weight_OD, inputs_TD = make_layer(8, 64, dtype=torch.float32)
    task = replace(layer_of(weight_OD, inputs_TD, name="model.linear"), row_weight_O=torch.arange(1.0, 9.0))
    methods = Methods(Answers(wrong_answers()[name]), solver=Auto())
    with pytest.raises(
        RecipeError, match=r"selector Answers broke its contract on model\.linear, pattern 0\.5 per row"
    ):
        prune_linear(task, HALF, methods)


def test_a_selector_may_work_in_place() -> None:
    """Errors measured against what it changed would be those of another linear."""

    class InPlace(Wanda):
        def select(self, task: LinearTask, pattern: Pattern) -> Selection:
            selection = super().select(task, pattern)
            task.weight_OD.numpy()[~selection.keep_OD.numpy()] = 0.0
            for matrix_DD in (task.hessian.damped_DD, task.hessian.inverse_DD, task.hessian.factor_DD):
                matrix_DD.data.mul_(2.0)
            return selection

    task = layer_of(*make_layer(8, 64, dtype=torch.float32), name="linear")
    found, again = (prune_linear(task, HALF, Methods(InPlace(), solver=Auto())) for _ in range(2))
    wanted = prune_linear(task, HALF, Methods(Wanda(), solver=Auto()))
    for each in (found, again):
        assert torch.equal(each.weight_OD, wanted.weight_OD)
        assert each.record.error == wanted.record.error > 0.0
        assert each.record.gap_max == wanted.record.gap_max


def test_stages_add_up() -> None:
    weight_OD, inputs_TD = make_layer(24, 64, dtype=torch.float32)
    clock = Stopwatch(torch.device("cpu"))
    result = prune_linear(layer_of(weight_OD, inputs_TD), HALF, Methods(Wanda(), solver=Auto()), clock=clock)
    assert set(clock.seconds) == {"select", "solve", "round"}
    assert result.record.seconds == pytest.approx(clock.total)


def test_a_stage_inside_another_pauses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("optima.device.time.perf_counter", lambda: now[0])
    clock = Stopwatch(torch.device("cpu"))
    with clock("forward"):
        now[0] += 3.0
        with clock("hessian"):
            now[0] += 2.0
        now[0] += 1.0
    assert clock.seconds == {"forward": 4.0, "hessian": 2.0}
    assert clock.total == 6.0


def test_selectors_see_rows_at_the_root_of_their_weights_and_what_they_return_is_scaled_back() -> None:
    seen = []

    class Halves(Wanda):
        def select(self, task: LinearTask, pattern: Pattern) -> Selection:
            seen.append(task.weight_OD.clone())
            keep_OD = super().select(task, pattern).keep_OD
            return Selection(keep_OD, 0.5 * task.weight_OD * keep_OD)

    weight_OD, inputs_TD = make_layer(4, 32, dtype=torch.float32)
    task = replace(layer_of(weight_OD, inputs_TD), row_weight_O=torch.tensor([1.0, 4.0, 9.0, 16.0]))
    result = prune_linear(task, HALF, Methods(Halves()))
    ratio_OD = seen[0] / weight_OD
    assert_close_in_norm(ratio_OD / ratio_OD[0, 0], torch.arange(1.0, 5.0)[:, None].expand(4, 32))
    assert_close_in_norm(result.weight_OD, 0.5 * weight_OD * result.keep_OD)
