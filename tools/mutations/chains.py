"""Changes that several kinds of mutations make: new nodes behind a value, other inputs or attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import NodeProto, helper
from tools.mutations.editor import Change, Editor

Chain = Callable[[Editor, str], list[NodeProto]]
"""Makes new nodes that read a value; the last one is to be read in its place."""


def plus(e: Editor, v: str, nodes: list[NodeProto]) -> list[NodeProto]:
    """v + the last of nodes."""
    return [*nodes, e.node("Add", [v, nodes[-1].output[0]])]


def backwards(e: Editor, v: str) -> NodeProto:
    """The tokens of v [batch, sequence, ...] in reverse order."""
    ends = e.constant([-(1 << 60)])
    return e.node("Slice", [v, e.constant([-1]), ends, e.constant([1]), e.constant([-1])])


def rolled(e: Editor, v: str) -> list[NodeProto]:
    """v with its axis 1 turned by one: the first comes last."""
    one, most, axis = e.constant([1]), e.constant([1 << 60]), e.constant([1])
    tail = e.node("Slice", [v, one, most, axis])
    head = e.node("Slice", [v, e.constant([0]), one, axis])
    return [tail, head, e.node("Concat", [tail.output[0], head.output[0]], axis=1)]


def minus(e: Editor, v: str, operator: str, axis: int) -> list[NodeProto]:
    """v less its mean, largest element or the like along an axis."""
    top = e.node(operator, [v, e.constant([axis])])
    return [top, e.node("Sub", [v, top.output[0]])]


def reversed_at(value: str) -> Change:
    """The tokens of a value [batch, heads, tokens, ...] in reverse order."""

    def change(e: Editor) -> None:
        ends = e.constant([-(1 << 60)])
        e.after(
            value,
            lambda v: [e.node("Slice", [v, e.constant([-1]), ends, e.constant([2]), e.constant([-1])])],
        )

    return change


def replace(old: int, **changes: Any) -> Change:
    """Attributes, operator or inputs of node number `old` changed."""

    def change(e: Editor) -> None:
        node = e.nodes[old]
        node.op_type = changes.get("operator", node.op_type)
        if "inputs" in changes:
            node.ClearField("input")
            node.input.extend(changes["inputs"])
        for name, value in changes.get("attributes", {}).items():
            for attribute in [a for a in node.attribute if a.name == name]:
                node.attribute.remove(attribute)
            node.attribute.append(helper.make_attribute(name, value))

    return change
