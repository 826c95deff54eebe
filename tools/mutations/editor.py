"""A graph that is being changed, and what a change of it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

Change = Callable[["Editor"], None]


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
