"""The outcomes of ONNX's node cases as a page of documentation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

import onnx

OPERATORS = {
    "attention": ("Attention", "RotaryEmbedding", "RMSNormalization", "FlexAttention"),
    "state": ("LinearAttention", "CausalConvWithState", "TensorScatter"),
    "norms and activations": (
        *("LayerNormalization", "GroupNormalization", "Softmax", "LogSoftmax", "Gelu", "Swish", "SwiGLU"),
        *("HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Relu", "LeakyRelu", "Elu", "Softplus", "Softsign"),
        *("Mish", "Erf"),
    ),
    "quantized": (
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        *("MatMulInteger", "QLinearMatMul", "ConvInteger"),
    ),
    "arithmetic": (
        *("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Reciprocal"),
        *("Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Min", "Max", "Mean", "Sum", "Clip", "MatMul"),
        *("Gemm", "Einsum"),
    ),
    "logic": (
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not"),
        *("IsNaN", "IsInf", "Where"),
    ),
    "reductions": (
        *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare"),
        *("ReduceL2", "ReduceLogSumExp", "CumSum", "ArgMax", "TopK"),
    ),
    "shapes and data": (
        *("Cast", "CastLike", "Gather", "GatherElements", "GatherND", "ScatterND", "ScatterElements"),
        *("Slice", "Split", "Concat", "Reshape", "Flatten", "Transpose", "Expand", "Squeeze", "Unsqueeze"),
        *("Tile", "Pad", "Trilu", "Range", "Shape", "Size", "Constant", "ConstantOfShape", "Identity"),
        *("EyeLike", "OneHot"),
    ),
}

Status = Literal["passed", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        constants: it passed only after scalars and integer vectors had been made initializers.
        halves: it passed only because two units in the last place of a float16 were allowed.
    """

    name: str
    op: str
    status: Status
    reason: str = ""
    constants: bool = False
    halves: bool = False


def plain_reason(outcome: Outcome) -> str:
    """The reason without names of cases, nodes and shapes, so that equal ones can be counted."""
    text = re.sub(r"^[\w.]+: ", "", outcome.reason)
    text = re.sub(r"node '[^']*' \((\w+)\) cannot be imported: ", r"", text)
    return re.sub(r" \(node '[^']*'\)", "", text)


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The report's rows, group by group."""
    yield "| operator | cases | passed | with constant inputs | refused | failed |"
    yield "|---|---:|---:|---:|---:|---:|"
    for group, operators in OPERATORS.items():
        of_group = [o for o in outcomes if o.op in operators]
        if of_group:
            yield _row(f"**{group}**", of_group)
        for op in sorted(operators):
            mine = [o for o in outcomes if o.op == op]
            if mine:
                yield _row(op, mine)
    yield _row("**all**", outcomes)


def _row(title: str, outcomes: Sequence[Outcome]) -> str:
    count = Counter(o.status for o in outcomes)
    constant = sum(o.constants and o.status == "passed" for o in outcomes)
    numbers = [len(outcomes), count["passed"], constant, count["refused"], count["failed"]]
    return f"| {title} | {' | '.join(str(n) for n in numbers)} |"


_INTRODUCTION = """\
# ONNX's node cases

Written by `python -m tools.node_cases`; do not edit.

The backend node cases of onnx {version} for operators that decoders use, through kvc's importer,
`ExpandMarkers` and LLVM, {date}. A case passes when types, shapes and numbers are as expected, within the
case's own tolerances. Cases that end in `_expanded` (the same operator spelled out by onnx) count for their
operator. Results in bfloat16 and float16 may differ by two units in the last place: onnx's own runner allows
that for bfloat16; for float16 it is more than the cases' 1e-3, and {halves} of those that passed needed it.

Many cases give as inputs what models have as constants: axes, shapes, sizes. Where kvc refuses such a case,
it is tried once more with scalars and integer vectors as initializers; how many passed only then is a column
of its own. Models of opsets before 13 are converted to 13 first.
"""


def report(outcomes: Sequence[Outcome]) -> str:
    """The page: counts an operator, then the reasons of refusals."""
    halves = sum(o.halves for o in outcomes)
    reasons = Counter((o.op, plain_reason(o)) for o in outcomes if o.status == "refused")
    rows = [
        f"| {count} | {op} | {reason.replace('|', chr(92) + '|')} |"
        for (op, reason), count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]
    lines = [
        _INTRODUCTION.format(version=onnx.__version__, date=date.today().isoformat(), halves=halves),
        *table(outcomes),
        "",
        "## Why cases are refused",
        "",
        "| cases | operator | reason |",
        "|---:|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)
