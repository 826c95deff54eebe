"""Provenance: what the pieces say is what the values are, whatever way layouts were changed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import IRModule, relax
from tvm.relax import op

from kvc_passes.conditions import Unprovable
from kvc_passes.graph import Graph
from kvc_passes.provenance import Piece, Provenance
from kvc_passes.rebuild import substitute
from support import Draft, floats, module_of, param, run, symbol

HEADS, DIM, WIDTH, N = 3, 8, 16, 5
Body = Callable[[Draft, relax.Var, relax.Var, relax.Var], relax.Expr]


def graph(columns: int, body: Body) -> IRModule:
    """`main(tokens [n], x [1,n,16], w [16,columns], b [columns])` -> an operand [1, heads, n, elements]."""
    n = symbol("n")
    params = [param("tokens", [n], "int64"), param("x", [1, n, WIDTH])]
    params += [param("w", [WIDTH, columns]), param("b", [columns])]
    return module_of(params, lambda emit, _, x, w, b: body(emit, x, w, b))[0]


def operand_of(module: IRModule) -> tuple[tuple[Piece, ...], relax.Var]:
    graph_ = Graph(module["main"])
    value = graph_.alias(module["main"].body.body)
    return Provenance(graph_).pieces(value), value


def check(module: IRModule, columns: int) -> tuple[Piece, ...]:
    """The elements of every piece are those of its source, at the columns that it names."""
    found, value = operand_of(module)
    arrays = [np.arange(N), floats(1, N, WIDTH), floats(WIDTH, columns, seed=1), floats(columns, seed=2)]
    for piece in found:
        assert piece.stride is not None
        both = _outputs(module, [value, piece.source])
        whole, source = run(both, *arrays)
        source = source.reshape(N, -1)
        for h in range(whole.shape[1]):
            first = piece.first + h * piece.stride
            expected = source[:, first : first + piece.width]
            np.testing.assert_array_equal(whole[0, h, :, piece.low : piece.high], expected)
    assert found[0].low == 0
    assert found[-1].high == whole.shape[3]
    assert all(a.high == b.low for a, b in pairwise(found))
    return found


def _outputs(module: IRModule, values: list[relax.Var]) -> IRModule:
    """The module with other outputs."""
    function = module["main"]
    graph_ = Graph(function)
    builder = relax.BlockBuilder()
    remap: dict[relax.Var, relax.Expr] = {}
    with builder.function("main", list(function.params)):
        with builder.dataflow():
            for var in graph_.order:
                remap[var] = builder.emit(substitute(graph_.definitions[var], remap))
            returned = builder.emit_output(relax.Tuple([substitute(v, remap) for v in values]))
        builder.emit_func_output(returned)
    return builder.get()


def _heads(emit: Draft, value: relax.Expr, count: int = HEADS, dim: int = DIM) -> relax.Var:
    n = value.ty.shape.values[-2]
    return emit(op.permute_dims(emit(op.reshape(value, [1, n, count, dim])), [0, 2, 1, 3]))


def _product(emit: Draft, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Var:
    return emit(op.add(emit(op.matmul(x, w)), b))


def test_a_product_of_its_own() -> None:
    module = graph(HEADS * DIM, lambda emit, x, w, b: _heads(emit, _product(emit, x, w, b)))
    (piece,) = check(module, HEADS * DIM)
    assert (piece.first, piece.stride, piece.width) == (0, DIM, DIM)
    projection = piece.projection
    assert projection is not None
    assert (projection.x.name, projection.weight.name, projection.bias.name) == ("x", "w", "b")
    assert projection.depth == WIDTH


@pytest.mark.parametrize("part", range(3))
def test_a_third_of_a_product_side_by_side(part: int) -> None:
    def body(emit: Draft, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        parts = emit(op.split(_product(emit, x, w, b), 3, axis=2))
        return _heads(emit, emit(relax.TupleGetItem(parts, part)))

    (piece,) = check(graph(3 * HEADS * DIM, body), 3 * HEADS * DIM)
    assert (piece.first, piece.stride) == (part * HEADS * DIM, DIM)
    assert piece.projection is not None


@pytest.mark.parametrize("part", range(3))
def test_a_third_of_every_head(part: int) -> None:
    def body(emit: Draft, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        product = _product(emit, x, w, b)
        split = emit(op.reshape(product, [1, x.ty.shape.values[1], HEADS, 3, DIM]))
        picked = emit(op.take(split, relax.const(part, "int64"), axis=3))
        return emit(op.permute_dims(picked, [0, 2, 1, 3]))

    (piece,) = check(graph(3 * HEADS * DIM, body), 3 * HEADS * DIM)
    assert (piece.first, piece.stride) == (part * DIM, 3 * DIM)


def test_a_bias_that_is_added_between_reshapes() -> None:
    def body(emit: Draft, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        n = x.ty.shape.values[1]
        rows = emit(op.reshape(x, [n, WIDTH]))
        whole = emit(op.reshape(emit(op.matmul(rows, w)), [1, n, HEADS * DIM]))
        return _heads(emit, emit(op.add(b, whole)))

    (piece,) = check(graph(HEADS * DIM, body), HEADS * DIM)
    assert piece.projection is not None
    assert piece.projection.x.name == "x"
    assert piece.projection.bias.name == "b"


@settings(max_examples=20, deadline=None)
@given(nope=st.integers(1, 6), rope=st.integers(1, 6), value=st.integers(0, 5))
def test_heads_with_elements_that_all_share(nope: int, rope: int, value: int) -> None:
    """As DeepSeek's: a projection, then elements that come from elsewhere, the same for every head."""
    columns = HEADS * (nope + value)

    def body(emit: Draft, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        n = x.ty.shape.values[1]
        own = _heads(emit, emit(op.matmul(x, w)), HEADS, nope + value)
        own = emit(op.strided_slice(own, [3], [0], [nope], assume_inbound=True))
        turned = emit(op.tanh(emit(op.strided_slice(x, [2], [3], [3 + rope], assume_inbound=True))))
        tail = emit(op.broadcast_to(emit(op.reshape(turned, [1, 1, n, rope])), [1, HEADS, n, rope]))
        return emit(op.concat([own, tail], axis=-1))

    own, tail = check(graph(columns, body), columns)
    assert own.projection is not None
    assert (own.width, own.stride) == (nope, nope + value)
    assert (tail.shared, tail.projection, tail.first, tail.width) == (True, None, 0, rope)


@pytest.mark.parametrize(
    "between",
    [
        lambda emit, v: emit(op.multiply(v, relax.const(2.0, "float32"))),
        lambda emit, v: emit(op.tanh(v)),
    ],
)
def test_what_comes_between_is_named(between: Callable[[Draft, relax.Var], relax.Var]) -> None:
    module = graph(HEADS * DIM, lambda emit, x, w, b: between(emit, _heads(emit, _product(emit, x, w, b))))
    found, value = operand_of(module)
    assert [(p.projection, p.shared, p.source) for p in found] == [(None, False, value)]


def test_heads_in_another_order_have_no_stride() -> None:
    def body(emit: Draft, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        heads = _heads(emit, _product(emit, x, w, b))
        return emit(op.take(heads, relax.const(np.array([2, 0, 1]), "int64"), axis=1))

    with pytest.raises(Unprovable):
        operand_of(graph(HEADS * DIM, body))


def test_tokens_of_another_row_are_no_projection() -> None:
    def body(emit: Draft, x: relax.Var, w: relax.Var, b: relax.Var) -> relax.Expr:
        heads = _heads(emit, _product(emit, x, w, b))
        first = emit(op.strided_slice(heads, [2], [0], [1], assume_inbound=True))
        return emit(op.broadcast_to(first, heads.ty.shape))

    (piece,) = operand_of(graph(HEADS * DIM, body))[0]
    assert (piece.stride, piece.projection, piece.shared) == (None, None, False)
