"""Whether a parsed ONNX graph hangs together: values made once, before their use; nodes as ONNX has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class _Described:
    """What ONNX's description of an operator says, read once: asking the library for it is slow."""

    inputs: tuple[tuple[str, bool], ...]
    """Name, and whether it may be left out."""
    counts: tuple[int, int, int, int]
    """Least and most inputs, least and most outputs."""
    output: str | None
    """The first output's name, where it must be there."""
    attributes: dict[str, tuple[int, str, bool]]
    """Type, its name, and whether it must be there."""


@cache
def _described(operator: str, opset: int) -> _Described | None:
    try:
        schema = get_schema(operator, opset, "")
    except SchemaError:
        return None  # the importer says what it does not know
    option, outputs = OpSchema.FormalParameterOption, schema.outputs
    single = bool(outputs) and outputs[0].option == option.Single
    return _Described(
        tuple((parameter.name, parameter.option == option.Optional) for parameter in schema.inputs),
        (schema.min_input, schema.max_input, schema.min_output, schema.max_output),
        outputs[0].name if single else None,
        {name: (each.type.value, each.type.name, each.required) for name, each in schema.attributes.items()},
    )


def _problem(node: onnx.NodeProto, opset: int) -> str | None:
    """What ONNX's own description of an operator does not allow; None for an operator that it lacks."""
    if node.domain not in ("", "ai.onnx") or opset > onnx_opset_version():
        return None
    described = _described(node.op_type, opset)
    return None if described is None else _wrong_values(node, described) or _wrong_attribute(node, described)


def _wrong_values(node: onnx.NodeProto, described: _Described) -> str | None:
    least, most, least_out, most_out = described.counts
    if not least <= len(node.input) <= most:
        return f"has {len(node.input)} inputs, not {_range(least, most)}"
    if not least_out <= len(node.output) <= most_out:
        return f"has {len(node.output)} outputs, not {_range(least_out, most_out)}"
    for place, given in enumerate(node.input):
        name, optional = described.inputs[min(place, len(described.inputs) - 1)]
        if not given and not optional:
            return f"lacks its input '{name}'"
    if not node.output[0] and described.output is not None:
        return f"lacks its output '{described.output}'"
    return None


def _wrong_attribute(node: onnx.NodeProto, described: _Described) -> str | None:
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, attribute in given.items():
        if name not in described.attributes:
            return f"has an attribute '{name}', which the operator does not have"
        type_, type_name, _ = described.attributes[name]
        if attribute.type != type_:
            return f"has an attribute '{name}' that is no {type_name}"
    required = [name for name, (*_, needed) in described.attributes.items() if needed]
    missing = [name for name in required if name not in given]
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
