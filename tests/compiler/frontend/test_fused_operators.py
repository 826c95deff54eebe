"""Operators that ONNX Runtime's optimizer writes compute what ONNX Runtime computes on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from kvc.frontend.importer import import_graph
from kvc_passes.errors import UnsupportedModel
from kvc_passes.expand_markers import ExpandMarkers
from kvc_passes.graph import graph_of, op_name
from kvc_passes.markers import ROTARY, SDPA, Sdpa, attributes
from support import Compiled

ATOL = 2e-6  # float32 sums of at most 64 products in another order, on values of up to 4
MICROSOFT = "com.microsoft"
Feeds = dict[str, np.ndarray | None]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(
    op: str, feeds: Feeds, outputs: Sequence[str], domain: str = MICROSOFT, **attrs: Any
) -> onnx.ModelProto:
    """One node, called `node`; feeds that are None are inputs left out."""
    given = {n: a for n, a in feeds.items() if a is not None}
    names = [n if n in given else "" for n in feeds]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(op, names, list(outputs), name="node", domain=domain, **attrs)
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in given.items()}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in given.items()],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs if o],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def computed(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    module = ExpandMarkers().run(import_graph(model)).module
    return Compiled(module)(*(a for a in feeds.values() if a is not None))


def check(
    op: str, feeds: Feeds, outputs: Sequence[str] = ("y",), domain: str = MICROSOFT, **attrs: Any
) -> None:
    """Compare all outputs with ONNX Runtime's."""
    model = model_of(op, feeds, outputs, domain, **attrs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {n: a for n, a in feeds.items() if a is not None})
    got = computed(model, feeds)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)


HEADS, GROUPS, SIZE, LIMIT = 4, 2, 16, 32
PRESENTS = ("y", "present_key", "present_value")


def group_query(batch: int, length: int, past: int = 0, *, packed: bool = False, **changes: Any) -> Feeds:
    """Inputs of a GroupQueryAttention of 4 heads over 2 KV heads of 16, every sequence of the same length."""
    q, k, v = (floats(batch, length, n * SIZE, seed=i) for i, n in enumerate((HEADS, GROUPS, GROUPS)))
    shape = (batch, GROUPS, past, SIZE)
    feeds: Feeds = {
        "query": np.concatenate([q, k, v], axis=2) if packed else q,
        "key": None if packed else k,
        "value": None if packed else v,
        "past_key": floats(*shape, seed=3) if past else None,
        "past_value": floats(*shape, seed=4) if past else None,
        "seqlens_k": np.full(batch, past + length - 1, np.int32),
        "total_sequence_length": np.array([past + length], np.int32),
        "cos_cache": None,
        "sin_cache": None,
        "position_ids": None,
        "attention_bias": None,
        "head_sink": None,
    }
    return feeds | changes


def rotation(half: int = SIZE // 2) -> Feeds:
    angles = np.arange(LIMIT)[:, None] / 100.0 ** (np.arange(half) / half)
    return {"cos_cache": np.cos(angles).astype(np.float32), "sin_cache": np.sin(angles).astype(np.float32)}


HEAD_COUNTS = {"num_heads": HEADS, "kv_num_heads": GROUPS}
STEPS = [(2, 6, 0), (2, 1, 5), (1, 4, 5)]
"""(batch, length, past): a prompt, a step of decoding, a chunk. ONNX Runtime takes chunks of one sequence."""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "attrs",
    [
        {"scale": 0.3, "softcap": 2.0},
        {"local_window_size": 1},
        {"local_window_size": 3},
        {"smooth_softmax": 1},
    ],
    ids=str,
)
def test_group_query_attention(step: tuple[int, int, int], attrs: dict[str, Any]) -> None:
    check("GroupQueryAttention", group_query(*step), PRESENTS, **HEAD_COUNTS, **attrs)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("interleaved", "packed"), [(0, False), (1, True)])
def test_group_query_attention_rotates(step: tuple[int, int, int], interleaved: int, packed: bool) -> None:
    feeds = group_query(*step, packed=packed, **rotation())
    check("GroupQueryAttention", feeds, PRESENTS, **HEAD_COUNTS, do_rotary=1, rotary_interleaved=interleaved)


def test_group_query_attention_with_sinks_and_bias() -> None:
    feeds = group_query(2, 6, head_sink=floats(HEADS, seed=7), attention_bias=floats(2, HEADS, 6, 6, seed=8))
    check("GroupQueryAttention", feeds, PRESENTS, **HEAD_COUNTS)


def test_group_query_attention_ignores_padding_behind_the_prompt() -> None:
    feeds = group_query(2, 6)
    lengths = np.array([5, 2], np.int32)
    attrs = HEAD_COUNTS
    full = computed(model_of("GroupQueryAttention", feeds, PRESENTS, **attrs), feeds)[0]
    feeds["seqlens_k"] = lengths
    model = model_of("GroupQueryAttention", feeds, PRESENTS, **attrs)
    got = computed(model, feeds)[0]
    given = {n: a for n, a in feeds.items() if a is not None}
    expected = ort.InferenceSession(model.SerializeToString()).run(None, given)[0]
    for row, last in enumerate(lengths):  # rows of padding are unspecified
        np.testing.assert_allclose(got[row, : last + 1], expected[row, : last + 1], rtol=0, atol=ATOL)
    assert not np.allclose(got[1, 3:], full[1, 3:])


def test_group_query_attention_normalizes_queries_and_keys() -> None:
    """ONNX Runtime's CPU kernel refuses these inputs, so that numpy has to say what they mean."""
    weights = {"q_norm_weight": floats(SIZE, seed=5), "k_norm_weight": floats(SIZE, seed=6)}
    feeds = group_query(1, 5, k_scale=None, v_scale=None, **weights)

    def normalized(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = x.reshape(*x.shape[:2], -1, SIZE)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * weight
        return x.reshape(*x.shape[:2], -1)

    plain = group_query(1, 5)
    plain["query"] = normalized(plain["query"], weights["q_norm_weight"])
    plain["key"] = normalized(plain["key"], weights["k_norm_weight"])
    expected = computed(model_of("GroupQueryAttention", plain, PRESENTS, **HEAD_COUNTS), plain)
    model = model_of("GroupQueryAttention", feeds, PRESENTS, **HEAD_COUNTS, qk_norm_epsilon=1e-3)
    for a, b in zip(computed(model, feeds), expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)


def test_group_query_attention_becomes_markers() -> None:
    feeds = group_query(2, 1, 5, **rotation())
    attrs = HEAD_COUNTS | {"do_rotary": 1, "local_window_size": 4, "softcap": 30.0}
    graph = graph_of(import_graph(model_of("GroupQueryAttention", feeds, PRESENTS, **attrs))["main"])
    calls = [graph.definitions[v] for v in graph.order]
    assert [op_name(c) for c in calls].count(ROTARY) == 2
    (found,) = [attributes(c, Sdpa) for c in calls if op_name(c) == SDPA]
    assert found == Sdpa(1 / math.sqrt(SIZE), 30.0, True, "past", 4, ("lengths",))


@pytest.mark.parametrize(
    ("attrs", "changes", "reason"),
    [
        ({"sliding_window_cache": 1}, {}, "sliding_window_cache"),
        ({"k_quant_type": "PER_TENSOR"}, {}, "its KV cache is quantized"),
        ({"do_rotary": 1}, {}, "has no cos_cache"),
        ({"kv_num_heads": 3}, {}, "do not divide a width of 32"),
    ],
)
def test_group_query_attention_refuses(attrs: dict[str, Any], changes: Feeds, reason: str) -> None:
    feeds = group_query(1, 3, **changes)
    with pytest.raises(UnsupportedModel, match=rf"node 'node' \(GroupQueryAttention\).*{reason}"):
        import_graph(model_of("GroupQueryAttention", feeds, PRESENTS, **(HEAD_COUNTS | attrs)))


def multi_head(batch: int, length: int, past: int = 0, **changes: Any) -> Feeds:
    q, k, v = (floats(batch, length, HEADS * SIZE, seed=i) for i in range(3))
    feeds: Feeds = {"query": q, "key": k, "value": v, "bias": None, "key_padding_mask": None}
    feeds |= {"attention_bias": None, "past_key": None, "past_value": None}
    if past:
        shape = (batch, HEADS, past, SIZE)
        feeds |= {"past_key": floats(*shape, seed=3), "past_value": floats(*shape, seed=4)}
    return feeds | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": floats(3 * HEADS * SIZE, seed=5)},
        {"attention_bias": floats(1, 1, 5, 5, seed=6)},
        {"key_padding_mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)},
    ],
    ids=lambda c: " ".join(c) or "plain",
)
@pytest.mark.parametrize("attrs", [{"scale": 0.2}, {"unidirectional": 1}], ids=str)
def test_multi_head_attention(changes: Feeds, attrs: dict[str, Any]) -> None:
    check("MultiHeadAttention", multi_head(2, 5, **changes), ("y",), num_heads=HEADS, **attrs)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_multi_head_attention_with_a_past(length: int, unidirectional: int) -> None:
    feeds = multi_head(2, length, 4)
    check("MultiHeadAttention", feeds, PRESENTS, num_heads=HEADS, unidirectional=unidirectional)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": None, "value": None}, "packed in one tensor"),
        ({"key_padding_mask": np.array([3, 3], np.int32)}, "key_padding_mask"),
    ],
)
def test_multi_head_attention_refuses(changes: Feeds, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"node 'node' \(MultiHeadAttention\).*{reason}"):
        import_graph(model_of("MultiHeadAttention", multi_head(2, 3, **changes), ("y",), num_heads=HEADS))


@pytest.mark.parametrize(
    ("interleaved", "flat", "first"), [(0, False, False), (1, False, True), (0, True, True), (1, True, False)]
)
def test_rotary_embedding(interleaved: int, flat: bool, first: bool) -> None:
    x = floats(2, 3, HEADS * SIZE) if flat else floats(2, HEADS, 3, SIZE)
    positions = np.array([4]) if first else np.array([[0, 1, 2], [7, 8, 9]])
    feeds: Feeds = {"x": x, "positions": positions.astype(np.int64)} | rotation()
    check("RotaryEmbedding", feeds, interleaved=interleaved)


def test_rotary_embedding_of_part_of_a_head() -> None:
    feeds: Feeds = {"x": floats(2, 3, HEADS * SIZE), "positions": np.arange(6).reshape(2, 3)} | rotation(2)
    check("RotaryEmbedding", feeds, num_heads=HEADS, rotary_embedding_dim=4)


def test_rotary_embedding_refuses_a_scale() -> None:
    feeds: Feeds = {"x": floats(2, 3, HEADS * SIZE), "positions": np.zeros((2, 3), np.int64)} | rotation()
    with pytest.raises(UnsupportedModel, match="scale of 2"):
        import_graph(model_of("RotaryEmbedding", feeds, ("y",), scale=2.0))


X = {"x": floats(2, 3, 16)}
SKIP: Feeds = X | {"skip": floats(2, 3, 16, seed=1), "gamma": floats(16, seed=2)}
NORMS: list[tuple[str, str, Feeds, tuple[str, ...]]] = [
    ("SimplifiedLayerNormalization", "", X | {"scale": floats(16, seed=2)}, ("y",)),
    ("SkipSimplifiedLayerNormalization", MICROSOFT, SKIP, ("y",)),
    (
        "SkipSimplifiedLayerNormalization",
        MICROSOFT,
        SKIP | {"bias": floats(16, seed=3)},
        ("y", "", "", "sum"),
    ),
    ("SkipLayerNormalization", MICROSOFT, SKIP | {"beta": floats(16, seed=4)}, ("y", "", "", "sum")),
    ("SkipLayerNormalization", MICROSOFT, SKIP | {"beta": None, "bias": floats(16, seed=3)}, ("y",)),
]


@pytest.mark.parametrize(("op", "domain", "feeds", "outputs"), NORMS)
def test_norms(op: str, domain: str, feeds: Feeds, outputs: tuple[str, ...]) -> None:
    check(op, feeds, outputs, domain, epsilon=1e-3)


@pytest.mark.parametrize(
    ("op", "feeds", "attrs"),
    [
        ("Gelu", X, {}),
        ("FastGelu", X, {}),
        ("FastGelu", X | {"bias": floats(16, seed=1)}, {}),
        ("BiasGelu", X | {"bias": floats(16, seed=1)}, {}),
        ("QuickGelu", X, {}),
        ("QuickGelu", X, {"alpha": 1.0}),
        ("FusedMatMul", {"a": floats(2, 3, 8), "b": floats(8, 5)}, {"alpha": 0.5}),
        ("FusedMatMul", {"a": floats(2, 8, 3), "b": floats(2, 5, 8)}, {"transA": 1, "transB": 1}),
    ],
    ids=str,
)
def test_activations_and_products(op: str, feeds: Feeds, attrs: dict[str, Any]) -> None:
    check(op, feeds, **attrs)


def test_a_graph_inside_flex_attention_needs_known_operators() -> None:
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 3, 3])

    body = [helper.make_node("Foo", ["scores"], ["changed"], domain="com.example")]
    change = helper.make_graph(body, "change", [value("scores")], [value("changed")])
    feeds: Feeds = {name: floats(1, 2, 3, 8, seed=i) for i, name in enumerate("qkv")}
    model = model_of("FlexAttention", feeds, ("y",), "ai.onnx.preview", score_mod=change)
    with pytest.raises(UnsupportedModel, match=r"node 'node' \(FlexAttention\).*'change' .*com.example::Foo"):
        import_graph(model)
