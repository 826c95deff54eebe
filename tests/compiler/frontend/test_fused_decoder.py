"""A decoder of fused operators: symbols stay, attention comes as markers, numbers are ONNX Runtime's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from kvc.frontend.importer import import_onnx
from kvc_passes.expand_markers import ExpandMarkers
from kvc_passes.graph import graph_of, op_name
from kvc_passes.markers import ROTARY, SDPA, Sdpa, attributes
from support import Compiled, OnnxRuntime, floats, shape_of

VOCABULARY, WIDTH, HEADS, GROUPS, SIZE, LIMIT = 32, 64, 4, 2, 16, 64
ATOL = 2e-5  # float32 sums of at most 64 products in another order, on logits of up to 20
MICROSOFT = "com.microsoft"


def weights() -> dict[str, np.ndarray]:
    angles = np.arange(LIMIT)[:, None] / 100.0 ** (np.arange(SIZE // 2) / (SIZE // 2))
    made = {
        "embedding": floats(VOCABULARY, WIDTH, seed=1),
        "norm": floats(WIDTH, seed=2),
        "q": floats(WIDTH, HEADS * SIZE, seed=3) / 8,
        "k": floats(WIDTH, GROUPS * SIZE, seed=4) / 8,
        "v": floats(WIDTH, GROUPS * SIZE, seed=5) / 8,
        "o": floats(HEADS * SIZE, WIDTH, seed=6) / 8,
        "head": floats(WIDTH, VOCABULARY, seed=7),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    constants = {"one": [1], "two": [2], "zero": [0], "axes": [1]}
    return {n: a.astype(np.float32) for n, a in made.items()} | {n: np.array(a) for n, a in constants.items()}


def node(op: str, inputs: str, outputs: str, domain: str = "", **attrs: Any) -> onnx.NodeProto:
    """Names are separated by spaces; "-" is an input or output left out."""
    given, made = (["" if name == "-" else name for name in names.split()] for names in (inputs, outputs))
    return helper.make_node(op, given, made, name=f"/{made[0]}", domain=domain, **attrs)


def microsoft() -> list[onnx.NodeProto]:
    """What ONNX Runtime's builder writes: lengths from the attention mask, rotation inside."""
    return [
        node("ReduceSum", "attention_mask axes", "seen", keepdims=0),
        node("Sub", "seen one", "last"),
        node("Cast", "last", "lengths", to=TensorProto.INT32),
        node("Shape", "attention_mask", "mask_shape"),
        node("Slice", "mask_shape one two", "total_64"),
        node("Cast", "total_64", "total", to=TensorProto.INT32),
        node("SimplifiedLayerNormalization", "x norm", "normal", epsilon=1e-5),
        *(node("MatMul", f"normal {n}", f"{n}_new") for n in "qkv"),
        node(
            "GroupQueryAttention",
            "q_new k_new v_new past_key past_value lengths total cos sin",
            "attended present_key present_value",
            MICROSOFT,
            **{"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": 1, "local_window_size": 6},
        ),
        node("MatMul", "attended o", "projected"),
        node("SkipSimplifiedLayerNormalization", "projected x norm", "out - - sum", MICROSOFT),
    ]


def standard() -> list[onnx.NodeProto]:
    """Opset 23: rotation by position ids, a causal attention behind a past."""
    return [
        node("RMSNormalization", "x norm", "normal"),
        *(node("MatMul", f"normal {n}", f"{n}_new") for n in "qkv"),
        node("RotaryEmbedding", "q_new cos sin position_ids", "q_turned", num_heads=HEADS),
        node("RotaryEmbedding", "k_new cos sin position_ids", "k_turned", num_heads=GROUPS),
        node(
            "Attention",
            "q_turned k_turned v_new - past_key past_value",
            "attended present_key present_value",
            **{"q_num_heads": HEADS, "kv_num_heads": GROUPS, "is_causal": 1},
        ),
        node("MatMul", "attended o", "projected"),
        node("Add", "projected x", "out"),
    ]


def write(path: Path, kind: str) -> Path:
    past = [TensorProto.FLOAT, ["batch_size", GROUPS, "past_length", SIZE]]
    inputs: dict[str, Any] = {"input_ids": [TensorProto.INT64, ["batch_size", "length"]]}
    name = "attention_mask" if kind == "microsoft" else "position_ids"
    inputs[name] = [TensorProto.INT64, ["batch_size", "some_length"]]
    inputs |= {"past_key": past, "past_value": past}
    body = microsoft() if kind == "microsoft" else standard()
    nodes = [node("Gather", "embedding input_ids", "x"), *body, node("MatMul", "out head", "logits")]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info(n, *i) for n, i in inputs.items()],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, None)
            for n in ("logits", "present_key", "present_value")
        ],
        [numpy_helper.from_array(a, n) for n, a in weights().items()],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("microsoft", Sdpa(0.25, None, True, "past", 6, ("lengths",))),
        ("standard", Sdpa(0.25, None, True, "past")),
    ],
)
def test_a_decoder_of_fused_operators(tmp_path: Path, kind: str, wanted: Sdpa) -> None:
    path = write(tmp_path / "decoder.onnx", kind)
    model = import_onnx(path)
    graph = graph_of(model.module["main"])
    calls = {var: graph.definitions[var] for var in graph.order}
    (attention,) = [var for var, call in calls.items() if op_name(call) == SDPA]
    assert attributes(calls[attention], Sdpa) == wanted
    operator = "Attention" if kind == "standard" else "GroupQueryAttention"
    assert model.names.describe(attention) == f"node '/attended' ({operator})"
    assert shape_of(attention) == ["batch", "4", "sequence", "16"]
    keys = calls[graph.alias(calls[attention].args[2])]
    assert op_name(keys) == "concat"
    assert shape_of(keys) == ["batch", "2", "past + sequence", "16"]
    assert sum(op_name(call) == ROTARY for call in calls.values()) == 2
    for var in calls:
        if isinstance(var.ty, relax.TensorType):
            assert var.ty.shape is not None, f"{var.name} has no shape"

    compiled, reference = Compiled(ExpandMarkers().run(model.module).module), OnnxRuntime(path)
    for batch, length, past in ((2, 7, 0), (2, 1, 5), (1, 4, 9)):
        tokens = np.random.default_rng(length).integers(0, VOCABULARY, (batch, length))
        feeds = reference.feeds(tokens, past)
        order = [feeds.get(p.name, model.weights.get(p.name)) for p in model.module["main"].params]
        for a, b in zip(compiled(*[np.asarray(x) for x in order]), reference.run(feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)
