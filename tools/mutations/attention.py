"""Mutations of attention: of its scores, masks, heads, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto
from tools.mutations.chains import Chain, minus, plus, replace, reversed_at, rolled
from tools.mutations.editor import Change, Editor, Mutation


def _scores(editor: Editor) -> list[tuple[int, NodeProto, NodeProto]]:
    """(number of the softmax, product with the keys, product with the values) of spelled out attentions."""
    found = []
    for index in editor.of("Softmax"):
        node: NodeProto | None = editor.nodes[index]
        down = node
        while node is not None and node.op_type != "MatMul":
            inner = [i for i in node.input if editor.tokens in editor.ancestors(i)]
            grown = [i for i in inner if editor.ranks.get(i, 4) == 4 and i in editor.producers]
            node = editor.producers[grown[0]] if grown else None
        for _ in range(6):
            users = editor.users(down.output[0]) if down is not None else []
            down = next((u for u in users if u.op_type != "IsNaN"), None)
            if down is None or down.op_type == "MatMul":
                break
        if node is not None and down is not None:
            found.append((index, node, down))
    return found


def attended(editor: Editor) -> Iterator[Mutation]:
    """Attention that attends to something else."""
    scores = _scores(editor)
    for layer, (index, product, weighted) in enumerate(scores):
        inputs = editor.nodes[index].input[0]
        first, second = editor.nodes.index(product), editor.nodes.index(weighted)
        for axis in (1, 2):
            yield Mutation(f"softmax {layer} over axis {axis}", replace(index, attributes={"axis": axis}))
        for name, chain in _ON_SCORES.items():

            def change(e: Editor, value: str = inputs, chain: Any = chain) -> None:
                e.after(value, lambda v: chain(e, v))

            yield Mutation(f"{name} on scores {layer}", change)
        query, keys = product.input
        weights, values = weighted.input
        yield Mutation(f"no mask at {layer}", replace(index, inputs=[product.output[0]]))
        yield Mutation(f"q and k exchanged at {layer}", _exchanged(first))
        other = scores[(layer + 1) % len(scores)]
        masks = [_mask_of(editor, i) for i in (index, other[0])]
        if None not in masks and masks[0] != masks[1] and layer < 2:
            yield Mutation(
                f"mask of the next layer at {layer}", _mask_moved(index, str(masks[0]), str(masks[1]))
            )
        yield Mutation(
            f"values of the next layer at {layer}", replace(second, inputs=[weights, other[2].input[1]])
        )
        yield Mutation(f"keys for values at {layer}", _keys_for_values(second, keys))
        yield Mutation(f"weights turned at {layer}", _turned(weights))
        yield Mutation(f"queries reversed at {layer}", reversed_at(query))
        yield Mutation(f"values reversed at {layer}", reversed_at(values))
        yield Mutation(f"heads rolled at {layer}", _rolled_heads(values))


def _mask_of(editor: Editor, softmax: int) -> str | None:
    node = editor.producers.get(editor.nodes[softmax].input[0])
    if node is None or node.op_type not in ("Add", "Where"):
        return None
    return next(
        (i for i in node.input if editor.tokens not in editor.ancestors(i) - {i} or "mask" in i), None
    )


def _mask_moved(softmax: int, old: str, new: str) -> Change:
    def change(e: Editor) -> None:
        e.rewire(e.producers[e.nodes[softmax].input[0]], old, new)
        e.nodes[:] = _sorted(e)

    return change


def _sorted(e: Editor) -> list[NodeProto]:
    """The nodes in an order in which values are made before they are used."""
    made = {v.name for v in e.graph.input} | {t.name for t in e.graph.initializer} | {""}
    rest, done = list(e.nodes), list[NodeProto]()
    while rest:
        ready = [n for n in rest if all(i in made for i in n.input)]
        if not ready:
            raise ValueError("a cycle")
        made |= {o for n in ready for o in n.output}
        done += ready
        rest = [n for n in rest if not any(n is r for r in ready)]
    return done


def _exchanged(first: int) -> Change:
    """Scores k q^T, which is their transpose, instead of q k^T."""

    def change(e: Editor) -> None:
        product = e.nodes[first]
        e.after(product.output[0], lambda v: [e.node("Transpose", [v], perm=[0, 1, 3, 2])])

    return change


def _keys_for_values(second: int, keys: str) -> Change:
    def change(e: Editor) -> None:
        turned = e.node("Transpose", [keys], perm=[0, 1, 3, 2])
        at = e.nodes[second]
        at.input[1] = turned.output[0]
        e.nodes.insert(second, turned)

    return change


def _turned(value: str) -> Change:
    return lambda e: e.after(value, lambda v: [e.node("Transpose", [v], perm=[0, 1, 3, 2])])


def _rolled_heads(value: str) -> Change:
    return lambda e: e.after(value, lambda v: rolled(e, v))


def _by_key(e: Editor, v: str, power: int, factor: float) -> list[NodeProto]:
    """scores + factor * key^power."""
    shape = e.node("Shape", [v])
    last = e.node("Gather", [shape.output[0], e.constant(-1)])
    keys = e.node("Range", [e.constant(0), last.output[0], e.constant(1)])
    number = e.node("Cast", [keys.output[0]], to=onnx.TensorProto.FLOAT)
    grown = e.node("Pow", [number.output[0], e.constant(power, np.float32)])
    return plus(
        e,
        v,
        [shape, last, keys, number, grown, e.node("Mul", [grown.output[0], e.constant(factor, np.float32)])],
    )


def _hidden_by_key(e: Editor, v: str) -> list[NodeProto]:
    """Keys from 20 on hidden, but not quite: -1e4 + 501 * key."""
    nodes = _by_key(e, v, 1, 501.0)
    low = e.node("Add", [nodes[-2].output[0], e.constant(-1e4, np.float32)])
    zero = e.constant(0.0, np.float32)
    parity = e.node("Mod", [nodes[2].output[0], e.constant(2)])
    odd = e.node("Equal", [parity.output[0], e.constant(1)])
    mask = e.node("Where", [odd.output[0], low.output[0], zero])
    return plus(e, v, [*nodes[:-1], low, parity, odd, mask])


def _near_hidden(e: Editor, v: str) -> list[NodeProto]:
    """Odd keys get -10000, even ones -9999: the difference is 1."""
    shape = e.node("Shape", [v])
    last = e.node("Gather", [shape.output[0], e.constant(-1)])
    keys = e.node("Range", [e.constant(0), last.output[0], e.constant(1)])
    parity = e.node("Mod", [keys.output[0], e.constant(2)])
    odd = e.node("Equal", [parity.output[0], e.constant(1)])
    mask = e.node("Where", [odd.output[0], e.constant(-10000.0, np.float32), e.constant(-9999.0, np.float32)])
    return plus(e, v, [shape, last, keys, parity, odd, mask])


def _rolled_last(e: Editor, v: str) -> list[NodeProto]:
    one, most, axis = e.constant([1]), e.constant([1 << 60]), e.constant([3])
    tail = e.node("Slice", [v, one, most, axis])
    head = e.node("Slice", [v, e.constant([0]), one, axis])
    return [tail, head, e.node("Concat", [tail.output[0], head.output[0]], axis=3)]


_ON_SCORES: Final[dict[str, Chain]] = {
    "a constant": lambda e, v: [e.node("Add", [v, e.constant(3.0, np.float32)])],
    "a bias by the key": lambda e, v: _by_key(e, v, 1, 0.03),
    "a bias by the key's square": lambda e, v: _by_key(e, v, 2, 0.003),
    "half of everything": lambda e, v: [e.node("Mul", [v, e.constant(0.5, np.float32)])],
    "a bound": lambda e, v: [e.node("Clip", [v, e.constant(-1.0, np.float32), e.constant(1.0, np.float32)])],
    "the sign": lambda e, v: [e.node("Neg", [v])],
    "their mean taken off": lambda e, v: minus(e, v, "ReduceMean", -1),
    "the largest taken off": lambda e, v: minus(e, v, "ReduceMax", -1),
    "the largest of all queries taken off": lambda e, v: minus(e, v, "ReduceMax", 2),
    "a transposition": lambda e, v: [e.node("Transpose", [v], perm=[0, 1, 3, 2])],
    "keys rolled": _rolled_last,
    "an odd mask that wears off": _hidden_by_key,
    "an odd mask of one": _near_hidden,
}
