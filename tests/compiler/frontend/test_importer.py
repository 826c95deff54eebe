"""From ONNX to Relax: exported models compute the same, shapes stay symbolic, weights stay in the file."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tvm import relax, tirx

from kvc.frontend.importer import Imported, import_graph, import_onnx
from kvc_passes.errors import UnsupportedModel
from kvc_passes.graph import Graph, dims, op_name
from support import Compiled, OnnxRuntime, onnx_model, ops

ATOL = 2e-5  # float32 sums of at most 256 products in another order, on logits of up to 6
MODELS = list(itertools.product(("llama", "gpt2", "qwen2", "mistral"), (False, True)))
SHAPES = [(1, 1, 0), (2, 13, 0), (3, 5, 9)]
"""(batch, sequence, past); the past is left out for models without."""

ModelFile = Callable[..., Path]


@pytest.fixture(scope="session")
def imported(model_file: ModelFile) -> Callable[..., Imported]:
    return functools.cache(lambda family, past=False: import_onnx(model_file(family, past)))


@pytest.mark.parametrize(("family", "past"), MODELS)
def test_one_module_computes_every_shape(
    model_file: ModelFile, imported: Callable[..., Imported], family: str, past: bool
) -> None:
    model = imported(family, past)
    compiled, reference = Compiled(model.module), OnnxRuntime(model_file(family, past))
    names = {p.name for p in model.module["main"].params}
    for batch, length, before in SHAPES:
        tokens = np.random.default_rng(length).integers(0, 512, (batch, length))
        feeds = reference.feeds(tokens, before if past else 0)
        expected = reference.run(feeds)
        given = {name.replace(".", "_"): value for name, value in feeds.items()}
        assert given.keys() <= names
        order = [given.get(p.name, model.weights.get(p.name)) for p in model.module["main"].params]
        got = compiled(*[np.asarray(a) for a in order])
        assert len(got) == len(expected) == (5 if past else 1)
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("family", "past"), MODELS)
def test_every_dimension_is_known_and_made_of_the_three_symbols(
    imported: Callable[..., Imported], family: str, past: bool
) -> None:
    model = imported(family, past)
    graph = Graph(model.module["main"])
    wanted = {"batch", "sequence", "past"} if past else {"batch", "sequence"}
    found: set[str] = set()
    for var in graph.order:
        if isinstance(var.ty, relax.TensorType):
            assert var.ty.shape is not None, f"{var.name} has no shape"
            for dim in dims(var):
                found |= {str(v) for v in _symbols(dim)}
    assert found == wanted


def _symbols(dim: Any) -> list[Any]:
    if isinstance(dim, tirx.Var):
        return [dim]
    return [v for name in ("a", "b") if hasattr(dim, name) for v in _symbols(getattr(dim, name))]


@pytest.mark.parametrize(("family", "past"), MODELS)
def test_roles_name_the_parameters(imported: Callable[..., Imported], family: str, past: bool) -> None:
    model = imported(family, past)
    params = [p.name for p in model.module["main"].params]
    roles = model.roles
    assert roles.tokens == params[0] == "input_ids"
    assert (roles.attention_mask, roles.positions) == (
        ("attention_mask", "position_ids") if past else (None, None)
    )
    assert len(roles.past) == (4 if past else 0)
    assert set(roles.past) <= set(params)
    inputs = 3 + len(roles.past) if past else 1
    assert params[inputs:] == list(model.weights)


def test_bindings_are_named_after_their_nodes(imported: Callable[..., Imported]) -> None:
    model = imported("llama")
    graph = Graph(model.module["main"])
    softmaxes = [v for v in graph.order if op_name(graph.definitions[v]) == "softmax"]
    expected = [n.name for n in model.file.graph.node if n.op_type == "Softmax"]
    assert [model.names.name(v) for v in softmaxes] == expected
    assert model.names.describe(softmaxes[0]) == f"node '{expected[0]}' (Softmax)"


def test_weights_are_those_of_the_file_not_copies(imported: Callable[..., Imported]) -> None:
    model = imported("gpt2")
    assert all(
        any(np.shares_memory(array, tensor) for tensor in model.file.tensors.values())
        for array in model.weights.values()
    )
    large = [n for n, a in model.file.tensors.items() if a.dtype == np.float32 and a.size >= 64]
    assert len(model.weights) == len(large)
    assert model.module["main"].attrs is None or "params" not in model.module["main"].attrs


def test_external_weights_stay_mapped(model_file: ModelFile, tmp_path: Path) -> None:
    proto = onnx.load(model_file("llama"))
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    model = import_onnx(path)
    assert len(model.weights) > 10
    for array in model.weights.values():
        base: Any = array
        while base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        assert not array.flags.writeable


I64, F32 = TensorProto.INT64, TensorProto.FLOAT
IDS = {"input_ids": (I64, ["b", "s"])}
TABLE = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)


def small(tmp_path: Path, *nodes: onnx.NodeProto, **weights: np.ndarray) -> Path:
    """Nodes between an embedding `x` [b, s, 8] and `logits`."""
    first = helper.make_node("Gather", ["table", "input_ids"], ["x"], name="/embed")
    path = tmp_path / "small.onnx"
    onnx.save(onnx_model([first, *nodes], IDS, {"table": TABLE, **weights}), path)
    return path


def node(
    operator: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any
) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, name=name, **attributes)


def test_every_unsupported_operator_is_listed_once_with_a_node(tmp_path: Path) -> None:
    path = small(
        tmp_path,
        node("Foo", ["x"], ["y"], "/a/Foo", domain="com.example"),
        node("Foo", ["y"], ["z"], "/b/Foo", domain="com.example"),
        node("Bar", ["z"], ["logits"], "/c/Bar"),
    )
    with pytest.raises(UnsupportedModel) as refused:
        import_onnx(path)
    text = str(refused.value)
    assert "operators that kvc cannot import: com.example::Foo (node '/a/Foo'), Bar (node '/c/Bar')" in text
    assert "/b/Foo" not in text


def test_what_is_wrong_with_a_fused_attention_is_said(tmp_path: Path) -> None:
    path = small(tmp_path, node("Attention", ["x", "x", "x"], ["logits"], "/layers.0/attn", q_num_heads=5))
    with pytest.raises(
        UnsupportedModel, match=r"node '/layers.0/attn' \(Attention\) .* 5 heads do not divide"
    ):
        import_onnx(path)


def test_an_operator_that_cannot_be_imported_here_is_named(tmp_path: Path) -> None:
    path = small(
        tmp_path, node("MatMul", ["x", "w"], ["logits"], "/head/MatMul"), w=np.zeros((9, 32), np.float32)
    )
    with pytest.raises(UnsupportedModel, match=r"node '/head/MatMul' \(MatMul\) cannot be imported"):
        import_onnx(path)


@pytest.mark.parametrize(
    ("operator", "more", "what"),
    [("Reshape", [], "target shape"), ("Expand", [], "target shape"), ("Slice", ["one", "one"], "start")],
)
def test_a_shape_that_depends_on_data_is_refused_with_the_node(
    tmp_path: Path, operator: str, more: list[str], what: str
) -> None:
    path = small(
        tmp_path,
        node("ReduceMax", ["input_ids"], ["data"], "/data", keepdims=0),
        node("Unsqueeze", ["data", "zero"], ["shape"], "/shape"),
        node(operator, ["x", "shape", *more], ["logits"], "/odd/Op"),
        zero=np.array([0]),
        one=np.array([1]),
    )
    with pytest.raises(
        UnsupportedModel,
        match=rf"node '/odd/Op' \({operator}\) cannot be imported: its {what} depends on the data",
    ):
        import_onnx(path)


def test_names_of_weights_become_identifiers_of_their_own(tmp_path: Path) -> None:
    w = np.ones((8, 8), np.float32)
    path = small(
        tmp_path,
        node("MatMul", ["x", "onnx::MatMul_12"], ["a"], "/a"),
        node("MatMul", ["a", "12"], ["b"], "/b"),
        node("MatMul", ["b", "tokens"], ["c"], "/c"),
        node("MatMul", ["c", "a.b"], ["d"], "/d"),
        node("MatMul", ["d", "a/b"], ["logits"], "/e"),
        **{"onnx::MatMul_12": w, "12": w, "tokens": w, "a.b": w, "a/b": w},
    )
    names = list(import_onnx(path).weights)
    assert len(set(names)) == len(names) == 6
    assert all(name.isidentifier() for name in names)
    assert "tokens" not in names


def test_shape_arithmetic_leaves_no_trace(tmp_path: Path) -> None:
    """Reshape to [batch, sequence, 2, -1] with a shape that nodes compute."""
    path = small(
        tmp_path,
        node("Shape", ["x"], ["shape"], "/shape"),
        node("Slice", ["shape", "zero", "two"], ["front"], "/front"),
        node("Concat", ["front", "rest"], ["target"], "/target", axis=0),
        node("Reshape", ["x", "target"], ["split"], "/split"),
        node("Transpose", ["split"], ["logits"], "/transpose", perm=[0, 2, 1, 3]),
        zero=np.array([0]),
        two=np.array([2]),
        rest=np.array([2, -1]),
    )
    model = import_onnx(path)
    assert dict(ops(model.module)) == {"take": 1, "reshape": 1, "permute_dims": 1}
    tokens = np.array([[1, 2, 31]])
    (got,) = Compiled(model.module)(tokens, TABLE)
    np.testing.assert_array_equal(got, TABLE[tokens].reshape(1, 3, 2, 4).transpose(0, 2, 1, 3))


def test_a_tensor_of_infinities_can_be_lowered() -> None:
    fill = numpy_helper.from_array(np.array([-np.inf], np.float32))
    nodes = [
        node("Shape", ["x"], ["shape"], "/shape"),
        node("ConstantOfShape", ["shape"], ["logits"], "/full", value=fill),
    ]
    module = import_graph(onnx_model(nodes, {"x": (TensorProto.FLOAT, ["n", 3])}, {}))
    (got,) = Compiled(module)(np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(got, np.full((2, 3), -np.inf, np.float32))


@pytest.mark.parametrize(
    ("kind", "shape", "reason"),
    [
        (TensorProto.INT4, [2], "input 'x' has the element type INT4"),
        (TensorProto.STRING, [2], "input 'x' has the element type STRING"),
        (TensorProto.FLOAT, [0, 2], "input 'x' is a tensor without elements"),
    ],
)
def test_inputs_that_no_graph_may_have(kind: int, shape: list[int], reason: str) -> None:
    model = onnx_model([node("Identity", ["x"], ["logits"], "/identity")], {"x": (kind, shape)}, {})
    with pytest.raises(UnsupportedModel, match=reason):
        import_graph(model)


def test_a_count_of_tokens_stays_symbolic(tmp_path: Path) -> None:
    path = small(
        tmp_path,
        node("Shape", ["input_ids"], ["length"], "/length", start=1, end=2),
        node("Squeeze", ["length"], ["stop"], "/stop"),
        node("Range", ["zero", "stop", "one"], ["count"], "/count"),
        node("Gather", ["places", "count"], ["rows"], "/rows"),
        node("Add", ["x", "rows"], ["logits"], "/add"),
        zero=np.array(0),
        one=np.array(1),
        places=TABLE[::-1].copy(),
    )
    model = import_onnx(path)
    compiled = Compiled(model.module)
    for length in (1, 4):
        tokens = np.arange(length)[None]
        (got,) = compiled(tokens, *model.weights.values())
        np.testing.assert_array_equal(got, TABLE[tokens] + TABLE[::-1][:length])


def test_a_convolutional_network_is_refused(model_file: ModelFile) -> None:
    with pytest.raises(UnsupportedModel, match=r"is not a decoder language model: .*inputs: 'image'"):
        import_onnx(model_file("cnn"))


def test_an_encoder_is_imported_but_its_attention_is_refused(model_file: ModelFile) -> None:
    """Only the proof can tell it from a decoder."""
    import kvc

    assert import_onnx(model_file("encoder")).roles.tokens == "input_ids"
    with pytest.raises(UnsupportedModel, match=r"attention at node '.+' \(Softmax\): .* bidirectional"):
        kvc.inspect(model_file("encoder"))
