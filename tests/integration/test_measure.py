"""A measured plan: stages of the recipe, a block of each structure, figures scaled to the run. Times are not tested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from rich.console import Console
from tiny import make_bert, make_llama, save_model

from optima import Recipe, prune
from optima.device import PeakMemory, Stopwatch
from optima.errors import NotDifferentiableError, OptimaError
from optima.linear import prune_linear
from optima.models.random_weights import alike, fill
from optima.models.skeleton import skeleton
from optima.models.source import find_source
from optima.models.stacks import find_stacks
from optima.plan import Measured, make_plan
from optima.plan_table import print_plan
from optima.rehearsal import stages
from optima.rehearsal.measure import measure
from optima.rehearsal.stages import Peak, Rehearsal, extrapolated

FEW: dict[str, Any] = {"max_seq_length": 16, "num_calibration_samples": 40, "batch_size": 4, "device": "cpu"}
ALWAYS = {"start", "read", "forward", "hessian", "linears", "write"}


def measured(directory: Path, recipe: Recipe) -> Measured:
    source = find_source(str(directory))
    return measure(make_plan(source, recipe), source)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"objective": "sink"}, set()),
        ({"objective": "sink", "true_sequential": True}, set()),
        ({"tuning_epochs": 0}, {"sweep"}),
        ({}, {"sweep", "tune"}),
        ({"allocation": "owl", "objective": "sink"}, set()),
    ],
)
def test_the_stages_are_those_of_the_recipe(options: dict[str, Any], more: set[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 500)
    recipe = Recipe(dataset=[str(text)], **FEW | options)
    found = measured(save_model(tmp_path / "model", make_llama().bfloat16()), recipe)
    assert set(found.seconds) == ALWAYS | more
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.peak_bytes > 0
    assert found.notes == ()


@pytest.mark.parametrize("family", ["gemma3", "mixtral", "deepseek_v4", "t5", "gpt2", "bamba", "bloom", "gemma3n"])
def test_any_family(family: str, tmp_path: Path) -> None:
    found = measured(save_model(tmp_path / "model", build(family)), Recipe(**FEW))
    assert found.seconds["linears"] > 0
    assert found.seconds["sweep"] > 0
    assert found.notes == ("the time to read allenai/c4 is not counted",)


def test_a_model_without_a_head_for_words(tmp_path: Path) -> None:
    found = measured(save_model(tmp_path / "model", make_bert(), "bert"), Recipe(**FEW))
    assert found.seconds["sweep"] > 0


def test_a_linear_of_each_shape_in_the_models_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(task: Any, pattern: Any, methods: Any, dtype: torch.dtype) -> Any:
        seen.append((tuple(task.weight_OD.shape), dtype))
        return prune_linear(task, pattern, methods, dtype)

    monkeypatch.setattr(stages, "prune_linear", watched)
    measured(save_model(tmp_path / "model", make_llama(num_hidden_layers=5).bfloat16()), Recipe(**FEW))
    assert sorted(seen) == [(shape, torch.bfloat16) for shape in [(16, 32), (32, 32), (32, 48), (48, 32)]]


def test_masks_from_elsewhere_count_as_one_pattern(tmp_path: Path) -> None:
    model = make_llama()
    source = save_model(tmp_path / "model", model)
    prune(model, Recipe(), calibration=torch.randint(4, 300, (4, 16)))
    recipe = Recipe(selector="external", mask_from=str(save_model(tmp_path / "sparse", model)), **FEW)
    assert measured(source, recipe).seconds["linears"] > 0


def test_text_that_is_too_short_is_refused_as_by_a_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the fox")
    with pytest.raises(OptimaError, match="token"):
        measured(save_model(tmp_path / "model"), Recipe(dataset=[str(text)], **FEW))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "deepseek_v3"])
def test_blocks_alike_share_their_random_weights(family: str, tmp_path: Path) -> None:
    dense = build(family)
    model, _ = skeleton(find_source(str(save_model(tmp_path / "model", dense))))
    (stack,) = find_stacks(model)
    structures = alike(stack.blocks)
    fill(model, structures, torch.bfloat16)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.is_floating_point())
    for blocks in structures:
        own = {id(parameter) for parameter in blocks[0].module.parameters()}
        assert all({id(parameter) for parameter in block.module.parameters()} == own for block in blocks)
    for name, buffer in dense.named_buffers():  # rotary frequencies are what the library makes of them
        assert torch.equal(model.get_buffer(name), buffer), name
    assert model.get_output_embeddings().weight.std() > 0
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_what_is_once_and_what_is_of_each_batch(tmp_path: Path) -> None:
    source, recipe = find_source(str(save_model(tmp_path / "model"))), Recipe(**FEW)
    peak = Peak(torch.device("cpu"), 0, 0)
    tried = Rehearsal(make_plan(source, recipe), torch.device("cpu"), torch.zeros(12, 16), peak)
    assert tried.batches == 10
    assert extrapolated({"a": 3.0}, {"a": 5.0}, 3, 10) == {"a": pytest.approx(12.0)}  # 2 and 1 of each
    assert extrapolated({"a": 4.0}, {"a": 3.0}, 3, 10) == {"a": pytest.approx(3.0)}  # noise is no gain
    assert extrapolated({"a": 0.5}, {"a": 3.0}, 3, 10) == {"a": pytest.approx(10.0)}
    assert extrapolated({}, {"a": 2.0}, 1, 10) == {"a": pytest.approx(20.0)}


def test_memory_is_that_of_the_run_not_of_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakMemory, "peak", lambda self: 1000)
    peak = Peak(torch.device("cpu"), weights_bytes=300, left_bytes=500)
    with peak.phase(weights=100, of_run=50.0, here=20):
        pass
    assert peak.num_bytes == 1000 - 300 + 100 + 50 - 20
    with peak.phase(weights=100) as waiting:  # known inside alone
        waiting.of_run, waiting.here = 9000.0, 20  # what is more than fits waits in files
    assert peak.num_bytes == 1000 - 300 + 100 + 500 - 20


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"objective": "sink"}], ids=["loss", "sink"])
def test_a_large_model_is_looked_at_on_one_batch(
    family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one takes long enough; with one sequence in it, as on a CPU."""
    monkeypatch.setattr(stages, "LONG", 0.0)
    steps: list[int] = []
    monkeypatch.setattr(stages, "tune", lambda block, _, streams, *more: steps.append(len(streams.pieces(block))))
    save_model(tmp_path / "model", make_llama() if family == "llama" else build(family))
    recipe = Recipe(tuning_epochs=1, **FEW | {"batch_size": 1} | options)
    found = measured(tmp_path / "model", recipe)
    assert not any("gradients" in note for note in found.notes)
    assert set(steps) == {4}, "one is held out, the others tuned on"


def test_structures_that_are_not_pruned_are_not_run(tmp_path: Path) -> None:
    """Of three: mixtures stand behind dense blocks, and all but the first block stay as they are."""
    directory = save_model(tmp_path / "model", build("deepseek_v3"))
    found = measured(directory, Recipe(objective="sink", targets=[r"layers\.0\."], **FEW))
    assert found.seconds["linears"] > 0


def test_a_head_without_gradients_goes_by_the_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise NotDifferentiableError("its words do not depend on its last block by a gradient")

    monkeypatch.setattr(stages, "at_the_head", refuse)
    notes = measured(save_model(tmp_path / "model"), Recipe(**FEW)).notes
    assert any("objective sink will take the place" in note for note in notes)


def test_blocks_behind_the_last_pruned_one_cost_their_sweep_alone(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", make_llama(num_hidden_layers=4))
    found = measured(directory, Recipe(targets=[r"layers\.1\."], **FEW))
    assert found.seconds["linears"] > 0


def test_fused_experts_may_take_the_disk_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family, twice in (("mixtral", True), ("gpt_oss", False), ("gemma3", False)):
        plan = make_plan(find_source(str(save_model(tmp_path / family, build(family)))), Recipe(max_seq_length=16))
        print_plan(plan, None, family, Console(width=80))
        assert ("for experts during the run" in " ".join(capsys.readouterr().out.split())) == twice
        fused = sum(each.numel() for name, each in plan.model.named_parameters() if each.ndim == 3)
        assert plan.beside_bytes == twice * fused * plan.dtype.itemsize


def test_the_page_fits_a_terminal_of_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(find_source(str(save_model(tmp_path / "model"))), Recipe(max_seq_length=16))
    seconds = {"start": 3.2, "read": 0.1, "forward": 7000.0, "hessian": 90.0, "sweep": 1200.0, "linears": 500.0}
    print_plan(plan, Measured(seconds, 3 * 2**30, ("what is not counted",)), "model", Console(width=80))
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert "about 2 h 27 min (start 3 s, forward 7000 s," in output
    assert "read" not in output.partition("time here")[2].partition("memory here")[0]
    assert "about 3.00 GiB at its peak" in output
    assert "note: what is not counted" in output


@pytest.mark.parametrize("layers", [2, 4])
def test_a_rehearsal_counts_the_linears_of_all_blocks(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(Stopwatch):
        """Every stage takes a second each time."""

        @contextmanager
        def __call__(self, stage: str) -> Iterator[None]:
            yield
            self.seconds[stage] = self.seconds.get(stage, 0.0) + 1.0

    monkeypatch.setattr(stages, "Stopwatch", Counted)
    source = find_source(str(save_model(tmp_path / "model", make_llama(num_hidden_layers=layers))))
    recipe = Recipe(max_seq_length=16, num_calibration_samples=40, batch_size=4, device="cpu", objective="sink")
    assert measure(make_plan(source, recipe), source).seconds["linears"] == 7 * layers
