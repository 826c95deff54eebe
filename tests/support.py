"""What the tests of the passes and of the frontend share: building, running and counting Relax functions."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
import tvm_ffi
from onnx import TensorProto, helper, numpy_helper
from tvm import IRModule, relax, tirx

from kvc_passes.conditions import Choice
from kvc_passes.graph import Graph, op_name
from kvc_passes.nodes import NodeNames
from kvc_passes.predicates import holds
from kvc_passes.sites import AttentionSite, MaskFact, Sliced
from kvc_passes.views import View


def symbol(name: str) -> tirx.Var:
    return tirx.Var(name, "int64")


def param(name: str, shape: Sequence[Any], dtype: str = "float32") -> relax.Var:
    return relax.Var(name, relax.TensorType(list(shape), dtype))


@dataclass
class Draft:
    """Writes `main` binding by binding, each named after an ONNX node, as the importer names them.

    `emit(value)` binds to a node called `op_<number>`; `emit(value, "name")` to the node `name`.
    """

    params: Sequence[relax.Var]
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    nodes: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, value: relax.Expr, node: str | None = None) -> relax.Var:
        operator = op_name(value) or type(value).__name__
        name = node or f"{operator}_{len(self.nodes)}"
        hint = NodeNames.hint(name, len(self.nodes))
        self.nodes.append((name, operator))
        return self.builder.emit(value, name_hint=hint)

    @property
    def names(self) -> NodeNames:
        return NodeNames(tuple(self.nodes))


def module_of(
    params: Sequence[relax.Var], body: Callable[..., relax.Expr | Sequence[relax.Expr]]
) -> tuple[IRModule, NodeNames]:
    """A module whose `main` is what `body(emit, *params)` binds and returns."""
    emit = Draft(params)
    with emit.builder.function("main", list(params)):
        with emit.builder.dataflow():
            result = body(emit, *params)
            values = relax.Tuple(list(result)) if isinstance(result, (tuple, list)) else result
            returned = emit.builder.emit_output(values)
        emit.builder.emit_func_output(returned)
    return emit.builder.get(), emit.names


def ops(mod: IRModule, name: str = "main") -> Counter[str]:
    """How often every operator occurs."""
    graph = Graph(mod[name])
    return Counter(op_name(graph.definitions[v]) for v in graph.order if op_name(graph.definitions[v]))


def params_of(mod: IRModule, name: str = "main") -> list[str]:
    return [p.name for p in mod[name].params]


def shape_of(value: relax.Expr) -> list[str]:
    """Dimensions as text, such as ["1", "n", "64"]."""
    return [str(d.value if isinstance(d, tirx.IntImm) else d) for d in value.ty.shape.values]


class Compiled:
    """A module compiled for this machine; calling it runs `main` on numpy arrays.

    LLVM's optimizations are off unless a target is given: that compiles five times as fast.
    """

    def __init__(self, mod: IRModule, target: tvm.target.Target | None = None) -> None:
        target = target or tvm.target.Target({"kind": "llvm", "opt-level": 0})
        mod = relax.transform.AttachGlobalSymbol()(mod)
        self.machine = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        result = self.machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays))
        many = result if hasattr(result, "__len__") and not hasattr(result, "numpy") else [result]
        return [r.numpy() for r in many]


def run(mod: IRModule, *arrays: np.ndarray) -> list[np.ndarray]:
    return Compiled(mod)(*arrays)


def site(index: int = 0, **changes: Any) -> AttentionSite:
    """A causal site of 4 heads over 2 KV heads of 8."""
    values: dict[str, Any] = {"node": f"softmax_{index}", "heads": 4, "kv_heads": 2, "head_dim": 8}
    values |= {"value_dim": 8, "scale": 0.25, "softcap": None, "rope": None}
    values["mask"] = MaskFact("causal", None, "given")
    return AttentionSite(index=index, **(values | changes))


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, facts: AttentionSite, dtype: Any = np.float64
) -> np.ndarray:
    """What a site's facts promise: [b,h,s,e], [b,g,t,e], [b,g,t,f] -> [b,s,h,f]; the s last keys are new."""
    q, k, v = (x.astype(dtype) for x in (q, k, v[..., : facts.value_dim]))
    k, v = (np.repeat(x, facts.group, axis=1) for x in (k, v))
    if facts.sliced is not None:
        k = turned(k[:, 0], facts.sliced)
        k = np.repeat(k, facts.heads // facts.sliced.count, axis=1)
    scores = np.einsum("bhse,bhte->bhst", q, k) * facts.scale
    if facts.softcap is not None:
        scores = facts.softcap * np.tanh(scores / facts.softcap)
    head = np.arange(facts.heads)[:, None, None]
    position = np.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    key = np.arange(k.shape[2])[None]
    if facts.slopes is not None:
        scores = scores + np.array(facts.slopes)[:, None, None] * (key - position)
    if facts.bias is not None:
        table = np.array(facts.bias)
        scores = scores + table[:, np.clip(position - key, 0, table.shape[1] - 1)]
    seen = np.vectorize(functools.partial(holds, facts.mask.predicate))(position, key, head)
    scores = np.where(seen, scores, -np.inf)
    if facts.sinks is not None:
        column = np.broadcast_to(np.array(facts.sinks)[None, :, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, column], -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bhtf->bshf", weights[..., : k.shape[2]], v)


def turned(rows: np.ndarray, sliced: Sliced) -> np.ndarray:
    """Kept rows [b,t,w] as the turned keys [b,count,t,dim], by the definition of Sliced."""
    b, t, _ = rows.shape
    keys = rows[..., : sliced.count * sliced.dim].reshape(b, t, sliced.count, sliced.dim)
    angles = rows[..., None, sliced.value_dim :]
    half = sliced.half
    cosine, sine = angles[..., :half], angles[..., half : 2 * half]
    if sliced.fine:
        cosine = cosine + angles[..., 2 * half : 3 * half] / 256
        sine = sine + angles[..., 3 * half :] / 256
    low, high, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    parts = [low * cosine - high * sine, high * cosine + low * sine, rest]
    return np.concatenate(parts, axis=-1).transpose(0, 2, 1, 3)


def viewed(x: np.ndarray, view: View, heads: int, width: int, angles: Sequence[np.ndarray]) -> np.ndarray:
    """The operand [1,heads,n,width] that is read from x, by the definition of View."""
    x = x.astype(np.float64)
    if view.columns is not None:
        assert x.shape == (1, x.shape[1], view.columns)
        columns = view.first + np.arange(heads)[:, None] * view.stride + np.arange(width)
        x = x[:, :, columns].transpose(0, 2, 1, 3)
    cosine, sine = (
        (a[:, None, :, where.first : where.first + view.half] for a, where in zip(angles, view.angles))
        if view.half
        else (np.ones(1), np.zeros(1))
    )
    low, high, rest = np.split(x, [view.half, 2 * view.half], axis=3)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=3)


_SITES: list[AttentionSite] = []


@functools.cache
def _define_marker() -> None:
    @tvm_ffi.register_global_func("kvc.attention")
    def marker(q: Any, k: Any, v: Any, index: int, *angles: Any) -> Any:
        site, given = _SITES[index], [x.numpy() for x in (q, k, v)]
        dtype = given[0].dtype
        if site.views is not None:
            left = [a.numpy() for a in angles]
            heads = (site.heads, site.kv_heads, site.kv_heads)
            widths = (site.head_dim, site.head_dim, site.value_dim)
            views = (site.views.query, site.views.key, site.views.value)
            given = [
                x if view is None else viewed(x, view, h, w, [left.pop(0) for _ in view.angles])
                for x, view, h, w in zip(given, views, heads, widths)
            ]
            assert not left
        return tvm.runtime.tensor(attend(*given, site).astype(dtype))


def run_markers(
    mod: IRModule,
    sites: Sequence[AttentionSite],
    *arrays: np.ndarray,
    target: tvm.target.Target | None = None,
) -> list[np.ndarray]:
    """Run a module with attention markers, each computed by numpy from the facts that were proved."""
    _define_marker()
    _SITES[:] = sites
    return Compiled(mod, target)(*arrays)


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Max": max,
    "Min": min,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
}


def evaluate(value: Any, known: dict[str, int]) -> Any:
    """An integer or boolean expression (or a Choice of such), its variables replaced by their numbers."""
    if isinstance(value, Choice):
        return evaluate(value.then if evaluate(value.when, known) else value.other, known)
    if isinstance(value, (bool, int, float, np.bool_)):
        return value
    if isinstance(value, (tirx.Var, tirx.IntImm)):
        return known[value.name] if isinstance(value, tirx.Var) else int(value.value)
    kind = type(value).__name__
    if kind in ("Not", "Cast"):
        return not evaluate(value.a, known) if kind == "Not" else evaluate(value.value, known)
    return _OPERATORS[kind](evaluate(value.a, known), evaluate(value.b, known))


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, Sequence[Any]]],
    weights: dict[str, np.ndarray],
    outputs: Sequence[str] = ("logits",),
    opset: int = 20,
) -> onnx.ModelProto:
    """An ONNX model; inputs are (element type, shape) by name."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, t, list(s)) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


class OnnxRuntime:
    """The ONNX file in ONNX Runtime, on one thread."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        self.inputs = {i.name: i.shape for i in self.session.get_inputs()}

    def feeds(self, tokens: np.ndarray, past: int = 0) -> dict[str, np.ndarray]:
        """Inputs for tokens [b, s] behind a random past of `past` tokens, in the graph's order."""
        batch, length = tokens.shape
        made = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, past + length), np.int64),
            "position_ids": np.tile(np.arange(past, past + length), (batch, 1)),
        }
        for seed, (name, shape) in enumerate(self.inputs.items()):
            if name not in made:
                made[name] = floats(batch, shape[1], past, shape[3], seed=seed)
        return {name: made[name] for name in self.inputs}

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.session.run(None, feeds))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [len(tokens), V] of one whole sequence."""
        result: np.ndarray = self.run(self.feeds(np.array([tokens], np.int64)))[0][0]
        return result
