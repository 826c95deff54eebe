"""Mutations of ONNX decoders: each changes one thing; most results are no decoders any more."""

from __future__ import annotations

from tools.mutations.attention import attended
from tools.mutations.caches import cached, returned
from tools.mutations.editor import Editor, Mutation
from tools.mutations.nodes import attributes, constants, operators
from tools.mutations.positions import placed
from tools.mutations.tokens import mixed

__all__ = ["Editor", "Mutation", "mutations"]


def mutations(editor: Editor) -> dict[str, list[Mutation]]:
    """Everything that can be changed in a graph, by kind; `editor` is only read."""
    kinds = (mixed, attended, placed, cached, returned, operators, constants, attributes)
    return {kind.__name__: list(kind(editor)) for kind in kinds}
