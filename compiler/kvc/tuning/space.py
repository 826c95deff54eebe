"""The candidates of a task: values of each parameter that are worth a try."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np

from ..kernels.attention import choose_tile
from ..kernels.knobs import DecodeKnobs, FewRows, ManyRows, PrefillKnobs
from ..kernels.traits import CpuTraits
from .tasks import Kernel, Task

KNOBS: Final[dict[Kernel, type[Any]]] = {
    "product_few": FewRows,
    "product_many": ManyRows,
    "prefill": PrefillKnobs,
    "decode": DecodeKnobs,
}
Values = dict[str, int]
"""The parameters of a candidate that are not as by default."""


def knobs_of(kernel: Kernel, values: Mapping[str, int]) -> Any:
    """The parameters of a kernel. Raises TypeError for a name that it does not have."""
    return KNOBS[kernel](**values)


def space(task: Task, traits: CpuTraits, tiles: bool) -> dict[str, tuple[int, ...]]:
    """The values of each parameter, the default first.

    tiles: whether the query tokens of a prefill task are free; all layers of a model have the same.
    """
    if task.kernel == "product_few":
        weight, rows = task.weight()[2], max(b.rows for b in task.buckets)
        accumulators = (8, 4, 16, 24) if 2 * rows <= 24 else (8,)
        return {"accumulators": accumulators, "ahead": (0,) if weight.coded else (0, 8, 16, 32, 64)}
    if task.kernel == "product_many":
        most, (columns, depth, format) = traits.tile_rows, task.weight()
        blocked = format.coded or columns % (2 * traits.lanes) == 0
        groups = tuple(g for g in range(1, traits.threads + 1) if traits.threads % g == 0)
        return {
            "rows": (0, *range(most - 1, max(2, most // 2 - 2), -1)),
            "depth": (1024, *(d for d in (256, 512, 2048, 4096) if blocked and d // 2 < depth)),
            "row_bytes": tuple(k * 1024 for k in (448, 64, 128, 256, 896, 1792)),
            "groups": (0, *groups),
        }
    if task.kernel == "decode":
        keys = (128, 32, 64, 256, 512)
        return {"ahead": (0, 1, 2, 4), "keys": keys, "splits": (0, *(traits.threads * n for n in (1, 2, 4)))}
    shape = task.shape()
    tile = choose_tile(shape.group, traits, shape.head_dim)
    some = sorted({max(1, round(tile * f)) for f in (0.25, 0.5, 0.75, 1.5, 2)} - {tile})
    return {"keys": (256, 64, 128, 512), "tile": (0, *some) if tiles else (0,)}


def default_of(task: Task, name: str) -> int:
    field = next(f for f in dataclasses.fields(KNOBS[task.kernel]) if f.name == name)
    default: Any = field.default
    return int(default)


def frozen(values: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(values.items()))


def propose(
    task: Task,
    choices: Mapping[str, tuple[int, ...]],
    best: Values,
    tried: Collection[tuple[tuple[str, int], ...]],
    rng: np.random.Generator,
) -> Values | None:
    """The next candidate: a neighbour of the best that was not tried, else any; None when all were.

    Of one parameter all values are tried before two change at once: a hill is climbed coordinate by
    coordinate, and once it is, what is left is sampled evenly.
    """

    def canonical(values: Mapping[str, int]) -> Values:
        return {n: v for n, v in values.items() if v != default_of(task, n)}

    def fresh(candidates: Iterator[Values]) -> list[Values]:
        return [c for c in candidates if c and frozen(c) not in tried]

    near = fresh(canonical({**best, name: v}) for name, values in choices.items() for v in values)
    if near:
        return near[0]
    names = list(choices)
    whole = fresh(canonical(dict(zip(names, combo))) for combo in itertools.product(*choices.values()))
    return whole[int(rng.integers(len(whole)))] if whole else None
