"""From a batch of sequences to a ragged list of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax, tirx

from .base import Result
from .facts import Roles
from .graph import dims
from .rebuild import rebuild, with_main

ROWS = "n"


@dataclass(frozen=True)
class FlattenTokens:
    """The same graph with a batch of one and all tokens of all requests as its sequence.

    Before: `main(tokens [batch, sequence], positions [sequence], weights...) -> logits [batch, sequence, V]`.
    After: `main(tokens [n], positions [n], weights...) -> logits [1, n, V]`, values shaped [1, n, ...].
    Needs: ProveTokenwise (tokens meet only in attention) and PositionsToInput.
    Refuses: nothing; what could be refused was refused by the proofs.
    """

    roles: Roles

    def run(self, mod: IRModule) -> Result:
        function = mod["main"]
        batch, sequence = dims(function.params[0])
        rows = tirx.Var(ROWS, "int64")
        bound = {sequence: rows}
        if isinstance(batch, tirx.Var):
            bound[batch] = tirx.IntImm("int64", 1)
        function = function.bind_symbolic_vars(bound)
        tokens = relax.Var("tokens", relax.TensorType((rows,), "int64"))
        old = function.params[0]
        dtype = old.ty.dtype.dtype
        ids = tokens if dtype == "int64" else relax.op.astype(tokens, dtype)
        values = {old: relax.op.reshape(ids, relax.ShapeExpr([tirx.IntImm("int64", 1), rows]))}
        module = rebuild(
            with_main(mod, function), [tokens, *function.params[1:]], lambda *_: None, values=values
        )
        return Result(module, 1)
