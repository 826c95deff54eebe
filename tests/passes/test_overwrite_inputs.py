"""OverwriteInputs: outputs in the memory of inputs that are not read any more, where the loops allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import IRModule, relax, te, tirx
from tvm.target import Target

from kvc.codegen.schedule_kernels import ScheduleKernels
from kvc_passes.errors import BudgetError
from kvc_passes.graph import graph_of, op_name
from kvc_passes.loop_nests import OVERWRITTEN, Kernel, overwritten
from kvc_passes.overwrite_inputs import OverwriteInputs
from kvc_passes.place_arena import Arena
from kvc_passes.prove_overwrites import ProveOverwrites
from kvc_passes.rematerialize import Rematerialize
from support import Compiled, Draft, floats, module_of, ops, param, symbol

QUICK = Target({"kind": "llvm", "opt-level": 0})
ROWS, SIZE = 4, 16
BYTES = 4 * ROWS * SIZE
Make = Callable[..., Any]


def made(compute: Make, inputs: int = 1, shape: Any = (ROWS, SIZE)) -> tirx.PrimFunc:
    """The kernel of an output of `shape` whose last step is `compute(inputs)(i, j)`."""
    given = [te.placeholder(shape, name=f"x{i}") for i in range(inputs)]
    return te.create_prim_func([*given, te.compute(shape, compute(*given), name="y")]).without_attr(
        "global_symbol"
    )


def adding(*given: Any) -> Any:
    return lambda i, j: sum((x[i, j] * 0.5 for x in given[1:]), given[0][i, j] + 1.0)


def through_a_local(x: Any) -> Any:
    doubled = te.compute(x.shape, lambda i, j: x[i, j] * 2.0, name="doubled")
    return lambda i, j: doubled[i, j] + x[i, j]


def turned(x: Any) -> Any:
    return lambda i, j: x[i, SIZE - 1 - j]


def shifted_local(x: Any) -> Any:
    doubled = te.compute(x.shape, lambda i, j: x[i, j] * 2.0, name="doubled")
    return lambda i, j: doubled[ROWS - 1 - i, j]


def row_sums(x: Any) -> Any:
    k = te.reduce_axis((0, SIZE), name="k")
    total = te.compute((ROWS,), lambda i: te.sum(x[i, k], axis=k), name="total")
    return lambda i, j: x[i, j] / total[i]


def product(x: Any) -> Any:
    k = te.reduce_axis((0, SIZE), name="k")
    return lambda i, j: te.sum(x[i, k] * 0.5, axis=k)


def product_added(a: Any, x: Any) -> Any:
    k = te.reduce_axis((0, SIZE), name="k")
    total = te.compute(a.shape, lambda i, j: te.sum(a[i, k] * (0.25 + k - j), axis=k), name="total")
    return lambda i, j: total[i, j] + x[i, j]


FORMS: dict[str, tuple[Make, int, tuple[int, ...]]] = {
    "elements of two": (adding, 2, (0, 1)),
    "through a local buffer": (through_a_local, 1, (0,)),
    "turned": (turned, 1, ()),
    "a local buffer read elsewhere": (shifted_local, 1, ()),
    "a sum over the row": (row_sums, 1, ()),
    "a reduction into the output": (product, 1, ()),
    "a product, then a sum": (product_added, 2, (1,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_may_be_overwritten_is_read_from_the_loops(form: str) -> None:
    compute, inputs, expected = FORMS[form]
    kernel = Kernel.of(made(compute, inputs))
    assert kernel is not None
    assert kernel.overwritable() == expected


def test_other_shapes_types_and_kernels_are_left_alone() -> None:
    wide = te.placeholder((ROWS, 2 * SIZE), name="x")
    whole = te.placeholder((ROWS, SIZE), "int32", name="n")
    y = te.compute((ROWS, SIZE), lambda i, j: wide[i, j] + whole[i, j].astype("float32"), name="y")
    kernel = Kernel.of(te.create_prim_func([wide, whole, y]))
    assert kernel is not None
    assert kernel.overwritable() == ()
    assert Kernel.of(made(adding).with_attr("tirx.is_scheduled", True)) is None


def calling(emit: Draft, compute: Make, *args: relax.Var, shape: Any = (ROWS, SIZE)) -> relax.Var:
    kernel = emit.builder.add_func(made(compute, len(args), shape), "kernel")
    return emit(relax.op.call_tir(kernel, list(args), relax.TensorType(shape, "float32")))


def module(body: Any, *params: relax.Var) -> IRModule:
    return module_of(list(params) or [param("x", [ROWS, SIZE])], body)[0]


def arena(mod: IRModule) -> int:
    passes = (relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking())
    for each in (*passes, relax.transform.CallTIRRewrite()):
        mod = each(mod)
    return Arena.of(mod, "apart").size({})


def same(a: IRModule, b: IRModule, *arrays: np.ndarray) -> None:
    for got, expected in zip(Compiled(a)(*arrays), Compiled(b)(*arrays), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_chain_lies_in_one_place() -> None:
    """The parameter stays as it is, and the result is no temporary: three calls, one place."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        a = calling(emit, turned, x)
        b = calling(emit, adding, calling(emit, adding, a), x)
        return calling(emit, turned, b)

    mod = module(body)
    result = OverwriteInputs().run(mod)
    assert result.sites == 2
    assert ops(result.module)["call_tir_inplace"] == 2
    assert ops(mod)["call_tir_inplace"] == 0
    assert arena(result.module) == BYTES < arena(mod)
    x = floats(ROWS, SIZE)
    before = x.copy()
    same(result.module, mod, x)
    np.testing.assert_array_equal(x, before)


def test_what_is_read_later_or_returned_stays() -> None:
    def body(emit: Draft, x: relax.Var) -> list[relax.Expr]:
        a = calling(emit, turned, x)
        b = calling(emit, adding, a)
        c = calling(emit, adding, b, a)  # `a` dies here, `b` does not
        return [calling(emit, turned, c), b]

    mod = module(body)
    result = OverwriteInputs().run(mod)
    (place,) = [v for v in graph_of(result.module["main"]).definitions.values() if "inplace" in op_name(v)]
    assert graph_of(result.module["main"]).order.index(place.args[1].fields[-1]) == 0
    same(result.module, mod, floats(ROWS, SIZE))


def test_a_value_that_is_read_twice_by_one_call_stays() -> None:
    """Its element is read for another place through the other operand."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        a = calling(emit, turned, x)
        return calling(emit, turned, calling(emit, product_added, a, a))

    mod = module(body)
    assert OverwriteInputs().run(mod).module.same_as(mod)


def test_a_view_that_is_read_later_keeps_its_storage() -> None:
    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        a = calling(emit, turned, x)
        flat = emit(relax.op.reshape(a, [ROWS * SIZE]))
        b = calling(emit, adding, a)
        back = emit(relax.op.reshape(flat, [ROWS, SIZE]))
        return calling(emit, product_added, b, back)

    mod = module(body)
    assert OverwriteInputs().run(mod).sites == 0


def test_an_updated_parameter_is_not_written_over() -> None:
    """What an update in place returns lies in the parameter, though it is read once."""

    def body(emit: Draft, x: relax.Var, state: relax.Var) -> relax.Expr:
        kernel = emit.builder.add_func(overwritten(made(adding, 2), 1), "update")
        after = emit(relax.op.call_tir_inplace(kernel, [x, state], [1], state.ty))
        return calling(emit, turned, calling(emit, adding, after))

    mod = module(body, param("x", [ROWS, SIZE]), param("state", [ROWS, SIZE]))
    assert OverwriteInputs().run(mod).module.same_as(mod)


def test_symbolic_shapes() -> None:
    n = symbol("n")

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        kernel = emit.builder.add_func(symbolic(), "kernel")
        ty = relax.TensorType([n], "float32")
        values = [x]
        for _ in range(3):
            values.append(emit(relax.op.call_tir(kernel, [values[-1]], ty)))
        return values[-1]

    def symbolic() -> tirx.PrimFunc:
        size = tirx.Var("m", "int64")
        x = te.placeholder((size,), name="x")
        y = te.compute((size,), lambda i: x[i] + 1.0, name="y")
        return te.create_prim_func([x, y]).without_attr("global_symbol")

    mod = module(body, param("x", [n]))
    result = OverwriteInputs().run(mod)
    assert result.sites == 1
    same(result.module, mod, floats(7))


@pytest.mark.parametrize("marked", [False, True])
def test_a_scheduled_kernel_is_known_by_its_mark(marked: bool) -> None:
    """Its loops say nothing any more; of what was not marked before, nothing is overwritten."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        return calling(emit, turned, calling(emit, adding, calling(emit, turned, x)))

    plain = module(body)
    found = ProveOverwrites().run(plain)
    assert found.sites == 1
    mod = ScheduleKernels(QUICK, parallel=True).run(found.module if marked else plain).module
    result = OverwriteInputs().run(mod)
    assert result.sites == marked
    places = [f.attrs.get(OVERWRITTEN) for f in result.module.functions.values()]
    assert sum(place is not None for place in places) == marked
    same(result.module, plain, floats(ROWS, SIZE))


CHOICES: tuple[tuple[Make, int], ...] = (
    (adding, 1),
    (adding, 2),
    (adding, 3),
    (turned, 1),
    (through_a_local, 1),
    (row_sums, 1),
    (product_added, 2),
)


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """For every call its form, and what it reads: 0 is the parameter, i + 1 the result of call i."""
    found = []
    for i in range(draw(st.integers(2, 10))):
        form = draw(st.integers(0, len(CHOICES) - 1))
        found.append((form, [draw(st.integers(max(0, i - 3), i)) for _ in range(CHOICES[form][1])]))
    return found


@settings(max_examples=25, deadline=None)
@given(calls=graphs(), part=st.sampled_from([0.0, 0.6, 0.8]))
def test_any_graph_computes_the_same(calls: list[tuple[int, list[int]]], part: float) -> None:
    """With and without a schedule for a budget first; what was planned is what the places take or less."""

    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        values = [x]
        for form, reads in calls:
            values.append(calling(emit, CHOICES[form][0], *(values[i] for i in reads)))
        used = {i for _, reads in calls for i in reads}
        return [v for i, v in enumerate(values) if i and i not in used]

    mod = chosen = module(body)
    try:
        scheduled = Rematerialize(int(arena(mod) * part) if part else 1 << 30, seconds=3).run(mod)
    except BudgetError:
        return
    chosen = scheduled.module
    result = OverwriteInputs().run(chosen).module
    assert arena(result) <= max(arena(chosen), BYTES)
    same(result, mod, floats(ROWS, SIZE))


def test_the_plan_counts_it_once() -> None:
    def body(emit: Draft, x: relax.Var) -> relax.Expr:
        value = calling(emit, turned, x)
        for _ in range(4):
            value = calling(emit, adding, value)
        return calling(emit, turned, value)

    mod = module(body)
    result = Rematerialize(BYTES).run(mod)
    assert result.facts.peak == BYTES == arena(OverwriteInputs().run(result.module).module)
