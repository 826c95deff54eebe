"""Small encoders, written node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def floats(name: str, *shape: int) -> onnx.TensorProto:
    """An initializer of random numbers."""
    seed = int.from_bytes(name.encode(), "little") % 1000
    values = np.random.default_rng(seed).standard_normal(shape) * 0.5
    return numpy_helper.from_array(values.astype(np.float32), name)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Shape],
    output: Shape,
    tensors: Sequence[onnx.TensorProto] = (),
    kind: int = TensorProto.FLOAT,
) -> Path:
    """A graph from `inputs` to `rows`, all of type `kind`."""
    given = [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs.items()]
    rows = helper.make_tensor_value_info("rows", kind, list(output))
    graph = helper.make_graph(list(nodes), "encoder", given, [rows], list(tensors))
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def plain(path: Path, inputs: dict[str, Shape], output: Shape, kind: int = TensorProto.FLOAT) -> Path:
    """The first input is the output."""
    return save(path, [helper.make_node("Tanh", [next(iter(inputs))], ["rows"])], inputs, output, kind=kind)


def pooled(path: Path) -> Path:
    """features [batch, 9, 64] -> rows, and a second output of weights of its own, of an unknown operator.

    The weights are among the inputs, too, as in old files.
    """
    nodes = [
        helper.make_node("MatMul", ["features", "w"], ["rows"]),
        helper.make_node("MatMul", ["rows", "p"], ["q"]),
        helper.make_node("Unknown", ["q"], ["pooled"], domain="elsewhere"),
    ]
    shape = ["batch", 9, 64]
    save(path, nodes, {"features": shape}, shape, [floats("w", 64, 64), floats("p", 64, 512)])
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, [64, 512]))
    model.graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 9, 512]))
    onnx.save(model, path)
    return path


def wide(path: Path, rows: int, width: int, middle: int = 512) -> Path:
    """features [batch, rows, width] -> rows: each element becomes `middle` and a sum over them."""
    axes = numpy_helper.from_array(np.array([3]), "axes")
    nodes = [
        helper.make_node("Unsqueeze", ["features", "axes"], ["x"]),
        helper.make_node("Mul", ["x", "a"], ["m"]),
        helper.make_node("Softmax", ["m"], ["s"], axis=-1),
        helper.make_node("Mul", ["s", "c"], ["t"]),
        helper.make_node("Softmax", ["t"], ["u"], axis=-1),
        helper.make_node("Mul", ["u", "m"], ["v"]),
        helper.make_node("ReduceSum", ["v", "axes"], ["rows"], keepdims=0),
    ]
    shape = ["batch", rows, width]
    return save(path, nodes, {"features": shape}, shape, [floats("a", middle), floats("c", middle), axes])
