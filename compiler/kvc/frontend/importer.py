"""ONNX file -> Relax module, symbolic dimensions kept, weights as parameters that hold no data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from tvm import IRModule

from kvc_passes.facts import Roles
from kvc_passes.nodes import NodeNames

from .graph_importer import Importer
from .reader import OnnxFile, from_model, read, require_types
from .roles import find_roles, order_outputs, unify_dimensions


@dataclass(frozen=True)
class Imported:
    """An imported model.

    Attributes:
        module: `main(inputs..., weights...) -> (logits, presents...)`.
        file: the ONNX file, with its tensors mapped.
        roles: what every input is for, by the name of the Relax parameter.
        weights: initializer of each weight parameter, by the parameter's name, in parameter order.
        names: from bindings back to ONNX nodes.
        allowed: permissions of the user's that were needed.
        limit: most tokens of a sequence for which the graph is what was imported, None for any number.
    """

    module: IRModule
    file: OnnxFile
    roles: Roles
    weights: dict[str, np.ndarray]
    names: NodeNames
    limit: int | None = None
    allowed: tuple[str, ...] = ()


def import_onnx(path: Path, allow: frozenset[str] = frozenset()) -> Imported:
    """Read and import `path`; `allow` has the user's permissions.

    Raises:
        InputError: the file cannot be read.
        UnsupportedModel: an operator or a form of it is not supported; the message names the node.
    """
    file = read(path)
    roles = find_roles(file.graph, path)
    unify_dimensions(file.graph, roles, path)
    order_outputs(file.graph, roles)
    importer = Importer(file, allow=allow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stock importer warns about every renamed input
        module = importer.from_onnx(file.graph, file.opset)
    renamed = {name: var.name for name, var in importer._inputs.items()}
    roles = Roles(
        renamed[roles.tokens],
        renamed.get(roles.attention_mask or ""),
        renamed.get(roles.positions or ""),
        tuple(renamed[name] for name in roles.past),
        renamed.get(roles.memory or ""),
        renamed.get(roles.memory_mask or ""),
    )
    names = NodeNames(tuple((n.name or f"#{i}", n.op_type) for i, n in enumerate(file.graph.node)))
    limit = min(importer.limits, default=None)
    return Imported(module, file, roles, importer.weights, names, limit, tuple(sorted(importer.used)))


def import_graph(model: onnx.ModelProto, name: str = "graph") -> IRModule:
    """Import any ONNX graph, without asking what its inputs are for.

    Args:
        model: its tensors are in it, not in other files.
        name: how messages call it.

    Returns:
        `main(inputs...) -> outputs`, a tuple if there are many; all initializers are constants.

    Raises:
        UnsupportedModel: an operator, an element type or a form of it is not supported.
    """
    require_types(model.graph, name)
    file = from_model(model, Path(name))
    importer = Importer(file, decoder=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importer.from_onnx(file.graph, file.opset)
