"""ProveTokenwise: what keeps tokens apart is proved, what mixes them is refused, rule by rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax, tirx
from tvm.relax import op

from kvc_passes.errors import UnsupportedModel
from kvc_passes.facts import Roles
from kvc_passes.operations import ELEMENTWISE
from kvc_passes.prove_tokenwise import _RULES, ProveTokenwise
from support import module_of, param, shape_of, symbol

B, S, D = symbol("batch"), symbol("sequence"), 8
TOKENS = param("input_ids", [B, S], "int64")
X = param("x", [B, S, D])
WEIGHT = param("weight", [D, D])
TABLE = param("table", [32, D])
SCALE = param("scale", [D])
PARAMS = [TOKENS, X, WEIGHT, TABLE, SCALE]

ONE = relax.const(1.0, "float32")


def prove(body: Any) -> Any:
    module, names = module_of(PARAMS, body)
    return ProveTokenwise(Roles("input_ids"), names).run(module), module


def heads(emit: Any) -> Any:
    """x as [b, s, 2, 4]."""
    return emit(op.reshape(X, [B, S, 2, 4]))


def experts(emit: Any) -> Any:
    """x three times, one after the other: [3 b s, 8]."""
    rows = emit(op.reshape(X, [1, B * S, D]))
    return emit(op.reshape(emit(op.broadcast_to(rows, [3, B * S, D])), [3 * B * S, D]))


ACCEPTED = {
    "elementwise with a weight": lambda e, *_: e(op.multiply(X, SCALE)),
    "elementwise with itself": lambda e, *_: e(op.add(X, e(op.exp(X)))),
    "elementwise with one value a token": lambda e, *_: e(
        op.multiply(X, e(op.mean(X, axis=-1, keepdims=True)))
    ),
    "where": lambda e, *_: e(op.where(e(op.greater(X, ONE)), X, ONE)),
    "cast": lambda e, *_: e(op.astype(X, "float16")),
    "mean over features": lambda e, *_: e(op.mean(X, axis=[-1])),
    "maximum over heads": lambda e, *_: e(op.max(heads(e), axis=2)),
    "softmax over features": lambda e, *_: e(op.nn.softmax(X, axis=-1)),
    "layer norm": lambda e, *_: e(op.nn.layer_norm(X, SCALE, SCALE, axes=[-1])),
    "rms norm": lambda e, *_: e(op.nn.rms_norm(X, SCALE, axes=[-1])),
    "product with a weight": lambda e, *_: e(op.matmul(X, WEIGHT)),
    "product with a weight's transpose": lambda e, *_: e(op.matmul(X, e(op.permute_dims(WEIGHT)))),
    "heads with heads of one token": lambda e, *_: e(
        op.matmul(heads(e), e(op.permute_dims(heads(e), [0, 1, 3, 2])))
    ),
    "split into heads": lambda e, *_: heads(e),
    "heads moved before tokens": lambda e, *_: e(op.permute_dims(heads(e), [0, 2, 1, 3])),
    "heads joined": lambda e, *_: e(op.reshape(heads(e), [B, S, D])),
    "batch and tokens joined": lambda e, *_: e(op.reshape(e(op.reshape(X, [B * S, D])), [B, S, D])),
    "each token twice": lambda e, *_: e(
        op.reshape(
            e(op.reshape(e(op.broadcast_to(e(op.expand_dims(X, 2)), [B, S, 2, D])), [B * S * 2, D])),
            [B, S, 2, D],
        )
    ),
    "tokens once for each expert": lambda e, *_: e(
        op.reshape(e(op.multiply(experts(e), SCALE)), [3, B * S, D])
    ),
    "tokens joined with features and back": lambda e, *_: e(
        op.reshape(e(op.tanh(e(op.reshape(X, [B, S * D])))), [B, S, D])
    ),
    "features joined with tokens and back": lambda e, *_: e(
        op.reshape(e(op.tanh(e(op.reshape(e(op.permute_dims(X, [0, 2, 1])), [B, D * S])))), [B, D, S])
    ),
    "expanded": lambda e, *_: e(op.expand_dims(X, 2)),
    "squeezed": lambda e, *_: e(op.squeeze(e(op.expand_dims(X, 2)), [2])),
    "broadcast": lambda e, *_: e(op.broadcast_to(e(op.expand_dims(X, 2)), [B, S, 3, D])),
    "concatenated features": lambda e, *_: e(op.concat([X, X], axis=-1)),
    "halves of features": lambda e, *_: e(op.strided_slice(X, [2], [0], [D // 2])),
    "every other feature": lambda e, *_: e(op.strided_slice(X, [-1], [0], [D], [2])),
    "features split": lambda e, *_: e(op.split(X, 2, axis=-1)),
    "embedding": lambda e, *_: e(op.take(TABLE, TOKENS, axis=0)),
    "chosen features": lambda e, *_: e(op.take(X, relax.const(np.array([1, 0]), "int64"), axis=2)),
    "constants broadcast to every token": lambda e, *_: e(op.broadcast_to(SCALE, [B, S, D])),
    "constants for every token": lambda e, *_: e(op.full([B, S], ONE, "float32")),
    "anything without tokens": lambda e, *_: e(op.cumsum(TABLE, axis=0)),
}


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED)
def test_an_operation_within_a_token_is_proved(body: Any) -> None:
    result, module = prove(body)
    assert result.module.same_as(module)
    assert (result.sites, result.facts > 0) == (0, True)


def transposed(emit: Any) -> Any:
    return emit(op.permute_dims(X, [0, 2, 1]))


REFUSED = {
    "mean over tokens": (lambda e, *_: e(op.mean(X, axis=[1])), "mean", "reduces over the tokens"),
    "sum over everything": (lambda e, *_: e(op.sum(X)), "sum", "reduces over the tokens"),
    "maximum over the batch": (lambda e, *_: e(op.max(X, axis=[0])), "max", "reduces over the tokens"),
    "index of the largest token": (
        lambda e, *_: e(op.argmax(X, axis=1)),
        "argmax",
        "reduces over the tokens",
    ),
    "variance over tokens": (
        lambda e, *_: e(op.variance(X, axis=[-2])),
        "variance",
        "reduces over the tokens",
    ),
    "softmax over tokens": (
        lambda e, *_: e(op.nn.softmax(X, axis=1)),
        "softmax",
        "normalizes over the tokens",
    ),
    "norm over tokens": (
        lambda e, *_: e(op.nn.rms_norm(transposed(e), e(op.full([S], ONE, "float32")), axes=[-1])),
        "rms_norm",
        "normalizes over the tokens",
    ),
    "cumulative sum over tokens": (
        lambda e, *_: e(op.cumsum(X, axis=1)),
        "cumsum",
        r"is of the operation \w+, which is not known to keep tokens apart",
    ),
    "reversal": (
        lambda e, *_: e(op.flip(X, axis=1)),
        "flip",
        r"is of the operation \w+, which is not known to keep tokens apart",
    ),
    "reversal by a slice": (
        lambda e, *_: e(op.strided_slice(X, [1], [S - 1], [-S - 1], [-1])),
        "strided_slice",
        "slices the tokens",
    ),
    "last token": (
        lambda e, *_: e(op.strided_slice(X, [1], [S - 1], [S], assume_inbound=True)),
        "strided_slice",
        "slices the tokens",
    ),
    "first token": (
        lambda e, *_: e(op.take(X, relax.const(np.array([0]), "int64"), axis=1)),
        "take",
        "picks tokens by index",
    ),
    "features by another token": (
        lambda e, *_: e(op.take(X, e(op.reshape(TOKENS, [B * S])), axis=2)),
        "take",
        "pairs every token with every token",
    ),
    "shifted tokens": (
        lambda e, *_: e(op.concat([X, e(op.full([B, 1, D], ONE, "float32"))], axis=1)),
        "concat",
        "concatenates along the tokens",
    ),
    "split tokens": (
        lambda e, *_: e(op.split(X, [2], axis=1)),
        "split",
        "splits along the tokens",
    ),
    "outer product": (
        lambda e, *_: e(op.matmul(X, transposed(e))),
        "matmul",
        "pairs every token with every token",
    ),
    "outer difference": (
        lambda e, *_: e(op.subtract(e(op.expand_dims(X, 1)), e(op.expand_dims(X, 2)))),
        "subtract",
        "pairs every token with every token",
    ),
    "contraction over tokens": (
        lambda e, *_: e(op.matmul(transposed(e), X)),
        "matmul",
        "sums over the tokens",
    ),
    "every third row of tokens and features": (
        lambda e, *_: e(op.reshape(e(op.reshape(X, [B, S * D])), [B, D, S])),
        "reshape",
        "merges the token axis with another axis",
    ),
    "tokens behind features, added to features behind tokens": (
        lambda e, *_: e(op.add(e(op.reshape(transposed(e), [B, D * S])), e(op.reshape(X, [B, S * D])))),
        "add",
        "pairs tokens with tokens in another order",
    ),
    "rows looked up by tokens that stand behind experts": (
        lambda e, *_: e(op.take(TABLE, e(op.argmax(experts(e), axis=-1)), axis=0)),
        "argmax",
        "takes an axis in which tokens stand behind another axis",
    ),
    "tokens cut out of features": (
        lambda e, *_: e(op.reshape(transposed(e), [B, S, D])),
        "reshape",
        "merges the token axis with another axis",
    ),
    "heads joined in the wrong order": (
        lambda e, *_: e(op.reshape(e(op.permute_dims(heads(e), [0, 2, 1, 3])), [B, S, D])),
        "reshape",
        "merges the token axis with another axis",
    ),
    "the number of tokens": (
        lambda e, *_: e(op.shape_to_tensor(relax.ShapeExpr([tirx.IntImm("int64", 1), S]))),
        "shape_to_tensor",
        "reads the number of tokens as a value",
    ),
    "rows of a table by count": (
        lambda e, *_: e(op.strided_slice(TABLE, [0], [0], [S], assume_inbound=True)),
        "strided_slice",
        "makes a value for every token out of neither the tokens nor their positions",
    ),
    "a count that is no position": (
        lambda e, *_: e(op.arange(0, S, 1, "int64")),
        "arange",
        "makes a value for every token out of neither the tokens nor their positions",
    ),
    "a count from the number of tokens on": (
        lambda e, *_: e(op.arange(S, S + 4, 1, "int64")),
        "arange",
        "reads the number of tokens as a value",
    ),
    "the row of a table by the number of tokens": (
        lambda e, *_: e(op.strided_slice(TABLE, [0], [S - 1], [S], assume_inbound=True)),
        "strided_slice",
        "reads the number of tokens as a value",
    ),
    "an element by the number of tokens": (
        lambda e, *_: e(op.strided_slice(X, [2], [S - 1], [S], assume_inbound=True)),
        "strided_slice",
        "reads the number of tokens as a value",
    ),
    "a triangle by the number of tokens": (
        lambda e, *_: e(op.tril(WEIGHT, S)),
        "tril",
        "reads the number of tokens as a value",
    ),
    "sorted tokens": (
        lambda e, *_: e(op.sort(X, axis=1)),
        "sort",
        r"is of the operation \w+, which is not known to keep tokens apart",
    ),
    "triangle": (
        lambda e, *_: e(op.tril(X)),
        "tril",
        r"is of the operation \w+, which is not known to keep tokens apart",
    ),
}


@pytest.mark.parametrize(("body", "operator", "reason"), REFUSED.values(), ids=REFUSED)
def test_an_operation_that_mixes_tokens_is_refused_with_its_node(
    body: Any, operator: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=rf"node '{operator}_\d+' \({operator}\) .*{reason}"):
        prove(body)


ELEMENTWISE = sorted(name for name in ELEMENTWISE if hasattr(op, name) or hasattr(op.nn, name))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_elementwise_operator_keeps_the_shape(name: str) -> None:
    """The list is not wrong: shapes of operands broadcast to the result's."""
    function = getattr(op, name, None) or getattr(op.nn, name)
    if name in ("where", "astype", "clip"):
        operands: list[Any] = {"where": [X, X, X], "astype": [X, "int32"], "clip": [X, 0, 1]}[name]
        operands = [param("c", [B, S, D], "bool"), X, X] if name == "where" else operands
    else:
        kind = "bool" if name.startswith("logical") else "int32" if name.startswith("bitwise") else "float32"
        x = param("c", [B, S, D], kind)
        binary = name in _BINARY
        operands = [x, x] if binary else [x]
    given = [TOKENS, *dict.fromkeys(o for o in operands if isinstance(o, relax.Var))]
    module, names = module_of(given, lambda emit, *_: emit(function(*operands)))
    assert shape_of(module["main"].body.body) == ["batch", "sequence", "8"]
    ProveTokenwise(Roles("input_ids"), names).run(module)


_BINARY = {
    *("add", "subtract", "multiply", "divide", "floor_divide", "mod", "power", "maximum", "minimum"),
    *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
    *("logical_and", "logical_or", "bitwise_and", "bitwise_or"),
}


def test_every_rule_names_an_operator_of_tvm() -> None:
    missing = [name for name in _RULES if not hasattr(op, name) and not hasattr(op.nn, name)]
    assert missing == []
