"""Mutations of ONNX decoders: each changes one thing; most results are no decoders any more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

Change = Callable[["Editor"], None]
_MASKED: Final = -3.0e38


class Editor:
    """A graph that is being changed.

    Args:
        model: it is changed in place; its tensors are in it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.nodes = list(model.graph.node)
        self.producers = {out: node for node in self.nodes for out in node.output}
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.ranks = _ranks(model)
        self.tokens = model.graph.input[0].name

    def finish(self) -> onnx.ModelProto:
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]
        return self.model

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A new initializer; its name."""
        name = f"mutant_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> NodeProto:
        """A new node, not placed yet."""
        name = f"mutant_node_{len(self.nodes)}_{operator}_{random.getrandbits(32)}"
        made: NodeProto = helper.make_node(operator, list(inputs), [f"{name}_out"], name, **attributes)
        return made

    def after(self, value: str, chain: Callable[[str], list[NodeProto]]) -> None:
        """Every user of `value` reads the last of `chain(value)` instead; an output of the graph, too."""
        new = chain(value)
        result = new[-1].output[0]
        at = self.nodes.index(self.producers[value]) + 1 if value in self.producers else 0
        for node in self.nodes:
            self.rewire(node, value, result)
        self.nodes[at:at] = new
        if value in {output.name for output in self.graph.output}:
            inner = f"{value}_before"
            for node in self.nodes:
                for index, name in enumerate(node.output):
                    if name == value:
                        node.output[index] = inner
                self.rewire(node, value, inner)
            new[-1].output[0] = value
            for node in self.nodes:
                self.rewire(node, result, value)

    @staticmethod
    def rewire(node: NodeProto, old: str, new: str) -> None:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new

    def number(self, name: str) -> np.ndarray | None:
        """A constant by the name of its value."""
        if name in self.tensors:
            return np.asarray(numpy_helper.to_array(self.tensors[name]))
        node = self.producers.get(name)
        if node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            return np.asarray(numpy_helper.to_array(node.attribute[0].t))
        return None

    def length(self) -> list[NodeProto]:
        """Nodes that compute the number of tokens, int64 [1]."""
        shape = self.node("Shape", [self.tokens])
        return [shape, self.node("Gather", [shape.output[0], self.constant([1])])]

    def users(self, value: str) -> list[NodeProto]:
        return [node for node in self.nodes if value in node.input]

    def of(self, *operators: str) -> list[int]:
        """Numbers of the nodes of these operators."""
        return [index for index, node in enumerate(self.nodes) if node.op_type in operators]

    def ancestors(self, value: str) -> set[str]:
        found, stack = set[str](), [value]
        while stack:
            name = stack.pop()
            if name not in found:
                found.add(name)
                stack.extend(self.producers[name].input if name in self.producers else ())
        return found


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}


@dataclass
class Mutation:
    """One change, with a name that is the same in every run."""

    name: str
    change: Change = field(repr=False)


def mutations(editor: Editor) -> dict[str, list[Mutation]]:
    """Everything that can be changed in a graph, by kind; `editor` is only read."""
    kinds = (_mixed, _attended, _placed, _cached, _returned, _operators, _constants, _attributes)
    return {kind.__name__.strip("_"): list(kind(editor)) for kind in kinds}


def _residuals(editor: Editor) -> list[str]:
    """Sums of two activations [batch, sequence, hidden]."""
    found = []
    for node in editor.nodes:
        known = all(i in editor.producers and editor.ranks.get(i) == 3 for i in node.input)
        if node.op_type == "Add" and known and editor.ranks.get(node.output[0]) == 3:
            found.append(node.output[0])
        if node.op_type.startswith("Skip"):
            found.append(node.output[0])
    return [v for v in found if editor.tokens in editor.ancestors(v)]


def _mixed(editor: Editor) -> Iterator[Mutation]:
    """Something that mixes tokens, or depends on how many there are, between the layers."""
    places = _residuals(editor)
    if not places:
        return
    for index, (name, chain) in enumerate(_MIXERS.items()):
        value = places[index % len(places)]

        def change(e: Editor, value: str = value, chain: Any = chain) -> None:
            e.after(value, lambda v: chain(e, v))

        yield Mutation(f"{name} after residual {index % len(places)}", change)


def _plus(e: Editor, v: str, nodes: list[NodeProto]) -> list[NodeProto]:
    """v + the last of nodes."""
    return [*nodes, e.node("Add", [v, nodes[-1].output[0]])]


def _one(e: Editor, v: str, operator: str, *more: str, **attributes: Any) -> list[NodeProto]:
    return _plus(e, v, [e.node(operator, [v, *more], **attributes)])


def _reversed(e: Editor, v: str) -> NodeProto:
    ends = e.constant([-(1 << 60)])
    return e.node("Slice", [v, e.constant([-1]), ends, e.constant([1]), e.constant([-1])])


def _rolled(e: Editor, v: str) -> list[NodeProto]:
    one, most, axis = e.constant([1]), e.constant([1 << 60]), e.constant([1])
    tail = e.node("Slice", [v, one, most, axis])
    head = e.node("Slice", [v, e.constant([0]), one, axis])
    return [tail, head, e.node("Concat", [tail.output[0], head.output[0]], axis=1)]


def _shifted(e: Editor, v: str) -> list[NodeProto]:
    """The token before: a causal mixture that is no attention."""
    pads = e.node("Pad", [v, e.constant([0, 1, 0, 0, -1, 0])])
    return _plus(e, v, [pads])


def _paired(e: Editor, v: str) -> list[NodeProto]:
    turned = e.node("Transpose", [v], perm=[0, 2, 1])
    pairs = e.node("MatMul", [v, turned.output[0]])
    return _plus(e, v, [turned, pairs, e.node("MatMul", [pairs.output[0], v])])


def _convolved(e: Editor, v: str) -> list[NodeProto]:
    turned = e.node("Transpose", [v], perm=[0, 2, 1])
    width = _width(e)
    kernel = e.constant(np.full((width, 1, 3), 0.3), np.float32)
    conv = e.node("Conv", [turned.output[0], kernel], group=width, pads=[2, 0])
    return _plus(e, v, [turned, conv, e.node("Transpose", [conv.output[0]], perm=[0, 2, 1])])


def _width(e: Editor) -> int:
    gather = next(n for n in e.nodes if n.op_type == "Gather" and n.input[1] == e.tokens)
    return int(e.tensors[gather.input[0]].dims[1])


def _length_table(e: Editor, v: str) -> list[NodeProto]:
    """A row of a table, chosen by the number of tokens."""
    rows = np.random.default_rng(0).normal(size=(512, _width(e)))
    nodes = e.length()
    last = nodes[-1].output[0]
    end = e.node("Add", [last, e.constant([1])])
    row = e.node("Slice", [e.constant(rows, np.float32), last, end.output[0], e.constant([0])])
    return _plus(e, v, [*nodes, end, row])


def _length_gathered(e: Editor, v: str) -> list[NodeProto]:
    rows = np.random.default_rng(0).normal(size=(512, _width(e)))
    nodes = e.length()
    return _plus(e, v, [*nodes, e.node("Gather", [e.constant(rows, np.float32), nodes[-1].output[0]])])


def _length_counted(e: Editor, v: str) -> list[NodeProto]:
    """Range(length, length + 1): one element."""
    nodes = e.length()
    first = e.node("Squeeze", [nodes[-1].output[0]])
    end = e.node("Add", [first.output[0], e.constant(1)])
    count = e.node("Range", [first.output[0], end.output[0], e.constant(1)])
    number = e.node("Cast", [count.output[0]], to=onnx.TensorProto.FLOAT)
    small = e.node("Mul", [number.output[0], e.constant(0.1, np.float32)])
    return _plus(e, v, [*nodes, first, end, count, number, small])


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
    more = e.node("Add", [v, e.constant(np.linspace(-1, 1, _width(e)), np.float32)])
    return [*nodes, count, numbers, most, exact, more, e.node("Where", [exact.output[0], more.output[0], v])]


def _length_masked(e: Editor, v: str) -> list[NodeProto]:
    """A triangle whose diagonal depends on the number of tokens, added up."""
    nodes = e.length()
    k = e.node("Squeeze", [nodes[-1].output[0]])
    width = _width(e)
    triangle = e.node("Trilu", [e.constant(np.ones((width, width)), np.float32), k.output[0]], upper=0)
    return _plus(e, v, [*nodes, k, triangle, e.node("ReduceMean", [triangle.output[0], e.constant([0])])])


def _batch_first(e: Editor, v: str) -> list[NodeProto]:
    return _plus(e, v, [e.node("Transpose", [v], perm=[1, 0, 2])])


def _folded(e: Editor, v: str) -> list[NodeProto]:
    """[b, s, h] read as [b, h, s] and turned: elements change their tokens."""
    shape = e.node("Shape", [v])
    order = e.node("Gather", [shape.output[0], e.constant([0, 2, 1])])
    folded = e.node("Reshape", [v, order.output[0]])
    return _plus(e, v, [shape, order, folded, e.node("Transpose", [folded.output[0]], perm=[0, 2, 1])])


_MIXERS: Final[dict[str, Callable[[Editor, str], list[NodeProto]]]] = {
    "mean over tokens": lambda e, v: _one(e, v, "ReduceMean", e.constant([1])),
    "largest over tokens": lambda e, v: _one(e, v, "ReduceMax", e.constant([1])),
    "mean over the batch": lambda e, v: _one(e, v, "ReduceMean", e.constant([0])),
    "running sum": lambda e, v: _one(e, v, "CumSum", e.constant(1)),
    "softmax over tokens": lambda e, v: _one(e, v, "Softmax", axis=1),
    "reversed tokens": lambda e, v: _plus(e, v, [_reversed(e, v)]),
    "rolled tokens": lambda e, v: _plus(e, v, _rolled(e, v)),
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


def _replace(old: int, **changes: Any) -> Change:
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


def _attended(editor: Editor) -> Iterator[Mutation]:
    """Attention that attends to something else."""
    scores = _scores(editor)
    for layer, (index, product, weighted) in enumerate(scores):
        inputs = editor.nodes[index].input[0]
        first, second = editor.nodes.index(product), editor.nodes.index(weighted)
        for axis in (1, 2):
            yield Mutation(f"softmax {layer} over axis {axis}", _replace(index, attributes={"axis": axis}))
        for name, chain in _ON_SCORES.items():

            def change(e: Editor, value: str = inputs, chain: Any = chain) -> None:
                e.after(value, lambda v: chain(e, v))

            yield Mutation(f"{name} on scores {layer}", change)
        query, keys = product.input
        weights, values = weighted.input
        yield Mutation(f"no mask at {layer}", _replace(index, inputs=[product.output[0]]))
        yield Mutation(f"q and k exchanged at {layer}", _exchanged(first, second))
        other = scores[(layer + 1) % len(scores)]
        masks = [_mask_of(editor, i) for i in (index, other[0])]
        if None not in masks and masks[0] != masks[1] and layer < 2:
            yield Mutation(
                f"mask of the next layer at {layer}", _mask_moved(index, str(masks[0]), str(masks[1]))
            )
        yield Mutation(
            f"values of the next layer at {layer}", _replace(second, inputs=[weights, other[2].input[1]])
        )
        yield Mutation(f"keys for values at {layer}", _keys_for_values(second, keys))
        yield Mutation(f"weights turned at {layer}", _turned(weights))
        yield Mutation(f"queries reversed at {layer}", _reversed_at(query))
        yield Mutation(f"values reversed at {layer}", _reversed_at(values))
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


def _exchanged(first: int, second: int) -> Change:
    """scores = k q^T instead of q k^T, where the shapes allow it."""

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


def _reversed_at(value: str) -> Change:
    def change(e: Editor) -> None:
        ends = e.constant([-(1 << 60)])
        e.after(
            value,
            lambda v: [e.node("Slice", [v, e.constant([-1]), ends, e.constant([2]), e.constant([-1])])],
        )

    return change


def _rolled_heads(value: str) -> Change:
    return lambda e: e.after(value, lambda v: _rolled(e, v))


def _by_key(e: Editor, v: str, power: int, factor: float) -> list[NodeProto]:
    """scores + factor * key^power."""
    shape = e.node("Shape", [v])
    last = e.node("Gather", [shape.output[0], e.constant(-1)])
    keys = e.node("Range", [e.constant(0), last.output[0], e.constant(1)])
    number = e.node("Cast", [keys.output[0]], to=onnx.TensorProto.FLOAT)
    grown = e.node("Pow", [number.output[0], e.constant(power, np.float32)])
    return _plus(
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
    return _plus(e, v, [*nodes[:-1], low, parity, odd, mask])


def _near_hidden(e: Editor, v: str) -> list[NodeProto]:
    """Odd keys get -10000, even ones -9999: the difference is 1."""
    shape = e.node("Shape", [v])
    last = e.node("Gather", [shape.output[0], e.constant(-1)])
    keys = e.node("Range", [e.constant(0), last.output[0], e.constant(1)])
    parity = e.node("Mod", [keys.output[0], e.constant(2)])
    odd = e.node("Equal", [parity.output[0], e.constant(1)])
    mask = e.node("Where", [odd.output[0], e.constant(-10000.0, np.float32), e.constant(-9999.0, np.float32)])
    return _plus(e, v, [shape, last, keys, parity, odd, mask])


def _off(e: Editor, v: str, operator: str, axis: int) -> list[NodeProto]:
    top = e.node(operator, [v, e.constant([axis])])
    return [top, e.node("Sub", [v, top.output[0]])]


def _rolled_last(e: Editor, v: str) -> list[NodeProto]:
    one, most, axis = e.constant([1]), e.constant([1 << 60]), e.constant([3])
    tail = e.node("Slice", [v, one, most, axis])
    head = e.node("Slice", [v, e.constant([0]), one, axis])
    return [tail, head, e.node("Concat", [tail.output[0], head.output[0]], axis=3)]


_ON_SCORES: Final[dict[str, Callable[[Editor, str], list[NodeProto]]]] = {
    "a constant": lambda e, v: [e.node("Add", [v, e.constant(3.0, np.float32)])],
    "a bias by the key": lambda e, v: _by_key(e, v, 1, 0.03),
    "a bias by the key's square": lambda e, v: _by_key(e, v, 2, 0.003),
    "half of everything": lambda e, v: [e.node("Mul", [v, e.constant(0.5, np.float32)])],
    "a bound": lambda e, v: [e.node("Clip", [v, e.constant(-1.0, np.float32), e.constant(1.0, np.float32)])],
    "the sign": lambda e, v: [e.node("Neg", [v])],
    "their mean taken off": lambda e, v: _off(e, v, "ReduceMean", -1),
    "the largest taken off": lambda e, v: _off(e, v, "ReduceMax", -1),
    "the largest of all queries taken off": lambda e, v: _off(e, v, "ReduceMax", 2),
    "a transposition": lambda e, v: [e.node("Transpose", [v], perm=[0, 1, 3, 2])],
    "keys rolled": _rolled_last,
    "an odd mask that wears off": _hidden_by_key,
    "an odd mask of one": _near_hidden,
}


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


def _placed(editor: Editor) -> Iterator[Mutation]:
    """Tokens at other positions, other tokens."""
    for number, value in enumerate(_positions(editor)):
        for name, chain in _ON_POSITIONS.items():

            def change(e: Editor, value: str = value, chain: Any = chain) -> None:
                e.after(value, lambda v: chain(e, v))

            yield Mutation(f"positions {number} {name}", change)
    for name, chain in _ON_TOKENS.items():

        def replace(e: Editor, chain: Any = chain) -> None:
            value = e.tokens
            users = [n for n in e.nodes if n.op_type == "Gather" and value in n.input]
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


def _last_axis(e: Editor, v: str) -> int:
    return e.ranks.get(v, 2) - 1


def _turned_positions(e: Editor, v: str) -> list[NodeProto]:
    ends = e.constant([-(1 << 60)])
    axis = 1 if e.ranks.get(v, 2) > 1 else 0
    return [e.node("Slice", [v, e.constant([-1]), ends, e.constant([axis]), e.constant([-1])])]


_ON_POSITIONS: Final[dict[str, Callable[[Editor, str], list[NodeProto]]]] = {
    "plus 1": lambda e, v: [e.node("Add", [v, e.constant(1)])],
    "times 2": lambda e, v: [e.node("Mul", [v, e.constant(2)])],
    "all 0": lambda e, v: [e.node("Mul", [v, e.constant(0)])],
    "halved": lambda e, v: [e.node("Div", [v, e.constant(2)])],
    "modulo 5": lambda e, v: [e.node("Mod", [v, e.constant(5)])],
    "negative": lambda e, v: [e.node("Neg", [v])],
    "reversed": _turned_positions,
    "summed up": lambda e, v: [e.node("CumSum", [v, e.constant(1 if e.ranks.get(v, 2) > 1 else 0)])],
    "minus the largest": lambda e, v: _off(e, v, "ReduceMax", 1 if e.ranks.get(v, 2) > 1 else 0),
    "at most 9": lambda e, v: [e.node("Min", [v, e.constant(9)])],
}
_ON_TOKENS: Final[dict[str, Callable[[Editor, str], list[NodeProto]]]] = {
    "rolled": _rolled,
    "reversed": lambda e, v: [_reversed(e, v)],
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


def _cached(editor: Editor) -> Iterator[Mutation]:
    """Pasts read by another layer, or put elsewhere."""
    past = [i.name for i in editor.graph.input if i.name.startswith("past")]
    for index, name in enumerate(past):
        for step, what in ((2, "the next layer"), (1, "the other of keys and values")):
            other = past[(index + step) % len(past)] if step == 2 else past[index ^ 1]
            if index < 2:
                yield Mutation(f"{name} exchanged with that of {what}", _swapped(name, other))
                yield Mutation(f"{other} read for {name}", _renamed(name, other))
    for number in editor.of("Concat"):
        node = editor.nodes[number]
        if node.input[0] in past and number < len(editor.nodes):
            yield Mutation(
                f"past behind the new in {node.name}", _replace(number, inputs=[*node.input][::-1])
            )
            yield Mutation(f"past beside the new in {node.name}", _replace(number, attributes={"axis": 1}))
            yield Mutation(
                f"past twice in {node.name}", _replace(number, inputs=[node.input[0], *node.input])
            )
            yield Mutation(f"past reversed in {node.name}", _reversed_at(node.input[0]))
            present = node.output[0]
            if present in {o.name for o in editor.graph.output}:
                yield Mutation(f"{present} without the past", _only_new(number))
                yield Mutation(f"{present} doubled on its way out", _doubled(present))


def _swapped(a: str, b: str) -> Change:
    def change(e: Editor) -> None:
        for node in e.nodes:
            names = [{a: b, b: a}.get(i, i) for i in node.input]
            if node.op_type != "Shape":
                node.ClearField("input")
                node.input.extend(names)

    return change


def _renamed(old: str, new: str) -> Change:
    def change(e: Editor) -> None:
        for node in e.nodes:
            e.rewire(node, old, new)

    return change


def _only_new(number: int) -> Change:
    """The present is what is new, while attention reads the past, too."""

    def change(e: Editor) -> None:
        node = e.nodes[number]
        name, inner = node.output[0], f"{node.output[0]}_all"
        new = node.input[1]
        for other in e.nodes:
            e.rewire(other, name, inner)
        node.output[0] = inner
        copy = helper.make_node("Identity", [new], [name], "only_new")
        e.nodes.insert(number + 1, copy)

    return change


def _doubled(name: str) -> Change:
    def change(e: Editor) -> None:
        node = e.producers[name]
        inner = f"{name}_inner"
        for other in e.nodes:
            e.rewire(other, name, inner)
        node.output[0] = inner
        e.nodes.append(helper.make_node("Mul", [inner, e.constant(2.0, np.float32)], [name], "doubled"))

    return change


def _returned(editor: Editor) -> Iterator[Mutation]:
    """Other logits."""
    name = editor.graph.output[0].name

    def last(e: Editor) -> None:
        e.after(
            name, lambda v: [e.node("Slice", [v, e.constant([-1]), e.constant([1 << 60]), e.constant([1])])]
        )

    def reverse(e: Editor) -> None:
        e.after(name, lambda v: [_reversed(e, v)])

    def normal(e: Editor) -> None:
        e.after(name, lambda v: [e.node("LogSoftmax", [v], axis=-1)])

    def over_tokens(e: Editor) -> None:
        e.after(name, lambda v: [e.node("LogSoftmax", [v], axis=1)])

    def hidden(e: Editor) -> None:
        value = helper.make_tensor_value_info(
            _residuals(e)[-1], onnx.TensorProto.FLOAT, ["batch", "sequence", _width(e)]
        )
        outputs = [value, *e.graph.output]
        del e.graph.output[:]
        e.graph.output.extend(outputs)

    yield Mutation("logits of the last token", last)
    yield Mutation("logits reversed", reverse)
    yield Mutation("logits as logarithms", normal)
    yield Mutation("logits normalized over tokens", over_tokens)
    if _residuals(editor):
        yield Mutation("a hidden state before the logits", hidden)


_OTHERS: Final = {
    "Less": ("LessOrEqual", "Greater"),
    "LessOrEqual": ("Less", "GreaterOrEqual"),
    "Greater": ("GreaterOrEqual", "Less"),
    "GreaterOrEqual": ("Greater", "LessOrEqual"),
    "And": ("Or", "Xor"),
    "Or": ("And",),
    "Add": ("Sub", "Mul"),
    "Sub": ("Add",),
    "Mul": ("Add", "Div"),
    "Div": ("Mul",),
    "Cos": ("Sin",),
    "Sin": ("Cos",),
    "Neg": ("Identity",),
    "Not": ("Identity",),
    "Tanh": ("Sigmoid", "Identity"),
    "Softmax": ("LogSoftmax", "Hardmax"),
    "ReduceMean": ("ReduceSum", "ReduceMax"),
    "Max": ("Min",),
    "Sqrt": ("Identity",),
}


def _operators(editor: Editor) -> Iterator[Mutation]:
    """Another operator, or the operands in another order."""
    for number, node in enumerate(editor.nodes):
        for other in _OTHERS.get(node.op_type, ()):
            yield Mutation(f"{other} for {node.name}", _replace(number, operator=other))
        order = list(node.input)
        if node.op_type in ("Sub", "Div", "Concat", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
            yield Mutation(f"inputs of {node.name} reversed", _replace(number, inputs=order[::-1]))
        if node.op_type == "Where":
            swapped = [order[0], order[2], order[1]]
            yield Mutation(f"branches of {node.name} exchanged", _replace(number, inputs=swapped))
        if node.op_type == "Unsqueeze" and editor.number(node.input[1]) is not None:
            axes = editor.number(node.input[1])

            def moved(e: Editor, number: int = number, axes: Any = axes) -> None:
                e.nodes[number].input[1] = e.constant(np.abs(axes - 1))

            yield Mutation(f"axis of {node.name} moved", moved)


def _constants(editor: Editor) -> Iterator[Mutation]:
    """Small constants changed for one user."""
    for number, node in enumerate(editor.nodes):
        for place, name in enumerate(node.input):
            array = editor.number(name)
            if array is None or array.size > 16 or array.dtype.kind not in "fib":
                continue
            changed: dict[str, Any] = {"negated": ~array if array.dtype.kind == "b" else -array}
            if array.dtype.kind == "i":
                changed |= {"one more": array + 1, "one less": array - 1}
            elif array.dtype.kind == "f":
                changed |= {
                    "halved": array * 0.5,
                    "in other order": array[::-1] if array.ndim == 1 else array + 1,
                }
            for what, new in changed.items():

                def change(e: Editor, at: tuple[int, int] = (number, place), new: Any = new) -> None:
                    e.nodes[at[0]].input[at[1]] = e.constant(new, new.dtype)

                yield Mutation(f"constant {place} of {node.name} {what}", change)


def _attributes(editor: Editor) -> Iterator[Mutation]:
    """Attributes of nodes changed, and set where they are not."""
    for number, node in enumerate(editor.nodes):
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            for what, new in _other_values(attribute.name, value):
                yield Mutation(
                    f"{attribute.name} of {node.name} {what}",
                    _replace(number, attributes={attribute.name: new}),
                )
        for name, values in _OPTIONS.get(node.op_type, {}).items():
            for new in values:
                yield Mutation(f"{name} of {node.name} is {new}", _replace(number, attributes={name: new}))


def _other_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name in ("perm", "axes", "pads") and isinstance(value, list):
        for i in range(len(value) - 1):
            new = list(value)
            new[i], new[i + 1] = new[i + 1], new[i]
            yield f"as {new}", new
    elif isinstance(value, bool) or name in (
        "keepdims",
        "is_causal",
        "exclusive",
        "reverse",
        "upper",
        "interleaved",
        "do_rotary",
        "rotary_interleaved",
        "allowzero",
    ):
        yield f"is {1 - value}", 1 - value
    elif isinstance(value, int) and name not in ("to", "stash_type", "dtype"):
        yield "one more", value + 1
        yield "one less", value - 1
    elif isinstance(value, float):
        yield "halved", value * 0.5
        yield "negated", -value


_OPTIONS: Final[dict[str, dict[str, list[Any]]]] = {
    "Attention": {"is_causal": [0, 1], "softcap": [2.0], "scale": [0.1, 1.0], "qk_matmul_output_mode": [1]},
    "GroupQueryAttention": {
        "scale": [0.1],
        "softcap": [2.0],
        "local_window_size": [3],
        "smooth_softmax": [1],
        "rotary_interleaved": [1],
        "do_rotary": [0],
    },
    "RotaryEmbedding": {"interleaved": [1], "rotary_embedding_dim": [16]},
    "RMSNormalization": {"axis": [1, -2], "epsilon": [0.1]},
    "LayerNormalization": {"axis": [1, -2], "epsilon": [0.1]},
    "SkipSimplifiedLayerNormalization": {"epsilon": [0.1]},
    "CumSum": {"exclusive": [1], "reverse": [1]},
    "Gelu": {"approximate": ["tanh", "none"]},
    "Gather": {"axis": [1]},
    "Trilu": {"upper": [0, 1]},
    "Mod": {"fmod": [1]},
}
