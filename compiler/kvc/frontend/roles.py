"""What each graph input is for, and one set of symbols for the dimensions they share."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import Roles

BATCH, SEQUENCE, PAST, ROWS = "batch", "sequence", "past", "rows"
LOGITS = "logits"
_TABLES = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose")
"""Operators that make tables of other tables."""
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def find_roles(graph: onnx.GraphProto, path: object) -> Roles:
    """Decide what every graph input is for.

    Token ids are recognized by use (they index the embedding table), the past by shape, the attention
    mask and the position ids by name, since their uses vary.

    Raises:
        UnsupportedModel: no token input, or an input of no known role.
    """
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initializers]
    tokens = _token_input(graph, inputs)
    if tokens is None:
        found = ", ".join(f"'{value.name}'" for value in inputs) or "none"
        raise UnsupportedModel(
            f"{path}: is not a decoder language model: no integer input [batch, sequence] indexes an "
            f"embedding table (inputs: {found})"
        )
    mask = positions = memory = memory_mask = None
    past: list[str] = []
    for value in inputs:
        kind, rank = value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)
        if value.name == tokens:
            continue
        if kind in _INTEGERS and rank == 2 and "position" in value.name.lower():
            positions = value.name
        elif rank == 2 and "mask" in value.name.lower():
            if "encoder" in value.name.lower():
                memory_mask = value.name
            else:
                mask = value.name
        elif kind not in _INTEGERS and rank == 3 and memory is None:
            memory = value.name
        elif kind not in _INTEGERS and rank == 4:
            past.append(value.name)
        else:
            raise UnsupportedModel(
                f"{path}: input '{value.name}' is neither token ids, attention mask, position ids, a past "
                "key or value [batch, heads, past, head dim] nor an encoder's output [batch, rows, width]"
            )
    return Roles(tokens, mask, positions, tuple(past), memory, memory_mask)


def _token_input(graph: onnx.GraphProto, inputs: list[onnx.ValueInfoProto]) -> str | None:
    """The integer input [batch, sequence] that indexes a table of weights, the one with the most rows."""
    rows = {t.name: t.dims[0] if len(t.dims) == 2 else 0 for t in graph.initializer}
    index = {t.name for t in graph.initializer if t.data_type in _INTEGERS}
    names = {
        v.name
        for v in inputs
        if v.type.tensor_type.elem_type in _INTEGERS
        and len(v.type.tensor_type.shape.dim) == 2
        and "position" not in v.name.lower()
        and "type" not in v.name.lower()
        and "mask" not in v.name.lower()
    }
    alias = {name: name for name in names}
    best: tuple[int, str] | None = None
    for node in graph.node:
        given = [name for name in node.input if name]
        if not given:
            continue
        if given[0] in alias and node.op_type in ("Cast", "Identity", "Reshape"):
            alias[node.output[0]] = alias[given[0]]
        elif node.op_type in _TABLES and given[0] in rows:
            size = rows[given[0]]
            rows |= dict.fromkeys(node.output, 1 if node.op_type in ("Reshape", "Transpose") else size)
        elif node.op_type in ("Gather", "GatherBlockQuantized") and given[0] in rows.keys() - index:
            source = alias.get(given[1]) if len(given) > 1 else None
            if source is not None and (best is None or rows[given[0]] > best[0]):
                best = (rows[given[0]], source)
    return best[1] if best else None


def unify_dimensions(graph: onnx.GraphProto, roles: Roles, path: object) -> None:
    """Give the inputs' dimensions the symbols batch, sequence and past, token ids first, in place.

    Exporters name them anew for every input, which hides that they are equal.

    Raises:
        UnsupportedModel: the sequence length is fixed, or a batch other than 1.
    """
    dims = {v.name: v.type.tensor_type.shape.dim for v in graph.input}
    if dims[roles.tokens][1].dim_value:
        raise UnsupportedModel(
            f"{path}: input '{roles.tokens}' has a fixed sequence length, {dims[roles.tokens][1].dim_value}; "
            "export the model with a dynamic sequence axis"
        )
    if dims[roles.tokens][0].dim_value > 1:
        raise UnsupportedModel(
            f"{path}: input '{roles.tokens}' has a fixed batch of {dims[roles.tokens][0].dim_value}; "
            "export the model with a dynamic batch, or a batch of 1"
        )
    inputs = sorted(graph.input, key=lambda value: value.name != roles.tokens)  # token ids come first
    del graph.input[:]
    graph.input.extend(inputs)
    dims = {v.name: v.type.tensor_type.shape.dim for v in graph.input}
    total = f"{PAST}+{SEQUENCE}" if roles.past else SEQUENCE
    wanted: dict[str | None, list[str | None]] = {
        roles.tokens: [BATCH, SEQUENCE],
        roles.positions: [BATCH, SEQUENCE],
        roles.attention_mask: [BATCH, total],
    }
    wanted |= {name: [BATCH, None, PAST, None] for name in roles.past}
    if roles.memory is not None:
        _check_memory(dims[roles.memory], roles.memory, path)
        wanted |= {roles.memory: [BATCH, ROWS, None], roles.memory_mask: [BATCH, ROWS]}
    for name, symbols in wanted.items():
        if name is None:
            continue
        for axis, symbol in enumerate(symbols):
            if symbol is not None and not dims[name][axis].dim_value:
                dims[name][axis].dim_param = symbol


def _check_memory(dims: Sequence[onnx.TensorShapeProto.Dimension], name: str, path: object) -> None:
    if dims[1].dim_value:
        raise UnsupportedModel(
            f"{path}: input '{name}' has a fixed number of rows, {dims[1].dim_value}; export the decoder "
            "with a dynamic axis for the encoder's output"
        )
    if not dims[2].dim_value:
        raise UnsupportedModel(f"{path}: input '{name}' has rows of unknown width")


def order_outputs(graph: onnx.GraphProto, roles: Roles) -> None:
    """Put the output called logits first, if there is one, presents in the order of their pasts, in place.

    Presents are known by the names of their pasts, such as present.0.key by past_key_values.0.key.
    """
    presents = {_kind(name): number for number, name in enumerate(roles.past)}

    def rank(value: onnx.ValueInfoProto) -> tuple[bool, int]:
        return value.name != LOGITS, presents.get(_kind(value.name), -1)

    outputs = sorted(graph.output, key=rank)
    del graph.output[:]
    graph.output.extend(outputs)


def _kind(name: str) -> str:
    """What the names of a past and of its present have in common."""
    return name.lower().replace("past_key_values", "present").replace("past", "present")
