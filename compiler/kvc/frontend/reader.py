"""Reading an ONNX file without reading its weights: the graph is parsed, tensors stay memory-mapped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError

from kvc_passes.errors import InputError, UnsupportedModel

from .structure import check_structure

OLDEST_OPSET = 13  # Squeeze, Unsqueeze and Reduce* take their axes as inputs from here on.

_DTYPES: dict[int, np.dtype[np.generic]] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.DOUBLE: np.dtype(np.float64),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    onnx.TensorProto.INT64: np.dtype(np.int64),
    onnx.TensorProto.INT32: np.dtype(np.int32),
    onnx.TensorProto.INT16: np.dtype(np.int16),
    onnx.TensorProto.INT8: np.dtype(np.int8),
    onnx.TensorProto.UINT64: np.dtype(np.uint64),
    onnx.TensorProto.UINT32: np.dtype(np.uint32),
    onnx.TensorProto.UINT16: np.dtype(np.uint16),
    onnx.TensorProto.UINT8: np.dtype(np.uint8),
    onnx.TensorProto.BOOL: np.dtype(np.bool_),
}


_FOUR_BITS = {onnx.TensorProto.INT4: True, onnx.TensorProto.UINT4: False}  # whether signed


@dataclass(frozen=True)
class FourBits:
    """A 4-bit initializer, whose array holds two elements a byte, the lower half first."""

    dims: tuple[int, ...]
    signed: bool


@dataclass(frozen=True)
class OnnxFile:
    """A parsed ONNX file.

    Attributes:
        path: the file.
        model: its graph, external tensors not loaded.
        opset: version of the ai.onnx operator set.
        tensors: every initializer as a numpy array; external ones are read-only memory maps. 4-bit ones are
            uint8 [ceil(elements / 2)].
        packed: what those 4-bit initializers are.
    """

    path: Path
    model: onnx.ModelProto
    opset: int
    tensors: dict[str, np.ndarray]
    packed: dict[str, FourBits] = field(default_factory=dict)

    @property
    def graph(self) -> onnx.GraphProto:
        return self.model.graph

    def parameter_bytes(self) -> dict[str, int]:
        """Bytes of all initializers by dtype, the largest first."""
        sizes: dict[str, int] = {}
        for name, array in self.tensors.items():
            dtype = "int4" if name in self.packed else str(array.dtype)
            sizes[dtype] = sizes.get(dtype, 0) + array.nbytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def read(path: Path) -> OnnxFile:
    """Parse `path` and map its tensors.

    Raises:
        InputError: not a file, not ONNX, truncated, not well formed, external data missing or short.
        UnsupportedModel: no ai.onnx operators, an opset that is too old, model-local functions, or an
            initializer of a type that kvc has no numbers for.
    """
    require_file(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX file, or a truncated one ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not model.graph.node or not model.opset_import:
        raise InputError(f"{path}: not an ONNX model: it holds no graph (empty or truncated file?)")
    opset = _opset(path, model)
    check_structure(model.graph, opset, path)
    return OnnxFile(path, model, opset, _tensors(path, model.graph), _packed(model.graph))


def require_types(graph: onnx.GraphProto, name: object) -> None:
    """Raise UnsupportedModel unless inputs, outputs and initializers are tensors of numbers, not empty."""
    # What is used only for its type may be empty.
    used = {name for node in graph.node for name in node.input[: 1 if node.op_type == "CastLike" else None]}
    used |= {value.name for value in graph.output}
    for role, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            if not value.type.HasField("tensor_type"):
                raise UnsupportedModel(f"{name}: {role} '{value.name}' is no tensor")
            _require_type(name, role, value.name, value.type.tensor_type.elem_type)
            empty = any(d.HasField("dim_value") and not d.dim_value for d in value.type.tensor_type.shape.dim)
            if empty and value.name in used:
                raise UnsupportedModel(f"{name}: {role} '{value.name}' is a tensor without elements")
    for tensor in graph.initializer:
        _require_type(name, "initializer", tensor.name, tensor.data_type)


def _require_type(path: object, role: str, name: str, kind: int) -> None:
    if kind not in _DTYPES:
        known = onnx.TensorProto.DataType.values()
        text = onnx.TensorProto.DataType.Name(kind) if kind in known else f"{kind}, which ONNX does not have"
        raise UnsupportedModel(f"{path}: {role} '{name}' has the element type {text}")


def from_model(model: onnx.ModelProto, name: Path) -> OnnxFile:
    """A model that is in memory, with its tensors; `name` is for messages.

    Raises:
        InputError, UnsupportedModel: as `read` does.
    """
    return OnnxFile(name, model, _opset(name, model), _tensors(name, model.graph), _packed(model.graph))


def require_file(path: Path) -> None:
    """Raise InputError unless `path` is a file that can be opened."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give the .onnx file in it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _opset(path: Path, model: onnx.ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise UnsupportedModel(f"{path}: imports no ai.onnx operator set")
    if versions[0] < OLDEST_OPSET:
        raise UnsupportedModel(
            f"{path}: opset {versions[0]} is too old; kvc reads opset {OLDEST_OPSET} and newer. "
            "Export the model again, or use onnx.version_converter"
        )
    if model.functions:
        raise UnsupportedModel(
            f"{path}: holds {len(model.functions)} model-local functions (the first is "
            f"'{model.functions[0].name}'); inline them with onnx.inliner.inline_local_functions"
        )
    return int(versions[0])


def _tensors(path: Path, graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    maps: dict[Path, np.memmap] = {}
    return {tensor.name: _tensor(path, tensor, maps) for tensor in graph.initializer}


def _packed(graph: onnx.GraphProto) -> dict[str, FourBits]:
    return {
        t.name: FourBits(tuple(t.dims), _FOUR_BITS[t.data_type])
        for t in graph.initializer
        if t.data_type in _FOUR_BITS
    }


def _inline(path: Path, tensor: onnx.TensorProto) -> np.ndarray:
    """An initializer that is in the .onnx file itself."""
    try:
        array = np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: initializer '{tensor.name}' is damaged ({error})") from None
    if tensor.data_type not in _FOUR_BITS:
        return array
    codes = np.append(array.astype(np.int8).reshape(-1), np.zeros(array.size % 2, np.int8)).view(np.uint8)
    return (codes[0::2] & 15) | (codes[1::2] << 4)


def _tensor(path: Path, tensor: onnx.TensorProto, maps: dict[Path, np.memmap]) -> np.ndarray:
    four = tensor.data_type in _FOUR_BITS
    if not four:
        _require_type(path, "initializer", tensor.name, tensor.data_type)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return _inline(path, tensor)
    dtype = np.dtype(np.uint8) if four else _DTYPES[tensor.data_type]
    info = {entry.key: entry.value for entry in tensor.external_data}
    file = _data_file(path, tensor.name, info.get("location", ""))
    shape = (-(-math.prod(tensor.dims) // 2),) if four else tuple(tensor.dims)
    start = info.get("offset", "0")
    if not (start.isascii() and start.isdigit()) or any(extent < 0 for extent in tensor.dims):
        raise InputError(
            f"{path}: initializer '{tensor.name}' is damaged (shape {list(tensor.dims)}, offset '{start}')"
        )
    offset, size = int(start), math.prod(shape) * dtype.itemsize
    if offset + size > file.stat().st_size:
        raise InputError(
            f"{path}: external data is short: initializer '{tensor.name}' ends at byte {offset + size} of "
            f"{file.name}, which has {file.stat().st_size}; copy the data file again"
        )
    if size == 0:
        return np.zeros(shape, dtype)
    data = maps.setdefault(file, np.memmap(file, np.uint8, "r"))
    return data[offset : offset + size].view(dtype).reshape(shape)


def _data_file(path: Path, tensor: str, location: str) -> Path:
    file = path.parent / location  # it may be a link, as in caches of downloaded models
    if not location or PurePath(location).is_absolute() or ".." in PurePath(location).parts:
        raise InputError(
            f"{path}: initializer '{tensor}' names external data outside the model's folder: '{location}'"
        )
    if not file.is_file():
        raise InputError(
            f"{path}: external data missing: initializer '{tensor}' is in '{location}', which is not there; "
            "keep the data file in the same folder as the .onnx file"
        )
    return file
