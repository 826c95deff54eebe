"""Bindings keep the ONNX node that they came from."""

from __future__ import annotations

import pytest
from tvm import relax
from tvm.relax import op

from kvc_passes.nodes import NodeNames
from kvc_passes.rebuild import rebuild, tidy
from support import param

NAMES = NodeNames((("/model/MatMul", "MatMul"), ("", "Add"), ("/model/layers.0/Softmax", "Softmax")))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("x_n0_", 0),
        ("x_n2_", 2),
        ("a_n1_n2_", 2),
        ("x_n2_17", 2),
        ("x_n3_", None),
        ("x", None),
        ("lv_n", None),
    ],
)
def test_the_index_is_read_from_the_name(name: str, index: int | None) -> None:
    assert NAMES.index(param(name, [1])) == index


def test_a_node_is_described_by_name_and_operator() -> None:
    var = param(NodeNames.hint("/model/layers.0/Softmax", 2), [1])
    assert NAMES.name(var) == "/model/layers.0/Softmax"
    assert NAMES.describe(var) == "node '/model/layers.0/Softmax' (Softmax)"
    assert NAMES.describe(param("lv3", [1])) == "value 'lv3'"
    assert NAMES.name(param("lv3", [1])) == "lv3"


@pytest.mark.parametrize("name", ["/a b/ç.0::x", "", "n7_", "x" * 300])
def test_a_hint_is_an_identifier_of_the_index(name: str) -> None:
    hint = NodeNames.hint(name, 1)
    assert f"x{hint}".isidentifier()
    assert NAMES.index(param(hint, [1])) == 1


def test_names_that_collide_keep_their_node_through_tvms_passes() -> None:
    """The builder numbers equal names; CSE and canonicalization keep them."""
    x = param("x", [4])
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            first = builder.emit(op.exp(x), name_hint=NodeNames.hint("Exp", 2))
            second = builder.emit(op.sin(first), name_hint=NodeNames.hint("Exp", 2))
            result = builder.emit_output(op.add(second, first), name_hint="out")
        builder.emit_func_output(result)
    module = relax.transform.EliminateCommonSubexpr()(tidy(builder.get()))
    module = rebuild(module, module["main"].params, lambda *_: None)
    bindings = module["main"].body.blocks[0].bindings
    assert [NAMES.index(b.var) for b in bindings[:2]] == [2, 2]
