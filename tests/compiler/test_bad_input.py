"""Bad input to compile and plan: one clear message, exit status 2, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kvc.artifact import Artifact
from kvc.checks import measure_peak

from .cli_fixtures import BUDGET, files_in
from .conftest import Run

PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de")


def _refused(run: Run, folder: Path, *arguments: str | Path) -> str:
    """The message; the folder is as it was."""
    before = files_in(folder)
    message = run(*arguments).refusal()
    assert files_in(folder) == before
    return message


def _graph(path: Path, nodes: Sequence[onnx.NodeProto], opset: int = 20) -> Path:
    """Token ids -> embedding -> `nodes` -> logits."""
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 16])
    table = numpy_helper.from_array(np.ones((16, 16), np.float32), "table")
    embed = helper.make_node("Gather", ["table", "ids"], ["x"], "embed")
    graph = helper.make_graph([embed, *nodes], "g", [ids], [logits], [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


@pytest.mark.parametrize("name", ["missing.onnx", "nowhere/missing.onnx", "x" * 300 + ".onnx", "", "file/x"])
@pytest.mark.parametrize("verb", ["compile", "inspect"])
def test_no_such_model(run: Run, tmp_path: Path, name: str, verb: str) -> None:
    (tmp_path / "file").write_text("")
    options = () if verb == "inspect" else BUDGET
    message = _refused(run, tmp_path, verb, tmp_path / name, *options)
    assert str(tmp_path / name) in message
    assert "--output" not in message


def test_relative_folder_as_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "folder" in _refused(run, tmp_path, "compile", ".", *BUDGET)


NO_MODELS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda model: b"",
    "first byte": lambda model: model[:1],
    "a third": lambda model: model[: len(model) // 3],
    "without its end": lambda model: model[:-1],
    "text": lambda model: b"Once upon a time there was a model.\n" * 40,
    "picture": lambda model: PNG,
    "zeros": lambda model: bytes(4096),
    "twice": lambda model: model[:400] * 2,
}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_file_that_is_no_model(run: Run, llama: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(NO_MODELS[kind](llama.read_bytes()))
    message = _refused(run, tmp_path, "compile", file, *BUDGET)
    assert message.startswith(str(file))
    assert "ONNX" in message


def _external(model: Path, folder: Path) -> Path:
    """The model with its weights in a file beside it."""
    path = folder / "external.onnx"
    onnx.save(onnx.load(model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data(run: Run, llama: Path, tmp_path: Path) -> None:
    path, data = _external(llama, tmp_path), tmp_path / "weights.bin"
    assert run("inspect", path).status == 0
    data.write_bytes(data.read_bytes()[:-100])
    message = _refused(run, tmp_path, "compile", path, *BUDGET)
    assert "external data is short" in message
    assert "weights.bin" in message
    assert str(data.stat().st_size) in message
    data.unlink()
    message = _refused(run, tmp_path, "compile", path, *BUDGET)
    assert "external data missing" in message
    assert "weights.bin" in message


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", ""])
def test_external_data_elsewhere(run: Run, llama: Path, tmp_path: Path, location: str) -> None:
    path = _external(llama, tmp_path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    message = _refused(run, tmp_path, "inspect", path)
    assert model.graph.initializer[0].name in message
    assert f"'{location}'" in message


@pytest.mark.parametrize("family", ["cnn", "encoder"])
def test_models_that_are_no_decoders(
    run: Run, model_file: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    output = tmp_path / "out.kvc"
    message = _refused(run, tmp_path, "compile", model_file(family), *BUDGET, "-o", output)
    assert {"cnn": "is not a decoder", "encoder": "causal"}[family] in message


def test_no_attention(run: Run, tmp_path: Path) -> None:
    path = _graph(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "table"], ["logits"], "head")])
    assert "no attention" in _refused(run, tmp_path, "compile", path, *BUDGET)


def test_unsupported_operators(run: Run, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mystery", ["x"], ["y"], "block/one"),
        helper.make_node("Mystery", ["y"], ["z"], "block/two"),
        helper.make_node("Riddle", ["z"], ["logits"], "block/three", domain="com.example"),
    ]
    path = _graph(tmp_path / "m.onnx", nodes)
    message = _refused(run, tmp_path, "compile", path, *BUDGET)
    for text in (str(path), "Mystery", "'block/one'", "Riddle", "'block/three'"):
        assert text in message
    assert "block/two" not in message  # once for each operator


def test_opset_too_old(run: Run, tmp_path: Path) -> None:
    path = _graph(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["logits"], "relu")], opset=12)
    message = _refused(run, tmp_path, "compile", path, *BUDGET)
    assert "opset 12 is too old" in message
    assert "13" in message


def test_half_precision(run: Run, llama: Path, tmp_path: Path) -> None:
    model = onnx.load(llama)
    weight = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2)
    half = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name)
    weight.CopyFrom(half)
    onnx.save(model, tmp_path / "half.onnx")
    assert str(tmp_path) in _refused(run, tmp_path, "inspect", tmp_path / "half.onnx")


SIZES = ["0", "0GB", "-1", "-1GB", "8XB", "GB", "", "1e9", "1,5GB", "nan", "0x10", "٣GB", "1 2"]


@pytest.mark.parametrize("budget", SIZES)
def test_budgets_that_are_no_sizes(run: Run, llama: Path, tmp_path: Path, budget: str) -> None:
    output = tmp_path / "out.kvc"
    arguments = (f"--budget={budget}", "--workload", "1x8", "-o", output)
    assert budget in _refused(run, tmp_path, "compile", llama, *arguments)


WORKLOADS = ["0x5", "5x0", "8", "ax b", "", ",", "8x256,", "8x", "x8", "-1x8", "8x2.5", "8*8", "1x8;2x8"]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads_of_another_form(run: Run, llama: Path, tmp_path: Path, workload: str) -> None:
    arguments = ("--budget", "1GB", f"--workload={workload}", "-o", tmp_path / "out.kvc")
    assert "workload" in _refused(run, tmp_path, "compile", llama, *arguments)


def test_workload_beyond_the_context(run: Run, llama: Path, tmp_path: Path) -> None:
    arguments = ("--budget", "1GB", "--workload", "1x8,2x257", "-o", tmp_path / "out.kvc")
    message = _refused(run, tmp_path, "compile", llama, *arguments)
    for text in ("2x257", "257", "256"):
        assert text in message


@pytest.mark.parametrize("budget", ["1", "1MB", "50MB"])
def test_budget_too_small(
    run: Run, llama: Path, tmp_path: Path, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal says what was given and what is needed; that works, and one byte less does not."""
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: 70 << 20)  # it may differ from run to run
    arguments = ("--workload", "4x64", "-o", tmp_path / "out.kvc")
    message = _refused(run, tmp_path, "compile", llama, "--budget", budget, *arguments)
    found = re.search(r"budget of (\d+) bytes.*4x64.*needs (\d+) bytes", message)
    assert found is not None
    given, needed = int(found[1]), int(found[2])
    assert given == {"1": 1, "1MB": 10**6, "50MB": 50 * 10**6}[budget]
    result = run("plan", llama, "--budget", str(needed), "--workload", "4x64", "--json")
    assert result.status == 0
    assert sum(json.loads(result.out)["bytes"].values()) <= needed
    _refused(run, tmp_path, "plan", llama, "--budget", str(needed - (1 << 20) - 1), "--workload", "4x64")


def test_the_needed_budget_holds_a_running_model(run: Run, llama: Path, tmp_path: Path) -> None:
    message = _refused(run, tmp_path, "plan", llama, "--budget", "9MB", "--workload", "2x16")
    needed = re.search(r"needs (\d+) bytes", message)
    assert needed is not None
    output = tmp_path / "out.kvc"
    result = run("compile", llama, "--budget", needed[1], "--workload", "2x16", "-o", output)
    assert result.status == 0, result.err
    assert measure_peak(output) <= int(needed[1])


def test_huge_numbers(run: Run, llama: Path, tmp_path: Path) -> None:
    many = f"{10**15}x256"
    assert many in _refused(run, tmp_path, "plan", llama, "--budget", "1GB", "--workload", many)
    result = run("plan", llama, "--budget", "7000000TB", "--workload", "1x8", "--json")
    assert json.loads(result.out)["budget"] == 7 * 10**18
    for budget in ("9" * 400, "1" + "0" * 30 + "TB"):
        message = _refused(run, tmp_path, "plan", llama, "--budget", budget, "--workload", "1x8")
        assert budget[:30] in message
        assert "8 EiB" in message


@pytest.mark.parametrize("target", ["gpu", "cpu:pentium9000", "", "CPU", "x86-64-v3"])
def test_unknown_target(run: Run, llama: Path, tmp_path: Path, target: str) -> None:
    arguments = (*BUDGET, f"--target={target}", "-o", tmp_path / "out.kvc")
    assert f"'{target.removeprefix('cpu:')}'" in _refused(run, tmp_path, "compile", llama, *arguments)


def test_output_exists(run: Run, llama: Path, artifact: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(artifact, tmp_path / "out.kvc"))
    message = _refused(run, tmp_path, "compile", llama, *BUDGET, "-o", output)
    assert "--force" in message
    (output / "stale").write_text("")
    assert run("compile", llama, "--budget", "1GB", "--workload", "2x32", "-o", output, "--force").status == 0
    assert list(tmp_path.iterdir()) == [output]
    assert not (output / "stale").exists()
    assert [str(w) for w in Artifact.open(output).plan.workload] == ["2x32"]


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "link"])
def test_force_replaces_artifacts_only(
    run: Run, llama: Path, artifact: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "precious"
    if kind == "file":
        output.write_text("my file")
    elif kind == "link":
        output.symlink_to(artifact)
    else:
        output.mkdir()
        (output / "thesis.txt").write_text("my work") if kind == "folder" else None
    message = _refused(run, tmp_path, "compile", llama, *BUDGET, "-o", output, "--force")
    assert str(output) in message
    assert "not" in message


def test_output_in_place_of_the_model(run: Run, model: Path, tmp_path: Path) -> None:
    assert "model" in _refused(run, tmp_path, "compile", model, *BUDGET, "-o", model, "--force")


@pytest.mark.parametrize("place", ["/proc/out.kvc", "file/out.kvc", "no/such/folder/out.kvc", "x" * 300])
def test_output_that_cannot_be_written(run: Run, llama: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    message = _refused(run, tmp_path, "compile", llama, *BUDGET, "-o", tmp_path / place)
    assert str(tmp_path / place) in message
    assert "--output" in message


@pytest.mark.parametrize("place", ["file", "file/ir", "/proc/ir"])
def test_dump_that_cannot_be_written(run: Run, llama: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    arguments = (*BUDGET, "-o", tmp_path / "out.kvc", "--dump", tmp_path / place)
    assert str(tmp_path / place) in _refused(run, tmp_path, "compile", llama, *arguments)


TOKENIZERS: dict[str, tuple[str, Any]] = {
    "no JSON": ("tokenizer.json", "{"),
    "not a tokenizer": ("tokenizer.json", "{}"),
    "list": ("tokenizer_config.json", "[]"),
    "broken config": ("tokenizer_config.json", "{"),
    "broken template": ("chat_template.jinja", "{% if"),
    "ends in a list": ("generation_config.json", "[]"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_broken_tokenizer_files(run: Run, model: Path, tmp_path: Path, kind: str) -> None:
    """Found when the model is compiled, not when it is run."""
    name, text = TOKENIZERS[kind]
    (tmp_path / "model.assets" / name).write_text(text)
    message = _refused(run, tmp_path, "compile", model, *BUDGET)
    assert name in message or (name == "chat_template.jinja" and "chat template" in message)
    assert "Error" not in message
