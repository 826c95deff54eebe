"""Relax operations by what they do with the elements of their operands."""

from __future__ import annotations

ELEMENTWISE = frozenset(
    [
        *("abs", "add", "astype", "bitwise_and", "bitwise_not", "bitwise_or", "ceil", "clip", "cos"),
        *("divide", "equal", "erf", "exp", "floor", "floor_divide", "gelu", "gelu_tanh", "greater"),
        *("greater_equal", "isnan", "leakyrelu", "less", "less_equal", "log", "logical_and"),
        *("logical_not", "logical_or", "maximum", "minimum", "mod", "multiply", "negative", "not_equal"),
        *("power", "relu", "round", "rsqrt", "sigmoid", "sign", "silu", "sin", "softplus", "sqrt"),
        *("square", "subtract", "tan", "tanh", "where"),
    ]
)
"""An element of the result depends on the operands' elements at the same place."""
REDUCTIONS = frozenset(["max", "mean", "min", "prod", "std", "sum", "variance", "argmax", "argmin"])
NORMS = frozenset(["softmax", "log_softmax", "layer_norm", "rms_norm"])
"""Operations that reduce an axis and keep it."""
