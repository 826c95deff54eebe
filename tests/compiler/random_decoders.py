"""Small decoders written node by node, as a specification of all their parts says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .random_specs import Spec

VOCAB, CONTEXT = 512, 80
HIDDEN = float(np.finfo(np.float32).min)


class Writer:
    """Writes the graph of one specification."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.random = spec, np.random.default_rng(spec.seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: str, count: int = 1, **attributes: Any) -> Any:
        """A node; its output, or a list of them."""
        outputs = [f"v{len(self.nodes)}_{i}" for i in range(count)]
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name, **attributes))
        return outputs[0] if count == 1 else outputs

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def weight(self, *shape: int) -> str:
        return self.const(self.random.normal(size=shape) / math.sqrt(shape[0]) * 1.5)

    def model(self) -> onnx.ModelProto:
        s = self.spec
        table = self.const(self.random.normal(size=(VOCAB, s.hidden)))
        x = self("Gather", table, "input_ids")
        shape = self("Shape", "input_ids")
        self.batch, self.one = self("Gather", shape, self.ints(0)), self("Gather", shape, self.ints(1))
        self.length = self("Squeeze", self.one)
        self.count = self("Range", self.const(0, np.int64), self.length, self.const(1, np.int64))
        if s.positions == "learned":
            learned = self.const(self.random.normal(size=(CONTEXT, s.hidden)) * 0.3)
            x = self("Add", x, self("Gather", learned, self.count))
        for block in range(s.blocks):
            x = self.block(x, s.mask[block], s.fault if block == 0 else None)
        x = self.normalized(x)
        head = self("Transpose", table, perm=[1, 0]) if s.tied else self.weight(s.hidden, VOCAB)
        if s.fault == "head of the last token":
            x = self("Add", x, self("Gather", x, self.ints(-1), axis=1))
        self.nodes.append(helper.make_node("MatMul", [x, head], ["logits"], "head"))
        return self.finished()

    def finished(self) -> onnx.ModelProto:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
        out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCAB])
        graph = helper.make_graph(self.nodes, "random", [ids], [out], self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)

    def block(self, x: str, mask: str, fault: str | None) -> str:
        y = self.normalized(x)
        attended = self.attention(y, mask, fault)
        if self.spec.parallel:
            x = self("Add", x, self("Add", attended, self.feed_forward(y)))
        else:
            x = self("Add", x, attended)
            x = self("Add", x, self.feed_forward(self.normalized(x)))
        return self.mixed(x, fault)

    def mixed(self, x: str, fault: str | None) -> str:
        """x with what a faulty decoder does outside attention."""
        if fault == "mean over tokens":
            x = self("Add", x, self("ReduceMean", x, self.ints(1)))
        elif fault == "rolled tokens":
            most = self.ints(1 << 60)
            tail = self("Slice", x, self.ints(1), most, self.ints(1))
            first = self("Slice", x, self.ints(0), self.ints(1), self.ints(1))
            x = self("Add", x, self("Concat", tail, first, axis=1))
        elif fault == "running sum":
            x = self("Add", x, self("CumSum", x, self.const(1, np.int64)))
        elif fault == "count of tokens":
            end = self("Add", self.length, self.const(1, np.int64))
            number = self("Range", self.length, end, self.const(1, np.int64))
            x = self("Add", x, self("Cast", number, to=TensorProto.FLOAT))
        elif fault == "row by length":
            table = self.const(self.random.normal(size=(CONTEXT + 1, self.spec.hidden)))
            end = self("Add", self.one, self.ints(1))
            x = self("Add", x, self("Slice", table, self.one, end, self.ints(0)))
        return x

    def normalized(self, x: str) -> str:
        s, weight = self.spec, self.const(1 + 0.1 * self.random.normal(size=self.spec.hidden))
        if s.norm == "layer":
            return str(self("LayerNormalization", x, weight, self.const(np.full(s.hidden, 0.1)), axis=-1))
        if s.norm == "none":
            return str(self("Mul", x, weight))
        if s.norm == "spelled layer":
            x = self("Sub", x, self("ReduceMean", x, self.ints(-1)))
        square = self("ReduceMean", self("Mul", x, x), self.ints(-1))
        root = self("Sqrt", self("Add", square, self.const(1e-5)))
        return str(self("Mul", weight, self("Div", x, root)))

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        y = self("MatMul", x, self.weight(inputs, outputs))
        return self("Add", y, self.const(0.1 * self.random.normal(size=outputs))) if self.spec.bias else y

    def feed_forward(self, x: str) -> str:
        s, wide = self.spec, 2 * self.spec.hidden
        y = self.linear(x, s.hidden, wide)
        if s.activation == "gated":
            gate = self.linear(x, s.hidden, wide)
            y = self("Mul", y, self("Mul", gate, self("Sigmoid", gate)))
        elif s.activation == "silu":
            y = self("Mul", y, self("Sigmoid", y))
        else:
            y = self({"relu": "Relu", "gelu": "Gelu", "tanh": "Tanh"}[s.activation], y)
        return self.linear(y, wide, s.hidden)

    def heads(self, x: str, heads: int, size: int) -> str:
        """[b,s,hidden] -> [b,heads,s,size]."""
        y = self.linear(x, self.spec.hidden, heads * size)
        y = self("Reshape", y, self("Concat", self.batch, self.one, self.ints(heads, size), axis=0))
        return str(self("Transpose", y, perm=[0, 2, 1, 3]))

    def repeated(self, x: str, size: int) -> str:
        s = self.spec
        if s.group == 1:
            return x
        wide = self("Concat", self.batch, self.ints(s.kv_heads, s.group), self.one, self.ints(size), axis=0)
        x = self("Expand", self("Unsqueeze", x, self.ints(2)), wide)
        return str(
            self(
                "Reshape",
                x,
                self("Concat", self.batch, self.ints(s.heads), self.one, self.ints(size), axis=0),
            )
        )

    def rotated(self, x: str) -> str:
        """[b,h,s,size] turned by positions, half against half or neighbours."""
        size = self.spec.head_dim
        if self.spec.positions not in ("halves", "pairs"):
            return x
        frequencies = self.const(1 / 100 ** (np.arange(size // 2) * 2 / size))
        at = self("Unsqueeze", self("Cast", self.count, to=TensorProto.FLOAT), self.ints(1))
        angles = self("Mul", at, frequencies)
        cos, sin = self("Cos", angles), self("Sin", angles)
        if self.spec.positions == "halves":
            a, b = self("Split", x, count=2, num_outputs=2, axis=-1)
        else:
            a, b = (
                self("Slice", x, self.ints(i), self.ints(1 << 60), self.ints(3), self.ints(2)) for i in (0, 1)
            )
        first = self("Sub", self("Mul", a, cos), self("Mul", b, sin))
        second = self("Add", self("Mul", b, cos), self("Mul", a, sin))
        if self.spec.positions == "halves":
            return str(self("Concat", first, second, axis=-1))
        both = [self("Unsqueeze", v, self.ints(-1)) for v in (first, second)]
        return str(self("Reshape", self("Concat", *both, axis=-1), self.ints(0, 0, -1, size)))

    def attention(self, x: str, mask: str, fault: str | None) -> str:
        s = self.spec
        q = self.rotated(self.heads(x, s.heads, s.head_dim))
        k = self.repeated(self.rotated(self.heads(x, s.kv_heads, s.head_dim)), s.head_dim)
        v = self.repeated(self.heads(x, s.kv_heads, s.value_dim), s.value_dim)
        if fault == "keys rolled":
            most, axis = self.ints(1 << 60), self.ints(2)
            pieces = (
                self("Slice", k, self.ints(1), most, axis),
                self("Slice", k, self.ints(0), self.ints(1), axis),
            )
            k = self("Concat", *pieces, axis=2)
        scores = self.capped(self.scaled(q, k))
        if fault not in ("mask after the softmax", "no mask"):
            scores = self.masked(scores, mask, fault)
        weights = self.weights(scores, fault)
        if fault == "mask after the softmax":
            shown = self.shown(mask, fault)
            weights = self("Mul", weights, self("Cast", shown, to=TensorProto.FLOAT))
        y = self("Transpose", self("MatMul", weights, v), perm=[0, 2, 1, 3])
        y = self("Reshape", y, self("Concat", self.batch, self.one, self.ints(s.heads * s.value_dim), axis=0))
        return self.linear(y, s.heads * s.value_dim, s.hidden)

    def scaled(self, q: str, k: str) -> str:
        s, factor = self.spec, 1 / math.sqrt(self.spec.head_dim)
        if s.scale in ("query", "both"):
            q = self("Mul", q, self.const(factor if s.scale == "query" else math.sqrt(factor)))
        if s.scale == "key":
            k = self("Mul", k, self.const(factor))
        k = self("Transpose", k, perm=[0, 1, 3, 2])
        if s.scale == "both":
            k = self("Mul", self.const(math.sqrt(factor)), k)
        scores = self("MatMul", q, k)
        if s.scale == "scores":
            scores = self("Mul", scores, self.const(factor))
        elif s.scale == "divided":
            scores = self("Div", scores, self.const(1 / factor))
        return str(scores)

    def capped(self, scores: str) -> str:
        cap = self.spec.softcap
        if cap is None:
            return scores
        return str(self("Mul", self("Tanh", self("Div", scores, self.const(cap))), self.const(cap)))

    def columns(self) -> tuple[str, str]:
        """Queries [s,1] and keys [1,s]."""
        return self("Unsqueeze", self.count, self.ints(1)), self("Unsqueeze", self.count, self.ints(0))

    def causal(self, ahead: int = 0) -> str:
        q, k = self.columns()
        if self.spec.distance:
            return str(self("GreaterOrEqual", self("Sub", q, k), self.const(-ahead, np.int64)))
        q = self("Add", q, self.const(ahead, np.int64)) if ahead else q
        return str(self("LessOrEqual", k, q))

    def near(self, window: str) -> str:
        """Whether a key lies less than `window` behind the query."""
        q, k = self.columns()
        if self.spec.distance:
            return str(self("Less", self("Sub", q, k), window))
        return str(self("Greater", k, self("Sub", q, window)))

    def shown(self, mask: str, fault: str | None) -> str:
        """A condition [s,s] or [heads,s,s]."""
        s, size = self.spec, self.const(self.spec.window, np.int64)
        shown = self.causal({"the next key": 1, "the window ahead": s.window}.get(fault or "", 0))
        if mask == "window":
            shown = self("And", shown, self.near(size))
        elif mask == "chunk":
            q, k = (self("Div", v, size) for v in self.columns())
            shown = self("And", shown, self("Equal", q, k))
        elif mask == "first and window":
            first = self("Less", self.columns()[1], self.const(2, np.int64))
            shown = self("And", shown, self("Or", first, self.near(size)))
        elif mask == "windows of heads":
            head = self.const(np.arange(s.heads).reshape(-1, 1, 1), np.int64)
            sizes = self("Add", self("Mul", head, self.const(3, np.int64)), size)
            shown = self("And", shown, self.near(sizes))
        return str(shown)

    def masked(self, scores: str, mask: str, fault: str | None) -> str:
        if mask == "alibi":
            slopes = self.const(0.5 ** np.arange(1, self.spec.heads + 1).reshape(-1, 1, 1))
            q, k = self.columns()
            distance = self("Cast", self("Sub", k, q), to=TensorProto.FLOAT)
            scores = self("Add", scores, self("Mul", distance, slopes))
        shown = self.shown(mask, fault)
        hidden = self.const(-0.5 if fault == "one key hidden by half" else HIDDEN)
        if self.spec.by_choice:
            if fault == "one key hidden by half":
                return str(self("Where", shown, scores, self("Add", scores, hidden)))
            return str(self("Where", shown, scores, hidden))
        return str(self("Add", scores, self("Where", shown, self.const(0.0), hidden)))

    def weights(self, scores: str, fault: str | None) -> str:
        s, axis = self.spec, 2 if fault == "softmax over queries" else -1
        if not s.sinks:
            return str(self("Softmax", scores, axis=axis))
        learned = self.const(self.random.normal(size=(1, s.heads, 1, 1)))
        shape = self("Concat", self.batch, self.ints(s.heads), self.one, self.ints(1), axis=0)
        together = self("Concat", scores, self("Expand", learned, shape), axis=3)
        if s.transposed_first:
            together = self("Sub", together, self("ReduceMax", together, self.ints(-1)))
        weights = self("Softmax", together, axis=axis)
        return str(self("Slice", weights, self.ints(0), self.ints(-1), self.ints(3)))
