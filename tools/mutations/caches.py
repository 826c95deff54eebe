"""Mutations of caches and results: pasts, presents and logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper
from tools.mutations.chains import backwards, replace, reversed_at
from tools.mutations.editor import Change, Editor, Mutation
from tools.mutations.tokens import hidden_size, residuals


def cached(editor: Editor) -> Iterator[Mutation]:
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
            yield Mutation(f"past behind the new in {node.name}", replace(number, inputs=[*node.input][::-1]))
            yield Mutation(f"past beside the new in {node.name}", replace(number, attributes={"axis": 1}))
            yield Mutation(f"past twice in {node.name}", replace(number, inputs=[node.input[0], *node.input]))
            yield Mutation(f"past reversed in {node.name}", reversed_at(node.input[0]))
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


def returned(editor: Editor) -> Iterator[Mutation]:
    """Other logits."""
    name = editor.graph.output[0].name

    def last(e: Editor) -> None:
        e.after(
            name, lambda v: [e.node("Slice", [v, e.constant([-1]), e.constant([1 << 60]), e.constant([1])])]
        )

    def reverse(e: Editor) -> None:
        e.after(name, lambda v: [backwards(e, v)])

    def normal(e: Editor) -> None:
        e.after(name, lambda v: [e.node("LogSoftmax", [v], axis=-1)])

    def over_tokens(e: Editor) -> None:
        e.after(name, lambda v: [e.node("LogSoftmax", [v], axis=1)])

    def hidden(e: Editor) -> None:
        value = helper.make_tensor_value_info(
            residuals(e)[-1], onnx.TensorProto.FLOAT, ["batch", "sequence", hidden_size(e)]
        )
        outputs = [value, *e.graph.output]
        del e.graph.output[:]
        e.graph.output.extend(outputs)

    yield Mutation("logits of the last token", last)
    yield Mutation("logits reversed", reverse)
    yield Mutation("logits as logarithms", normal)
    yield Mutation("logits normalized over tokens", over_tokens)
    if residuals(editor):
        yield Mutation("a hidden state before the logits", hidden)
