"""Rebuilding a Relax function binding by binding: the one way our passes write functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import IRModule, relax

from .graph import Graph

Rule = Callable[[relax.BlockBuilder, relax.Var, relax.Expr], "relax.Expr | None"]


def substitute(value: relax.Expr, remap: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """`value` with its operands replaced; types are inferred anew when it is emitted."""
    if isinstance(value, relax.Var):
        return remap.get(value, value)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substitute(field, remap) for field in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(value.tuple_value, remap), value.index)
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [substitute(a, remap) for a in value.args], value.attrs, value.ty_args)
    return value


def rebuild(
    function: relax.Function,
    params: Sequence[relax.Var],
    rule: Rule,
    *,
    values: dict[relax.Var, relax.Expr] | None = None,
    output: relax.Expr | None = None,
    name: str = "main",
    module: IRModule | None = None,
) -> IRModule:
    """A module with `function` written anew.

    Args:
        function: a straight line of bindings.
        params: the parameters of the new function.
        rule: given the builder, the old variable and its value with operands replaced, returns the value
            to bind instead, or None to keep it.
        values: replacements of old variables, for parameters that changed; filled with those of all variables.
        output: what to return, an expression over old variables; the old body by default.
        name: the function's name in the result.
        module: functions that the result starts with (its own `name` is replaced).

    Returns:
        a normalized module without dead code.
    """
    graph = Graph(function)
    builder = relax.BlockBuilder(module) if module is not None else relax.BlockBuilder()
    values = {} if values is None else values
    with builder.function(name, list(params)):
        with builder.dataflow():
            for var in graph.order:
                value = substitute(graph.definitions[var], values)
                replaced = rule(builder, var, value)
                result = value if replaced is None else replaced
                values[var] = result if isinstance(result, relax.Var) else builder.emit(result, name_hint=var.name)
            result = substitute(function.body.body if output is None else output, values)
            returned = builder.emit_output(result)
        builder.emit_func_output(returned)
    return tidy(builder.get())


def tidy(module: IRModule) -> IRModule:
    """Canonical bindings, no dead code."""
    return relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(module))


def drop_params(module: IRModule, names: set[str | None], function: str = "main") -> IRModule:
    """`module` without the parameters called `names`, which nothing may use."""
    old = module[function]
    kept = [p for p in old.params if p.name not in names]
    new = relax.Function(kept, old.body, old.ret_ty, old.is_pure, old.attrs)
    result = IRModule(dict(module.functions_items()))
    result[function] = new
    return result
