"""Other number formats for an exported decoder: ONNX Runtime's quantizers, and a writer of QDQ weights.

Every function reads the ONNX file `path`, writes `out` with the weights inside, and returns `out`. Products
with a constant matrix are quantized (MatMul, and Gemm where it says so); embeddings, norms and attention are
not.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kvc_models.export import ModelError, replacing

Stored = Literal["int8", "uint8", "int4", "uint4"]
Grain = Literal["tensor", "channel", "block"]

_RANGES: Final = {"int8": (-127, 127), "uint8": (0, 255), "int4": (-7, 7), "uint4": (0, 15)}
_TYPES: Final = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}


def matmul_nbits(
    path: Path, out: Path, *, bits: int = 4, block: int = 32, symmetric: bool = True, accuracy: int = 0
) -> Path:
    """MatMul -> com.microsoft.MatMulNBits, by ONNX Runtime's quantizer.

    Args:
        path: a float32 or float16 graph.
        out: the file to write.
        bits: 4 or 8.
        block: elements of a column that share a scale: 16, 32, 64, 128 or 256.
        symmetric: no zero points; otherwise one a block.
        accuracy: what kernels may compute in (0: not said, 1: float32, 4: int8).

    Raises:
        ModelError: the graph has no MatMul with a constant matrix.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(path), bits=bits, block_size=block, is_symmetric=symmetric, accuracy_level=accuracy
    )
    with _quiet():
        quantizer.process()
    model = quantizer.model.model
    _expect(model, "MatMulNBits", path)
    return _save(model, out)


def dynamic(path: Path, out: Path, *, per_channel: bool = False) -> Path:
    """MatMul -> DynamicQuantizeLinear of its input and MatMulInteger with int8 weights, by ONNX Runtime.

    Raises:
        ModelError: nothing was quantized.
    """
    from onnxruntime.quantization import quantize_dynamic

    with replacing(out) as part, _quiet():
        quantize_dynamic(
            onnx.load(path), part, per_channel=per_channel, op_types_to_quantize=["MatMul", "Gemm"]
        )
        _expect(onnx.load(part), "MatMulInteger", path)
    return out


def static(path: Path, out: Path, *, vocab: int, per_channel: bool = False) -> Path:
    """QuantizeLinear / DequantizeLinear around weights and activations, by ONNX Runtime; int8.

    Ranges of activations come from random tokens below `vocab`. The graph takes nothing but input_ids.

    Raises:
        ModelError: the graph has another input, or nothing was quantized.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    model = onnx.load(path)
    if [value.name for value in model.graph.input] != ["input_ids"]:
        raise ModelError(f"{path}: only a graph without past can be calibrated with random tokens")

    class Tokens(CalibrationDataReader):  # type: ignore[misc]
        """Four random prompts."""

        def __init__(self) -> None:
            random = np.random.default_rng(0)
            self.prompts = iter(random.integers(0, vocab, (4, 2, 32)))

        def get_next(self) -> dict[str, NDArray[np.int64]] | None:
            ids = next(self.prompts, None)
            return None if ids is None else {"input_ids": ids}

    with replacing(out) as part, _quiet():
        quantize_static(
            model, part, Tokens(), per_channel=per_channel, op_types_to_quantize=["MatMul", "Gemm"]
        )
        _expect(onnx.load(part), "DequantizeLinear", path)
    return out


def qdq_weights(
    path: Path, out: Path, *, stored: Stored = "int8", grain: Grain = "channel", block: int = 32
) -> Path:
    """Constant matrices of MatMul and Gemm -> DequantizeLinear of integers; the rest stays as it is.

    Args:
        path: a float32 or float16 graph.
        out: the file to write.
        stored: the integers; unsigned ones have zero points, signed ones are symmetric.
        grain: what shares a scale: the tensor, an output channel, or a block of a channel.
        block: elements of a block.

    Raises:
        ModelError: blocks or 4-bit integers before opset 21, or no such matrix.
    """
    model = onnx.load(path)
    version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if version < 21 and (grain == "block" or stored.endswith("int4")):
        raise ModelError(f"{path}: blocks and 4-bit integers take opset 21, and this is opset {version}")
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    nodes: list[Any] = []
    for node in graph.node:
        name = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        tensor = initializers.get(name)
        if tensor is not None and len(tensor.dims) == 2 and uses[name] == 1:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            kept, dequantize = _quantized(tensor, stored, grain, block, 1 if transposed else 0)
            graph.initializer.remove(tensor)
            graph.initializer.extend(kept)
            nodes.append(dequantize)
            node.input[1] = dequantize.output[0]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    model.ir_version = max(model.ir_version, 10)
    _expect(model, "DequantizeLinear", path)
    return _save(model, out)


def _quantized(tensor: Any, stored: Stored, grain: Grain, block: int, inner: int) -> tuple[list[Any], Any]:
    """The initializers and the node that take a matrix's place; the product sums over the axis `inner`."""
    values = numpy_helper.to_array(tensor)
    wide = values.astype(np.float32)
    low, high = _bounds(wide, tensor.name, grain, block, inner)
    scale, zero = _affine(low, high, stored, values.dtype)

    def spread(x: NDArray[Any]) -> NDArray[Any]:
        """A value for every element of the matrix."""
        if grain == "block":
            return np.repeat(x, block, axis=inner)
        return np.expand_dims(x, inner) if grain == "channel" else x

    least, most = _RANGES[stored]
    numbers = np.clip(np.rint(wide / spread(scale).astype(np.float32)) + spread(zero), least, most)
    kind, base = _TYPES[stored], tensor.name
    kept = [
        helper.make_tensor(f"{base}_quantized", kind, values.shape, numbers.astype(np.int32).flatten()),
        numpy_helper.from_array(scale, f"{base}_scale"),
    ]
    if stored.startswith("u"):
        kept.append(helper.make_tensor(f"{base}_zero", kind, zero.shape, zero.flatten()))
    attributes = {"channel": {"axis": 1 - inner}, "block": {"axis": inner, "block_size": block}}.get(
        grain, {}
    )
    node = helper.make_node(
        "DequantizeLinear",
        [x.name for x in kept],
        [f"{base}_dequantized"],
        name=f"{base}/DequantizeLinear",
        **attributes,
    )
    return kept, node


def _bounds(
    wide: NDArray[np.float32], name: str, grain: Grain, block: int, inner: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest number of what shares a scale."""
    if grain == "tensor":
        return np.asarray(wide.min()), np.asarray(wide.max())
    if grain == "channel":
        return wide.min(axis=inner), wide.max(axis=inner)
    length = wide.shape[inner]
    if length % block:
        raise ModelError(f"{name}: {length} elements are not a whole number of blocks of {block}")
    pieces = np.stack(np.split(wide, length // block, axis=inner), axis=inner)
    return pieces.min(axis=inner + 1), pieces.max(axis=inner + 1)


def _affine(
    low: NDArray[np.float32], high: NDArray[np.float32], stored: Stored, dtype: Any
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Scale (`dtype`) and zero point of the range low..high; signed integers have the zero point 0."""
    least, most = _RANGES[stored]
    signed = not stored.startswith("u")
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    width = np.maximum(-low, high) / most if signed else (high - low) / (most - least)
    scale = np.asarray(np.where(width > 0, width, 1)).astype(dtype)
    zero = np.zeros_like(low) if signed else np.rint(least - low / scale.astype(np.float32))
    return scale, np.asarray(zero.clip(least, most)).astype(np.int32)


def _expect(model: Any, operator: str, path: Path) -> None:
    if not any(node.op_type == operator for node in model.graph.node):
        raise ModelError(f"{path}: no product with a constant matrix was found to quantize")


def _save(model: Any, out: Path) -> Path:
    with replacing(out) as part:
        onnx.save(model, part)
    return out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizers, which name every node and give advice."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
