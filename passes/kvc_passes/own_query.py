"""Queries by a product of their own, where keys or values that are not computed any more shared theirs."""

from __future__ import annotations

from collections.abc import Set

from tvm import relax, tirx

from .conditions import Unprovable
from .emitting import head_columns, indices, replaced, shape, shared_columns
from .graph import dims
from .provenance import Piece
from .rotations import Rotation, Rotations
from .state_forms import Forms


def own_query(
    builder: relax.BlockBuilder,
    forms: Forms,
    query: relax.Expr,
    products: Set[relax.Var],
    values: dict[relax.Var, relax.Expr],
) -> relax.Expr | None:
    """The query [1, heads, n, width], made anew; None if it is no part of `products`, or not that alone.

    query: as the graph has it, a part of a product, which may be turned as keys are.
    """
    if not products & forms.graph.ancestors([query]):
        return None
    try:
        pieces = forms.provenance.pieces(query)
        rotation = None
        if len(pieces) != 1 or pieces[0].projection is None:
            rotation = Rotations(forms.graph, forms.provenance).read(query, pieces)
    except Unprovable:
        return None
    piece = pieces[0] if rotation is None else rotation.key
    if piece.projection is None or piece.projection.product not in products:
        return None
    wanted = str(query.ty.dtype.dtype)
    product = _product(builder, piece, int(dims(query)[1].value), dims(query)[2], wanted, values)
    return product if rotation is None else _turned(builder, product, rotation, values)


def _product(
    builder: relax.BlockBuilder,
    piece: Piece,
    heads: int,
    n: tirx.Var,
    dtype: str,
    values: dict[relax.Var, relax.Expr],
) -> relax.Expr:
    projection = piece.projection
    assert projection is not None
    own_columns = indices(head_columns(piece, heads, 1))
    x, weight = replaced(projection.x, values), replaced(projection.weight, values)
    x = builder.emit(relax.op.reshape(x, shape(1, n, projection.depth)))
    own = builder.emit(relax.op.take(weight, own_columns, axis=1, mode="clip"))
    product = builder.emit(relax.op.matmul(x, own))
    if projection.bias is not None:
        bias = builder.emit(
            relax.op.take(replaced(projection.bias, values), own_columns, axis=0, mode="clip")
        )
        if bias.ty.dtype.dtype != product.ty.dtype.dtype:
            product = builder.emit(relax.op.astype(product, bias.ty.dtype.dtype))
        product = builder.emit(relax.op.add(product, bias))
    product = builder.emit(relax.op.reshape(product, shape(1, n, heads, piece.width)))
    product = builder.emit(relax.op.permute_dims(product, [0, 2, 1, 3]))
    same = str(product.ty.dtype.dtype) == dtype
    return product if same else builder.emit(relax.op.astype(product, dtype))


def _turned(
    builder: relax.BlockBuilder, x: relax.Expr, rotation: Rotation, values: dict[relax.Var, relax.Expr]
) -> relax.Expr:
    """x [1, heads, n, width] with its first elements turned."""
    half, (_, _, n, width) = rotation.half, dims(x)
    dtype = str(x.ty.dtype.dtype)

    def part(low: int, high: int) -> relax.Expr:
        return builder.emit(relax.op.strided_slice(x, [3], [low], [high], assume_inbound=True))

    def angle(source: tuple[relax.Var, int]) -> relax.Expr:
        piece = Piece(0, half, source[0], source[1], 0)
        found = shared_columns(builder, replaced(source[0], values), piece, n)
        return found if str(found.ty.dtype.dtype) == dtype else builder.emit(relax.op.astype(found, dtype))

    def times(a: relax.Expr, b: relax.Expr) -> relax.Expr:
        return builder.emit(relax.op.multiply(a, b))

    cosine, sine, low, high = (
        angle(rotation.angles.cosine),
        angle(rotation.angles.sine),
        part(0, half),
        part(half, 2 * half),
    )
    first = builder.emit(relax.op.subtract(times(low, cosine), times(high, sine)))
    second = builder.emit(relax.op.add(times(high, cosine), times(low, sine)))
    rest = [part(2 * half, int(width.value))] if int(width.value) > 2 * half else []
    return builder.emit(relax.op.concat([first, second, *rest], axis=3))
