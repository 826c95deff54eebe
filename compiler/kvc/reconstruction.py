"""Values from keys: the weights that make them, and how much rounding costs with the real ones.

With keys K = x W_K kept in 16 bits, x W_V is [K, x U] M: U [d, r] are the r left singular directions of W_K
that it is weakest in, and M solves for the others. Directions in which W_K is weak would bring the rounding
of K back enlarged; those are kept as they are. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import ml_dtypes
import numpy as np

from kvc_passes.facts import FLOAT_BYTES, StateForm
from kvc_passes.keep_keys import KeyWeights
from kvc_passes.weights import Source

Array = np.ndarray[Any, Any]

LIMIT: Final = 1.5
"""How many times the error of kept K and V the form's may be."""
GOAL: Final = 1.1
"""What is aimed at with more directions: a model's own x are not as even as those that are tried."""
RESTS: Final = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Directions that are tried, the fewest first."""
_TOKENS: Final = 128
_HEADS: Final = 8


@dataclass(frozen=True)
class Judgement:
    """The error of a layer's values, as a multiple of that of kept values, for numbers of directions."""

    ratios: Mapping[int, float]
    condition: float
    """Largest over smallest singular value of W_K."""

    def least(self, *, some: bool) -> int | None:
        """The fewest directions that reach the goal, or that pass; with `some` at least one. None if none."""
        for limit in (GOAL, LIMIT):
            passed = [rest for rest, ratio in self.ratios.items() if ratio <= limit and (rest > 0) == some]
            if passed:
                return min(passed)
        return None


def decided(form: StateForm, judgement: Judgement, dtype: str) -> StateForm:
    """A form of kept keys with its number of directions, or why it is not legal."""
    rest = judgement.least(some=form.name == "k_plus_r")
    best = min(
        (ratio for r, ratio in judgement.ratios.items() if (r > 0) == (form.name == "k_plus_r")),
        default=np.inf,
    )
    figures = f"error {best:.2f} times that of K and V in {dtype}, condition of W_K {judgement.condition:.0f}"
    kept = form.detail.partition(";")[0]
    if rest is None:
        return replace(form, detail=f"{figures}; at most {LIMIT} is allowed")
    beside = f" and {rest} directions of what it is a projection of" if rest else ""
    size = form.token_bytes + rest * FLOAT_BYTES[dtype]
    return replace(form, legal=True, rest=rest, token_bytes=size, detail=f"{kept}{beside}; {figures}")


class Solver:
    """Solves for the values of one layer.

    key: W_K [d, keys], value: W_V [d, values], of the weights' own numbers.
    """

    def __init__(self, key: Array, value: Array) -> None:
        self.key, self.value = key.astype(np.float64), value.astype(np.float64)
        # Of the Gram matrix: as exact as is needed, and several times as fast as a decomposition of W_K.
        self.squares, self.directions = np.linalg.eigh(self.key @ self.key.T)
        self.squares = np.maximum(self.squares, 0.0)

    @property
    def condition(self) -> float:
        least = float(self.squares[0])
        return float(np.sqrt(self.squares[-1] / least)) if least > 0 else float("inf")

    def solve(self, rest: int) -> tuple[Array, Array]:
        """M [keys + rest, values] and U [d, rest]."""
        weak, strong = self.directions[:, :rest], self.directions[:, rest:]
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = (strong / self.squares[rest:]) @ (strong.T @ self.value)
        return np.concatenate([self.key.T @ inverse, weak.T @ self.value]), weak

    def judge(self, dtype: str, heads: int, rests: tuple[int, ...] = RESTS) -> Judgement:
        """Errors of attention with random x and queries, rounded as a `dtype` graph and its pages round.

        x has unit variance and the scores a variance of 2, over 128 tokens; keys are of `heads` heads.
        """
        rng = np.random.default_rng(0)
        x = _rounded(rng.standard_normal((_TOKENS, len(self.key))), dtype)
        exact, made = x @ self.key, _rounded(_float32(x, self.key), dtype)
        each = self.key.shape[1] // heads
        weights, kept_weights = [], []
        for part in (slice(h * each, (h + 1) * each) for h in range(min(heads, _HEADS))):
            query = rng.standard_normal((4, each))
            scale = np.sqrt(2) / np.std(query @ exact[:, part].T)
            weights.append(_softmax(scale * query @ exact[:, part].T))
            kept_weights.append(_softmax(scale * query @ made[:, part].T))
        p, rounded_p = np.concatenate(weights), np.concatenate(kept_weights)
        right = p @ (x @ self.value)

        def error(values: Array) -> float:
            return float(np.sqrt(np.mean((values - right) ** 2)))

        kept = error(rounded_p @ _rounded(_float32(x, self.value), dtype))
        ratios = {}
        for rest in rests:
            if rest >= len(self.key):
                break
            matrix, weak = self.solve(rest)
            if not np.isfinite(matrix).all():
                ratios[rest] = float("inf")
                continue
            row = np.concatenate([made, _rounded(_float32(x, weak), dtype)], axis=1)
            ratios[rest] = error(_float32(rounded_p @ row, matrix)) / kept
            if rest and ratios[rest] <= GOAL:
                break
        return Judgement(ratios, self.condition)


def _softmax(scores: Array) -> Array:
    weights: Array = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _float32(a: Array, b: Array) -> Array:
    product: Array = a.astype(np.float32) @ b.astype(np.float32)
    return product.astype(np.float64)


def _rounded(x: Array, dtype: str) -> Array:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore"):
        result: Array = x.astype(kind).astype(np.float64)
    return result


def columns_of(source: Source, piece: tuple[int, int, int, int], weights: Mapping[str, Array]) -> Array:
    """Columns of a weight [d, columns], head by head."""
    array = weights[source.name]
    matrix = array if source.transposed else array.T
    first, stride, heads, width = piece
    at = (first + np.arange(heads)[:, None] * stride + np.arange(width)).reshape(-1)
    return np.asarray(matrix[:, at])


def solver_of(layer: KeyWeights, weights: Mapping[str, Array]) -> Solver:
    return Solver(
        columns_of(layer.key, layer.key_piece, weights), columns_of(layer.value, layer.value_piece, weights)
    )


class WithKeyWeights(Mapping[str, Array]):
    """A model's weights and those that KeepKeys adds, which are computed when they are asked for."""

    def __init__(self, weights: Mapping[str, Array], layers: tuple[KeyWeights, ...]) -> None:
        self.weights = weights
        self._made = {name: (layer, i) for layer in layers for i, name in enumerate(layer.names)}
        self._solved = lru_cache(maxsize=1)(self._solve)

    def __getitem__(self, name: str) -> Array:
        if name not in self._made:
            return self.weights[name]
        layer, which = self._made[name]
        return self._solved(layer)[which]

    def __iter__(self) -> Iterator[str]:
        yield from self.weights
        yield from self._made

    def __len__(self) -> int:
        return len(self.weights) + len(self._made)

    def _solve(self, layer: KeyWeights) -> tuple[Array, Array, Array]:
        made, weak = solver_of(layer, self.weights).solve(layer.rest)
        bias = np.zeros(made.shape[1])
        if layer.value_bias:
            bias += _bias(self.weights[layer.value_bias], layer.value_piece)
        if layer.key_bias:
            bias -= _bias(self.weights[layer.key_bias], layer.key_piece) @ made[: len(made) - layer.rest]
        return made.astype(np.float32), np.ascontiguousarray(weak, np.float32), bias.astype(np.float32)


def _bias(array: Array, piece: tuple[int, int, int, int]) -> Array:
    first, stride, heads, width = piece
    at = (first + np.arange(heads)[:, None] * stride + np.arange(width)).reshape(-1)
    return np.asarray(array[at], np.float64)
