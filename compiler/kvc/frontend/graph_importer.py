"""The subclass of TVM's importer: one ONNX graph into one Relax function.

It folds shape arithmetic over `Integers`, looks converters up by domain
and operator, and names every binding after its ONNX node, so that later refusals can name the node.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from tvm import IRModule, relax, tirx
from tvm.ir import GenericConst
from tvm.ir import Range as IRRange
from tvm.relax import op
from tvm.relax.frontend.onnx import onnx_frontend as stock

from kvc_passes.errors import UnsupportedModel
from kvc_passes.nodes import NodeNames

from .half_precision import narrow, widened
from .integers import Folder, Integers, NotFolded, expr, from_array
from .operators import CONVERTERS
from .quantized_operators import coded_initializers
from .reader import OnnxFile
from .roles import PAST, SEQUENCE

_RESERVED = re.compile(
    r"[kvx](_scale)?_\d+|(slots|block_table)_\d+|slots|tokens|positions|tiles|rows|logits|memory|memory_last"
)
"""Names of the compiled functions' other parameters."""
_SMALLEST_PARAMETER = 64  # elements; smaller float initializers become constants of the module


class Importer(stock.ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer with symbolic integer folding and converters of our own."""

    def __init__(self, file: OnnxFile, decoder: bool = True, allow: frozenset[str] = frozenset()) -> None:
        super().__init__(None, "float32", keep_params_in_input=True)
        self.file = file
        self.allow = allow
        self.used: set[str] = set()  # permissions that were needed
        self.decoder = decoder  # inputs have roles, large initializers are parameters
        self.outputs: list[str] = []
        self.folder = Folder()
        self.weights: dict[str, np.ndarray] = {}
        self.sources: dict[str, str] = {}  # initializers by the names of their parameters
        self.coded: set[str] = set()
        self.taken: set[str] = set()  # names of parameters
        self.one: relax.Var | None = None
        """The scale of codes that are numbers; parameters are made before nodes are converted."""
        self.hint = ""
        self.symbols: dict[str, tirx.Var] = {}
        self.limits: list[int] = []  # most tokens for which the graph is what was imported

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        self.coded = coded_initializers(graph, _key) if self.decoder else set()
        self.taken = {value.name for value in graph.input}
        if any(node.op_type == "MatMulInteger" for node in graph.node):
            self.one = self.add_weight("one", np.ones(1, np.float32))
        for tensor in graph.initializer:
            array = self.file.tensors[tensor.name]
            small = array.dtype.kind in "iub" or array.size < _SMALLEST_PARAMETER
            if not self.decoder or (small and tensor.name not in self.coded):
                self._nodes[tensor.name] = from_array(array) or relax.const(array, str(array.dtype))
                continue
            self._nodes[tensor.name] = self.add_weight(tensor.name, array)
            self.sources[self._nodes[tensor.name].name] = tensor.name

    def add_weight(self, name: str, array: np.ndarray) -> relax.Var:
        """A new parameter that holds `array`."""
        wanted = _identifier(name, self.taken)
        self.taken.add(wanted)
        var = self._new_var(wanted, list(array.shape), str(array.dtype))
        self._params[wanted] = (var, wanted)  # the base class wants a value; it is never read
        self.weights[wanted] = array
        return var

    def parameter(self, value: Any) -> Any:
        """The parameter of which a value is another shape, else the value."""
        while isinstance(value, relax.Var) and value.name not in self.weights:
            call = self.bb.lookup_binding(value)
            if not isinstance(call, relax.Call) or getattr(call.op, "name", "") != "relax.reshape":
                break
            value = call.args[0]
        return value

    def initializer(self, value: Any) -> str:
        """The initializer that a parameter holds, "" for any other value."""
        return self.sources.get(value.name, "") if isinstance(value, relax.Var) else ""

    def from_onnx(self, graph: onnx.GraphProto, opset: int) -> IRModule:
        """The module, without the base class's `params` attribute."""
        try:
            module = super().from_onnx(graph, opset)
        except Exception:
            with contextlib.suppress(Exception):  # TVM warns about builders that have an open block
                self.bb._end_block()
            raise
        module["main"] = module["main"].without_attr("params")
        return module

    def _parse_graph_input(self, graph: onnx.GraphProto) -> None:
        super()._parse_graph_input(graph)
        large = 1 << 31
        for var in self._inputs.values():
            for dim in var.ty.shape.values if isinstance(var, relax.Var) and var.ty.shape is not None else ():
                if isinstance(dim, tirx.Var):
                    self.symbols[dim.name] = dim
                    low = 0 if dim.name == "past" else 1
                    bounds = IRRange(tirx.IntImm("int64", low), tirx.IntImm("int64", large))
                    self.folder.analyzer.bind(dim, bounds, True)

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        missing: dict[str, str] = {}
        for node in graph.node:
            key = _key(node)
            if not _known(key):
                missing.setdefault(key, node.name)
        if missing:
            listed = ", ".join(f"{op} (node '{name}')" for op, name in missing.items())
            raise UnsupportedModel(f"{self.file.path}: operators that kvc cannot import: {listed}")

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for index, node in enumerate(graph.node):
            self.hint = NodeNames.hint(node.name or node.op_type, index)
            self.outputs = list(node.output)
            try:
                results = self._convert(node)
            except Exception as error:  # the stock converters raise anything
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
                raise UnsupportedModel(
                    f"{self.file.path}: node '{node.name}' ({node.op_type}) cannot be imported: {reason}"
                ) from error
            for name, value in zip(node.output, results):
                if name:
                    self._nodes[name] = self._bind(value)
        for output in graph.output:
            self._nodes[output.name] = self.tensor(self._nodes[output.name])

    def _convert(self, node: onnx.NodeProto) -> list[Any]:
        attrs = self._parse_attr(node.attribute)
        inputs = stock.onnx_input([self._nodes[name] if name else None for name in node.input])
        if node.op_type == "Constant":
            array = _constant(node, attrs)
            return [from_array(array) or relax.const(array, str(array.dtype))]
        if node.op_type == "Shape":
            shape = self.shape(inputs[0])[attrs.get("start", 0) : attrs.get("end", None)]
            return [Integers.of(np.array(shape, object))]
        if node.op_type == "Size":
            return [Integers.of(self.folder.product(self.shape(inputs[0])))]
        try:
            return [self.folder.fold(node, list(inputs), attrs)]
        except NotFolded:
            pass
        convert = CONVERTERS.get(_key(node))
        if convert is not None:
            result = convert(self, inputs, attrs)
        else:
            result = self.stock(node.op_type, inputs, attrs)
        return self._unpack(result)

    def stock(self, operator: str, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
        """What TVM's own converter makes of the node at hand."""
        attrs = attrs | {"tvm_custom": {"name": self.hint, "num_outputs": len(self.outputs)}}
        tensors = stock.onnx_input([self.tensor(value) for value in inputs])
        dtype = narrow(operator, tensors)
        if dtype is not None:
            tensors = stock.onnx_input([widened(self, value) for value in tensors])
        converter = stock._get_convert_map()[operator].get_converter(self.opset)
        result = converter(self.bb, tensors, attrs, [self._nodes, self._params])
        if dtype is None:
            return result
        return [op.astype(self.emit(value), dtype) for value in self._unpack(result)]

    def _unpack(self, result: Any) -> list[Any]:
        if isinstance(result, (list, tuple)):
            return list(result)
        if isinstance(result, relax.Tuple):
            return list(result.fields)
        if isinstance(result, Integers):
            return [result]
        result = self.bb.normalize(result)
        if isinstance(result.ty, relax.TupleType):
            return [self.bb.emit(relax.TupleGetItem(result, i)) for i in range(len(result.ty.fields))]
        return [result]

    def _bind(self, value: Any) -> Any:
        if isinstance(value, (Integers, relax.Var, GenericConst)) or not isinstance(value, relax.Expr):
            return value
        return self.bb.emit(value, name_hint=self.hint)

    def wants(self, output: int) -> bool:
        """Whether the node at hand has its optional output number `output`."""
        return output < len(self.outputs) and bool(self.outputs[output])

    def emit(self, value: relax.Expr) -> relax.Var:
        """Bind an intermediate value of the node at hand."""
        return self.bb.emit(value, name_hint=self.hint)

    def holds(self, condition: Any, extent: Any) -> bool:
        """Whether a condition is proved, perhaps for no more than `extent` tokens: a limit of the model."""
        if self.folder.prove(condition):
            return True
        tokens = self.symbols.get(SEQUENCE)
        if not self.decoder or tokens is None or not isinstance(extent, int):
            return False
        total = tokens + self.symbols[PAST] if PAST in self.symbols else tokens
        if not self.folder.prove(tirx.Or(total > extent, condition)):
            return False
        self.limits.append(extent)
        return True

    def shape(self, value: Any) -> list[Any]:
        """Dimensions of a value: ints where known, else expressions. Raises ValueError without a shape."""
        if isinstance(value, Integers):
            return list(value.values.shape)
        if value.ty.shape is None:
            raise ValueError("an input has no known shape")
        return [self.folder.simplify(dim) for dim in value.ty.shape.values]

    def inline(self, graph: onnx.GraphProto, inputs: Sequence[relax.Expr]) -> list[Any]:
        """The outputs of a graph that is an attribute of the node at hand, for the given inputs."""
        outer, outputs = dict(self._nodes), self.outputs
        missing = ", ".join(_key(n) for n in graph.node if not _known(_key(n)))
        if missing:
            raise ValueError(f"its graph '{graph.name}' has operators that kvc cannot import: {missing}")
        for tensor in graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            self._nodes[tensor.name] = from_array(array) or relax.const(array, str(array.dtype))
        self._nodes.update(zip((value.name for value in graph.input), inputs))
        for node in graph.node:
            self.outputs = list(node.output)
            for name, value in zip(node.output, self._convert(node)):
                self._nodes[name] = self._bind(value)
        results = [self.tensor(self._nodes[output.name]) for output in graph.output]
        self._nodes.clear()
        self._nodes.update(outer)
        self.outputs = outputs
        return results

    @staticmethod
    def integer(value: Any) -> Integers:
        """A dimension as a scalar tensor."""
        return Integers.of(np.array(value, object))

    def tensor(self, value: Any) -> Any:
        """A value as a Relax tensor."""
        if not isinstance(value, Integers):
            return value
        if value.static:
            return relax.const(value.numpy(), value.dtype)
        result = self.emit(relax.op.shape_to_tensor(relax.ShapeExpr([expr(v) for v in value.flat()])))
        if value.values.ndim != 1:
            result = self.emit(relax.op.reshape(result, list(value.values.shape)))
        if value.dtype != "int64":
            result = self.emit(relax.op.astype(result, value.dtype))
        return result


def _known(key: str) -> bool:
    return key in CONVERTERS or key in stock._get_convert_map() or key in ("Constant", "Shape", "Size")


def _key(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _identifier(name: str, taken: set[str]) -> str:
    base = re.sub(r"\W", "_", name.removeprefix("onnx::")) or "weight"
    if base[0].isdigit() or _RESERVED.fullmatch(base):
        base = f"w_{base}"
    result, count = base, 1
    while result in taken:
        result, count = f"{base}_{count}", count + 1
    return result


def _constant(node: onnx.NodeProto, attrs: dict[str, Any]) -> np.ndarray:
    if "value" in attrs:
        return np.asarray(onnx.numpy_helper.to_array(attrs["value"]))
    for name, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if name in attrs:
            return np.array(attrs[name], dtype)
    raise ValueError("it has no numeric value")
