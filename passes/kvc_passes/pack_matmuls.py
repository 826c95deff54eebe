"""Products with constant matrices use weights in the kernels' own layout."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import IRModule, relax, tirx
from tvm.ir import GenericConst

from .base import Result
from .errors import PlanningError
from .graph import Graph, dims, graph_of, op_name, same_shape, static
from .kernel_sets import MatmulKernels
from .loop_nests import OVERWRITES
from .markers import HEAD_PRODUCT, HEAD_WEIGHT, HeadProduct, attributes, tensors
from .prove_rows import ROWS
from .rebuild import drop_params, rebuild
from .weights import HeadWeight, PackedWeight, WeightPart, head_weight_of, table_of, weight_of

MATMUL = "packed_matmul"
_PARTS = ("packed", "scales", "zeros")


@dataclass(frozen=True)
class PackMatmuls:
    """Matrix products with a weight, and lookups in the same weight, become kernels on a packed weight.

    Before: `matmul(x [.., m, depth], w [depth, columns])`, w a parameter of floats or a dequantized one, the
        transpose or a widening cast of one, or a concatenation of such; a bias that is a parameter [columns]
        of x's type may be added, and, where the kernels can, any value of the product's shape;
        `take(w, ids)`, or a cast of it, may read rows of the same weight, or of a dequantized one.
        `kvc.head_product(x, w)`.
    After: `call_tir(packed_matmul, x, *packed, [bias], [residual])`; parameters have the packed shapes.
    Needs: FlattenTokens (x is [.., n, depth], where all dimensions before n are 1).
    Refuses: nothing; a product that does not match stays a plain matmul.
    """

    kernels: MatmulKernels

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: dict of WeightPart by the new function's weight parameter names."""
        function = mod["main"]
        graph = graph_of(function)
        products = self._products(graph)
        weights = dict.fromkeys(m.weight for m in products.values())
        found = ((v, _lookup(graph, v, weights, self.kernels.dtypes)) for v in graph.order)
        lookups = {var: lookup for var, lookup in found if lookup is not None}
        of_heads = self._head_products(graph)
        looked_up = [weight for weight, _ in lookups.values()]
        ordered: dict[PackedWeight | HeadWeight, None] = dict.fromkeys([*weights, *looked_up])
        ordered.update(dict.fromkeys(weight for _, weight in of_heads.values()))
        packed = {weight: self._parameters(weight) for weight in ordered}
        made: dict[tuple[Any, ...], Any] = {}
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var in lookups:
                weight, ids = lookups[var]
                return self._embedding(builder, made, var, values.get(ids, ids), packed[weight], weight)
            if var in products:
                match = products[var]
                x, residual = (values.get(v, v) for v in (match.x, match.residual))
                return self._matmul(builder, made, match, x, residual, packed[match.weight])
            if var in of_heads:
                attrs, weight_of_heads = of_heads[var]
                (parameter,) = packed[weight_of_heads]
                if op_name(value) == HEAD_WEIGHT:
                    return parameter
                return self._head_product(builder, made, var, value, attrs, weight_of_heads, parameter)
            return None

        new = [parameter for parameters in packed.values() for parameter in parameters]
        module = rebuild(mod, [*function.params, *new], place, values=values)
        used = graph_of(module["main"])
        replaced = {name for weight in packed for source in weight.sources for name in source.names}
        module = drop_params(
            module, {p.name for p in function.params if p.name in replaced and not used.users[p]}
        )
        recipes = {p.name: WeightPart(weight, i) for weight, ps in packed.items() for i, p in enumerate(ps)}
        return Result(module, len(products) + len(lookups) + len(of_heads), recipes)

    def _head_products(self, graph: Graph) -> dict[relax.Var, tuple[HeadProduct, HeadWeight]]:
        found = {}
        for var in graph.order:
            call = graph.definitions[var]
            if op_name(call) in (HEAD_PRODUCT, HEAD_WEIGHT):
                attrs = attributes(call, HeadProduct)
                weight = head_weight_of(graph, tensors(call)[-1], attrs)
                if weight is None:
                    raise PlanningError(f"the weight of '{var.name}' is no parameter of floats")
                found[var] = attrs, weight
        return found

    def _head_product(
        self,
        builder: relax.BlockBuilder,
        made: dict[Any, Any],
        var: relax.Var,
        call: relax.Call,
        attrs: HeadProduct,
        weight: HeadWeight,
        packed: relax.Var,
    ) -> relax.Expr:
        x = tensors(call)[0]
        dtype, sizes = str(x.ty.dtype.dtype), (attrs.heads, attrs.group, weight.columns, weight.inner)
        key = (HEAD_PRODUCT, *sizes, weight.format, attrs.absorbed, dtype)
        if key not in made:
            kernel = self.kernels.head_product(*sizes, weight.format, absorbed=attrs.absorbed, dtype=dtype)
            made[key] = builder.add_func(kernel, "head_product")
        return relax.op.call_tir(made[key], [x, packed], relax.TensorType(var.ty.shape, dtype))

    def _products(self, graph: Graph) -> dict[relax.Var, _Product]:
        """By the value that a kernel replaces; of two products that are added, the first adds the other."""
        found: dict[relax.Var, _Product] = {}
        for var in graph.order:
            match = _product(graph, var, self.kernels)
            if match is not None and match.result in found:
                match = replace(match, residual=None, result=match.sum)
            if match is not None:
                found[match.result] = match
        return found

    def _parameters(self, weight: PackedWeight | HeadWeight) -> tuple[relax.Var, ...]:
        first = weight.sources[0]
        if isinstance(weight, HeadWeight):
            tensor = self.kernels.head_packed(weight.heads, weight.columns, weight.inner, weight.format)
            name = f"{first.name}_heads_{weight.first}{'_absorbed' if weight.absorbed else ''}"
            return (relax.Var(name, relax.TensorType(tensor.shape, tensor.dtype)),)
        suffix = ("" if first.transposed else "_rows") + (f"_{first.picked[0][0]}" if first.picked else "")
        parts = self.kernels.packed(weight.columns, weight.depth, weight.format)
        return tuple(
            relax.Var(f"{first.name}_{part}{suffix}", relax.TensorType(t.shape, t.dtype))
            for part, t in zip(_PARTS, parts)
        )

    def _embedding(
        self,
        builder: relax.BlockBuilder,
        made: dict[Any, Any],
        var: relax.Var,
        ids: relax.Expr,
        packed: Sequence[relax.Var],
        weight: PackedWeight,
    ) -> relax.Expr:
        dtype = str(var.ty.dtype.dtype)
        key = ("packed_embedding", weight.columns, weight.depth, weight.format, dtype)
        if key not in made:
            kernel = self.kernels.embedding(weight.columns, weight.depth, weight.format, dtype)
            made[key] = builder.add_func(kernel, key[0])
        if ids.ty.dtype.dtype != "int64":
            ids = builder.emit(relax.op.astype(ids, "int64"))
        shape = [*dims(ids), tirx.IntImm("int64", weight.depth)]
        return relax.op.call_tir(made[key], [*packed, ids], relax.TensorType(shape, dtype))

    def _matmul(
        self,
        builder: relax.BlockBuilder,
        made: dict[Any, Any],
        match: _Product,
        x: relax.Expr,
        residual: relax.Expr | None,
        packed: Sequence[relax.Var],
    ) -> relax.Expr:
        weight, bias, dtype = match.weight, match.bias is not None, str(x.ty.dtype.dtype)
        key = (MATMUL, weight.columns, weight.depth, weight.format, bias, residual is not None, dtype)
        if key not in made:
            kernel = self.kernels.matmul(
                weight.columns,
                weight.depth,
                weight.format,
                bias=bias,
                flat=False,
                dtype=dtype,
                residual=residual is not None,
            )
            if residual is not None and self.kernels.overwrites:
                kernel = kernel.with_attr(OVERWRITES, [len(kernel.params) - 2])
            made[key] = builder.add_func(kernel.with_attr(ROWS, True), MATMUL)
        leading = dims(x)[:-1]
        one, depth, columns = (tirx.IntImm("int64", size) for size in (1, weight.depth, weight.columns))
        shape, flat = [one, leading[-1], columns], len(leading) != 2
        if flat:
            x = builder.emit(relax.op.reshape(x, relax.ShapeExpr([one, leading[-1], depth])))
        if flat and residual is not None:
            residual = builder.emit(relax.op.reshape(residual, relax.ShapeExpr(shape)))
        args = [x, *packed, *(value for value in (match.bias, residual) if value is not None)]
        result = relax.op.call_tir(made[key], args, relax.TensorType(shape, dtype))
        if not flat:
            return result
        return relax.op.reshape(builder.emit(result), relax.ShapeExpr([*leading, columns]))


@dataclass(frozen=True)
class _Product:
    """x @ w^T (+ bias) (+ residual), and the value that a kernel call replaces."""

    x: relax.Expr
    weight: PackedWeight
    bias: relax.Var | None
    residual: relax.Var | None
    sum: relax.Var
    """x @ w^T (+ bias) in the graph."""
    result: relax.Var
    """The same with the residual."""


def _lookup(
    graph: Graph, var: relax.Var, packed: Container[PackedWeight], dtypes: tuple[str, ...]
) -> tuple[PackedWeight, relax.Expr] | None:
    """The weight and the ids of `take(w, ids [1, n])` or its cast, if w is packed anyway or holds codes."""
    call = graph.definitions[var]
    if op_name(call) == "astype":
        call = graph.resolve(call.args[0])
    if op_name(call) != "take" or call.attrs.axis is None or int(call.attrs.axis) != 0:
        return None
    if len(dims(call.args[1])) != 2 or str(var.ty.dtype.dtype) not in dtypes:
        return None
    weight = table_of(graph, call.args[0])
    there = weight is not None and (weight in packed or weight.format.coded)
    return (weight, call.args[1]) if weight is not None and there else None


def _product(graph: Graph, var: relax.Var, kernels: MatmulKernels) -> _Product | None:
    call = graph.definitions[var]
    if op_name(call) != "matmul" or str(var.ty.dtype.dtype) not in kernels.dtypes:
        return None
    x = call.args[0]
    if x.ty.dtype.dtype != var.ty.dtype.dtype:
        return None
    if isinstance(graph.resolve(x), GenericConst) or len(dims(x)) < 2:
        return None
    if any(static(d) != 1 for d in dims(x)[:-2]):
        return None
    weight = weight_of(graph, call.args[1])
    if weight is None:
        return None
    bias, total = _bias(graph, var, weight.columns)
    residual, result = _residual(graph, total) if kernels.adds else (None, total)
    return _Product(x, weight, bias, residual, total, result)


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
            own = operand in graph.function.params and operand.ty.dtype.dtype == product.ty.dtype.dtype
            if own and [static(d) for d in dims(operand)] == [columns]:
                return operand, users[0]
    return None, product


def _residual(graph: Graph, product: relax.Var) -> tuple[relax.Var | None, relax.Var]:
    """The other value of an addition that is the only use of the product, unless that is what is returned."""
    users = graph.users[product]
    if len(users) != 1:
        return None, product
    add = graph.definitions[users[0]]
    returned = graph.alias(users[0]) == graph.alias(graph.function.body.body)
    if op_name(add) != "add" or returned or not same_shape(dims(users[0]), dims(product)):
        return None, product
    others = [a for a in add.args if graph.alias(a) != graph.alias(product)]
    for other in others:
        if isinstance(other, relax.Var) and same_shape(dims(other), dims(product)):
            return other, users[0]
    return None, product
