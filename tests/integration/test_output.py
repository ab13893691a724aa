"""Nothing half-written: an output directory that cannot be had, a disk that fills up, Ctrl-C."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from optima.models.checkpoint import output_directory
from safetensors import SafetensorError
from tiny import TEXT, WEIGHTS, Refused, prune_arguments, save_text, snapshot

from optima.cli import main
from optima.pipeline import Pruner


class TestOutput:
    @pytest.mark.parametrize("kind", ["file", "directory", "hidden", "link"])
    def test_exists(self, cheap: Refused, root: Path, kind: str) -> None:
        make_occupied(root, kind)
        name = "elsewhere" if kind == "link" else "out"
        assert f"{name} exists: choose another --output-dir, or replace it with --overwrite" in cheap()

    @pytest.mark.parametrize("kind", ["file", "directory", "hidden", "link", "dangling link", "empty"])
    def test_overwrite_replaces(self, root: Path, kind: str) -> None:
        make_occupied(root, kind)
        assert main(prune_arguments("--overwrite")) == 0
        assert {"config.json", WEIGHTS, "report.json"} <= {path.name for path in (root / "out").iterdir()}
        assert not (root / "out" / "old").exists()
        assert not list(root.glob(".*"))
        assert (root / "out").is_symlink() == ("link" in kind), "a link stays, and what it points at is replaced"

    def test_empty_directory_is_free(self, root: Path) -> None:
        make_occupied(root, "empty")
        assert main(prune_arguments()) == 0

    def test_failing_to_replace_leaves_the_old(
        self, late: Refused, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_occupied(root, "directory")
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.name.startswith(".out.partial-") and Path(target).name == "out" and (self / WEIGHTS).exists():
                raise OSError(errno.EIO, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        assert "Input/output error" in late("--overwrite")

    @pytest.mark.parametrize("option", ["text.txt/out", "text.txt/a/b/out"])
    def test_below_a_file(self, cheap: Refused, option: str) -> None:
        assert "cannot write beside" in cheap("--output-dir", option)

    @pytest.mark.parametrize("option", [".", "..", "/", "../here"])
    def test_current_directory_and_mount_points(self, cheap: Refused, option: str) -> None:
        assert "cannot be replaced: choose a directory below it" in cheap("--output-dir", option, "--overwrite")

    def test_new_parents_are_removed_again(self, cheap: Refused) -> None:
        assert "the weights of model cannot be read" in cheap("--output-dir", "a/b/out")

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
    def test_read_only(self, cheap: Refused, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        monkeypatch.setattr("tempfile.mkdtemp", raising(OSError(code, "not for you")))
        message = cheap("--output-dir", "a/out")
        assert "cannot write beside" in message
        assert "(not for you): choose another --output-dir" in message

    def test_full_disk(self, cheap: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(".")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        assert "GiB free and the checkpoint needs" in cheap()

    @pytest.mark.parametrize(
        "target",
        [
            "transformers.PreTrainedModel.save_pretrained",
            "transformers.PreTrainedTokenizerBase.save_pretrained",
            "optima.reporting.record.Report.save",
            "optima.recipe.Recipe.save",
            "optima.run.save_file",  # --dump-layer
            "shutil.copyfile",
        ],
    )
    @pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
    def test_disk_fills_up_while_writing(
        self, late: Refused, root: Path, monkeypatch: pytest.MonkeyPatch, target: str, existing: bool
    ) -> None:
        if existing:
            make_occupied(root, "directory")
        monkeypatch.setattr(target, raising(OSError(errno.ENOSPC, "No space left on device")))
        message = late("--output-dir", "out" if existing else "a/out", "--overwrite", "--dump-layer", "q_proj")
        assert message.startswith("writing ")
        assert "No space left on device" in message
        assert "nothing was left behind; free some space" in message

    def test_safetensors_fail_while_writing(self, late: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", raising(SafetensorError("I/O error")))
        assert "failed (I/O error)" in late()

    def test_space_is_checked_for_the_weights(self, tmp_path: Path) -> None:
        free = shutil.disk_usage(tmp_path).free
        with output_directory(tmp_path / "out", False, free // 2) as partial:
            (partial / "file").touch()
        assert snapshot(tmp_path) == {"out": None, "out/file": b""}


def make_occupied(root: Path, kind: str) -> None:
    out = root / "out"
    if kind == "file":
        out.write_text("old")
    elif "link" in kind:
        out.symlink_to(root / "elsewhere")
        if kind == "link":
            (root / "elsewhere").mkdir()
            (root / "elsewhere" / "old").touch()
    else:
        out.mkdir()
        if kind != "empty":
            (out / ("old" if kind == "directory" else ".old")).touch()


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


class TestInterrupt:
    @pytest.mark.parametrize(
        "target",
        [
            "optima.run.load_tokenizer",
            "optima.run.load_model",
            "optima.run.save_file",
            "optima.pipeline.Pruner._propagate",
            "transformers.PreTrainedModel.save_pretrained",
            "optima.models.checkpoint._take_place",
        ],
    )
    def test_leaves_nothing(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
    ) -> None:
        before = snapshot(root)
        monkeypatch.setattr(target, raising(KeyboardInterrupt()))
        assert main(prune_arguments("--output-dir", "a/out", "--dump-layer", "q_proj")) == 130
        assert capsys.readouterr().err == "optima: interrupted, nothing was left half-written\n"
        assert snapshot(root) == before

    def test_in_the_middle_of_pruning(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_occupied(root, "directory")
        before = snapshot(root)
        original, calls = Pruner._prune, []

        def interrupt(self: Pruner, *args: object) -> None:
            calls.append(args)
            if len(calls) == 10:
                raise KeyboardInterrupt
            original(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Pruner, "_prune", interrupt)
        assert main(prune_arguments("--overwrite")) == 130
        assert len(calls) == 10
        assert snapshot(root) == before

    def test_signal(self, root: Path) -> None:
        save_text(root / "text.txt", TEXT * 300)
        before = snapshot(root)
        # Long enough to be interrupted between the first linear and the last.
        options = ["--num-calibration-samples", "3000", "--batch-size", "1", "--dump-layer", r"0\.self_attn\.q"]
        process = subprocess.Popen(
            [sys.executable, "-m", "optima", *prune_arguments(*options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in the background ignores the signal, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while not list(root.glob(".out.partial-*/layers/*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, message = process.communicate(timeout=60)
        assert process.returncode == 130
        assert output == ""
        assert message == "optima: interrupted, nothing was left half-written\n"
        assert snapshot(root) == before
