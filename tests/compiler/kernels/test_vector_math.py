import math

import numpy as np
import pytest
from kernel_machines import Machine
from tvm import tirx

from kvc.kernels.emit import Emitter, argument, i64, size_var
from kvc.kernels.vector_math import replace_math

EXACT = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "erf": np.vectorize(math.erf),
}


def elementwise(op: str, vector: bool) -> tirx.PrimFunc:
    """y = op(x) over f32[n, 16], the inner loop vectorised or not."""
    e, n, j = Emitter(), size_var("n"), tirx.Var("j", "int64")
    x, y = argument("x", (n, 16)), argument("y", (n, 16))
    kind = tirx.ForKind.VECTORIZED if vector else tirx.ForKind.SERIAL
    with e.loop("i", n) as i:
        store = tirx.BufferStore(y, getattr(tirx, op)(x[i, j] * tirx.const(1.0, "float32")), [i, j])
        e.add(tirx.For(j, i64(0), i64(16), kind, store))
    return e.function([x, y], [x], [y])


def replaced(op: str, vector: bool, traits: object) -> tirx.PrimFunc:
    return replace_math(elementwise(op, vector))


def inputs() -> np.ndarray:
    largest = np.finfo(np.float32).max
    special = [0.0, -0.0, 1e-30, -1e-30, 1e-40, 88.7, 88.8, -87.3, -103.9, -104.1, largest, -largest]
    x = np.concatenate([np.linspace(-130, 130, 60001), np.linspace(-5, 5, 60001), special]).astype(np.float32)
    return np.resize(x, (-(-len(x) // 16), 16))


@pytest.mark.parametrize("op", EXACT)
def test_error_over_the_whole_range(machine: Machine, op: str) -> None:
    x = inputs()
    y = machine.call(machine.build(replaced, op, True), x, np.zeros_like(x))[-1]
    with np.errstate(over="ignore", invalid="ignore"):
        exact = EXACT[op](x.astype(float))
        rounded = exact.astype(np.float32)
    assert not np.isnan(y).any()
    normal = (np.abs(exact) >= np.finfo(np.float32).tiny) & np.isfinite(rounded)
    relative = np.abs(y[normal] - exact[normal]) / np.abs(exact[normal])
    assert relative.max() < 3e-7
    if op != "exp":
        assert np.abs(y - exact).max() < 3e-7
    subnormal = np.abs(exact) < np.finfo(np.float32).tiny
    assert np.abs(y[subnormal] - exact[subnormal]).max(initial=0) <= np.finfo(np.float32).tiny
    assert (y[~np.isfinite(rounded)] == np.inf).all()


@pytest.mark.parametrize("op", EXACT)
def test_not_a_number_goes_through(machine: Machine, op: str) -> None:
    x = np.full((1, 16), np.nan, np.float32)
    assert np.isnan(machine.call(machine.build(replaced, op, True), x, np.zeros_like(x))[-1]).all()


def test_scalar_code_gives_the_same(machine: Machine) -> None:
    x = inputs()[::50]
    scalar, vector = (
        machine.call(machine.build(replaced, "exp", v), x, np.zeros_like(x))[-1] for v in (False, True)
    )
    np.testing.assert_array_max_ulp(scalar, vector, 1)


def test_other_calls_and_types_stay() -> None:
    func = elementwise("sqrt", False)
    assert replace_math(func).script() == func.script()
