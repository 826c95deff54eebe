"""Products with constant matrices use weights in the kernels' own layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx
from tvm.ir import GenericConst

from .base import Result
from .facts import FLOAT32
from .graph import Graph, dims, graph_of, op_name, operands, same_shape, static
from .kernel_sets import MatmulKernels
from .rebuild import drop_params, rebuild

MATMUL = "packed_matmul"


@dataclass(frozen=True)
class Source:
    """A parameter of the imported model, as rows of a weight.

    Attributes:
        name: the parameter.
        columns: its share of the product's columns.
        transposed: it stands as [depth, columns], not [columns, depth].
    """

    name: str
    columns: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class PackedWeight:
    """A weight of the compiled model: where its numbers come from.

    Attributes:
        sources: one parameter, or those whose products are computed together.
        depth: the weight as a matrix is [columns, depth], y = x @ w^T; 0 for a weight kept as it is.
    """

    sources: tuple[Source, ...]
    depth: int = 0

    @classmethod
    def kept(cls, name: str) -> PackedWeight:
        """A weight that is stored as it is."""
        return cls((Source(name),))

    @property
    def columns(self) -> int:
        return sum(source.columns for source in self.sources)


@dataclass(frozen=True)
class PackMatmuls:
    """Matrix products with a weight, and lookups in the same weight, become kernels on a packed weight.

    Before: `matmul(x [.., m, depth], w [depth, columns])`, w a parameter, the transpose of one, or a
        concatenation of such; a bias that is a parameter [columns] may be added; `take(w, ids)` may read rows
        of the same weight.
    After: `call_tir(packed_matmul, x, packed, [bias])`; the parameter has the packed shape.
    Needs: FlattenTokens (x is [1, n, depth] or [n, depth]).
    Refuses: nothing; a product that does not match stays a plain matmul.
    """

    kernels: MatmulKernels

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: dict of PackedWeight by the new function's weight parameter names."""
        function = mod["main"]
        graph = graph_of(function)
        products = {m.result: m for v in graph.order if (m := _product(graph, v))}
        packed = {m.weight: self._parameter(m.weight) for m in products.values()}
        lookups = {v: s for v in graph.order if (s := self._lookup(graph, v, packed))}
        made: dict[tuple[Any, ...], Any] = {}
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var in lookups:
                return self._embedding(builder, made, value, packed[lookups[var]], lookups[var])
            if var in products:
                match = products[var]
                return self._matmul(builder, made, match, values.get(match.x, match.x), packed[match.weight])
            return None

        module = rebuild(mod, [*function.params, *packed.values()], place, values=values)
        used = graph_of(module["main"])
        replaced = {source.name for weight in packed for source in weight.sources}
        module = drop_params(
            module, {p.name for p in function.params if p.name in replaced and not used.users[p]}
        )
        recipes = {parameter.name: weight for weight, parameter in packed.items()}
        return Result(module, len(products) + len(lookups), recipes)

    def _parameter(self, weight: PackedWeight) -> relax.Var:
        (data,) = self.kernels.packed(weight.columns, weight.depth, FLOAT32)
        first = weight.sources[0]
        name = f"{first.name}_packed" if first.transposed else f"{first.name}_packed_rows"
        return relax.Var(name, relax.TensorType(data.shape, data.dtype))

    def _lookup(
        self, graph: Graph, var: relax.Var, packed: Mapping[PackedWeight, relax.Var]
    ) -> PackedWeight | None:
        """The packed weight whose rows `take(w, ids [1, n])` reads."""
        call = graph.definitions[var]
        if (
            op_name(call) != "take"
            or call.attrs.axis is None
            or int(call.attrs.axis) != 0
            or len(dims(call.args[1])) != 2
        ):
            return None
        data = graph.alias(call.args[0])
        if not isinstance(data, relax.Var) or call.args[1].ty.dtype.dtype != "int64" or len(dims(data)) != 2:
            return None
        rows, depth = (static(d) for d in dims(data))
        weight = PackedWeight((Source(data.name, rows or 0),), depth or 0)
        return weight if weight in packed else None

    def _embedding(
        self,
        builder: relax.BlockBuilder,
        made: dict[Any, Any],
        value: relax.Call,
        weight: relax.Var,
        recipe: PackedWeight,
    ) -> relax.Expr:
        key = ("packed_embedding", recipe.columns, recipe.depth)
        if key not in made:
            made[key] = builder.add_func(
                self.kernels.embedding(recipe.columns, recipe.depth, FLOAT32), key[0]
            )
        shape = [*dims(value.args[1]), tirx.IntImm("int64", recipe.depth)]
        return relax.op.call_tir(made[key], [weight, value.args[1]], relax.TensorType(shape, "float32"))

    def _matmul(
        self,
        builder: relax.BlockBuilder,
        made: dict[Any, Any],
        match: _Product,
        x: relax.Expr,
        weight: relax.Var,
    ) -> relax.Expr:
        columns, depth, bias = match.weight.columns, match.weight.depth, match.bias is not None
        key = (MATMUL, columns, depth, bias)
        if key not in made:
            made[key] = builder.add_func(
                self.kernels.matmul(columns, depth, FLOAT32, bias=bias, flat=False), MATMUL
            )
        leading = dims(x)[:-1]
        if len(leading) == 1:
            one = [tirx.IntImm("int64", 1), *leading]
            x = builder.emit(relax.op.reshape(x, relax.ShapeExpr([*one, tirx.IntImm("int64", depth)])))
        shape = [
            *([tirx.IntImm("int64", 1)] if len(leading) == 1 else []),
            *leading,
            tirx.IntImm("int64", columns),
        ]
        args = [x, weight] if match.bias is None else [x, weight, match.bias]
        result = relax.op.call_tir(made[key], args, relax.TensorType(shape, "float32"))
        if len(leading) == 2:
            return result
        return relax.op.reshape(builder.emit(result), relax.ShapeExpr(shape[1:]))


@dataclass(frozen=True)
class _Product:
    """x @ w^T (+ bias), and the value that a kernel call replaces."""

    x: relax.Expr
    weight: PackedWeight
    bias: relax.Var | None
    result: relax.Var


def _product(graph: Graph, var: relax.Var) -> _Product | None:
    call = graph.definitions[var]
    if op_name(call) != "matmul" or var.ty.dtype.dtype != "float32":
        return None
    x = call.args[0]
    if isinstance(graph.resolve(x), GenericConst) or len(dims(x)) not in (2, 3):
        return None
    if len(dims(x)) == 3 and static(dims(x)[0]) != 1:
        return None
    weight = _weight(graph, call.args[1])
    if weight is None:
        return None
    bias, result = _bias(graph, var, weight.columns)
    return _Product(x, weight, bias, result)


def _weight(graph: Graph, value: relax.Expr) -> PackedWeight | None:
    """The weight [depth, columns] behind the right side of a product, None when it is none."""
    joined = graph.resolve(value)
    is_joined = op_name(joined) == "concat" and int(joined.attrs.axis) % 2 == 1
    parts = operands(joined) if is_joined else [value]
    sources = [_source(graph, part) for part in parts]
    depth = static(dims(value)[0]) if len(dims(value)) == 2 else None
    known = [source for source in sources if source is not None]
    return PackedWeight(tuple(known), depth) if depth and len(known) == len(parts) else None


def _source(graph: Graph, value: relax.Expr) -> Source | None:
    weight, transposed = graph.alias(value), True
    swap = graph.resolve(weight)
    if op_name(swap) == "permute_dims" and len(dims(weight)) == 2:
        weight, transposed = graph.alias(swap.args[0]), False
    columns = static(dims(value)[1]) if len(dims(value)) == 2 else None
    if weight not in graph.function.params or columns is None:
        return None
    return Source(weight.name, columns, transposed)


def _bias(graph: Graph, product: relax.Var, columns: int) -> tuple[relax.Var | None, relax.Var]:
    """The parameter [columns] that is the only thing added to the product."""
    users = graph.users[product]
    if (
        len(users) == 1
        and op_name(graph.definitions[users[0]]) == "add"
        and same_shape(dims(users[0]), dims(product))
    ):
        add = graph.definitions[users[0]]
        for operand in map(graph.alias, add.args):
            if operand in graph.function.params and [static(d) for d in dims(operand)] == [columns]:
                return operand, users[0]
    return None, product
