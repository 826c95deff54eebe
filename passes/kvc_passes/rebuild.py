"""Rebuilding a Relax function binding by binding: the one way our passes write functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import IRModule, relax

from .graph import graph_of

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
    mod: IRModule,
    params: Sequence[relax.Var],
    rule: Rule,
    *,
    values: dict[relax.Var, relax.Expr] | None = None,
    output: relax.Expr | None = None,
) -> IRModule:
    """The module with its function `main` written anew; other functions stay.

    Args:
        mod: its `main` is a straight line of bindings.
        params: the parameters of the new function.
        rule: given the builder, the old variable and its value with operands replaced, returns the value
            to bind instead, or None to keep it.
        values: replacements of old variables, for changed parameters; those of all variables are added.
        output: what to return, an expression over old variables; the old body by default.

    Returns:
        a normalized module without dead code.
    """
    function = mod["main"]
    graph = graph_of(function)
    builder = relax.BlockBuilder(IRModule({v: f for v, f in mod.functions_items() if v.name_hint != "main"}))
    values = {} if values is None else values
    with builder.function("main", list(params)):
        with builder.dataflow():
            for var in graph.order:
                value = substitute(graph.definitions[var], values)
                replaced = rule(builder, var, value)
                result = value if replaced is None else replaced
                values[var] = (
                    result if isinstance(result, relax.Var) else builder.emit(result, name_hint=var.name)
                )
            result = substitute(function.body.body if output is None else output, values)
            returned = builder.emit_output(result)
        builder.emit_func_output(returned)
    return tidy(builder.get())


def tidy(module: IRModule) -> IRModule:
    """Canonical bindings, no dead code."""
    return relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(module))


def drop_params(module: IRModule, names: set[str | None]) -> IRModule:
    """`module` without the parameters of `main` called `names`, which nothing may use."""
    old = module["main"]
    kept = [p for p in old.params if p.name not in names]
    return with_main(module, relax.Function(kept, old.body, old.ret_ty, old.is_pure, old.attrs))


def drop_unused(module: IRModule, first: int) -> IRModule:
    """`module` without those parameters of `main`, from number `first` on, that nothing uses."""
    used = graph_of(module["main"]).users
    return drop_params(module, {p.name for p in module["main"].params[first:] if not used[p]})


def with_main(module: IRModule, function: relax.Function) -> IRModule:
    """`module` with another `main`."""
    result = IRModule(dict(module.functions_items()))
    result["main"] = function
    return result


def insert_params(function: relax.Function, after: str, new: Sequence[relax.Var]) -> list[relax.Var]:
    """The function's parameters with `new` behind the one called `after`."""
    at = next(i for i, p in enumerate(function.params) if p.name == after) + 1
    return [*function.params[:at], *new, *function.params[at:]]
