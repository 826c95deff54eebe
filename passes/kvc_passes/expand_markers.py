"""Expand markers: `kvc.rotary` and `kvc.sdpa` become ordinary operations."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax

from .base import Result
from .graph import graph_of, op_name
from .markers import ROTARY, SDPA, Rotary, Sdpa, attributes, tensors
from .rebuild import rebuild
from .spelled_out import attention, rotary


@dataclass(frozen=True)
class ExpandMarkers:
    """Markers of rotary embeddings and attention as the operations that exporters write.

    Before: `kvc.rotary(x, cos, sin)` and `kvc.sdpa(q, k, v, extras...)` with their attributes.
    After: slices, products and a concatenation for the first; for the second products, masks from
        compared positions, and a softmax whose rows are zero where no key is seen. Values in half
        precision are attended in float32. Other markers stay.
    Needs: nothing. In a decoder's pipeline, RecognizeAttention: it reads attention as markers.
    Refuses: nothing.
    """

    def run(self, mod: IRModule) -> Result:
        if not any(op_name(value) in (ROTARY, SDPA) for value in graph_of(mod["main"]).definitions.values()):
            return Result(mod, 0)
        count = 0

        def place(builder: relax.BlockBuilder, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
            nonlocal count
            name = op_name(value)
            if name not in (ROTARY, SDPA):
                return None
            count += 1

            def emit(expression: relax.Expr) -> relax.Var:
                return builder.emit(expression, name_hint=var.name)

            if name == ROTARY:
                return rotary(emit, attributes(value, Rotary), *tensors(value))
            return attention(emit, attributes(value, Sdpa), tensors(value)).output

        module = rebuild(mod, mod["main"].params, place)
        return Result(module, count)
