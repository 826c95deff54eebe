"""Values from keys: the weights that make them, and how much rounding costs with the real ones.

With keys K = x W_K kept in 16 bits, x W_V is [K, x U] M: U [d, r] are the r left singular directions of W_K
that it is weakest in, which would bring the rounding of K back enlarged. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any, Final

import ml_dtypes
import numpy as np

from kvc_passes.facts import StateForm
from kvc_passes.keep_keys import KeyWeights
from kvc_passes.sites import FLOAT_BYTES
from kvc_passes.weights import Source

Array = np.ndarray[Any, Any]

LIMIT: Final = 1.5
"""How many times the error of kept K and V the form's may be."""
GOAL: Final = 1.1
"""What is aimed at with more directions: a model's own x are not as even as those that are tried."""
RESTS: Final = (0, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024)
"""Directions that are tried, the fewest first."""
_TOKENS: Final = 128
_HEADS: Final = 8
_ITERATIONS: Final = 3


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

    With A = [W_K, s U], M = A^T (A A^T)^-1 W_V gives A M = W_V for any U that makes A of full rank. Of all
    such M it brings back the least of the rounding, if that is as large in s x U as in a key: which is what s
    is for. So U need not be exact, and a few steps of subspace iteration find it.
    """

    def __init__(self, key: Array, value: Array) -> None:
        self.key, self.value = key.astype(np.float64), value.astype(np.float64)
        self.gram = self.key @ self.key.T
        self.weight = float(np.trace(self.gram)) / self.key.shape[1]
        """s squared: the mean square of a key for x of unit variance."""

    @cached_property
    def _weakest(self) -> tuple[Array, Array]:
        """Squares of the smallest singular values of W_K, rising, and their left vectors [d, some]."""
        d = len(self.gram)
        inverse = np.linalg.inv(self.gram + np.eye(d) * np.trace(self.gram) * 1e-15)
        vectors = np.random.default_rng(0).standard_normal((d, min(d, RESTS[-1])))
        for _ in range(_ITERATIONS):
            vectors = np.linalg.qr(inverse @ vectors)[0]
        values, turn = np.linalg.eigh(vectors.T @ (inverse @ vectors))
        return 1 / values[::-1], vectors @ turn[:, ::-1]

    @property
    def condition(self) -> float:
        """Largest over smallest singular value of W_K; infinite where it lacks a direction."""
        top = np.random.default_rng(0).standard_normal(len(self.gram))
        for _ in range(_ITERATIONS * 8):
            top = self.gram @ (top / np.linalg.norm(top))
        most, least = np.linalg.norm(top), self._weakest[0][0]
        return float(np.sqrt(most / least)) if least > most * 1e-13 else float("inf")

    def solve(self, rest: int) -> tuple[Array, Array]:
        """M [keys + rest, values] and U [d, rest]. Raises LinAlgError where W_K and U lack a direction."""
        weak = self._weakest[1][:, :rest]
        solved = np.linalg.solve(self._square(weak), self.value)
        return np.concatenate([self.key.T @ solved, self.weight * (weak.T @ solved)]), weak

    def _square(self, weak: Array) -> Array:
        """A A^T."""
        square: Array = self.gram + self.weight * (weak @ weak.T)
        return square

    def _made(self, rows: Array, weak: Array) -> Array:
        """rows [n, keys + rest] M, without making M."""
        keys = self.key.shape[1]
        back = rows[:, :keys] @ self.key.T + self.weight * (rows[:, keys:] @ weak.T)
        return np.asarray(np.linalg.solve(self._square(weak), back.T).T @ self.value)

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

        @cache
        def ratio(rest: int) -> float:
            weak = self._weakest[1][:, :rest]
            rows = np.concatenate([rounded_p @ made, rounded_p @ _rounded(_float32(x, weak), dtype)], axis=1)
            noise = np.random.default_rng(rest).uniform(-1, 1, rows.shape)
            rows *= 1 + noise * 2.0**-24  # M is float32: as if rows were rounded so
            try:
                return error(self._made(rows, weak)) / kept
            except np.linalg.LinAlgError:
                return float("inf")

        tried = [rest for rest in rests if rest < len(self.key)]
        ratios = {0: ratio(0)}
        for limit in (GOAL, LIMIT):  # the error falls with every direction that is kept
            low, high = 1, len(tried)
            while low < high:
                middle = (low + high) // 2
                ratios[tried[middle]] = ratio(tried[middle])
                low, high = (low, middle) if ratios[tried[middle]] <= limit else (middle + 1, high)
            if low < len(tried):
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
