"""Products with constant matrices use weights in the kernels' own layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx
from tvm.ir import GenericConst

from .base import Result
from .graph import Graph, dims, graph_of, op_name, same_shape, static
from .kernel_sets import MatmulKernels
from .rebuild import drop_params, rebuild

MATMUL = "packed_matmul"


@dataclass(frozen=True)
class PackedWeight:
    """A weight of the compiled model: where its numbers come from.

    Attributes:
        source: parameter of the imported model.
        columns, depth: the weight as a matrix [columns, depth], y = x @ w^T; 0 for a weight kept as it is.
        transposed: the source stands as [depth, columns].
    """

    source: str
    columns: int = 0
    depth: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class PackMatmuls:
    """Matrix products with a weight, and lookups in the same weight, become kernels on a packed weight.

    Before: `matmul(x [.., m, depth], w [depth, columns])`, w a parameter or the transpose of one; a bias that
        is a parameter [columns] may be added; `take(w, ids)` may read rows of the same weight.
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
        packed = {m.source.name: self._parameter(m) for m in products.values()}
        lookups = {v: s for v in graph.order if (s := self._lookup(graph, v, packed))}
        made: dict[tuple[Any, ...], Any] = {}
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var in lookups:
                return self._embedding(builder, made, value, *packed[lookups[var]])
            if var in products:
                match = products[var]
                return self._matmul(
                    builder, made, match, values.get(match.x, match.x), packed[match.source.name][0]
                )
            return None

        module = rebuild(mod, [*function.params, *(w for w, _ in packed.values())], place, values=values)
        used = graph_of(module["main"])
        module = drop_params(
            module, {p.name for p in function.params if p.name in packed and not used.users[p]}
        )
        recipes = {w.name: recipe for w, recipe in packed.values()}
        return Result(module, len(products) + len(lookups), recipes)

    def _parameter(self, match: _Product) -> tuple[relax.Var, PackedWeight]:
        recipe = PackedWeight(match.source.name, match.columns, match.depth, match.transposed)
        shape = self.kernels.packed_shape(match.columns, match.depth)
        return relax.Var(f"{match.source.name}_packed", relax.TensorType(shape, "float32")), recipe

    def _lookup(
        self, graph: Graph, var: relax.Var, packed: Mapping[str, tuple[relax.Var, PackedWeight]]
    ) -> str | None:
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
        name = data.name if isinstance(data, relax.Var) else ""
        stands_as_rows = name in packed and not packed[name][1].transposed
        return name if stands_as_rows and call.args[1].ty.dtype.dtype == "int64" else None

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
            made[key] = builder.add_func(self.kernels.embedding(recipe.columns, recipe.depth), key[0])
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
        key = (MATMUL, match.columns, match.depth, match.bias is not None)
        if key not in made:
            kernel = self.kernels.matmul(match.columns, match.depth, bias=match.bias is not None, flat=False)
            made[key] = builder.add_func(kernel, MATMUL)
        leading = dims(x)[:-1]
        if len(leading) == 1:
            one = [tirx.IntImm("int64", 1), *leading]
            x = builder.emit(relax.op.reshape(x, relax.ShapeExpr([*one, tirx.IntImm("int64", match.depth)])))
        shape = [
            *([tirx.IntImm("int64", 1)] if len(leading) == 1 else []),
            *leading,
            tirx.IntImm("int64", match.columns),
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
    source: relax.Var
    columns: int
    depth: int
    transposed: bool
    bias: relax.Var | None
    result: relax.Var


def _product(graph: Graph, var: relax.Var) -> _Product | None:
    call = graph.definitions[var]
    if (
        op_name(call) != "matmul"
        or var.ty.dtype.dtype != "float32"
        or isinstance(graph.resolve(call.args[0]), GenericConst)
    ):
        return None
    x, weight, transposed = call.args[0], graph.alias(call.args[1]), True
    swap = graph.resolve(weight)
    if op_name(swap) == "permute_dims" and len(dims(weight)) == 2:
        weight, transposed = graph.alias(swap.args[0]), False
    if weight not in graph.function.params or len(dims(weight)) != 2 or len(dims(x)) not in (2, 3):
        return None
    rows, columns = (static(d) for d in dims(weight))
    if rows is None or columns is None or (len(dims(x)) == 3 and static(dims(x)[0]) != 1):
        return None
    columns, depth = (columns, rows) if transposed else (rows, columns)
    bias, result = _bias(graph, var, columns)
    return _Product(x, weight, columns, depth, transposed, bias, result)


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
