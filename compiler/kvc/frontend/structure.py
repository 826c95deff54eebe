"""Whether a parsed ONNX graph hangs together: values made once, before their use; nodes as ONNX has them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx.defs import OpSchema, SchemaError, get_schema, onnx_opset_version

from kvc_passes.errors import InputError


def check_structure(graph: onnx.GraphProto, opset: int, path: object) -> None:
    """Raise InputError, naming the file and the value or node, unless the graph is well formed."""
    for what, text in _names(graph):
        if not isinstance(text, str):  # protobuf's answer to bytes that are no UTF-8
            raise InputError(f"{path}: the name of {what} is no text: {text!r}; the file is damaged")
    made = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for index, node in enumerate(graph.node):
        label = f"{path}: node '{node.name or f'#{index}'}' ({node.op_type})"
        for name in node.input:
            if name and name not in made:
                raise InputError(
                    f"{label} reads '{name}', which nothing before it makes; the nodes are in another order, "
                    "or the file is damaged"
                )
        for name in filter(None, node.output):
            if name in made:
                raise InputError(f"{label} makes '{name}', which is there already")
            made.add(name)
        problem = _problem(node, opset)
        if problem is not None:
            raise InputError(f"{label} {problem}; the file is damaged, or of another opset than {opset}")
    for value in graph.output:
        if value.name not in made:
            raise InputError(f"{path}: the output '{value.name}' is made by no node")


def _problem(node: onnx.NodeProto, opset: int) -> str | None:
    """What ONNX's own description of an operator does not allow; None for an operator that it lacks."""
    if node.domain not in ("", "ai.onnx") or opset > onnx_opset_version():
        return None
    try:
        schema = get_schema(node.op_type, opset, "")
    except SchemaError:
        return None  # the importer says what it does not know
    return _wrong_values(node, schema) or _wrong_attribute(node, schema)


def _wrong_values(node: onnx.NodeProto, schema: OpSchema) -> str | None:
    given = len(node.input)
    if not schema.min_input <= given <= schema.max_input:
        return f"has {given} inputs, not {_range(schema.min_input, schema.max_input)}"
    if not schema.min_output <= len(node.output) <= schema.max_output:
        return f"has {len(node.output)} outputs, not {_range(schema.min_output, schema.max_output)}"
    for place, name in enumerate(node.input):
        parameter = schema.inputs[min(place, len(schema.inputs) - 1)]
        if not name and parameter.option != OpSchema.FormalParameterOption.Optional:
            return f"lacks its input '{parameter.name}'"
    if not node.output[0] and schema.outputs[0].option == OpSchema.FormalParameterOption.Single:
        return f"lacks its output '{schema.outputs[0].name}'"
    return None


def _wrong_attribute(node: onnx.NodeProto, schema: OpSchema) -> str | None:
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, attribute in given.items():
        if name not in schema.attributes:
            return f"has an attribute '{name}', which the operator does not have"
        if attribute.type != schema.attributes[name].type.value:
            return f"has an attribute '{name}' that is no {schema.attributes[name].type.name}"
    missing = [name for name, each in schema.attributes.items() if each.required and name not in given]
    return f"lacks its attribute '{missing[0]}'" if missing else None


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}" if most < 100 else f"{least} or more"


def _names(graph: onnx.GraphProto) -> Iterator[tuple[str, object]]:
    for what, values in (("an input", graph.input), ("an output", graph.output)):
        for value in values:
            yield what, value.name
            yield from (("a dimension", dim.dim_param) for dim in value.type.tensor_type.shape.dim)
    for tensor in graph.initializer:
        yield "an initializer", tensor.name
    for node in graph.node:
        yield from (("a node", text) for text in (node.name, node.op_type, node.domain))
        yield from (("a value", name) for name in (*node.input, *node.output))
        yield from (("an attribute", attribute.name) for attribute in node.attribute)
