"""Changes of .onnx files, each known by a number: of bytes, or of fields in what is still a protobuf."""

from __future__ import annotations

import random
from typing import Final

import onnx


def mutated(data: bytes, number: int) -> bytes:
    """Mutation `number` of a file: one to four flips, deletions, insertions, copies or cuts."""
    source, changed = random.Random(number), bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        at, length = source.randrange(len(changed)), source.choice((1, 1, 2, 4, 16, 200))
        kind = source.choice(("bit", "byte", "byte", "number", "delete", "insert", "copy", "move", "cut"))
        if kind == "bit":
            changed[at] ^= 1 << source.randrange(8)
        elif kind == "byte":
            changed[at] = source.randrange(256)
        elif kind == "number":  # what protobuf reads as a very large or a negative number
            value = source.choice(
                (b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x0f", b"\x80\x80\x80\x80\x10", b"\x00")
            )
            changed[at : at + 1] = value
        elif kind == "delete":
            del changed[at : at + length]
        elif kind == "insert":
            changed[at:at] = source.randbytes(length)
        elif kind == "copy":
            changed[at:at] = changed[at : at + length]
        elif kind == "move":
            piece = changed[at : at + length]
            del changed[at : at + length]
            to = source.randrange(len(changed) + 1)
            changed[to:to] = piece
        elif source.random() < 0.3:
            del changed[max(at, 1) :]
        if not changed:
            changed += b"\x08"
    return bytes(changed)


def damaged(data: bytes, number: int) -> bytes:
    """Mutation `number` of a model's fields, which are still a valid protobuf: sizes, types, names, order."""
    model, source = onnx.load_model_from_string(data), random.Random(number)
    for _ in range(source.choice((1, 1, 2))):
        try:
            source.choice(_DAMAGES)(model, source)
        except (IndexError, ValueError):  # nothing to choose from
            continue
    return bytes(model.SerializeToString())


def _node(model: onnx.ModelProto, source: random.Random) -> onnx.NodeProto:
    return source.choice(model.graph.node)


def _value(model: onnx.ModelProto, source: random.Random) -> onnx.TypeProto.Tensor:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return source.choice(values).type.tensor_type


def _sizes(model: onnx.ModelProto, source: random.Random) -> None:
    dims = source.choice(model.graph.initializer).dims
    wrong = source.choice((-1, 0, 1, 3, 1 << 40, (1 << 63) - 1, -(1 << 63)))
    if dims and source.random() < 0.7:
        dims[source.randrange(len(dims))] = wrong
    else:
        dims.append(wrong)


def _extents(model: onnx.ModelProto, source: random.Random) -> None:
    dim = source.choice(_value(model, source).shape.dim)
    if source.random() < 0.3:
        dim.Clear()
    elif source.random() < 0.3:
        dim.dim_param = source.choice(("batch", "", "past", "a + b", "\n", "n" * 300))
    else:
        dim.dim_value = source.choice((-1, 0, 1, 7, 1 << 40, (1 << 63) - 1))


def _rank(model: onnx.ModelProto, source: random.Random) -> None:
    value = _value(model, source)
    if source.random() < 0.3:
        value.ClearField("shape")
    elif source.random() < 0.5:
        value.shape.dim.add()
    else:
        del value.shape.dim[source.randrange(len(value.shape.dim)) :]


def _types(model: onnx.ModelProto, source: random.Random) -> None:
    wrong = source.choice((0, 2, 3, 7, 8, 10, 14, 17, 23, 99, -5))
    if source.random() < 0.5:
        source.choice(model.graph.initializer).data_type = wrong
    else:
        _value(model, source).elem_type = wrong


def _inputs(model: onnx.ModelProto, source: random.Random) -> None:
    names = _node(model, source).input
    how = source.randrange(5)
    if how == 0:
        del names[source.randrange(len(names) + 1) :]
    elif how == 1:
        names.append(source.choice((*names, "", "nothing")))
    else:
        others = ("", "nothing", *_node(model, source).output, *_node(model, source).input)
        names[source.randrange(len(names))] = source.choice(others)


def _outputs(model: onnx.ModelProto, source: random.Random) -> None:
    names = _node(model, source).output
    how = source.randrange(4)
    if how == 0:
        del names[:]
    elif how == 1:
        names.append("more")
    else:
        names[0] = source.choice(("", *_node(model, source).output, *_node(model, source).input))


def _order(model: onnx.ModelProto, source: random.Random) -> None:
    nodes = list(model.graph.node)
    at, to = source.randrange(len(nodes)), source.randrange(len(nodes))
    nodes.insert(to, nodes.pop(at))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _operator(model: onnx.ModelProto, source: random.Random) -> None:
    node = _node(model, source)
    if source.random() < 0.2:
        node.domain = source.choice(("com.microsoft", "nowhere", "ai.onnx"))
    else:
        names = ("If", "Loop", "Constant", "Shape", "Range", "Split", "TopK", "Attention", "", "Nothing")
        node.op_type = source.choice((*names, _node(model, source).op_type, _node(model, source).op_type))


def _attribute(model: onnx.ModelProto, source: random.Random) -> None:
    attributes = [a for node in model.graph.node for a in node.attribute]
    attribute = source.choice(attributes)
    how = source.randrange(4)
    if how == 0:
        attribute.type = source.choice((0, 1, 2, 3, 4, 5, 6, 7, 8))
    elif how == 1:
        attribute.name = source.choice([a.name for a in attributes] + [""])
    else:
        wrong = (-1, 1, 1 << 62, 1.5, float("nan"), "text", [1, 2, 3], [-7], [0.5])
        made = onnx.helper.make_attribute(attribute.name or "x", source.choice(wrong))
        attribute.CopyFrom(made)


def _removed(model: onnx.ModelProto, source: random.Random) -> None:
    names = ("node", "initializer", "input", "output", "opset_import")
    name = source.choice(names)
    values = getattr(model if name == "opset_import" else model.graph, name)
    at = source.randrange(len(values))
    if source.random() < 0.3:
        values.add().CopyFrom(values[at])
    else:
        del values[at]


def _content(model: onnx.ModelProto, source: random.Random) -> None:
    tensor = source.choice(model.graph.initializer)
    how = source.randrange(4)
    if how == 0:
        tensor.raw_data = tensor.raw_data[: source.randrange(len(tensor.raw_data) + 1)]
    elif how == 1:
        tensor.ClearField("raw_data")
    elif how == 2:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            wrong = ("", "-1", "x", "nothing.data", "../up", "/etc/passwd", str(1 << 62))
            tensor.external_data.add(key=key, value=source.choice(wrong))
    else:
        tensor.name = source.choice((*[t.name for t in model.graph.initializer], "", "tokens"))


_DAMAGES: Final = (
    _sizes,
    _extents,
    _rank,
    _types,
    _inputs,
    _inputs,
    _outputs,
    _order,
    _operator,
    _attribute,
    _attribute,
    _removed,
    _content,
)
