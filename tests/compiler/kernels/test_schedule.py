import ml_dtypes
import numpy as np
import pytest
import tvm
from kernel_machines import Machine
from tvm import relax, tirx
from tvm.relax import op
from tvm.script import tirx as T

from kvc.codegen.schedule_kernels import own_buffers
from kvc.kernels.emit import compiled
from kvc.kernels.schedule import schedule_elementwise
from kvc.kernels.vector_math import replace_math
from kvc_passes.loop_nests import overwritten

N = 7


def tensor(name: str, *shape: object, dtype: str = "float32") -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))


def rms_norm(x, w, **_):
    return x * op.rsqrt(op.mean(x * x, -1, True) + relax.const(1e-5)) * w


def layer_norm(x, w, **_):
    return op.nn.layer_norm(x, w, w, axes=[-1], epsilon=1e-5)


def silu(x, y, **_):
    return op.sigmoid(x) * x * y


def rotate(q, **_):
    q = op.permute_dims(q, [0, 2, 1, 3])
    low, high = op.strided_slice(q, [3], [0], [16]), op.strided_slice(q, [3], [16], [32])
    return op.concat([op.negative(high), low], axis=-1) * relax.const(2.0)


def gather(x, ids, **_):
    return op.take(x, ids, axis=1)


def softmax(odd, **_):
    return op.nn.softmax(odd, axis=-1)


def largest(x, **_):
    return op.max(x, axis=-1)


MODELS = [rms_norm, layer_norm, silu, rotate, gather, softmax, largest]


def functions(model: object) -> list[tirx.PrimFunc]:
    """What TVM makes of a model: legalised and fused, not scheduled."""
    n = tirx.Var("n", "int64")
    args = {
        "x": tensor("x", 1, n, 96),
        "y": tensor("y", 1, n, 96),
        "w": tensor("w", 96),
        "q": tensor("q", 1, n, 3, 32),
        "ids": tensor("ids", n, dtype="int64"),
        "odd": tensor("odd", n, 37),
        "half": tensor("half", 96, dtype="bfloat16"),
    }
    builder = relax.BlockBuilder()
    with builder.function("main", list(args.values())):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(model(**args)))
        builder.emit_func_output(result)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    module = tvm.transform.Sequential(passes)(builder.get())
    return [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]


def arguments(func: tirx.PrimFunc) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [[int(d) if isinstance(d, tirx.IntImm) else N for d in p.shape] for p in func.params]
    return [
        rng.integers(0, N, s) if str(p.dtype) == "int64" else rng.random(s, np.float32) + np.float32(0.1)
        for p, s in zip(func.params, shapes)
    ]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_the_result_stays(machine: Machine, model: object, parallel: bool) -> None:
    if parallel and machine.traits.lanes == 8:
        parallel = False  # threads do not depend on the width
    for func in functions(model):
        scheduled = schedule_elementwise(func, machine.traits, parallel)
        assert not scheduled.same_as(func)
        assert ("T.parallel" in scheduled.script()) == parallel
        inputs = arguments(func)
        plain, fast = (
            machine.call(compiled(f, machine.target), *inputs)[-1] for f in (func, replace_math(scheduled))
        )
        # Sums of 96 positive terms in another order, and exp by a polynomial.
        np.testing.assert_allclose(fast, plain, rtol=96 * 2.0**-24, atol=1e-6)


def biased(x, half, **_):
    """The argument of a polynomial, which is bound to a variable, reads a weight of 16 bits."""
    return op.sigmoid(x + op.astype(half, "float32"))


@pytest.mark.parametrize("parallel", [True, False])
def test_weights_of_bfloat16_are_widened(machine: Machine, parallel: bool) -> None:
    (func,) = functions(biased)
    rng = np.random.default_rng(1)
    x, half = rng.normal(size=(1, N, 96)).astype(np.float32), rng.normal(size=96).astype(ml_dtypes.bfloat16)
    scheduled = schedule_elementwise(replace_math(func), machine.traits, parallel)
    given = {"float32": x, "bfloat16": half}
    inputs = [given[str(p.dtype)] for p in func.params[:-1]]
    got = machine.call(compiled(scheduled, machine.target), *inputs, np.empty_like(x))[-1]
    expected = 1 / (1 + np.exp(-(x.astype(np.float64) + half.astype(np.float64))))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("model", [rms_norm, layer_norm, silu, rotate])
def test_rows_of_whole_vectors_are_vectorised(machine: Machine, model: object) -> None:
    for func in functions(model):
        assert "T.vectorized" in schedule_elementwise(func, machine.traits, True).script()


def test_producers_are_inlined(machine: Machine) -> None:
    (func,) = functions(silu)
    assert "sblock_alloc_buffer" in func.script()
    assert "sblock_alloc_buffer" not in schedule_elementwise(func, machine.traits, False).script()


def test_scheduled_functions_are_left_alone(machine: Machine) -> None:
    func = functions(silu)[0].with_attr("tirx.is_scheduled", True)
    assert schedule_elementwise(func, machine.traits, True).same_as(func)


def test_a_function_without_blocks_comes_back(machine: Machine) -> None:
    n = tirx.Var("n", "int64")
    x = tirx.decl_buffer((n,), "float32", "x")
    func = tirx.PrimFunc([x], tirx.BufferStore(x, tirx.const(1.0, "float32"), [tirx.const(0, "int64")]))
    assert schedule_elementwise(func, machine.traits, True).same_as(func)


def test_what_is_scheduled_stays_as_it_was(machine: Machine) -> None:
    """TVM's schedules write into a body that another function holds, too."""
    for model in (softmax, rms_norm, gather):
        for func in functions(model):
            before = func.script()
            schedule_elementwise(func, machine.traits, True)
            assert func.script() == before


def product(rows: int, depth: int, columns: int, heads: int | None) -> tirx.PrimFunc:
    """max(x w + c, 0), for every head where there are some: legalised and fused, not scheduled."""
    leading = [1] if heads is None else [1, heads]
    weight = [depth, columns] if heads is None else [1, heads, depth, columns]
    args = [tensor("x", *leading, rows, depth), tensor("w", *weight), tensor("c", columns)]
    builder = relax.BlockBuilder()
    with builder.function("main", args):
        with builder.dataflow():
            total = builder.emit(op.add(builder.emit(op.matmul(args[0], args[1])), args[2]))
            result = builder.emit_output(op.nn.relu(total))
        builder.emit_func_output(result)
    return fused(builder.get())


def fused(module: tvm.IRModule) -> tirx.PrimFunc:
    """The one kernel of a module."""
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    module = tvm.transform.Sequential(passes)(module)
    (func,) = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    return func


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "heads"),
    [(24, 20, 96, None), (7, 5, 32, None), (1, 9, 48, None), (12, 16, 16, 3)],
)
def test_products_are_tiles_that_add_in_order(
    machine: Machine, rows: int, depth: int, columns: int, heads: int | None
) -> None:
    func = product(rows, depth, columns, heads)
    scheduled = schedule_elementwise(func, machine.traits, True)
    script = scheduled.script()
    assert scheduled.attrs["tirx.is_scheduled"]
    assert 'scope="local"' in script  # sums are in registers, and nothing of its own in memory
    assert "T.vectorized" in script
    assert not own_buffers(scheduled)
    inputs = arguments(func)
    got = machine.call(compiled(scheduled, machine.target), *inputs)[-1]
    x, w, c = (a.astype(np.float64) for a in inputs[:3])
    # Positive terms, so the error of the sum is at most that of its roundings.
    np.testing.assert_allclose(got, np.maximum(x @ w + c, 0), rtol=(depth + 2) * 2.0**-24)


def test_a_slice_of_the_rows_has_the_same_numbers(machine: Machine) -> None:
    whole, part = (
        compiled(schedule_elementwise(product(rows, 37, 64, None), machine.traits, True), machine.target)
        for rows in (30, 11)
    )
    rng = np.random.default_rng(0)
    x, w, c = (rng.standard_normal(s).astype(np.float32) for s in ((1, 30, 37), (37, 64), (64,)))
    every = machine.call(whole, x, w, c, np.empty((1, 30, 64), np.float32))[-1]
    some = machine.call(part, x[:, 5:16].copy(), w, c, np.empty((1, 11, 64), np.float32))[-1]
    np.testing.assert_array_equal(some, every[:, 5:16])


def test_columns_that_are_no_vectors_are_tiles_of_which_the_last_begins_earlier(machine: Machine) -> None:
    func = product(6, 32, 33, None)
    inputs = arguments(func)
    scheduled = schedule_elementwise(func, machine.traits, False)
    assert "sums" in scheduled.script()
    got = machine.call(compiled(scheduled, machine.target), *inputs)[-1]
    x, w, c = (a.astype(np.float64) for a in inputs[:3])
    np.testing.assert_allclose(got, np.maximum(x @ w + c, 0), rtol=34 * 2.0**-24)


def test_a_product_over_what_it_adds_is_tiles_too(machine: Machine) -> None:
    args = [tensor("x", 1, 24, 20), tensor("w", 20, 96), tensor("r", 1, 24, 96)]
    builder = relax.BlockBuilder()
    with builder.function("main", args):
        with builder.dataflow():
            result = builder.emit_output(op.add(builder.emit(op.matmul(args[0], args[1])), args[2]))
        builder.emit_func_output(result)
    func = fused(builder.get())
    over = overwritten(func, 2)
    scheduled = schedule_elementwise(over, machine.traits, False)
    assert len(scheduled.params) == 3
    assert 'scope="local"' in scheduled.script()
    x, w, r = arguments(over)
    got = machine.call(compiled(scheduled, machine.target), x, w, r)[-1]
    expected = x.astype(np.float64) @ w.astype(np.float64) + r
    np.testing.assert_allclose(got, expected, rtol=22 * 2.0**-24)


def test_what_an_earlier_block_wrote_is_no_input(machine: Machine) -> None:
    @T.prim_func(private=True, s_tir=True)
    def twice(x: T.Buffer((8, 32)), y: T.Buffer((8, 32))) -> None:
        for i, j in T.grid(8, 32):
            with T.sblock("first"):
                v, w = T.axis.remap("SS", [i, j])
                y[v, w] = x[v, w] * T.float32(2.0)
        for i, j in T.grid(8, 32):
            with T.sblock("second"):
                v, w = T.axis.remap("SS", [i, j])
                y[v, w] = y[v, w] + x[v, w]

    func = schedule_elementwise(twice, machine.traits, False)
    x = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    got = machine.call(compiled(func, machine.target), x, np.full_like(x, np.nan))[-1]
    np.testing.assert_array_equal(got, x * 2 + x)
