"""One arena for all temporaries of a function, its size a compile-time constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
        unlike = dict(zip(self._shapes, self.temporaries))
        known = {key: t.size(bounds) for key, t in unlike.items()}
        sizes = [known[key] for key in self._shapes]
        lives = [(t.first, t.last - t.first + 1) for t in self.temporaries]
        keys: tuple[Callable[[int], tuple[int, int]], ...] = (
            lambda i: (-sizes[i], lives[i][0]),
            lambda i: (-lives[i][1], -sizes[i]),
            lambda i: (-sizes[i] * lives[i][1], lives[i][0]),
        )
        offsets, total = min((self._placed(sizes, key) for key in keys), key=lambda found: found[1])
        return {t.var: offset for t, offset in zip(self.temporaries, offsets)}, total

    def _placed(self, sizes: Sequence[int], key: Callable[[int], tuple[int, int]]) -> tuple[list[int], int]:
        """Blocks one after another in the order of `key`, each in the smallest gap that it fits."""
        offsets = [-1] * len(sizes)
        for i in sorted(range(len(sizes)), key=key):
            busy = sorted((offsets[j], offsets[j] + sizes[j]) for j in self._together[i] if offsets[j] >= 0)
            best: tuple[int, int] | None = None
            free = 0
            for start, end in busy:
                if start - free >= sizes[i] and (best is None or start - free < best[0]):
                    best = start - free, free
                free = max(free, end)
            offsets[i] = free if best is None else best[1]
        return offsets, max((at + size for at, size in zip(offsets, sizes)), default=ALIGNMENT)

    @cached_property
    def _shapes(self) -> list[str]:
        """What the size of each temporary depends on: layers repeat."""
        return [f"{t.alloc.args[0]} {t.alloc.args[1]}" for t in self.temporaries]

    @cached_property
    def _together(self) -> list[list[int]]:
        """Of every temporary, those that are alive at a time when it is."""
        found: list[list[int]] = [[] for _ in self.temporaries]
        alive: list[int] = []
        for i in sorted(range(len(found)), key=lambda i: self.temporaries[i].first):
            alive = [j for j in alive if self.temporaries[j].last >= self.temporaries[i].first]
            for j in alive:
                found[i].append(j)
                found[j].append(i)
            alive.append(i)
        return found


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
