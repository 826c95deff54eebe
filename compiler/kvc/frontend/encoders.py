"""The encoder of an encoder-decoder pair: any ONNX graph from inputs [1, ...] to rows of one sequence."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from tvm import IRModule

from kvc_passes.errors import InputError, UnsupportedModel
from kvc_passes.nodes import NodeNames

from .graph_importer import Importer
from .reader import OnnxFile, read
from .roles import SEQUENCE

_NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_MASK = "attention_mask"


@dataclass(frozen=True)
class ImportedEncoder:
    """An imported encoder.

    Attributes:
        module: `main(inputs..., weights...) -> rows [1, rows, width]`.
        file: what of the ONNX file makes the output, with its tensors mapped.
        inputs: ONNX names of the inputs, in order.
        masks: those that say which elements are no padding.
        weights: initializer of each weight parameter, by the parameter's name, in parameter order.
        names: from bindings back to ONNX nodes.
        open: name of the extent that requests choose, and an input that has it; in the module it is SEQUENCE.
        limit: the largest value of it for which the graph is what was imported.
        dtype: the output's type in the file.
    """

    module: IRModule
    file: OnnxFile
    inputs: tuple[str, ...]
    masks: frozenset[str]
    weights: dict[str, np.ndarray]
    names: NodeNames
    open: tuple[str, str] | None
    limit: int | None
    dtype: str


def import_encoder(path: Path, wanted: str | None, fixed: Mapping[str, int]) -> ImportedEncoder:
    """Read and import `path`, for one sequence at a time.

    Args:
        path: the ONNX file.
        wanted: what the decoder calls what it reads.
        fixed: extents of inputs that the file leaves open, by name.

    Raises:
        InputError: the file cannot be read, several extents are open, an extent to fix is not there.
        UnsupportedModel: no output of rows, an input without a batch; an operator or a form of it that is not
            supported, with its node.
    """
    file = read(path)
    output = output_of(file.graph, path, wanted)
    file = _alone(file, output)
    initializers = {tensor.name for tensor in file.graph.initializer}
    inputs = [value for value in file.graph.input if value.name not in initializers]
    if not inputs:
        raise UnsupportedModel(f"{path}: the encoder has no inputs")
    masks, open_ = _set_extents(inputs, fixed, path)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
    _widen_inputs(file.graph, inputs)
    _widen_output(file.graph, output)
    importer = Importer(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stock importer warns about every renamed input
        module = importer.from_onnx(file.graph, file.opset)
    names = NodeNames(tuple((n.name or f"#{i}", n.op_type) for i, n in enumerate(file.graph.node)))
    return ImportedEncoder(
        module,
        file,
        tuple(value.name for value in inputs),
        masks,
        importer.weights,
        names,
        open_,
        min(importer.limits, default=None),
        str(dtype),
    )


def output_of(graph: onnx.GraphProto, path: Path, wanted: str | None) -> onnx.ValueInfoProto:
    """The output that the decoder reads: the only one, or the one called so, else the first of rank 3."""
    outputs = [v for v in graph.output if len(v.type.tensor_type.shape.dim) == 3]
    named = [v for v in outputs if v.name in (wanted, "last_hidden_state")]
    found = [*named, *outputs]
    if not found:
        listed = ", ".join(f"'{v.name}'" for v in graph.output)
        raise UnsupportedModel(f"{path}: no output is [batch, rows, width], as a decoder reads it ({listed})")
    return found[0]


def _alone(file: OnnxFile, output: onnx.ValueInfoProto) -> OnnxFile:
    """The file with one of its outputs, in place, without the nodes and initializers that do not make it."""
    graph, needed = file.graph, {output.name}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if needed.isdisjoint(filter(None, node.output)):
            del graph.node[index]
        else:
            node.name = node.name or f"#{index}"  # its place in the file, by which it is told of
            needed.update(node.input)
    unused = {tensor.name for tensor in graph.initializer} - needed
    others = {value.name for value in graph.output} - {output.name}
    # Old files list initializers among the inputs, too.
    for values, dropped in ((graph.initializer, unused), (graph.input, unused), (graph.output, others)):
        for index in reversed(range(len(values))):
            if values[index].name in dropped:
                del values[index]
    return replace(file, tensors={tensor.name: file.tensors[tensor.name] for tensor in graph.initializer})


def _set_extents(
    inputs: Sequence[onnx.ValueInfoProto], fixed: Mapping[str, int], path: Path
) -> tuple[frozenset[str], tuple[str, str] | None]:
    """Give inputs a batch of 1, and the open extent the name SEQUENCE, in place; the masks, the extent."""
    free: dict[str, str] = {}
    known: list[str] = []
    masks = set()
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].dim_value not in (0, 1):
            has = f"a batch of {dims[0].dim_value}" if dims else "no batch"
            raise UnsupportedModel(
                f"{path}: input '{value.name}' has {has}; export the encoder with a dynamic batch"
            )
        dims[0].dim_value = 1
        if len(dims) == 2 and _MASK in value.name.lower():
            masks.add(value.name)
    for value in sorted(inputs, key=lambda value: value.name in masks):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value:
                continue
            # Exporters name the extent of a mask anew, which hides that it is that of what it masks.
            masked = next(iter(free), "") if value.name in masks else ""
            name = masked or dim.dim_param or f"{value.name}_{axis}"
            if name in fixed:
                dim.dim_value = fixed[name]
            else:
                free.setdefault(name, value.name)
                dim.dim_param = SEQUENCE  # whose limits the importer finds
            known.append(name)
    _check_free(free, known, fixed, path)
    return frozenset(masks), next(iter(free.items()), None)


def _check_free(free: Mapping[str, str], known: Sequence[str], fixed: Mapping[str, int], path: Path) -> None:
    """free: the inputs by their open extents. Raises InputError for several, and for a name in vain."""
    for name in fixed:
        if name not in known:
            listed = ", ".join(dict.fromkeys(known)) or "none"
            raise InputError(f"{path}: no input has an open extent '{name}'; there are: {listed}")
    if len(free) > 1:
        listed = ", ".join(f"'{name}' of input '{value}'" for name, value in free.items())
        raise InputError(
            f"{path}: the extents {listed} are open; the rows of the workload can bound one of them: fix the "
            "others, as --encoder-dim NAME=N"
        )


def _widen_inputs(graph: onnx.GraphProto, inputs: Sequence[onnx.ValueInfoProto]) -> None:
    """Inputs of 16-bit floats are given as float32 and cast, in place: numpy has no bfloat16."""
    for value in inputs:
        kind = value.type.tensor_type
        if kind.elem_type not in _NARROW:
            continue
        narrow = f"{value.name}_as_given"
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == value.name:
                    node.input[place] = narrow
        cast = onnx.helper.make_node("Cast", [value.name], [narrow], to=kind.elem_type)
        graph.node.insert(0, cast)
        kind.elem_type = onnx.TensorProto.FLOAT


def _widen_output(graph: onnx.GraphProto, output: onnx.ValueInfoProto) -> None:
    """An output of 16-bit floats is cast to float32, in place, as the function `encode` takes it."""
    kind = output.type.tensor_type
    if kind.elem_type not in _NARROW:
        return
    narrow = f"{output.name}_as_computed"
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == output.name:
                    names[place] = narrow
    graph.node.append(onnx.helper.make_node("Cast", [narrow], [output.name], to=onnx.TensorProto.FLOAT))
    kind.elem_type = onnx.TensorProto.FLOAT
