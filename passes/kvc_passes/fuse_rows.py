"""What is computed row by row around a reduction becomes one kernel: norms, softmaxes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tvm import IRModule, relax
from tvm.ir import GenericConst

from .base import Result
from .graph import Graph, dims, graph_of, op_name, operands, same_shape, static
from .operations import ELEMENTWISE
from .rebuild import rebuild, substitute

_REDUCTIONS = ("max", "mean", "min", "sum")
_LONGEST = 16384
"""Elements of a row that a block of threads can hold."""
_MOST = 40
"""Operations after a reduction that are looked at."""


@dataclass(frozen=True)
class FuseRows:
    """A reduction over the last axis, with the element-wise operations around it, is one function.

    Before: `mean(x * x)`, and operations on it and on x, such as those of a norm. TVM's own fusion goes from
        a reduction onwards, and not from x around it.
    After: a call of a primitive function that does all of it; FuseTIR makes one kernel of that.
    Needs: a target whose schedules keep a row in one block of threads; before legalization.
    Refuses: nothing; groups that more than one result leaves are made smaller.
    """

    def run(self, mod: IRModule) -> Result:
        graph = graph_of(mod["main"])
        groups: dict[relax.Var, list[relax.Var]] = {}
        taken: set[relax.Var] = set()
        for var in graph.order:
            group = None if var in taken else _group(graph, var, taken)
            if group is not None:
                groups[group[-1]] = group
                taken.update(group)
        values: dict[relax.Var, relax.Expr] = {}

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            if var not in groups:
                return None
            inputs = _inputs(graph, groups[var])
            function = builder.add_func(_function(graph, groups[var], inputs), "rows")
            return relax.Call(function, [substitute(i, values) for i in inputs], ty_args=[])

        module = rebuild(mod, mod["main"].params, place, values=values)
        return Result(module, len(groups))


def _group(graph: Graph, reduction: relax.Var, taken: set[relax.Var]) -> list[relax.Var] | None:
    """Operations in order, of which only the last is used elsewhere; None for no group."""
    if not _reduces_rows(graph, reduction):
        return None
    members, best, source = {reduction}, None, graph.definitions[reduction].args[0]
    start = graph.order.index(reduction) + 1
    for var in graph.order[start : start + _MOST]:
        value = graph.definitions[var]
        if not any(isinstance(o, relax.Var) and o in members for o in operands(value)):
            continue
        if var in taken or not (_is_elementwise(graph, var, source) or _reduces_rows(graph, var, source)):
            continue
        members.add(var)
        whole = members | _producers(graph, members, source, taken)
        leaving = [v for v in whole if _leaves(graph, v, whole)]
        if leaving == [var]:
            best = whole
    if best is None:
        return None
    return [v for v in graph.order if v in best]


def _producers(
    graph: Graph, members: Iterable[relax.Var], source: relax.Expr, taken: set[relax.Var]
) -> set[relax.Var]:
    """Element-wise operations that only the group uses."""
    found: set[relax.Var] = set()
    whole = set(members)
    stack = [o for v in whole for o in operands(graph.definitions[v])]
    while stack:
        var = stack.pop()
        known = isinstance(var, relax.Var) and var in graph.definitions and var not in whole
        if not known or var in taken or not _is_elementwise(graph, var, source):
            continue
        if all(user in whole for user in graph.users[var]) and var is not graph.function.body.body:
            whole.add(var)
            found.add(var)
            # Its other users were looked at; what it is made of comes next, and again what waited for it.
            stack.extend(o for v in whole for o in operands(graph.definitions[v]))
    return found


def _leaves(graph: Graph, var: relax.Var, group: set[relax.Var]) -> bool:
    outside = any(user not in group for user in graph.users[var])
    return outside or var in operands(graph.function.body.body) or var is graph.function.body.body


def _reduces_rows(graph: Graph, var: relax.Var, source: relax.Expr | None = None) -> bool:
    """Whether `var` reduces the last axis, and keeps it, of rows like those of `source`."""
    call = graph.definitions[var]
    if op_name(call) not in _REDUCTIONS or call.attrs.axis is None or not call.attrs.keepdims:
        return False
    rows = dims(call.args[0])
    last = [int(a) % len(rows) for a in call.attrs.axis] == [len(rows) - 1]
    length = static(rows[-1])
    if not last or length is None or not 1 < length <= _LONGEST:
        return False
    return source is None or same_shape(rows, dims(source))


def _is_elementwise(graph: Graph, var: relax.Var, source: relax.Expr) -> bool:
    """Whether `var` has the rows of `source`, or one element for each."""
    if op_name(graph.definitions[var]) not in ELEMENTWISE:
        return False
    rows, own = dims(source), dims(var)
    if len(own) == 1:  # a weight that is cast
        return static(own[0]) == static(rows[-1]) and all(
            o in graph.function.params for o in operands(graph.definitions[var])
        )
    return (
        len(rows) == len(own) and same_shape(own[:-1], rows[:-1]) and static(own[-1]) in (1, static(rows[-1]))
    )


def _inputs(graph: Graph, group: list[relax.Var]) -> list[relax.Expr]:
    """What the group reads, in order: variables, and constants that are no single numbers."""
    inside = set(group)
    read = [o for v in group for o in operands(graph.definitions[v])]
    tensors = (o for o in read if isinstance(o, relax.Var) or (isinstance(o, GenericConst) and dims(o)))
    return list(dict.fromkeys(o for o in tensors if o not in inside))


def _function(graph: Graph, group: list[relax.Var], inputs: list[relax.Expr]) -> relax.Function:
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", v.ty) for i, v in enumerate(inputs)]
    values: dict[relax.Expr, relax.Expr] = dict(zip(inputs, params))

    def within(var: relax.Var) -> relax.Call:
        call = graph.definitions[var]
        return relax.Call(call.op, [values.get(a, a) for a in call.args], call.attrs, call.ty_args)

    with builder.function("rows", params, {"Primitive": True}, private=True):
        with builder.dataflow():
            for var in group[:-1]:
                values[var] = builder.emit(within(var))
            result = builder.emit_output(within(group[-1]))
        builder.emit_func_output(result)
    return relax.utils.copy_with_new_vars(builder.get()["rows"])
