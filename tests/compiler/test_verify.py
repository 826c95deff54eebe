"""`kvc verify` passes what keeps its promises and fails what does not."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kvc.artifact import Artifact
from kvc.checks import Check, measure_peak, verify
from kvc_passes.errors import Error, InputError

from .cli_fixtures import Result, copy_artifact, edit_json, kvc, scale_weights, seal
from .conftest import Run


def _verdicts(result: Result) -> dict[tuple[str, str], str]:
    """(check, what of) -> verdict, from the printed table."""
    rows = [line.split("│") for line in result.out.splitlines() if line.startswith("│")]
    return {(cells[1].strip(), cells[2].strip()): cells[5].strip() for cells in rows}


def test_a_good_artifact(artifact: Path, llama: Path) -> None:
    result = kvc("verify", artifact, "--against", llama)
    assert result.status == 0, result.out + result.err
    assert result.err == ""
    verdicts = _verdicts(result)
    assert set(verdicts.values()) == {"kept"}
    assert {check for check, _ in verdicts} == {
        "prefill", "chunked prefill", "decode", "ragged batches", "peak memory"
    }  # fmt: skip


def test_checks_measure_something(artifact: Path, llama: Path) -> None:
    checks = verify(artifact, llama, seed=3)
    assert all(check.passed for check in checks)
    assert all(0 < check.measured < 1e-4 for check in checks if check.unit == "")  # float32 is never exact
    (memory,) = (check for check in checks if check.unit == "bytes")
    plan = Artifact.open(artifact).plan
    assert memory.limit == plan.bytes.total
    assert plan.bytes.weights + plan.bytes.pools < memory.measured < memory.limit


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_other_weights(run: Run, artifact: Path, llama: Path, tmp_path: Path, factor: float) -> None:
    """The artifact is whole and runs; only its logits are wrong."""
    folder = copy_artifact(artifact, tmp_path)
    scale_weights(folder, factor)
    if not math.isnan(factor):
        assert run("run", folder, "--prompt", "The weights", "--max-new-tokens", "2").status == 0
    result = run("verify", folder, "--against", llama)
    assert result.status == 1
    verdicts = _verdicts(result)
    assert {check for (check, _), verdict in verdicts.items() if verdict == "BROKEN"} >= {
        "prefill", "chunked prefill", "decode", "ragged batches"
    }  # fmt: skip
    assert result.err.startswith(f"kvc: {folder}: ")
    assert "not as promised" in result.err
    assert len(result.err.splitlines()) == 1


def test_one_wrong_weight(run: Run, artifact: Path, llama: Path, tmp_path: Path) -> None:
    """A single number of the last matrix is enough."""
    folder = copy_artifact(artifact, tmp_path)
    spec = max(Artifact.open(folder).layout(), key=lambda spec: spec.offset)
    data = bytearray((folder / "weights.safetensors").read_bytes())
    values = np.frombuffer(data, np.float32, spec.bytes // 4, spec.offset)
    values[len(values) // 2] += 1
    (folder / "weights.safetensors").write_bytes(data)
    seal(folder)
    assert run("verify", folder, "--against", llama).status == 1


def test_a_promise_that_is_too_low(run: Run, artifact: Path, llama: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path)
    edit_json(folder / "plan.json", lambda plan: plan["bytes"].update(runtime=20 << 20))
    seal(folder)
    result = run("verify", folder, "--against", llama)
    assert result.status == 1
    broken = [check for (check, _), verdict in _verdicts(result).items() if verdict == "BROKEN"]
    assert broken == ["peak memory"]
    assert result.err == f"kvc: {folder}: peak memory: not as promised\n"


def test_a_budget_below_the_promise(run: Run, artifact: Path, llama: Path, tmp_path: Path) -> None:
    folder = copy_artifact(artifact, tmp_path)
    edit_json(folder / "plan.json", lambda plan: plan.update(budget=20 << 20))
    seal(folder)
    result = run("verify", folder, "--against", llama)
    assert result.status == 1
    assert "peak memory" in result.err


def test_tolerance(run: Run, artifact: Path, llama: Path) -> None:
    result = run("verify", artifact, "--against", llama, "--tolerance", "1e-12")
    assert result.status == 1
    assert "prefill" in result.err
    assert "peak memory" not in result.err


@pytest.mark.parametrize("tolerance", ["-1", "nan", "much"])
def test_tolerances_that_are_none(run: Run, artifact: Path, llama: Path, tolerance: str) -> None:
    assert "tolerance" in run("verify", artifact, "--against", llama, f"--tolerance={tolerance}").refusal()


def test_another_model_of_the_same_size(run: Run, artifact: Path, model_file: Callable[..., Path]) -> None:
    assert run("verify", artifact, "--against", model_file("gpt2")).status == 1


@pytest.mark.parametrize("vocab", [64, 1024])
def test_a_model_with_another_vocabulary(artifact: Path, tmp_path: Path, vocab: int) -> None:
    table = np.zeros((vocab, 8), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
            helper.make_node("MatMul", ["x", "head"], ["logits"], "head"),
        ],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", vocab])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(table.T.copy(), "head")],
    )
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    result = kvc("verify", artifact, "--against", path)
    message = result.refusal()
    assert str(path) in message
    assert str(vocab) in message
    assert "512" in message


@pytest.mark.parametrize("name", ["missing.onnx", "empty.onnx", "."])
def test_nothing_to_compare_with(run: Run, artifact: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"")
    message = run("verify", artifact, "--against", tmp_path / name).refusal()
    assert message.startswith(str(tmp_path / name))


def test_a_model_that_is_no_decoder(run: Run, artifact: Path, model_file: Callable[..., Path]) -> None:
    assert "decoder" in run("verify", artifact, "--against", model_file("cnn")).refusal()


def test_onnxruntime_is_not_installed(
    run: Run, artifact: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = run("verify", artifact, "--against", llama).refusal()
    assert "pip install 'kvc[verify]'" in message


def test_a_process_that_dies_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(Error, match="does not exist"):
        measure_peak(tmp_path / "missing.kvc")


def test_from_python(artifact: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        verify(str(artifact), str(tmp_path / "missing.onnx"))
    assert all(isinstance(check, Check) for check in verify(str(artifact), str(llama), tolerance=1.0))


def test_nan_is_not_within_any_limit() -> None:
    assert not Check("prefill", "", float("nan"), 1.0).passed
    assert Check("prefill", "", 1.0, 1.0).passed
    assert not Check("prefill", "", 1.0000001, 1.0).passed
