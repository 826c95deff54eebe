"""Powers with small whole exponents are products."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax

from .base import Result
from .graph import op_name, scalar
from .rebuild import rebuild


@dataclass(frozen=True)
class SimplifyPowers:
    """x^2 and x^3 as multiplications: libm's pow takes longer than the matrix product around it.

    Before: `power(x, 2)`, `power(x, 3)`.
    After: `multiply(x, x)`, `multiply(multiply(x, x), x)`.
    Needs: nothing.
    Refuses: nothing; other exponents stay.
    """

    def run(self, mod: IRModule) -> Result:
        count = 0

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            nonlocal count
            exponent = scalar(value.args[1]) if op_name(value) == "power" else None
            if exponent not in (2.0, 3.0):
                return None
            count += 1
            x = value.args[0]
            square = relax.op.multiply(x, x)
            return square if exponent == 2.0 else relax.op.multiply(builder.emit(square), x)

        module = rebuild(mod, mod["main"].params, place)
        return Result(module, count)
