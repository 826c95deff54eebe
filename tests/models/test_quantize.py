"""Quantized graphs: the integers mean the weights, and ONNX Runtime computes nearly the same logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kvc_models import ModelError, export_tiny, quantize
from kvc_models.families import VOCAB
from support import OnnxRuntime

TOKENS = list(np.random.default_rng(3).integers(0, VOCAB, 23))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`plain(opset, dtype)`: a llama, exported once in this module."""
    folder = tmp_path_factory.mktemp("plain")

    def export(opset: int = 20, dtype: str = "float32") -> Path:
        out = folder / f"{opset}-{dtype}.onnx"
        return out if out.exists() else export_tiny("llama", out, opset=opset, dtype=dtype)

    return export


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def error(path: Path, reference: Path) -> float:
    """Largest difference of a logit."""
    return float(np.abs(OnnxRuntime(path).logits(TOKENS) - OnnxRuntime(reference).logits(TOKENS)).max())


@pytest.mark.parametrize(
    ("bits", "block", "symmetric"),
    [*itertools.product((4, 8), (16, 32, 64, 128), (True, False)), (4, 256, False)],
)
def test_matmul_nbits(
    plain: Callable[..., Path], tmp_path: Path, bits: int, block: int, symmetric: bool
) -> None:
    out = quantize.matmul_nbits(plain(), tmp_path / "q.onnx", bits=bits, block=block, symmetric=symmetric)
    nodes = [node for node in onnx.load(out).graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 2 * 7 + 1
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"]) == (bits, block)
        assert len([name for name in node.input if name]) == (3 if symmetric else 4)
    assert error(out, plain()) < {4: 2.5, 8: 0.1}[bits]


def test_more_bits_and_smaller_blocks_are_nearer(plain: Callable[..., Path], tmp_path: Path) -> None:
    errors = [
        error(
            quantize.matmul_nbits(plain(), tmp_path / f"{bits}{block}.onnx", bits=bits, block=block), plain()
        )
        for bits, block in ((4, 128), (4, 16), (8, 128))
    ]
    assert errors[0] > errors[1] > 5 * errors[2] > 0


STORED = [
    *itertools.product(("int8", "uint8", "int4", "uint4"), ("tensor", "channel", "block")),
]


def weights(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("stored", "grain"), STORED, ids=[f"{s}-{g}" for s, g in STORED])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dequantized_weights_are_within_half_a_step(
    plain: Callable[..., Path], tmp_path: Path, stored: Any, grain: Any, dtype: str
) -> None:
    source = plain(21, dtype)
    out = quantize.qdq_weights(source, tmp_path / "q.onnx", stored=stored, grain=grain)
    model = onnx.load(out)
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 2 * 7 + 1
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    model.graph.output.extend(helper.make_tensor_value_info(n.output[0], kind, None) for n in nodes)
    onnx.save(model, tmp_path / "shown.onnx")
    runtime = OnnxRuntime(tmp_path / "shown.onnx")
    shown = runtime.run(runtime.feeds(np.array([TOKENS])))[1:]
    before, after = weights(source), weights(out)
    for node, value in zip(nodes, shown, strict=True):
        base = node.output[0].removesuffix("_dequantized")
        assert after[node.input[0]].data_type == getattr(TensorProto, stored.upper())
        assert base not in after, "the float weight must be gone"
        original = numpy_helper.to_array(before[base]).astype(np.float32)
        scale = numpy_helper.to_array(after[node.input[1]]).astype(np.float32)
        assert scale.size == {"tensor": 1, "channel": original.shape[1], "block": original.size // 32}[grain]
        slack = 1.01 if dtype == "float32" else 1.3  # the scale itself is rounded, and the product too
        assert np.abs(value.astype(np.float32) - original).max() <= slack * scale.max() / 2
    assert len(node.input) == (3 if stored.startswith("u") else 2)


def test_products_of_a_gemm_are_quantized_too(tmp_path: Path) -> None:
    source = export_tiny("gpt2", tmp_path / "gpt2.onnx")
    out = quantize.qdq_weights(source, tmp_path / "q.onnx")
    assert operators(out).count("DequantizeLinear") >= 2 * 4
    assert 0 < error(out, source) < 0.2


def test_blocks_take_opset_21(plain: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="take opset 21, and this is opset 20"):
        quantize.qdq_weights(plain(), tmp_path / "q.onnx", grain="block")
    assert not list(tmp_path.iterdir())


def test_a_graph_without_products_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y])), path)
    with pytest.raises(ModelError, match="no product with a constant matrix"):
        quantize.matmul_nbits(path, tmp_path / "q.onnx")


@pytest.mark.parametrize("per_channel", [False, True])
def test_onnxruntimes_dynamic_quantization(
    plain: Callable[..., Path], tmp_path: Path, per_channel: bool
) -> None:
    out = quantize.dynamic(plain(), tmp_path / "q.onnx", per_channel=per_channel)
    assert operators(out).count("MatMulInteger") == 2 * 7 + 1
    assert "DynamicQuantizeLinear" in operators(out)
    # Without VNNI, ONNX Runtime's products of bytes saturate in 16 bits.
    assert 0 < error(out, plain()) < 1.0


def test_onnxruntimes_static_quantization(plain: Callable[..., Path], tmp_path: Path) -> None:
    out = quantize.static(plain(), tmp_path / "q.onnx", vocab=VOCAB)
    assert "QuantizeLinear" in operators(out)
    assert 0 < error(out, plain()) < 1.0
