"""One arena for all temporaries of a function, its size a compile-time constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import IRModule, relax, tirx

from .base import Result
from .errors import PlanningError
from .graph import graph_of, op_name, operands, static
from .rebuild import substitute, with_main

ALIGNMENT = 64  # bytes; generated code loads whole vectors


@dataclass(frozen=True)
class Temporary:
    """A temporary tensor, and the first and last binding between which it is alive."""

    var: relax.Var
    alloc: relax.Call
    first: int
    last: int

    def size(self, bounds: Mapping[str, int]) -> int:
        """Bytes, aligned, with the symbols at their bounds."""
        count = 1
        for dim in self.alloc.args[0].values:
            count *= evaluate(dim, bounds)
        size = count * element_bytes(str(self.alloc.args[1].value))
        return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Arena:
    """The temporaries of a function and where they can lie."""

    temporaries: tuple[Temporary, ...]

    @classmethod
    def of(cls, mod: IRModule, *, leave: bool = False) -> Arena:
        """The temporaries of `main`; values that alias one keep it alive.

        leave: those that the function returns are none: they stay allocations of their own.
        """
        graph = graph_of(mod["main"])
        roots: dict[relax.Var, set[relax.Var]] = {}
        first: dict[relax.Var, int] = {}
        last: dict[relax.Var, int] = {}
        for step, var in enumerate(graph.order):
            value = graph.definitions[var]
            if op_name(value) == "builtin.alloc_tensor":
                roots[var], first[var], last[var] = {var}, step, step
                continue
            used = [r for o in operands(value) if isinstance(o, relax.Var) for r in roots.get(o, ())]
            for root in used:
                last[root] = step
            if not isinstance(value, relax.Call) or op_name(value) == "reshape":
                roots[var] = set(used)
        result = graph.function.body.body
        returned = {r for o in operands(graph.definitions.get(result, result)) for r in roots.get(o, ())}
        for root in returned | roots.get(result, set()):
            if not leave:
                raise PlanningError(f"the temporary {root.name} leaves the function")
            first.pop(root)
        return cls(tuple(Temporary(v, graph.definitions[v], first[v], last[v]) for v in first))

    def size(self, bounds: Mapping[str, int]) -> int:
        """Bytes that the arena needs with the symbols at their bounds."""
        return self.place(bounds)[1]

    def place(self, bounds: Mapping[str, int]) -> tuple[dict[relax.Var, int], int]:
        """Offset of every temporary, and the bytes of all: the best of three orders."""
        blocks = [(t.size(bounds), t) for t in self.temporaries]
        orders = (
            sorted(blocks, key=lambda b: (-b[0], b[1].first)),
            sorted(blocks, key=lambda b: (b[1].first - b[1].last, -b[0])),
            sorted(blocks, key=lambda b: (-b[0] * (b[1].last - b[1].first + 1), b[1].first)),
        )
        return min((self._placed(order) for order in orders), key=lambda found: found[1])

    def _placed(self, blocks: Sequence[tuple[int, Temporary]]) -> tuple[dict[relax.Var, int], int]:
        """Blocks one after another, each in the smallest gap that it fits."""
        placed: list[tuple[int, int, Temporary]] = []  # start, end
        for size, block in blocks:
            busy = sorted((s, e) for s, e, o in placed if o.first <= block.last and block.first <= o.last)
            best: tuple[int, int] | None = None
            free = 0
            for start, end in busy:
                if start - free >= size and (best is None or start - free < best[0]):
                    best = start - free, free
                free = max(free, end)
            at = free if best is None else best[1]
            placed.append((at, at + size, block))
        return {t.var: start for start, _, t in placed}, max((e for _, e, _ in placed), default=ALIGNMENT)


@dataclass(frozen=True)
class PlaceArena:
    """Temporaries become places in one storage.

    Before: `builtin.alloc_tensor(shape, ...)` for every temporary, shapes in symbols such as n.
    After: one `memory.alloc_storage(bytes)` at the start, `memory.alloc_tensor(storage, offset, shape)` for
        every temporary; two that are alive at the same time never overlap.
    Needs: CallTIRRewrite (allocations are explicit) and a bound for every symbol.
    Refuses: an arena larger than `bytes`, which would break the plan (PlanningError).

    Placement is best fit over lifetimes, by decreasing size, length of life or both, as in "Efficient Memory
    Management for Deep Neural Net Inference" (Pisarchyk and Lee, 2020). `bytes` = None takes what is needed.
    With `leave`, temporaries that the function returns stay allocations of their own.
    """

    bounds: Mapping[str, int]
    bytes: int | None = None
    leave: bool = False

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: bytes of the arena."""
        function = mod["main"]
        graph = graph_of(function)
        offsets, needed = Arena.of(mod, leave=self.leave).place(self.bounds)
        total = needed if self.bytes is None else self.bytes
        if needed > total:
            raise PlanningError(f"temporaries take {needed} bytes, {total} were planned")
        builder = relax.BlockBuilder()
        with builder.function(
            "main", list(function.params), attrs=dict(function.attrs) if function.attrs else None
        ):
            shape = relax.ShapeExpr([tirx.IntImm("int64", total)])
            arena = builder.emit(
                relax.op.memory.alloc_storage(shape, 0, "global", "uint8"), name_hint="arena"
            )
            values: dict[relax.Var, relax.Expr] = {}
            made: dict[tuple[int, str], relax.Var] = {}
            for var in graph.order:
                value = graph.definitions[var]
                if var not in offsets:
                    values[var] = builder.emit(substitute(value, values), name_hint=var.name)
                    continue
                place = (offsets[var], f"{value.args[0]}{value.args[1]}")
                if place not in made:  # layers repeat: most temporaries have been made before
                    made[place] = _tensor(builder, arena, offsets[var], value)
                values[var] = made[place]
            builder.emit_func_output(substitute(function.body.body, values))
        new = builder.get()["main"]
        return Result(with_main(mod, new.with_attr("global_symbol", "main")), len(offsets), total)


def _tensor(builder: relax.BlockBuilder, arena: relax.Var, offset: int, alloc: relax.Call) -> relax.Var:
    """A tensor at `offset`, its data pointer moved there: kernels take no tensors with an offset."""
    shape, dtype = alloc.args[0], alloc.args[1].value
    tensor = builder.emit(relax.op.memory.alloc_tensor(arena, offset, shape, dtype))
    if offset == 0:
        return tensor
    move = relax.ExternFunc("vm.builtin.ensure_zero_offset")
    return builder.emit(relax.Call(move, [tensor], ty_args=[relax.TensorType(shape, dtype)]))


def element_bytes(dtype: str) -> int:
    """Bytes of one element; booleans take one."""
    return -(-int("".join(c for c in dtype if c.isdigit()) or 8) // 8)


def evaluate(dim: Any, bounds: Mapping[str, int]) -> int:
    """A dimension with its symbols at their bounds. Raises PlanningError for a symbol without one."""
    value = static(dim)
    if value is not None:
        return value
    if isinstance(dim, tirx.Var):
        if dim.name not in bounds:
            raise PlanningError(f"no bound is known for the symbol {dim.name}")
        return bounds[dim.name]
    a, b = evaluate(dim.a, bounds), evaluate(dim.b, bounds)
    rules = {tirx.Add: a + b, tirx.Sub: a - b, tirx.Mul: a * b, tirx.Max: max(a, b), tirx.Min: min(a, b)}
    if isinstance(dim, tirx.FloorDiv):
        return a // b
    if type(dim) not in rules:
        raise PlanningError(f"the extent {dim} has no bound")
    return rules[type(dim)]
