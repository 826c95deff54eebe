"""What must be proved of an encoder: that its output is what its decoder reads, and how large it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import IRModule, relax

from kvc_passes.errors import InputError, UnsupportedModel
from kvc_passes.facts import EncoderFacts, EncoderInput, ModelFacts
from kvc_passes.graph import Graph, dims, graph_of, static
from kvc_passes.place_arena import evaluate
from kvc_passes.rematerialize import tensors_of

from .frontend.encoders import ImportedEncoder
from .frontend.roles import SEQUENCE
from .index_spans import grows
from .model_facts import check_types, rows_read
from .planning.budget import most_of
from .table_reads import longest_read


@dataclass(frozen=True)
class Extents:
    """What is computed, by the one extent that a request may choose; 0 stands for none."""

    output: tuple[Any, ...]
    """[1, rows, width]"""
    all: tuple[Any, ...]
    """Extents that depend on it."""
    most: int
    """The largest that the graph is made for."""

    def bounds(self, extent: int) -> dict[str, int]:
        return {SEQUENCE: extent} if extent else {}

    def rows(self, extent: int) -> int:
        """Of the output."""
        return evaluate(self.output[1], self.bounds(extent))

    def least(self) -> int:
        """The smallest with which nothing is empty; beyond `most` if there is none."""

        def empty(extent: int) -> bool:
            return any(evaluate(dim, self.bounds(extent)) < 1 for dim in (*self.all, self.output[1]))

        return 1 + most_of(self.most, empty)

    def longest(self, least: int, rows: int) -> int:
        """The largest from `least` on with which the output has at most so many rows."""
        before = least - 1
        return before + most_of(self.most - before, lambda more: self.rows(before + more) <= rows)


def prove_encoder(
    imported: ImportedEncoder, mod: IRModule, decoder: ModelFacts
) -> tuple[EncoderFacts, Extents]:
    """Facts of an encoder whose graph, before it is lowered, is `mod`.

    Raises:
        InputError: the decoder reads no encoder's output, or another kind; an extent has no bound.
        UnsupportedModel: extents, table reads or types that cannot be proved or stored.
    """
    path, function = imported.file.path, mod["main"]
    graph = graph_of(function)
    check_types(path, imported, graph)
    output = tuple(dims(function.body.body))
    _check_output(imported, output, decoder)
    every = _extents(graph, path)
    given = zip(imported.inputs, function.params)
    inputs = tuple(_input(name, param, name in imported.masks, graph) for name, param in given)
    longest = longest_read(imported, graph, inputs)
    extents = Extents(output, every, longest if imported.limit is None else min(longest, imported.limit))
    least = 0
    if imported.open is not None:
        name, value = imported.open
        if static(output[1]) is not None:
            raise InputError(
                f"{path}: input '{value}': its extent '{name}' has no bound, since the rows of the output "
                f"do not depend on it: fix it, as --encoder-dim {name}=N"
            )
        least = extents.least()
        if least > extents.most:
            raise UnsupportedModel(f"{path}: input '{value}': with no extent '{name}' is there an output")
    facts = EncoderFacts(
        name=path.stem,
        inputs=inputs,
        least=least,
        parameter_bytes=imported.file.parameter_bytes(),
        nodes=len(imported.file.graph.node),
    )
    return facts, extents


def _check_output(imported: ImportedEncoder, output: Sequence[Any], decoder: ModelFacts) -> None:
    path = imported.file.path
    if decoder.memory is None:
        raise InputError(f"the model '{decoder.name}' reads no encoder's output: give no encoder")
    width, dtype = decoder.memory
    if len(output) != 3 or static(output[0]) != 1:
        raise UnsupportedModel(f"{path}: the output has no batch as the inputs have: {list(output)}")
    columns = static(output[2])
    if columns != width or imported.dtype != dtype:
        raise InputError(
            f"{path}: the encoder's output is {imported.dtype} [batch, rows, {columns}]; the decoder "
            f"'{decoder.name}' reads {dtype} [batch, rows, {width}]"
        )


def _input(name: str, param: relax.Var, mask: bool, graph: Graph) -> EncoderInput:
    dtype = str(param.ty.dtype.dtype)
    ids = rows_read(graph, param) if "int" in dtype and not mask else None
    return EncoderInput(name, dtype, tuple(static(d) for d in dims(param)[1:]), ids, mask)


def _extents(graph: Graph, path: Path) -> tuple[Any, ...]:
    """Extents of all values that depend on a request. Raises UnsupportedModel for one that could shrink."""
    found: dict[str, Any] = {}
    for var in graph.order:
        for tensor in tensors_of(var.ty):
            if tensor.shape is None:
                raise UnsupportedModel(f"{path}: value '{var.name}' has no known shape")
            found |= {str(dim): dim for dim in tensor.shape.values if static(dim) is None}
    for text, dim in found.items():
        if not grows(dim):
            raise UnsupportedModel(f"{path}: the extent {text} of a value has no bound that could be found")
    return tuple(found.values())
