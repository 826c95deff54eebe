"""Writing the files: whole or absent; and the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import onnx
import pytest

from kvc_models import ENTRIES, ModelError, export_tiny
from kvc_models.__main__ import main
from kvc_models.export import replacing


def test_an_export_that_fails_leaves_the_older_files(tmp_path: Path) -> None:
    out, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    out.write_text("old graph")
    data.write_text("old weights")

    def fail() -> None:
        with replacing(out) as part:
            part.write_text("half of the new gr")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (out.read_text(), data.read_text()) == ("old graph", "old weights")
    assert sorted(tmp_path.iterdir()) == [out, data]


def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    program = f"""
        import os, signal
        from pathlib import Path
        from kvc_models.export import replacing
        with replacing(Path({str(out)!r})) as part:
            part.write_text("half")
            Path(str(part) + ".data").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    path = str(Path(sys.modules["kvc_models"].__path__[0]).parent)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env={"PYTHONPATH": path}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".")
    assert len(list(leftover.iterdir())) == 2
    with replacing(out) as part:
        part.write_text("whole")
    assert list(tmp_path.iterdir()) == [out]


def test_new_files_take_the_places_of_older_ones(tmp_path: Path) -> None:
    out, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    out.write_text("old graph")
    data.write_text("old weights")
    with replacing(out) as part:
        part.write_text("new graph with its weights inside")
    assert out.read_text() == "new graph with its weights inside"
    assert not data.exists(), "weights of the older graph would mislead"


def test_an_opset_that_is_too_old_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot export model\.onnx at opset 3"):
        export_tiny("gpt2", tmp_path / "model.onnx", opset=3)
    assert not (tmp_path / "model.onnx").exists()


def test_the_opset_asked_for_is_written(tmp_path: Path) -> None:
    out = export_tiny("gpt2", tmp_path / "model.onnx", opset=23)
    assert {entry.domain: entry.version for entry in onnx.load(out).opset_import}[""] == 23


def test_list_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [entry.name for entry in ENTRIES]
    assert {"smollm2-135m", "tiny-llama", "tiny-phi3"} <= set(listed)


def test_export_says_in_a_few_lines_what_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "tiny.onnx"
    path = str(Path(sys.modules["kvc_models"].__path__[0]).parent)
    done = subprocess.run(
        [sys.executable, "-m", "kvc_models", "export", "tiny-gpt2", str(out), "--with-past"],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert 2 <= len(lines) <= 6
    assert any(f"wrote {out}, " in line and line.endswith(" MB") for line in lines)
    inputs = [value.name for value in onnx.load(out).graph.input]
    assert inputs[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert (tmp_path / "deep" / "tiny.assets" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "out", "message"),
    [
        ("nothing", "x.onnx", "no model is called 'nothing'; there are smollm2-135m, smollm2-long"),
        ("tiny-llama", "x.bin", "must be named something.onnx"),
    ],
)
def test_mistakes_are_explained(
    name: str, out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", name, str(tmp_path / out)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
