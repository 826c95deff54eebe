"""Small integer tensors (shapes, axes, bounds) kept as numpy arrays of symbolic expressions.

Exporters compute shapes with ordinary nodes. Folding those nodes here, element by element, keeps the
dimensions symbolic and leaves no shape arithmetic in the imported module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from tvm import tirx
from tvm.sym import Analyzer, ProofStrength

Scalar = Any  # int, bool or a tirx integer expression
OPEN_END = 1 << 31  # Slice ends from here on mean "to the end"
_LARGEST = 1024  # elements, such as those of a head; larger integer tensors become constants of the module


class NotFolded(Exception):
    """The node's value is not a small integer tensor known at compile time."""


@dataclass(frozen=True)
class Integers:
    """An integer or boolean tensor of Python ints, bools and tirx expressions."""

    values: np.ndarray
    dtype: str

    @classmethod
    def of(cls, values: Any, dtype: str = "int64") -> Integers:
        shape = values.shape if isinstance(values, np.ndarray) else np.shape(values)
        array = np.empty(shape, object)
        array[...] = values
        return cls(array, dtype)

    def flat(self) -> list[Scalar]:
        return list(self.values.reshape(-1))

    @property
    def static(self) -> bool:
        return all(isinstance(value, int) for value in self.flat())

    def numpy(self) -> np.ndarray:
        return np.array(self.values.tolist(), dtype=self.dtype)


class Folder:
    """Folds ONNX nodes over `Integers`; knows the bounds of the symbolic dimensions."""

    def __init__(self) -> None:
        self.analyzer = Analyzer()

    def simplify(self, value: Scalar) -> Scalar:
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        if isinstance(value, (int, np.integer)):
            return int(value)
        value = self.analyzer.simplify(value)
        return int(value.value) if isinstance(value, tirx.IntImm) else value

    def equal(self, a: Scalar, b: Scalar) -> bool | None:
        """Whether a == b for all values of the symbols; None when it depends on them."""
        difference = self.simplify(expr(a) - expr(b))
        if isinstance(difference, int):
            return difference == 0
        if self.prove(difference > 0) or self.prove(difference < 0):
            return False
        return None

    def prove(self, condition: Any) -> bool:
        return bool(self.analyzer.can_prove(condition, ProofStrength.SYMBOLIC_BOUND))

    def product(self, values: Sequence[Scalar]) -> Scalar:
        result: Scalar = 1
        for value in values:
            result = self.simplify(result * value)
        return result

    def fold(self, node: onnx.NodeProto, inputs: Sequence[Any], attrs: dict[str, Any]) -> Integers:
        """The node's output. Raises NotFolded when it is no small integer tensor."""
        rule = _RULES.get(node.op_type)
        if rule is None or node.domain not in ("", "ai.onnx"):
            raise NotFolded
        if not inputs or not all(i is None or isinstance(i, Integers) for i in inputs):
            raise NotFolded
        return rule(self, list(inputs), attrs)


def expr(value: Scalar) -> Any:
    """A Python int as an int64 immediate, expressions unchanged."""
    return tirx.IntImm("int64", int(value)) if isinstance(value, int) else value


def from_array(array: np.ndarray) -> Integers | None:
    """A constant as `Integers`, None when it is large or not integral."""
    if array.dtype.kind not in "ib" or array.size > _LARGEST:
        return None
    return Integers.of(array.astype(object), str(array.dtype))


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[..., Integers]:
    def rule(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
        result = inputs[0].values
        for other in inputs[1:]:
            result = np.frompyfunc(lambda x, y: folder.simplify(function(x, y)), 2, 1)(result, other.values)
        return Integers.of(result, inputs[0].dtype)

    return rule


def _divide(x: Scalar, y: Scalar) -> Scalar:
    if isinstance(x, int) and isinstance(y, int):
        if x < 0 or y <= 0:
            raise NotFolded  # ONNX truncates towards zero
        return x // y
    return tirx.floordiv(expr(x), expr(y))


def _remainder(x: Scalar, y: Scalar) -> Scalar:
    if isinstance(x, int) and isinstance(y, int):
        if y == 0:
            raise NotFolded
        return x % y
    return tirx.floormod(expr(x), expr(y))


def _mod(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if attrs.get("fmod", 0):
        raise NotFolded
    return _arithmetic(_remainder)(folder, inputs, attrs)


def _negative(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    values = np.frompyfunc(lambda x: folder.simplify(0 - x), 1, 1)(inputs[0].values)
    return Integers.of(values, inputs[0].dtype)


def _logic(function: Callable[..., bool]) -> Callable[..., Integers]:
    """A function of booleans that are known."""

    def rule(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
        if not all(i.static for i in inputs):
            raise NotFolded
        return Integers.of(np.frompyfunc(function, len(inputs), 1)(*(i.values for i in inputs)), "bool")

    return rule


def _extreme(
    python: Callable[[Any, Any], Any], symbolic: Callable[[Any, Any], Any]
) -> Callable[..., Integers]:
    def pick(x: Scalar, y: Scalar) -> Scalar:
        return python(x, y) if isinstance(x, int) and isinstance(y, int) else symbolic(expr(x), expr(y))

    return _arithmetic(pick)


def _equal(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    result = np.frompyfunc(folder.equal, 2, 1)(inputs[0].values, inputs[1].values)
    if any(value is None for value in np.reshape(result, -1)):
        raise NotFolded
    return Integers.of(result, "bool")


def _where(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if not inputs[0].static:
        raise NotFolded
    pick = np.frompyfunc(lambda c, x, y: x if c else y, 3, 1)
    return Integers.of(pick(*(i.values for i in inputs)), inputs[1].dtype)


def _cast(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if attrs["to"] not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        raise NotFolded
    values = np.frompyfunc(lambda v: int(v) if isinstance(v, bool) else v, 1, 1)(inputs[0].values)
    return Integers.of(values, "int64" if attrs["to"] == onnx.TensorProto.INT64 else "int32")


def _gather(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if not inputs[1].static:
        raise NotFolded
    taken = np.take(inputs[0].values, inputs[1].numpy(), axis=attrs.get("axis", 0))
    return Integers.of(taken, inputs[0].dtype)


def _axes(inputs: list[Integers], attrs: dict[str, Any]) -> tuple[int, ...]:
    return tuple(
        int(a)
        for a in (inputs[1].flat() if len(inputs) > 1 and inputs[1] is not None else attrs.get("axes", ()))
    )


def _unsqueeze(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    return Integers.of(np.expand_dims(inputs[0].values, _axes(inputs, attrs)), inputs[0].dtype)


def _squeeze(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    return Integers.of(np.squeeze(inputs[0].values, _axes(inputs, attrs) or None), inputs[0].dtype)


def _reshape(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if not inputs[1].static:
        raise NotFolded
    source = inputs[0].values
    shape = [source.shape[i] if v == 0 else int(v) for i, v in enumerate(inputs[1].flat())]
    return Integers.of(source.reshape(shape), inputs[0].dtype)


def _slice(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if not all(i is None or i.static for i in inputs[1:]):
        raise NotFolded
    starts, ends = inputs[1].flat(), inputs[2].flat()
    axes = inputs[3].flat() if len(inputs) > 3 and inputs[3] is not None else range(len(starts))
    steps = inputs[4].flat() if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index = [slice(None)] * inputs[0].values.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        index[axis] = slice(start, None if end >= OPEN_END - 1 else end, step)
    return Integers.of(inputs[0].values[tuple(index)], inputs[0].dtype)


def _concat(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    return Integers.of(np.concatenate([i.values for i in inputs], axis=attrs.get("axis", 0)), inputs[0].dtype)


def _product(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if inputs[0].values.ndim != 1:
        raise NotFolded
    result = folder.product(inputs[0].flat())
    return Integers.of(
        result if not attrs.get("keepdims", 1) else np.array([result], object), inputs[0].dtype
    )


def _range(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if not all(i.static for i in inputs):
        raise NotFolded
    return _small(np.arange(*[int(i.flat()[0]) for i in inputs]).astype(inputs[0].dtype))


def _constant_of_shape(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    if not inputs[0].static:
        raise NotFolded
    value = onnx.numpy_helper.to_array(attrs["value"]) if "value" in attrs else np.zeros(1, np.float32)
    return _small(np.full([int(v) for v in inputs[0].flat()], value.reshape(-1)[0]))


def _small(array: np.ndarray) -> Integers:
    result = from_array(array)
    if result is None:
        raise NotFolded
    return result


def _identity(folder: Folder, inputs: list[Integers], attrs: dict[str, Any]) -> Integers:
    return inputs[0]


_RULES: dict[str, Callable[[Folder, list[Any], dict[str, Any]], Integers]] = {
    "Add": _arithmetic(lambda x, y: x + y),
    "Sub": _arithmetic(lambda x, y: x - y),
    "Mod": _mod,
    "Neg": _negative,
    "And": _logic(lambda x, y: bool(x and y)),
    "Or": _logic(lambda x, y: bool(x or y)),
    "Not": _logic(lambda x: not x),
    "Mul": _arithmetic(lambda x, y: x * y),
    "Div": _arithmetic(_divide),
    "Max": _extreme(max, tirx.max),
    "Min": _extreme(min, tirx.min),
    "Equal": _equal,
    "Where": _where,
    "Cast": _cast,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Slice": _slice,
    "Concat": _concat,
    "ReduceProd": _product,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Identity": _identity,
}
