"""Operators in an order, and computed again where that pays, so that temporaries fit a number of bytes."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tvm import IRModule, relax, tirx
from tvm.s_tir.analysis import estimate_tir_flops

from .base import Result
from .errors import PlanningError
from .graph import Graph, graph_of, op_name, operands
from .loop_nests import OVERWRITES, call_kernel
from .place_arena import ALIGNMENT, element_bytes, evaluate
from .rebuild import substitute, with_main
from .remat.problem import Problem
from .remat.solve import Solution, solve

FLOPS: Final = 50.0
BANDWIDTH: Final = 20.0
"""Of the roofline by which operators are weighed: operations and bytes a nanosecond."""
CALL: Final = 1000
"""Nanoseconds that any call takes."""
_KERNELS: Final = ("call_tir", "call_dps_packed")
_INPLACE: Final = "call_tir_inplace"


@dataclass(frozen=True)
class Rematerialize:
    """Values that are cheap to compute again are not kept; operators run when their results are needed.

    Before: a dataflow function of kernel calls (`call_tir`, `call_tir_inplace`), reshapes and tuples.
    After: the same calls in another order, some of them several times; at no step do the temporaries that are
        alive take more than `bytes`.
    Needs: FuseTIR (it plans on what will be kernels) and RewriteDataflowReshape; a bound for every symbol.
        No pass after it may merge equal calls.
    Refuses: bytes that no schedule was found for (BudgetError, with the lowest peak that was); a call
        that is no kernel, several updates in place by one call of temporaries (PlanningError).

    Where a kernel may write over an input (OverwriteInputs), both count once. Outputs of the function are no
    temporaries and not counted: their memory is the caller's. Calls that update something in place, and those
    that read it before, run once and stay in order.
    """

    bytes: int
    bounds: Mapping[str, int] = field(default_factory=dict)
    costs: Mapping[str, int] | None = None
    """Nanoseconds of kernels by name, as measured; what lacks is taken from a roofline."""
    seconds: float = 60.0
    fixed_order: bool = False
    certify: bool = False
    seed: int = 0

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: the Solution; its `peak` is in bytes, its costs in nanoseconds."""
        function = mod["main"]
        operations = Operations(mod, self.bounds, self.costs or {})
        solution = solve(
            operations.problem,
            self.bytes,
            seconds=self.seconds,
            fixed_order=self.fixed_order,
            certify=self.certify,
            seed=self.seed,
        )
        order = solution.schedule.order
        if order == tuple(range(len(operations.vars))):
            return Result(mod, 0, solution)
        new = _written(function, operations, solution)
        return Result(with_main(mod, new), len(order), solution)


def _written(function: relax.Function, operations: Operations, solution: Solution) -> relax.Function:
    """The function with its bindings in the order of the solution."""
    graph = operations.graph
    builder = relax.BlockBuilder()
    values: dict[relax.Var, relax.Expr] = {}
    with builder.function(
        "main", list(function.params), attrs=dict(function.attrs) if function.attrs else None
    ):
        with builder.dataflow():
            for number in solution.schedule.order:
                var = operations.vars[number]
                for inner in operations.tuples_before(var):
                    values[inner] = substitute(graph.definitions[inner], values)
                value = substitute(graph.definitions[var], values)
                values[var] = builder.emit(value, name_hint=var.name)
            for inner in operations.tuples_before(function.body.body):
                values[inner] = substitute(graph.definitions[inner], values)
            result = builder.emit_output(substitute(function.body.body, values))
        builder.emit_func_output(result)
    return builder.get()["main"].with_attr("global_symbol", "main")


class Operations:
    """A function's bindings as a problem of rematerialization.

    Attributes:
        vars: the binding of every operation; tuples are none, they are written where they are used.
    """

    def __init__(self, mod: IRModule, bounds: Mapping[str, int], costs: Mapping[str, int]) -> None:
        self.graph: Graph = graph_of(mod["main"])
        self.vars = [v for v in self.graph.order if not isinstance(self.graph.definitions[v], relax.Tuple)]
        self.functions, self._bounds, self._costs = mod.functions, bounds, costs
        self._found: dict[Any, tuple[int, ...]] = {}
        self._bases: dict[relax.Var, relax.Var | None] = {}

    @functools.cached_property
    def problem(self) -> Problem:
        """Sizes in bytes, aligned as in an arena; costs in nanoseconds."""
        returned, number = self.graph.function.body.body, {var: i for i, var in enumerate(self.vars)}
        outputs, fixed = set(self.storages(returned)), self._fixed()
        reads = [sorted({number[o] for o in self._reads(v) if o in number}) for v in self.vars]
        return Problem(
            sizes=tuple(0 if v in outputs else self._size(v) for v in self.vars),
            costs=tuple(self._cost(v) for v in self.vars),
            inputs=tuple(map(tuple, reads)),
            kept=tuple(sorted({number[o] for o in self._flat(returned) if o in number})),
            once=tuple(i for i, v in enumerate(self.vars) if v in fixed),
            alias=tuple(number.get(self._base(v), -1) for v in self.vars),
            overwrites=self._overwrites(number, outputs, fixed),
        )

    def tuples_before(self, value: relax.Expr) -> list[relax.Var]:
        """The tuples that a binding's value, or a value itself, is written with, the inner ones first."""
        found: list[relax.Var] = []
        given = self.graph.definitions.get(value, value) if isinstance(value, relax.Var) else value
        if isinstance(value, relax.Var) and isinstance(self.graph.definitions.get(value), relax.Tuple):
            found.append(value)
        for operand in operands(given):
            if isinstance(self.graph.definitions.get(operand), relax.Tuple):
                found = [*self.tuples_before(operand), *found]
        return list(dict.fromkeys(found))

    def _flat(self, value: relax.Expr) -> list[relax.Var]:
        """The variables that a value is or holds, behind tuples that are only written."""
        if isinstance(value, relax.Tuple):
            return [v for field in value.fields for v in self._flat(field)]
        if isinstance(value, relax.Var):
            inner = self.graph.definitions.get(value)
            return self._flat(inner) if isinstance(inner, relax.Tuple) else [value]
        return []

    def _reads(self, var: relax.Var) -> list[relax.Var]:
        value = self.graph.definitions[var]
        given = [value] if isinstance(value, relax.Var) else operands(value)
        return [v for operand in given for v in self._flat(operand)]

    def _base(self, var: relax.Var) -> relax.Var | None:
        """The binding whose storage a value lies in; None for storage of its own, or a parameter's."""
        if var not in self._bases:  # a chain of updates asks for all before it, each time
            self._bases[var] = self._found_base(var)
        return self._bases[var]

    def _found_base(self, var: relax.Var) -> relax.Var | None:
        value = self.graph.definitions[var]
        if isinstance(value, relax.Var):
            return value
        if isinstance(value, relax.TupleGetItem):
            (whole,) = self._flat(value.tuple_value)[:1] or [None]
            inner = self.graph.definitions.get(value.tuple_value)
            return self._flat(inner.fields[value.index])[0] if isinstance(inner, relax.Tuple) else whole
        if op_name(value) == "reshape":
            return value.args[0] if isinstance(value.args[0], relax.Var) else None
        if op_name(value) == _INPLACE:
            updated = self._updated(value)
            own = [v for v in updated if v in self.graph.definitions and self.storages(v)]
            if len(own) > 1:
                raise PlanningError(f"'{var.name}' updates several temporaries in place")
            return own[0] if own else None
        return None

    def _updated(self, value: relax.Call) -> list[relax.Var]:
        """What a call updates in place."""
        places = [int(i) for i in value.attrs.inplace_indices]
        return [value.args[1].fields[i] for i in places if i >= 0]

    def storages(self, value: relax.Expr) -> list[relax.Var]:
        """The bindings that made the storage of what a value is or holds; parameters' are none."""
        found = []
        for var in self._flat(value):
            current: relax.Var | None = var
            while current is not None and current in self.graph.definitions:
                before = self._base(current)
                if before is None:
                    found.append(current)
                current = before
        return found

    def read_storages(self, var: relax.Var) -> set[relax.Var]:
        """The bindings whose storage an operation reads."""
        return {root for v in self._reads(var) for root in self.storages(v)}

    def _fixed(self) -> set[relax.Var]:
        """Updates in place, and everything that reads what is updated."""
        fixed = {v for v in self.vars if op_name(self.graph.definitions[v]) == _INPLACE}
        roots = {self._root(o) for v in fixed for o in self._updated(self.graph.definitions[v])}
        if not roots:
            return fixed
        readers = {
            v
            for v in self.vars
            if op_name(self.graph.definitions[v]) in _KERNELS
            and any(self._root(o) in roots for o in self._reads(v))
        }
        return fixed | readers

    def _overwrites(
        self, number: Mapping[relax.Var, int], outputs: set[relax.Var], fixed: set[relax.Var]
    ) -> tuple[int, ...]:
        """For every operation the one whose storage its output may take, -1 for none.

        Every other operation that reads that storage is an ancestor: it comes before in every order.
        """
        readers: dict[relax.Var, set[int]] = defaultdict(set)
        before: list[int] = []  # for every operation its ancestors, as bits
        for i, var in enumerate(self.vars):
            reads = [number[o] for o in self._reads(var) if o in number]
            before.append(functools.reduce(operator.or_, (before[r] | 1 << r for r in reads), 0))
            if self._base(var) is None or var in fixed:
                for root in self.read_storages(var):
                    readers[root].add(i)
        found = []
        for i, var in enumerate(self.vars):
            options = [] if var in outputs else [r for v in self.overwritable(var) for r in self.storages(v)]
            fitting = (
                number[root]
                for root in options
                if root not in outputs
                and self._size(root) == self._size(var)
                and all(before[i] >> other & 1 for other in readers[root] - {i})
            )
            found.append(next(fitting, -1))
        return tuple(found)

    def overwritable(self, var: relax.Var) -> list[relax.Var]:
        """The temporaries that a call may overwrite if nothing reads them later."""
        call = self.graph.definitions[var]
        if op_name(call) != "call_tir":
            return []
        given = list(call.args[1].fields)
        storages = [self.storages(v) if isinstance(v, relax.Var) else [] for v in given]
        places = self._places(call)
        return [
            given[i]
            for i in places
            if storages.count(storages[i]) == len(storages[i]) == 1
            # an update of a parameter lies in the parameter
            and op_name(self.graph.definitions[storages[i][0]]) in _KERNELS
        ]

    def _places(self, call: relax.Call) -> tuple[int, ...]:
        """The inputs that a kernel's output may overwrite."""
        name = call.args[0]
        if name not in self._found:
            self._found[name] = self._found_places(call)
        return self._found[name]

    def _found_places(self, call: relax.Call) -> tuple[int, ...]:
        """As they are marked, else by the kernel's loops."""
        function = self.functions.get(call.args[0])
        marked = function.attrs.get(OVERWRITES) if isinstance(function, tirx.PrimFunc) else None
        if marked is not None:
            return tuple(int(place) for place in marked)
        kernel = call_kernel(self.functions, call)
        return () if kernel is None else kernel.overwritable()

    def _root(self, var: relax.Var) -> relax.Var:
        """The parameter or the binding that a value's storage is."""
        while var in self.graph.definitions:
            value = self.graph.definitions[var]
            if op_name(value) == _INPLACE:
                var = self._updated(value)[0]  # one is like the others: all are updated here
                continue
            before = self._base(var)
            if before is None:
                break
            var = before
        return var

    def _size(self, var: relax.Var) -> int:
        """Bytes of what a call makes."""
        value = self.graph.definitions[var]
        if self._base(var) is not None or not isinstance(value, relax.Call) or op_name(value) == _INPLACE:
            return 0
        if op_name(value) == "reshape":  # of a parameter
            return 0
        if op_name(value) not in _KERNELS:
            raise PlanningError(f"'{var.name}' is a call of {op_name(value) or value}, which is no kernel")
        return sum(self._tensor_bytes(t) for t in tensors_of(var.ty))

    def _tensor_bytes(self, tensor: Any) -> int:
        count = 1
        for dim in tensor.shape.values:
            count *= evaluate(dim, self._bounds)
        return -(-count * element_bytes(str(tensor.dtype.dtype)) // ALIGNMENT) * ALIGNMENT

    def _cost(self, var: relax.Var) -> int:
        """Nanoseconds: measured, or the larger of what its operations and its bytes take."""
        value = self.graph.definitions[var]
        name = op_name(value)
        if name not in (*_KERNELS, _INPLACE):
            return 0
        kernel = value.args[0]
        if getattr(kernel, "name_hint", "") in self._costs:
            return self._costs[kernel.name_hint]
        read = [o.ty for o in operands(value) if isinstance(getattr(o, "ty", None), relax.TensorType)]
        moved = sum(self._tensor_bytes(t) for t in (*read, *tensors_of(var.ty)) if t.shape is not None)
        return CALL + round(max(moved / BANDWIDTH, self._flops(kernel) / FLOPS))

    def _flops(self, kernel: Any) -> float:
        function = self.functions.get(kernel) if hasattr(kernel, "name_hint") else None
        if not isinstance(function, tirx.PrimFunc):
            return 0.0
        try:
            return float(estimate_tir_flops(IRModule({"main": function})))
        except Exception:
            return 0.0


def tensors_of(ty: Any) -> list[Any]:
    """The tensors that a type is or holds."""
    if isinstance(ty, relax.TensorType):
        return [ty]
    return [t for field in getattr(ty, "fields", ()) for t in tensors_of(field)]
