"""Graphs of real size, tried at a small one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers
from onnx import TensorProto, numpy_helper

from kvc_models import big
from kvc_models.__main__ import main
from kvc_models.export import export_decoder
from support import OnnxRuntime

SMALL = {
    "vocab_size": 640,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
PARAMETERS = 2 * 640 * 256 + 5 * 256 + 2 * (256 * (256 + 64 + 64 + 256) + 3 * 256 * 704)
TOKENS = list(range(9))


def test_a_small_one_is_what_the_exporter_writes(tmp_path: Path) -> None:
    out = big.make_big(tmp_path / "big.onnx", "1b", dtype="float32", **SMALL)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    onnx.checker.check_model(str(out), full_check=True)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).eval()
    usual = export_decoder(model, tmp_path / "usual.onnx", with_past=True)
    graphs = [onnx.load(path).graph for path in (out, usual)]
    operators = [Counter(node.op_type for node in graph.node) for graph in graphs]
    assert operators[0] == operators[1]
    inputs = [[(x.name, str(x.type)) for x in graph.input] for graph in graphs]
    assert inputs[0] == inputs[1]
    shapes = [sorted(tuple(x.dims) for x in graph.initializer if np.prod(x.dims) > 999) for graph in graphs]
    assert shapes[0] == shapes[1]
    logits = OnnxRuntime(out).logits(TOKENS)
    assert logits.shape == (len(TOKENS), 640)
    assert np.isfinite(logits).all()
    assert logits.std() > 1e-3


def test_weights_are_random_and_of_the_type_asked_for(tmp_path: Path) -> None:
    out = big.make_big(tmp_path / "big.onnx", "1b", **SMALL)
    large = [x for x in onnx.load(out).graph.initializer if np.prod(x.dims) > 40000]
    weights = [numpy_helper.to_array(x) for x in large]
    assert {x.data_type for x in large} == {TensorProto.FLOAT16}
    assert sum(x.size for x in weights) >= 0.9 * PARAMETERS
    for weight in weights:
        assert float(weight.astype(np.float32).std()) == pytest.approx(0.02, rel=0.05)
    first = weights[0].reshape(-1)[:1000]
    assert not any(np.array_equal(first, other.reshape(-1)[:1000]) for other in weights[1:])


def test_sparse_data_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(big.SIZES, "7b", SMALL)
    out = tmp_path / "big.onnx"
    assert main(["make-big", str(out), "--params", "7b", "--sparse", "--dtype", "bfloat16"]) == 0
    data = (tmp_path / "big.onnx.data").stat()
    assert data.st_size >= 0.9 * 2 * PARAMETERS
    assert data.st_blocks * 512 < 1 << 16
    large = [x for x in onnx.load(out).graph.initializer if np.prod(x.dims) > 40000]
    assert {x.data_type for x in large} == {TensorProto.BFLOAT16}
    assert not any(numpy_helper.to_array(x).astype(np.float32).any() for x in large)
    assert main(["make-big", str(tmp_path / "big.bin"), "--params", "7b"]) == 1
