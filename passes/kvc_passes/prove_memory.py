"""The premise of cross-attention: an encoder's output enters through it alone, row by row."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import IRModule, relax

from .base import Result
from .errors import UnsupportedModel
from .facts import Roles
from .graph import dims, graph_of, op_name, operands
from .markers import ATTENTION
from .nodes import NodeNames
from .prove_tokenwise import Mixes, TokenAxes


@dataclass(frozen=True)
class ProveMemory:
    """Prove that keys and values of cross-attention can be made once for a request; changes nothing.

    Before and after: `main(tokens [batch, sequence], ..., memory [batch, rows, d], ...)` with attention as
        markers.
    Needs: RecognizeAttention and PositionsToInput.
    Refuses: values of the encoder's output that depend on tokens or positions, or are read by anything but
        the keys and values of attention; operations on it that mix its rows.
    """

    roles: Roles
    names: NodeNames

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: the number of operations proved. Raises UnsupportedModel."""
        if self.roles.memory is None:
            return Result(mod, 0, 0)
        graph = graph_of(mod["main"])
        params = {p.name: p for p in graph.function.params}
        memory = params[self.roles.memory]
        own = graph.reachable_from([params[self.roles.tokens], params["positions"]])
        axes = TokenAxes([dims(memory)[1]])
        made: set[relax.Expr] = {memory}
        for var in graph.order:
            call = graph.definitions[var]
            read = [o for o in operands(call) if o in made]
            if not read:
                continue
            if op_name(call) == ATTENTION:
                if call.args[1] in made:
                    self._refuse(var, "asks for tokens with what is made of the encoder's output")
                continue
            if var in own:
                self._refuse(var, "combines tokens or positions with the encoder's output")
            try:
                axes.check(graph, var)
            except Mixes as reason:
                self._refuse(var, f"{reason}; cross-attention alone may mix rows of the encoder's output")
            made.add(var)
        if graph.alias(graph.function.body.body) in made:
            raise UnsupportedModel("the logits are made of the encoder's output alone")
        return Result(mod, 0, len(made) - 1)

    def _refuse(self, var: relax.Var, rule: str) -> None:
        raise UnsupportedModel(f"{self.names.describe(var)} {rule}")
