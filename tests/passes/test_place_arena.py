"""PlaceArena: temporaries that are alive together never share a byte; the size is what was promised."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import IRModule, relax, tirx
from tvm.relax import op

from kvc_passes.errors import PlanningError
from kvc_passes.graph import Graph, op_name
from kvc_passes.place_arena import ALIGNMENT, Arena, PlaceArena, evaluate
from support import ops, param, symbol

USE = "test.use"
N = symbol("n")
Life = tuple[int, int, int]
"""Bytes of a temporary, and the first and last step that uses it."""


def program(lives: list[Life], steps: int) -> IRModule:
    """Allocates each temporary before its first step; step i passes all that are alive to a call."""
    x = param("x", [N])
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        made: dict[int, relax.Var] = {}
        for step in range(steps):
            for i, (size, first, _) in enumerate(lives):
                if first == step:
                    made[i] = builder.emit(
                        op.builtin.alloc_tensor(relax.ShapeExpr([size]), "uint8", 0, "global")
                    )
            alive = [made[i] for i, (_, first, last) in enumerate(lives) if step in (first, last)]
            builder.emit(relax.Call(relax.ExternFunc(USE), [x, *alive], ty_args=[relax.TupleType([])]))
        builder.emit_func_output(x)
    return builder.get()


def places(module: IRModule) -> list[list[tuple[int, int]]]:
    """For every step's call, (offset, bytes) of the temporaries it is given."""
    graph = Graph(module["main"])
    found = []
    for var in graph.order:
        call = graph.definitions[var]
        if op_name(call) == USE:
            found.append([_place(graph, a) for a in call.args[1:]])
    return found


def _place(graph: Graph, value: relax.Expr) -> tuple[int, int]:
    call = graph.resolve(value)
    if op_name(call) == "vm.builtin.ensure_zero_offset":
        call = graph.resolve(call.args[0])
    assert op_name(call) == "memory.alloc_tensor"
    return int(call.args[1].value), int(call.args[2].values[0])


@st.composite
def _programs(draw: st.DrawFn) -> tuple[list[Life], int]:
    steps = draw(st.integers(1, 8))
    lives = []
    for _ in range(draw(st.integers(1, 8))):
        first = draw(st.integers(0, steps - 1))
        lives.append((draw(st.integers(1, 1000)), first, draw(st.integers(first, steps - 1))))
    return lives, steps


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@settings(deadline=None)
@given(_programs())
def test_temporaries_alive_together_never_overlap(drawn: tuple[list[Life], int]) -> None:
    lives, steps = drawn
    result = PlaceArena({}).run(program(lives, steps))
    assert result.sites == len(lives)
    assert ops(result.module)["builtin.alloc_tensor"] == 0
    assert ops(result.module)["memory.alloc_storage"] == 1
    offsets: dict[int, int] = {}
    for step, given_ in enumerate(places(result.module)):
        used = [i for i, (_, first, last) in enumerate(lives) if step in (first, last)]
        for i, (offset, size) in zip(used, given_, strict=True):
            assert size == lives[i][0]
            assert offset % ALIGNMENT == 0
            assert offsets.setdefault(i, offset) == offset
    for step in range(steps):
        alive = sorted((offsets[i], s) for i, (s, first, last) in enumerate(lives) if first <= step <= last)
        for (low, size), (high, _) in itertools.pairwise(alive):
            assert low + size <= high
        assert sum(aligned(s) for _, s in alive) <= result.facts
        assert all(offset + size <= result.facts for offset, size in alive)
    assert result.facts <= sum(aligned(s) for s, _, _ in lives)


@settings(deadline=None, max_examples=30)
@given(_programs(), st.integers(1, 10**6))
def test_an_arena_of_the_planned_size(drawn: tuple[list[Life], int], slack: int) -> None:
    module = program(*drawn)
    needed = PlaceArena({}).run(module).facts
    result = PlaceArena({}, needed + slack).run(module)
    graph = Graph(result.module["main"])
    storage = next(v for v in graph.order if op_name(graph.definitions[v]) == "memory.alloc_storage")
    assert int(graph.definitions[storage].args[0].values[0]) == needed + slack == result.facts
    with pytest.raises(PlanningError, match=f"temporaries take {needed} bytes, {needed - 1} were planned"):
        PlaceArena({}, needed - 1).run(module)


def test_an_order_that_leaves_a_gap_is_repaired() -> None:
    """In each of the three orders a long life, placed late, lies beyond what is alive at most."""
    lives = [(32, 5, 6), (32, 2, 3), (16, 1, 5), (16, 0, 1), (32, 0, 0)]
    module = program([(4 * size, first, last) for size, first, last in lives], 7)
    assert max(Arena.of(module).alive({})) == 192
    assert PlaceArena({}).run(module).facts == 192


def test_places_of_the_same_shape_are_made_once() -> None:
    lives = [(64, 0, 0), (64, 1, 1), (64, 2, 2)]
    result = PlaceArena({}).run(program(lives, 3))
    assert ops(result.module)["memory.alloc_tensor"] == 1
    assert result.facts == 64


def symbolic(dtype: str = "float32") -> IRModule:
    x = param("x", [N, 4])
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        for shape in ([N, 4], [2 * N, 4]):
            made = builder.emit(op.builtin.alloc_tensor(relax.ShapeExpr(shape), dtype, 0, "global"))
            builder.emit(relax.Call(relax.ExternFunc(USE), [x, made], ty_args=[relax.TupleType([])]))
        builder.emit_func_output(x)
    return builder.get()


@pytest.mark.parametrize(("dtype", "bytes_"), [("float32", 4), ("int64", 8), ("float16", 2)])
def test_symbols_count_at_their_bounds(dtype: str, bytes_: int) -> None:
    assert PlaceArena({"n": 100}).run(symbolic(dtype)).facts == aligned(2 * 100 * 4 * bytes_)


def test_a_symbol_without_a_bound_is_a_bug() -> None:
    with pytest.raises(PlanningError, match="symbol n"):
        PlaceArena({"b": 1}).run(symbolic())


def returning(returned: int, *others: int) -> IRModule:
    """A function whose first temporary, of so many floats, is returned; the others are used after it."""
    builder = relax.BlockBuilder()
    with builder.function("main", [param("x", [N])]):
        made = []
        for number, size in enumerate((returned, *others)):
            shape = relax.ShapeExpr([size])
            alloc = op.builtin.alloc_tensor(shape, "float32", 0, "global")
            made.append(builder.emit(alloc, name_hint=f"made{number}"))
            builder.emit(relax.Call(relax.ExternFunc(USE), [made[-1]], ty_args=[relax.TupleType([])]))
        builder.emit_func_output(made[0])
    return builder.get()


def test_a_temporary_must_not_leave_the_function() -> None:
    with pytest.raises(PlanningError, match="the temporary made0 leaves the function"):
        PlaceArena({}).run(returning(4))


def test_what_leaves_lies_apart_or_stays_to_the_end() -> None:
    """The others are alive one after another; of what is returned none may take the place."""
    mod = returning(48, 16, 32)
    assert Arena.of(mod, "apart").size({}) == aligned(4 * 32)
    within = Arena.of(mod, "within")
    offsets, size = within.place({})
    assert size == aligned(4 * 48) + aligned(4 * 32)
    kept, *others = [(offsets[t.var], offsets[t.var] + t.size({})) for t in within.temporaries]
    assert all(end <= kept[0] or begin >= kept[1] for begin, end in others)
    placed = PlaceArena({}, returned="within").run(mod)
    assert placed.facts == size
    assert "alloc_tensor(made0" not in placed.module.script()


def test_aliases_keep_a_temporary_alive() -> None:
    """A reshaped view, and a tuple's field, of `first` are read after `second` was made."""
    builder = relax.BlockBuilder()
    x = param("x", [N])
    with builder.function("main", [x]):
        first = builder.emit(op.builtin.alloc_tensor(relax.ShapeExpr([16]), "float32", 0, "global"))
        view = builder.emit(op.reshape(first, [4, 4]))
        pair = builder.emit(relax.Tuple([view, x]))
        field = builder.emit(relax.TupleGetItem(pair, 0))
        second = builder.emit(op.builtin.alloc_tensor(relax.ShapeExpr([16]), "float32", 0, "global"))
        builder.emit(relax.Call(relax.ExternFunc(USE), [second], ty_args=[relax.TupleType([])]))
        builder.emit(relax.Call(relax.ExternFunc(USE), [field], ty_args=[relax.TupleType([])]))
        builder.emit_func_output(x)
    assert PlaceArena({}).run(builder.get()).facts == 128


def _int(value: int) -> Any:
    return tirx.IntImm("int64", value)


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (_int(5), 5),
        (N, 7),
        (N + 1, 8),
        (N * 3, 21),
        (N - 2, 5),
        (tirx.floordiv(N + 3, _int(4)), 2),
        (tirx.max(N, _int(9)), 9),
        (tirx.min(N, _int(4)), 4),
    ],
)
def test_extents_at_their_bounds(dim: Any, expected: int) -> None:
    assert evaluate(dim, {"n": 7}) == expected


def test_an_unknown_extent_is_a_bug() -> None:
    with pytest.raises(PlanningError, match="has no bound"):
        evaluate(tirx.floormod(N, _int(4)), {"n": 7})
