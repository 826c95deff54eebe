"""What was proved about a model, as plain facts; and refusals of what could not be stored as it is."""

from __future__ import annotations

from pathlib import Path

from tvm import relax
from tvm.ir import GenericConst

from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import ModelFacts
from kvc_passes.graph import Graph, dims, graph_of, op_name, operands, scalar, static
from kvc_passes.markers import DEQUANTIZE
from kvc_passes.sites import FLOAT_BYTES, FloatName
from kvc_passes.weights import table_of, weight_of

from .configuration import Configuration
from .frontend.encoders import ImportedEncoder
from .frontend.importer import Imported
from .pipeline import Understood

_LARGEST_CONSTANT = 1 << 16  # bytes; what is larger would be memory that no plan counts


def facts_of(imported: Imported, understood: Understood) -> ModelFacts:
    """Sizes, sites and limits of a proved model, and what its config.json says that the graph does not.

    Raises:
        UnsupportedModel: an embedding table or logits of unknown size, a weight of a type that is not stored.
    """
    path = imported.file.path
    function = understood.module["main"]
    graph = graph_of(function)
    vocab = rows_read(graph, function.params[0])
    if vocab is None:
        raise UnsupportedModel(f"{path}: the token ids do not index an embedding table of known size")
    columns = static(dims(function.body.body)[-1])
    if columns is None or len(dims(function.body.body)) != 3:
        raise UnsupportedModel(f"{path}: the first output is not logits [batch, sequence, vocabulary]")
    check_types(path, imported, graph)
    configuration = Configuration.beside(path)
    known = (rows_read(graph, function.params[1]), configuration.context, understood.limit)
    limits = [n for n in known if n]
    return ModelFacts(
        name=path.stem,
        vocab=vocab,
        logits=columns,
        context=min(limits) if limits else None,
        sites=understood.sites,
        positions=understood.positions,
        parameter_bytes=imported.file.parameter_bytes(),
        nodes=len(imported.file.graph.node),
        warnings=configuration.contradictions(understood.sites, columns),
        memory=_memory(function, understood.memory),
    )


def _memory(function: relax.Function, name: str | None) -> tuple[int, FloatName] | None:
    """Elements and type of a row of the encoder's output."""
    param = next((p for p in function.params if p.name == name), None)
    if param is None:
        return None
    dtype: FloatName = str(param.ty.dtype.dtype)  # type: ignore[assignment]
    return static(dims(param)[2]) or 0, dtype


def check_types(path: Path, imported: Imported | ImportedEncoder, graph: Graph) -> None:
    """Refuse what would be stored as something else than it is: memory that no plan counts."""
    for var in graph.order:
        for constant in operands(graph.definitions[var]):
            if isinstance(constant, GenericConst) and constant.value.numpy().nbytes > _LARGEST_CONSTANT:
                what = f"{constant.value.dtype} {list(constant.value.shape)}"
                raise UnsupportedModel(
                    f"{path}: {imported.names.describe(var)} reads a constant of type {what}; "
                    "tables of this size must be weights: floats, or codes that are dequantized"
                )
        if op_name(graph.definitions[var]) == DEQUANTIZE and not _is_factor(graph, var):
            raise UnsupportedModel(
                f"{path}: {imported.names.describe(var)} dequantizes a weight for something other than a "
                "product with it or a lookup in it; it would have to be stored as floats"
            )
    for name, array in imported.weights.items():
        if str(array.dtype) not in (*FLOAT_BYTES, "int8", "uint8"):
            raise UnsupportedModel(
                f"{path}: initializer '{name}' is {array.dtype}; kvc stores weights of float32, float16, "
                "bfloat16, and of 4 and 8 bits"
            )


def _is_factor(graph: Graph, var: relax.Var) -> bool:
    """Whether a dequantized weight is only multiplied with or looked up in."""
    users = graph.users[var]
    for user in users:
        call = graph.definitions[user]
        name, last = op_name(call), graph.alias(call.args[-1]) if isinstance(call, relax.Call) else None
        if name in ("permute_dims", "astype", ""):
            if not _is_factor(graph, user):
                return False
        elif name == "matmul":
            if last != var or weight_of(graph, call.args[1]) is None:
                return False
        elif name != "take" or table_of(graph, call.args[0]) is None:
            return False
    return bool(users)


def rows_read(graph: Graph, index: relax.Var) -> int | None:
    """How large `index` can be: rows of the smallest table that is read at it, or at it plus a constant.

    Raises:
        UnsupportedModel: a table is read at something else that depends on `index`.
    """
    offsets = {index: 0}
    dependent = graph.reachable_from([index])
    limits = []
    for var in graph.order:
        call = graph.definitions[var]
        if op_name(call) in ("reshape", "broadcast_to", "astype") and call.args[0] in offsets:
            offsets[var] = offsets[call.args[0]]
        elif op_name(call) == "add" and call.args[0] in offsets and scalar(call.args[1], graph) is not None:
            offsets[var] = offsets[call.args[0]] + int(scalar(call.args[1], graph) or 0)
        elif op_name(call) == "take" and call.args[1] in dependent and _is_index(call.args[1]):
            rows = static(dims(call.args[0])[int(call.attrs.axis or 0)])
            if rows is not None and _picked(graph, call.args[1], rows):
                continue
            if call.args[1] not in offsets or rows is None:
                raise UnsupportedModel(
                    f"value '{var.name}' reads a table at an index that has no known bound"
                )
            limits.append(rows - offsets[call.args[1]])
    return min(limits, default=None)


def _picked(graph: Graph, value: relax.Expr, rows: int) -> bool:
    """Whether an index was chosen as the place of the largest of at most `rows` values."""
    call = graph.resolve(value)
    if op_name(call) == "argmax":
        extent = static(dims(call.args[0])[int(call.attrs.axis)])
        return extent is not None and extent <= rows
    moved = ("reshape", "squeeze", "expand_dims", "broadcast_to", "concat", "astype", "permute_dims")
    return op_name(call) in moved and all(
        _picked(graph, o, rows) for o in operands(call) if isinstance(o, relax.Var)
    )


def _is_index(value: relax.Expr) -> bool:
    return "int" in str(value.ty.dtype.dtype)
