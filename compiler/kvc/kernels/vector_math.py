"""Polynomial exp, tanh, sigmoid and erf that vectorise, instead of calls of the scalar C library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Call
from tvm_ffi import structural_map

from .emit import Expr, lanes_of, splat, widened

Bind = Callable[[str, Expr], Expr]
"""Names the value of an expression, so that it is computed once."""

LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06
# e^r on |r| <= ln(2) / 2 and 2^r on |r| <= 1/2: Taylor of degree 7, truncation below 1e-8.
_EXP = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_LN2 = 0.6931471805599453
_EXP2 = tuple(c * _LN2 ** (7 - i) for i, c in enumerate(_EXP))[1:]
# tanh x = x + x^3 P(x^2) on |x| < 0.625 (Cephes); erf x = x P(x^2) / Q(x^2) (XLA).
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERF_P = (
    0.00022905065861350646,
    0.0034082910107109506,
    0.050955695062380861,
    0.18520832239976145,
    1.128379143519084,
)
_ERF_Q = (
    -1.1791602954361697e-7,
    0.000023547966471313185,
    0.0010179625278914885,
    0.014070470171167667,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)
_ERF_ONE = 3.832506856900711
"""From here on erf is 1 in float32."""


def _like(value: float, x: Expr) -> Expr:
    return splat(tirx.const(value, "float32"), lanes_of(x))


def _int_like(value: int, x: Expr) -> Expr:
    return splat(tirx.const(value, "int32"), lanes_of(x))


def _dtype(name: str, x: Expr) -> str:
    return name if lanes_of(x) == 1 else f"{name}x{lanes_of(x)}"


def _horner(bind: Bind, coefficients: tuple[float, ...], x: Expr) -> Expr:
    value = _like(coefficients[0], x)
    for c in coefficients[1:]:
        value = bind("p", value * x + _like(c, x))
    return value


def _power_of_two(n: Expr) -> Expr:
    """2^n of int32 n in -126 .. 127, by the exponent bits."""
    bits = (n + _int_like(127, n)) << _int_like(23, n)
    return tirx.reinterpret(_dtype("float32", n), bits)


def _clamp(x: Expr, low: float, high: float) -> Expr:
    # The constant stands first, so that a NaN goes through.
    return tirx.Min(_like(high, x), tirx.Max(_like(low, x), x))


def exp2_nonpositive(bind: Bind, x: Expr) -> Expr:
    """2^x of float32 x <= 0 (a scalar or a vector); below -126 it is 2^-126, and of NaN it is NaN."""
    x = bind("x", tirx.Max(_like(-126.0, x), x))
    n = bind("n", tirx.nearbyint(x))
    r = bind("r", x - n)
    return _horner(bind, _EXP2, r) * _power_of_two(tirx.Cast(_dtype("int32", x), n))


def exp(bind: Bind, x: Expr) -> Expr:
    """e^x, relative error below 3e-7; overflows to infinity and underflows to zero."""
    x = bind("x", _clamp(x, -110.0, 110.0))
    n = bind("n", tirx.nearbyint(x * _like(LOG2E, x)))
    r = bind("r", x - n * _like(_LN2_HIGH, x))
    r = bind("r", r - n * _like(_LN2_LOW, x))
    k = bind("k", tirx.Cast(_dtype("int32", x), n))
    half = bind("half", k >> _int_like(1, k))
    # Two factors: 2^k alone is out of the exponent's range near overflow and for subnormals.
    return _horner(bind, _EXP, r) * _power_of_two(half) * _power_of_two(k - half)


def sigmoid(bind: Bind, x: Expr) -> Expr:
    """1 / (1 + e^-x), relative error below 3e-7."""
    one = _like(1.0, x)
    return one / (one + exp(bind, _like(0.0, x) - x))


def tanh(bind: Bind, x: Expr) -> Expr:
    """tanh x, absolute error below 3e-7 (relative near zero)."""
    x = bind("x", _clamp(x, -10.0, 10.0))
    square = bind("square", x * x)
    small = bind("small", x + x * square * _horner(bind, _TANH, square))
    e = bind("e", exp(bind, x * _like(2.0, x)))
    one = _like(1.0, x)
    large = one - _like(2.0, x) / (e + one)
    return tirx.Select(square < _like(0.625 * 0.625, x), small, large)


def erf(bind: Bind, x: Expr) -> Expr:
    """The error function, relative error below 3e-7."""
    x = bind("x", _clamp(x, -_ERF_ONE, _ERF_ONE))
    square = bind("square", x * x)
    value = x * _horner(bind, _ERF_P, square) / _horner(bind, _ERF_Q, square)
    return _clamp(value, -1.0, 1.0)


_REPLACED: dict[str, Callable[[Bind, Expr], Expr]] = {
    "tirx.exp": exp,
    "tirx.sigmoid": sigmoid,
    "tirx.tanh": tanh,
    "tirx.erf": erf,
}


def _as_expression(function: Callable[[Bind, Expr], Expr], x: Expr) -> Expr:
    lets: list[tuple[Any, Expr]] = []

    def bind(name: str, value: Expr) -> Expr:
        var = tirx.Var(name, value.ty.dtype)
        lets.append((var, value))
        return var

    result = function(bind, bind("a", x))
    for var, value in reversed(lets):
        result = tirx.Let(var, value, result)
    return result


def replace_math(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """`func` with float32 exp, sigmoid, tanh and erf as polynomials, and casts from bfloat16 by the bits.

    Polynomials vectorise with the loop. TVM's own casts are wrong where they are bound to a variable.
    """

    def replace(call: Any) -> Any:
        function = _REPLACED.get(getattr(call.op, "name", ""))
        if function is None or not str(call.ty.dtype).startswith("float32"):
            return call
        return _as_expression(function, call.args[0])

    def widen(cast: Any) -> Any:
        from_bits = str(cast.value.ty.dtype) == "bfloat16" and str(cast.ty.dtype) == "float32"
        return widened(cast.value) if from_bits else cast

    return func.with_body(structural_map(func.body, [(Call, replace), (tirx.Cast, widen)]))
