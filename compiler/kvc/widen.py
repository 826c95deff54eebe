"""A graph with all its arithmetic in float32: every number it holds is kept exactly.

ONNX Runtime has no CPU kernels for bfloat16, and computes float16 in a precision of its own choosing; what it
makes of the widened graph is what the weights really say. Nor may it quantize activations to 8 bits, as the
attribute `accuracy_level` of MatMulNBits lets it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

_NARROW: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES: Final = ("to", "dtype", "softmax_precision", "stash_type", "output_dtype")


_FLOAT32_PRODUCTS: Final = 1
"""The `accuracy_level` of products in float32."""


def is_exact(model: Any) -> bool:
    """Whether ONNX Runtime computes the graph in float32 as it is."""
    values = (*model.graph.input, *model.graph.output)
    narrow = any(t.data_type in _NARROW for t in model.graph.initializer) or any(
        v.type.tensor_type.elem_type in _NARROW for v in values
    )
    return not narrow and not any(_coarse(node) for node in model.graph.node)


def widen(path: Path, out: Path) -> Path:
    """Write the graph `path` to `out`, all float16 and bfloat16 as float32; return `out`.

    The weights go into a file beside it, `out` + ".data".
    """
    model = onnx.load(path)
    _widen_graph(model.graph)
    for function in model.functions:
        _widen_nodes(function.node)
    out.parent.mkdir(parents=True, exist_ok=True)
    data = out.with_name(out.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save(model, out, save_as_external_data=True, location=data.name)
    return out


def _coarse(node: Any) -> bool:
    return node.op_type == "MatMulNBits" and any(
        a.name == "accuracy_level" and a.i not in (0, _FLOAT32_PRODUCTS) for a in node.attribute
    )


def _widen_graph(graph: Any) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    _widen_nodes(graph.node)


def _widen_nodes(nodes: Iterable[Any]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.type == AttributeProto.GRAPH:
                _widen_graph(attribute.g)
            elif attribute.name in _TYPE_ATTRIBUTES and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
            elif attribute.name == "accuracy_level":
                attribute.i = _FLOAT32_PRODUCTS


def _widen_tensor(tensor: Any) -> None:
    if tensor.data_type in _NARROW:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
