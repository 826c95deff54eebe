"""Legalization with a memory gives what TVM's own gives, and generates what repeats once."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import tvm_ffi
from tvm import IRModule, relax

from kvc.codegen.legalize import legalize_ops
from support import module_of, param, symbol


@pytest.fixture
def generated() -> Iterator[list[str]]:
    """Names of the functions that TVM generates in a test."""
    names: list[str] = []
    original = relax.BlockBuilder.call_te

    def call_te(self: relax.BlockBuilder, function: object, *args: object, **kwargs: object) -> relax.Call:
        names.append(getattr(function, "__name__", ""))
        return original(self, function, *args, **kwargs)

    with patch.object(relax.BlockBuilder, "call_te", call_te):
        yield names


def layers(count: int) -> IRModule:
    """The same few operators again and again; some differ in a constant, an attribute or a shape."""
    n = symbol("n")

    def body(emit: object, x: relax.Var, y: relax.Var) -> relax.Expr:
        for i in range(count):
            z = emit(relax.op.multiply(x, relax.const(1.5 if i % 2 else 2.5, "float32")))  # type: ignore[operator]
            z = emit(relax.op.subtract(y, z))  # type: ignore[operator]
            z = emit(relax.op.subtract(z, y))  # type: ignore[operator]
            z = emit(relax.op.add(z, z))  # type: ignore[operator]
            z = emit(relax.op.mean(z, -1 if i % 3 else 0, keepdims=True))  # type: ignore[operator]
            z = emit(relax.op.add(x, z))  # type: ignore[operator]
            a = emit(relax.op.strided_slice(z, [1], [0], [4], [1]))  # type: ignore[operator]
            b = emit(relax.op.strided_slice(z, [1], [4], [8], [1]))  # type: ignore[operator]
            x = emit(relax.op.concat([b, a], 1))  # type: ignore[operator]
        return x

    return module_of([param("x", (n, 8)), param("y", (n, 8))], body)[0]


def test_the_module_is_the_one_that_tvm_makes() -> None:
    mod = layers(7)
    assert tvm_ffi.structural_equal(legalize_ops(mod), relax.transform.LegalizeOps()(mod))


def test_what_repeats_is_generated_once(generated: list[str]) -> None:
    legalize_ops(layers(6))
    once = len(generated)
    legalize_ops(layers(12))
    # Not remembered: a concatenation, which takes a tuple, and the sum of a value with itself.
    assert len(generated) - once == once + 2 * 6
