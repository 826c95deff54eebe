"""From Relax bindings back to the ONNX nodes they were imported from.

The importer ends the name of every binding with `_n<index of the ONNX node>_`; TVM's passes keep the
names of variables, so a refusal late in the pipeline can still name the node.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvm import relax

_INDEX = re.compile(r"_n(\d+)_\d*$")


@dataclass(frozen=True)
class NodeNames:
    """Name and operator of every ONNX node, in graph order."""

    nodes: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def hint(name: str, index: int) -> str:
        """The binding name for the node called `name` at `index`."""
        return f"{re.sub(r'[^0-9a-zA-Z_]', '_', name)[-40:]}_n{index}_"

    def index(self, var: relax.Var) -> int | None:
        """Index of the ONNX node that `var` came from, None for values that kvc made."""
        found = _INDEX.search(var.name)
        return int(found.group(1)) if found and int(found.group(1)) < len(self.nodes) else None

    def name(self, var: relax.Var) -> str:
        """The ONNX node's name, or the variable's own."""
        index = self.index(var)
        return var.name if index is None else self.nodes[index][0]

    def describe(self, var: relax.Var) -> str:
        """`node 'NAME' (Operator)` for messages."""
        index = self.index(var)
        if index is None:
            return f"value '{var.name}'"
        return f"node '{self.nodes[index][0]}' ({self.nodes[index][1]})"
