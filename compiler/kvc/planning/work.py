"""What the kernels of a lowered function do beside attention: weights multiplied, bytes moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tvm import IRModule, relax

from kvc_passes.graph import dims, graph_of, static
from kvc_passes.loop_nests import OVERWRITTEN
from kvc_passes.place_arena import element_bytes, evaluate
from kvc_passes.row_slices import Segment, is_kernel_call

from .rates import Rates

_LEAST_WEIGHTS: Final = 4096
"""Fewer numbers are a norm's or a bias's, which no product reads."""


@dataclass(frozen=True)
class Step:
    """A kernel that is called once for all tokens; bytes and rows are `fixed` plus so many for n and r.

    n: tokens of a call. r: rows whose logits are wanted. b: sequences.
    """

    kind: Literal["product", "other"]
    weights: int
    """Numbers of the weight that is multiplied, 0 for others."""
    bits: int
    rows: Literal["n", "r", "1"]
    moved: tuple[int, int, int]
    """Bytes that others read and write: fixed, for each of n, for each of r."""

    def seconds(self, rates: Rates, n: int, r: int, spread: bool = False) -> float:
        if self.kind == "product":
            rows = {"n": n, "r": r, "1": 1}[self.rows]
            return rates.kernel + rates.product(self.bits, self.weights, rows)
        fixed, each, asked = self.moved
        own = rates.kernel if spread else rates.call
        return own + (fixed + each * n + asked * r) / rates.element


@dataclass(frozen=True)
class Work:
    """The kernels of a function, and how often each is called."""

    steps: tuple[tuple[Step, int], ...]
    segments: tuple[tuple[Step, int], ...] = ()
    """Those that may be called for one slice of the tokens after another."""
    spread: bool = False
    """Whether generated functions run on all threads, as products do."""

    def seconds(self, rates: Rates, n: int, r: int, rows: int = 0) -> float:
        """Of one call for n tokens and r rows of logits, without attention; `rows`: tokens of a slice."""
        whole, rest = divmod(n, rows) if rows else (0, n)
        seconds = sum(count * step.seconds(rates, n, r, self.spread) for step, count in self.steps)
        for step, count in self.segments:
            seconds += whole * count * step.seconds(rates, rows, r, self.spread) if whole else 0.0
            seconds += count * step.seconds(rates, rest, r, self.spread) if rest else 0.0
        return seconds


def work_of(mod: IRModule, segments: Sequence[Segment] = (), spread: bool = False) -> Work:
    """Read the kernel calls of `main`, those that see a block table left out."""
    graph = graph_of(mod["main"])
    params = dict.fromkeys(graph.function.params)
    inside = {step for segment in segments for step in range(segment.first, segment.last + 1)}
    counts: Counter[Step] = Counter()
    sliced: Counter[Step] = Counter()
    for number, var in enumerate(graph.order):
        call = graph.definitions[var]
        if is_kernel_call(call):
            step = _step(call, params, OVERWRITTEN in (mod[call.op].attrs or {}))
            if step is not None:
                (sliced if number in inside else counts)[step] += 1
    return Work(tuple(counts.items()), tuple(sliced.items()), spread)


def _step(call: relax.Call, params: Mapping[relax.Var, None], overwrites: bool) -> Step | None:
    """overwrites: whether the call reads what its result is written over."""
    # What is read in two places, as keys and values of one product are, is read once.
    read_once = dict.fromkeys(a for a in call.args if isinstance(a, relax.Var))
    tensors = [a for a in read_once if isinstance(a.ty, relax.TensorType)]
    names = [a.name for a in tensors]
    if any(name.startswith("block_table") for name in names):
        return None
    state = [a for a in tensors if any(str(d).startswith("pages") for d in dims(a))]
    moved = [a for a in tensors if a not in state]
    constant = [a for a in moved if a in params and all(static(d) is not None for d in dims(a))]
    weights = [a for a in constant if _count(a, {}) >= _LEAST_WEIGHTS]
    # What reads whole numbers beside a weight, such as ids of tokens, looks rows up.
    looks_up = any(str(a.ty.dtype.dtype) in ("int32", "int64") for a in moved)
    if weights and not looks_up:
        size = sum(_bytes(a, {}) for a in weights)
        inner, outer = static(dims(moved[0])[-1]) or 1, static(dims(moved[-1])[-1]) or 1
        largest = max(_count(a, {}) for a in weights)
        coded = any("int8" in str(a.ty.dtype.dtype) for a in weights)
        number = inner * outer if coded else largest
        return Step("product", number, round(8 * size / number), _rows(moved[-1]), (0, 0, 0))
    read = [a for a in moved if a not in weights] + moved[-1:] * overwrites
    at = [sum(_bytes(a, {"n": n, "r": r, "b": 1}) for a in read) for n, r in ((0, 0), (1, 0), (0, 1))]
    return Step("other", 0, 0, "1", (at[0], at[1] - at[0], at[2] - at[0]))


def _rows(result: relax.Var) -> Literal["n", "r", "1"]:
    symbols = {str(d) for d in dims(result) if static(d) is None}
    return "n" if "n" in symbols else "r" if "r" in symbols else "1"


def _count(tensor: relax.Var, bounds: Mapping[str, int]) -> int:
    count = 1
    for dim in dims(tensor):
        count *= evaluate(dim, _Any(bounds))
    return count


def _bytes(tensor: relax.Var, bounds: Mapping[str, int]) -> int:
    return _count(tensor, bounds) * element_bytes(str(tensor.ty.dtype.dtype))


class _Any(dict[str, int]):
    """Bounds in which other symbols, such as those of tables, are 1."""

    def __missing__(self, key: str) -> int:
        return 1

    def __contains__(self, key: Any) -> bool:
        return True
