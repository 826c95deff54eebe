"""Mutations of single nodes: their operators, constants and attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from onnx import helper
from tools.mutations.chains import replace
from tools.mutations.editor import Editor, Mutation

_OTHERS: Final = {
    "Less": ("LessOrEqual", "Greater"),
    "LessOrEqual": ("Less", "GreaterOrEqual"),
    "Greater": ("GreaterOrEqual", "Less"),
    "GreaterOrEqual": ("Greater", "LessOrEqual"),
    "And": ("Or", "Xor"),
    "Or": ("And",),
    "Add": ("Sub", "Mul"),
    "Sub": ("Add",),
    "Mul": ("Add", "Div"),
    "Div": ("Mul",),
    "Cos": ("Sin",),
    "Sin": ("Cos",),
    "Neg": ("Identity",),
    "Not": ("Identity",),
    "Tanh": ("Sigmoid", "Identity"),
    "Softmax": ("LogSoftmax", "Hardmax"),
    "ReduceMean": ("ReduceSum", "ReduceMax"),
    "Max": ("Min",),
    "Sqrt": ("Identity",),
}


def operators(editor: Editor) -> Iterator[Mutation]:
    """Another operator, or the operands in another order."""
    for number, node in enumerate(editor.nodes):
        for other in _OTHERS.get(node.op_type, ()):
            yield Mutation(f"{other} for {node.name}", replace(number, operator=other))
        order = list(node.input)
        if node.op_type in ("Sub", "Div", "Concat", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
            yield Mutation(f"inputs of {node.name} reversed", replace(number, inputs=order[::-1]))
        if node.op_type == "Where":
            swapped = [order[0], order[2], order[1]]
            yield Mutation(f"branches of {node.name} exchanged", replace(number, inputs=swapped))
        if node.op_type == "Unsqueeze" and editor.number(node.input[1]) is not None:
            axes = editor.number(node.input[1])

            def moved(e: Editor, number: int = number, axes: Any = axes) -> None:
                e.nodes[number].input[1] = e.constant(np.abs(axes - 1))

            yield Mutation(f"axis of {node.name} moved", moved)


def constants(editor: Editor) -> Iterator[Mutation]:
    """Small constants changed for one user."""
    for number, node in enumerate(editor.nodes):
        for place, name in enumerate(node.input):
            array = editor.number(name)
            if array is None or array.size > 16 or array.dtype.kind not in "fib":
                continue
            changed: dict[str, Any] = {"negated": ~array if array.dtype.kind == "b" else -array}
            if array.dtype.kind == "i":
                changed |= {"one more": array + 1, "one less": array - 1}
            elif array.dtype.kind == "f":
                changed |= {
                    "halved": array * 0.5,
                    "in other order": array[::-1] if array.ndim == 1 else array + 1,
                }
            for what, new in changed.items():

                def change(e: Editor, at: tuple[int, int] = (number, place), new: Any = new) -> None:
                    e.nodes[at[0]].input[at[1]] = e.constant(new, new.dtype)

                yield Mutation(f"constant {place} of {node.name} {what}", change)


def attributes(editor: Editor) -> Iterator[Mutation]:
    """Attributes of nodes changed, and set where they are not."""
    for number, node in enumerate(editor.nodes):
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            for what, new in _other_values(attribute.name, value):
                yield Mutation(
                    f"{attribute.name} of {node.name} {what}",
                    replace(number, attributes={attribute.name: new}),
                )
        for name, values in _OPTIONS.get(node.op_type, {}).items():
            for new in values:
                yield Mutation(f"{name} of {node.name} is {new}", replace(number, attributes={name: new}))


def _other_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name in ("perm", "axes", "pads") and isinstance(value, list):
        for i in range(len(value) - 1):
            new = list(value)
            new[i], new[i + 1] = new[i + 1], new[i]
            yield f"as {new}", new
    elif isinstance(value, bool) or name in (
        "keepdims",
        "is_causal",
        "exclusive",
        "reverse",
        "upper",
        "interleaved",
        "do_rotary",
        "rotary_interleaved",
        "allowzero",
    ):
        yield f"is {1 - value}", 1 - value
    elif isinstance(value, int) and name not in ("to", "stash_type", "dtype"):
        yield "one more", value + 1
        yield "one less", value - 1
    elif isinstance(value, float):
        yield "halved", value * 0.5
        yield "negated", -value


_OPTIONS: Final[dict[str, dict[str, list[Any]]]] = {
    "Attention": {"is_causal": [0, 1], "softcap": [2.0], "scale": [0.1, 1.0], "qk_matmul_output_mode": [1]},
    "GroupQueryAttention": {
        "scale": [0.1],
        "softcap": [2.0],
        "local_window_size": [3],
        "smooth_softmax": [1],
        "rotary_interleaved": [1],
        "do_rotary": [0],
    },
    "RotaryEmbedding": {"interleaved": [1], "rotary_embedding_dim": [16]},
    "RMSNormalization": {"axis": [1, -2], "epsilon": [0.1]},
    "LayerNormalization": {"axis": [1, -2], "epsilon": [0.1]},
    "SkipSimplifiedLayerNormalization": {"epsilon": [0.1]},
    "CumSum": {"exclusive": [1], "reverse": [1]},
    "Gelu": {"approximate": ["tanh", "none"]},
    "Gather": {"axis": [1]},
    "Trilu": {"upper": [0, 1]},
    "Mod": {"fmod": [1]},
}
