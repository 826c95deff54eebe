"""Mutations of what comes in: positions, tokens, and the attention mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper
from tools.mutations.chains import Chain, backwards, minus, rolled
from tools.mutations.editor import Change, Editor, Mutation


def _positions(editor: Editor) -> list[str]:
    """Integer values that become angles or rows of a table."""
    found = [i.name for i in editor.graph.input if "position" in i.name]
    tokens = editor.tokens
    for node in editor.nodes:
        source = node.input[0] if node.input else ""
        grown = source in editor.producers and editor.producers[source].op_type in (
            "Unsqueeze",
            "Expand",
            "Add",
            "Range",
        )
        counts = any(
            editor.producers[a].op_type == "Range" for a in editor.ancestors(source) if a in editor.producers
        )
        if node.op_type == "Cast" and grown and counts and tokens not in editor.ancestors(source) - {tokens}:
            found.append(source)
        if node.op_type == "Gather" and node.input[0] in editor.tensors and node.input[1] not in (tokens,):
            found.append(node.input[1])
    return list(dict.fromkeys(v for v in found if v in editor.producers or "position" in v))[:2]


def placed(editor: Editor) -> Iterator[Mutation]:
    """Tokens at other positions, other tokens."""
    for number, value in enumerate(_positions(editor)):
        for name, chain in _ON_POSITIONS.items():

            def change(e: Editor, value: str = value, chain: Any = chain) -> None:
                e.after(value, lambda v: chain(e, v))

            yield Mutation(f"positions {number} {name}", change)
    for name, chain in _ON_TOKENS.items():

        def replace(e: Editor, chain: Any = chain) -> None:
            value = e.tokens
            users = [n for n in e.nodes if n.op_type != "Shape" and value in n.input]
            new = chain(e, value)
            for node in users:
                e.rewire(node, value, new[-1].output[0])
            e.nodes[:0] = new

        yield Mutation(f"tokens {name}", replace)
    if any(i.name == "attention_mask" for i in editor.graph.input):
        embedded = next(
            n.output[0] for n in editor.nodes if n.op_type == "Gather" and n.input[1] == editor.tokens
        )
        yield Mutation("embeddings times the attention mask", _mask_elsewhere(embedded))
        yield Mutation("attention mask ignored", _mask_ignored)


def _turned_positions(e: Editor, v: str) -> list[NodeProto]:
    ends = e.constant([-(1 << 60)])
    axis = 1 if e.ranks.get(v, 2) > 1 else 0
    return [e.node("Slice", [v, e.constant([-1]), ends, e.constant([axis]), e.constant([-1])])]


_ON_POSITIONS: Final[dict[str, Chain]] = {
    "plus 1": lambda e, v: [e.node("Add", [v, e.constant(1)])],
    "times 2": lambda e, v: [e.node("Mul", [v, e.constant(2)])],
    "all 0": lambda e, v: [e.node("Mul", [v, e.constant(0)])],
    "halved": lambda e, v: [e.node("Div", [v, e.constant(2)])],
    "modulo 5": lambda e, v: [e.node("Mod", [v, e.constant(5)])],
    "negative": lambda e, v: [e.node("Neg", [v])],
    "reversed": _turned_positions,
    "summed up": lambda e, v: [e.node("CumSum", [v, e.constant(1 if e.ranks.get(v, 2) > 1 else 0)])],
    "minus the largest": lambda e, v: minus(e, v, "ReduceMax", 1 if e.ranks.get(v, 2) > 1 else 0),
    "at most 9": lambda e, v: [e.node("Min", [v, e.constant(9)])],
}
_ON_TOKENS: Final[dict[str, Chain]] = {
    "rolled": rolled,
    "reversed": lambda e, v: [backwards(e, v)],
    "all the first": lambda e, v: [
        first := e.node("Gather", [v, e.constant([0])], axis=1),
        zero := e.node("Sub", [v, v]),
        e.node("Add", [zero.output[0], first.output[0]]),
    ],
    "halved": lambda e, v: [e.node("Div", [v, e.constant(2)])],
    "summed up": lambda e, v: [
        total := e.node("CumSum", [v, e.constant(1)]),
        e.node("Mod", [total.output[0], e.constant(512)]),
    ],
}


def _mask_elsewhere(embedded: str) -> Change:
    def change(e: Editor) -> None:
        def chain(v: str) -> list[NodeProto]:
            number = e.node("Cast", ["attention_mask"], to=onnx.TensorProto.FLOAT)
            total = e.node("ReduceMean", [number.output[0], e.constant([1])])
            column = e.node("Unsqueeze", [total.output[0], e.constant([2])])
            return [number, total, column, e.node("Mul", [v, column.output[0]])]

        e.after(embedded, chain)

    return change


def _mask_ignored(e: Editor) -> None:
    """Ones in its place."""
    shape = e.node("Shape", ["attention_mask"])
    one = numpy_helper.from_array(np.ones(1, np.int64))
    ones = e.node("ConstantOfShape", [shape.output[0]], value=one)
    for node in e.nodes:
        e.rewire(node, "attention_mask", ones.output[0])
    e.nodes[:0] = [shape, ones]
