"""A graph of 16-bit floats as the same graph of float32: every number it holds is kept exactly.

ONNX Runtime has no CPU kernels for bfloat16, and computes float16 in a precision of its own choosing; what it
makes of the widened graph is what the weights really say.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from kvc_models.export import replacing

_NARROW: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES: Final = ("to", "dtype", "softmax_precision", "stash_type", "output_dtype")


def widen(path: Path, out: Path) -> Path:
    """Write the graph `path` to `out`, all float16 and bfloat16 as float32, weights inside; return `out`."""
    model = onnx.load(path)
    _widen_graph(model.graph)
    for function in model.functions:
        _widen_nodes(function.node)
    with replacing(out) as part:
        onnx.save(model, part)
    return out


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


def _widen_tensor(tensor: Any) -> None:
    if tensor.data_type in _NARROW:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
