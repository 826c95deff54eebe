"""Mutations between the layers: something mixes tokens, or depends on how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto
from tools.mutations.chains import Chain, backwards, plus, rolled
from tools.mutations.editor import Editor, Mutation


def residuals(editor: Editor) -> list[str]:
    """Sums of two activations [batch, sequence, hidden]."""
    found = []
    for node in editor.nodes:
        known = all(i in editor.producers and editor.ranks.get(i) == 3 for i in node.input)
        if node.op_type == "Add" and known and editor.ranks.get(node.output[0]) == 3:
            found.append(node.output[0])
        if node.op_type.startswith("Skip"):
            found.append(node.output[0])
    return [v for v in found if editor.tokens in editor.ancestors(v)]


def mixed(editor: Editor) -> Iterator[Mutation]:
    """Something that mixes tokens, or depends on how many there are, between the layers."""
    places = residuals(editor)
    if not places:
        return
    for index, (name, chain) in enumerate(_MIXERS.items()):
        value = places[index % len(places)]

        def change(e: Editor, value: str = value, chain: Any = chain) -> None:
            e.after(value, lambda v: chain(e, v))

        yield Mutation(f"{name} after residual {index % len(places)}", change)


def _one(e: Editor, v: str, operator: str, *more: str, **attributes: Any) -> list[NodeProto]:
    return plus(e, v, [e.node(operator, [v, *more], **attributes)])


def _shifted(e: Editor, v: str) -> list[NodeProto]:
    """The token before: a causal mixture that is no attention."""
    pads = e.node("Pad", [v, e.constant([0, 1, 0, 0, -1, 0])])
    return plus(e, v, [pads])


def _paired(e: Editor, v: str) -> list[NodeProto]:
    turned = e.node("Transpose", [v], perm=[0, 2, 1])
    pairs = e.node("MatMul", [v, turned.output[0]])
    return plus(e, v, [turned, pairs, e.node("MatMul", [pairs.output[0], v])])


def _convolved(e: Editor, v: str) -> list[NodeProto]:
    turned = e.node("Transpose", [v], perm=[0, 2, 1])
    width = hidden_size(e)
    kernel = e.constant(np.full((width, 1, 3), 0.3), np.float32)
    conv = e.node("Conv", [turned.output[0], kernel], group=width, pads=[2, 0])
    return plus(e, v, [turned, conv, e.node("Transpose", [conv.output[0]], perm=[0, 2, 1])])


def hidden_size(e: Editor) -> int:
    """Columns of the table of embeddings."""
    gather = next(n for n in e.nodes if n.op_type == "Gather" and n.input[1] == e.tokens)
    return int(e.tensors[gather.input[0]].dims[1])


def _length_table(e: Editor, v: str) -> list[NodeProto]:
    """A row of a table, chosen by the number of tokens."""
    rows = np.random.default_rng(0).normal(size=(512, hidden_size(e)))
    nodes = e.length()
    last = nodes[-1].output[0]
    end = e.node("Add", [last, e.constant([1])])
    row = e.node("Slice", [e.constant(rows, np.float32), last, end.output[0], e.constant([0])])
    return plus(e, v, [*nodes, end, row])


def _length_gathered(e: Editor, v: str) -> list[NodeProto]:
    rows = np.random.default_rng(0).normal(size=(512, hidden_size(e)))
    nodes = e.length()
    return plus(e, v, [*nodes, e.node("Gather", [e.constant(rows, np.float32), nodes[-1].output[0]])])


def _length_counted(e: Editor, v: str) -> list[NodeProto]:
    """Range(length, length + 1): one element."""
    nodes = e.length()
    first = e.node("Squeeze", [nodes[-1].output[0]])
    end = e.node("Add", [first.output[0], e.constant(1)])
    count = e.node("Range", [first.output[0], end.output[0], e.constant(1)])
    number = e.node("Cast", [count.output[0]], to=onnx.TensorProto.FLOAT)
    small = e.node("Mul", [number.output[0], e.constant(0.1, np.float32)])
    return plus(e, v, [*nodes, first, end, count, number, small])


def _length_scaled(e: Editor, v: str) -> list[NodeProto]:
    nodes = e.length()
    number = e.node("Cast", [nodes[-1].output[0]], to=onnx.TensorProto.FLOAT)
    root = e.node("Sqrt", [number.output[0]])
    return [*nodes, number, root, e.node("Div", [v, root.output[0]])]


def _length_exact(e: Editor, v: str) -> list[NodeProto]:
    """Another value in sequences of exactly 30 tokens."""
    nodes = e.length()
    count = e.node("Squeeze", [nodes[-1].output[0]])
    numbers = e.node("Range", [e.constant(0), count.output[0], e.constant(1)])
    most = e.node("ReduceMax", [numbers.output[0]], keepdims=0)
    exact = e.node("Equal", [most.output[0], e.constant(29)])
    more = e.node("Add", [v, e.constant(np.linspace(-1, 1, hidden_size(e)), np.float32)])
    return [*nodes, count, numbers, most, exact, more, e.node("Where", [exact.output[0], more.output[0], v])]


def _length_masked(e: Editor, v: str) -> list[NodeProto]:
    """A triangle whose diagonal depends on the number of tokens, added up."""
    nodes = e.length()
    k = e.node("Squeeze", [nodes[-1].output[0]])
    width = hidden_size(e)
    triangle = e.node("Trilu", [e.constant(np.ones((width, width)), np.float32), k.output[0]], upper=0)
    return plus(e, v, [*nodes, k, triangle, e.node("ReduceMean", [triangle.output[0], e.constant([0])])])


def _batch_first(e: Editor, v: str) -> list[NodeProto]:
    return plus(e, v, [e.node("Transpose", [v], perm=[1, 0, 2])])


def _folded(e: Editor, v: str) -> list[NodeProto]:
    """[b, s, h] read as [b, h, s] and turned: elements change their tokens."""
    shape = e.node("Shape", [v])
    order = e.node("Gather", [shape.output[0], e.constant([0, 2, 1])])
    folded = e.node("Reshape", [v, order.output[0]])
    return plus(e, v, [shape, order, folded, e.node("Transpose", [folded.output[0]], perm=[0, 2, 1])])


_MIXERS: Final[dict[str, Chain]] = {
    "mean over tokens": lambda e, v: _one(e, v, "ReduceMean", e.constant([1])),
    "largest over tokens": lambda e, v: _one(e, v, "ReduceMax", e.constant([1])),
    "mean over the batch": lambda e, v: _one(e, v, "ReduceMean", e.constant([0])),
    "running sum": lambda e, v: _one(e, v, "CumSum", e.constant(1)),
    "softmax over tokens": lambda e, v: _one(e, v, "Softmax", axis=1),
    "reversed tokens": lambda e, v: plus(e, v, [backwards(e, v)]),
    "rolled tokens": lambda e, v: plus(e, v, rolled(e, v)),
    "the token before": _shifted,
    "the first token": lambda e, v: _one(e, v, "Slice", e.constant([0]), e.constant([1]), e.constant([1])),
    "the last token, gathered": lambda e, v: _one(e, v, "Gather", e.constant([-1]), axis=1),
    "products of tokens": _paired,
    "a convolution over tokens": _convolved,
    "layer norm over tokens and elements": lambda e, v: _one(e, v, "LpNormalization", axis=1),
    "batch and tokens exchanged": _batch_first,
    "elements folded into tokens": _folded,
    "a row by the length, sliced": _length_table,
    "a row by the length, gathered": _length_gathered,
    "a count from the length": _length_counted,
    "divided by the root of the length": _length_scaled,
    "other at one length": _length_exact,
    "a triangle by the length": _length_masked,
}
