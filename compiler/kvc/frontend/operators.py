"""Converters of ONNX operators that the stock importer lacks or handles without symbolic shapes.

Each takes the importer, the node's inputs (Relax expressions, `Integers`, or None) and its attributes,
and returns the output expression, or a list of them; a ValueError says what is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from tvm import relax, tirx
from tvm.relax import op
from tvm.relax.frontend.onnx import onnx_frontend as stock

from . import (
    activation_operators,
    attention_operators,
    elementwise_operators,
    flex_attention,
    gather_operators,
    norm_operators,
    quantize_activations,
    quantized_operators,
    reduce_operators,
    rotary_operators,
    state_operators,
)
from .integers import OPEN_END, Integers, expr

if TYPE_CHECKING:
    from .graph_importer import Importer


def _known(importer: Importer, value: Any, what: str) -> Integers:
    if not isinstance(value, Integers):
        raise ValueError(f"its {what} depends on the data, not only on shapes")
    return value


def _reshape(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    data = importer.tensor(inputs[0])
    source = importer.shape(data)
    target = _known(importer, inputs[1], "target shape").flat()
    if not attrs.get("allowzero", 0):
        target = [source[i] if isinstance(v, int) and v == 0 else v for i, v in enumerate(target)]
    return op.reshape(data, [expr(v) for v in _infer(importer, source, target)])


def _infer(importer: Importer, source: list[Any], target: list[Any]) -> list[Any]:
    """Replace the -1 of a Reshape: the product of the source's dimensions that the target does not name."""
    if not any(isinstance(v, int) and v == -1 for v in target):
        return target
    above, below = list(source), []
    for value in target:
        if isinstance(value, int) and value == -1:
            continue
        match = next((i for i, v in enumerate(above) if importer.folder.equal(v, value)), None)
        if match is None:
            below.append(value)
        else:
            above.pop(match)
    top: Any = 1
    bottom: Any = 1
    for value in above:
        top = top * value
    for value in below:
        bottom = bottom * value
    rest = importer.folder.simplify(tirx.floordiv(expr(top), expr(bottom)))
    return [rest if isinstance(v, int) and v == -1 else v for v in target]


def _broadcast(a: list[Any], b: list[Any]) -> list[Any]:
    rank = max(len(a), len(b))
    a, b = [1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b
    return [y if isinstance(x, int) and x == 1 else x for x, y in zip(a, b)]


def _expand(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    data = importer.tensor(inputs[0])
    source = importer.shape(data)
    wanted = _known(importer, inputs[1], "target shape").flat()
    target = _broadcast(source, wanted)
    for extent, other in zip(target[::-1], wanted[::-1]):
        if not (isinstance(other, int) and other == 1) and not importer.folder.equal(extent, other):
            raise ValueError(f"it expands an axis of extent {extent} to {other}, which fits only if it is 1")
    if len(target) == len(source) and all(importer.folder.equal(a, b) for a, b in zip(target, source)):
        return data
    return op.broadcast_to(data, relax.ShapeExpr([expr(v) for v in target]))


def _slice(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    data = importer.tensor(inputs[0])
    shape = importer.shape(data)
    starts = _known(importer, inputs[1], "start").flat()
    ends = _known(importer, inputs[2], "end").flat()
    axes = [
        int(a) % len(shape)
        for a in (_known(importer, inputs[3], "axes").flat() if inputs[3] else range(len(starts)))
    ]
    steps = _known(importer, inputs[4], "steps").flat() if inputs[4] else [1] * len(starts)
    kept = []
    for axis, start, end, step in zip(axes, starts, ends, steps):
        begin, stop = _bound(importer, start, shape[axis]), _bound(importer, end, shape[axis])
        if step != 1 or not importer.folder.equal(begin, 0) or not importer.folder.equal(stop, shape[axis]):
            kept.append((axis, begin, stop, step))
    if not kept:
        return data
    for axis, begin, stop, step in kept:
        proved = importer.holds(expr(begin) >= 0, shape[axis]) and importer.holds(
            expr(stop) <= expr(shape[axis]), shape[axis]
        )
        if not isinstance(step, int) or step < 1 or not proved:
            raise ValueError(
                f"it slices [{begin}:{stop}:{step}] of {shape[axis]}; only forward slices that are proved "
                "to lie inside are supported"
            )
    axes_, begins, stops, strides = zip(*kept)
    return op.strided_slice(
        data,
        list(axes_),
        [expr(v) for v in begins],
        [expr(v) for v in stops],
        [expr(v) for v in strides],
        assume_inbound=True,
    )


def _bound(importer: Importer, value: Any, extent: Any) -> Any:
    """A Slice bound within 0 .. extent."""
    if not isinstance(value, int):
        return value
    if value >= OPEN_END - 1:
        return extent
    if value < 0:
        return importer.folder.simplify(expr(extent) + value)
    return min(value, extent) if isinstance(extent, int) else value


def _range(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    start, limit, step = (_known(importer, value, "bound").flat()[0] for value in inputs[:3])
    return op.arange(expr(start), expr(limit), expr(step), inputs[0].dtype)


def _constant_of_shape(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    shape = relax.ShapeExpr([expr(v) for v in _known(importer, inputs[0], "shape").flat()])
    value = (
        onnx.numpy_helper.to_array(attrs["value"]).reshape(-1)
        if "value" in attrs
        else np.zeros(1, np.float32)
    )
    fill = relax.const(value[0].item(), str(value.dtype))
    if value.dtype.kind not in "biu" and not np.isfinite(value[0]):
        return op.broadcast_to(fill, shape)  # TVM's lowering of full stumbles over infinities
    return op.full(shape, fill, str(value.dtype))


def _gather(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    data, indices = importer.tensor(inputs[0]), inputs[1]
    axis = attrs.get("axis", 0)
    nonnegative = isinstance(indices, Integers) and all(
        not isinstance(v, int) or v >= 0 for v in indices.flat()
    )
    # A decoder's inputs are token ids and positions, which the runtime checks; others may count from the end.
    if nonnegative or (importer.decoder and indices in importer._inputs.values()):
        return op.take(data, importer.tensor(indices), axis=axis, mode="clip")
    return op.take(data, importer.tensor(indices), axis=axis, mode="wrap")


def _concat(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    parts = [importer.tensor(value) for value in inputs]
    return parts[0] if len(parts) == 1 else op.concat(parts, axis=attrs["axis"])


def _cast(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    dtype = stock.get_type(attrs["to"])
    value = inputs[0]
    if isinstance(value, Integers) and value.static:
        return relax.const(value.numpy().astype(dtype), dtype)
    tensor = importer.tensor(value)
    return tensor if tensor.ty.dtype.dtype == dtype else op.astype(tensor, dtype)


def _where(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
    return op.where(*(importer.tensor(value) for value in inputs[:3]))


def _fold_binary(binary: Callable[[Any, Any], relax.Expr]) -> Callable[..., relax.Expr]:
    def convert(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> relax.Expr:
        result = importer.tensor(inputs[0])
        for value in inputs[1:]:
            result = importer.bb.normalize(binary(result, importer.tensor(value)))
        return result

    return convert


def _identity(importer: Importer, inputs: Sequence[Any], attrs: dict[str, Any]) -> Any:
    return inputs[0]


CONVERTERS: dict[str, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _identity,
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _identity,
    "Max": _fold_binary(op.maximum),
    "Min": _fold_binary(op.minimum),
    "Range": _range,
    "Reshape": _reshape,
    "Slice": _slice,
    "Where": _where,
    **activation_operators.CONVERTERS,
    **attention_operators.CONVERTERS,
    **elementwise_operators.CONVERTERS,
    **gather_operators.CONVERTERS,
    **flex_attention.CONVERTERS,
    **norm_operators.CONVERTERS,
    **quantize_activations.CONVERTERS,
    **quantized_operators.CONVERTERS,
    **reduce_operators.CONVERTERS,
    **rotary_operators.CONVERTERS,
    **state_operators.CONVERTERS,
}
