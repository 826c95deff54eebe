"""The candidates of a task: of all combinations of its parameters' values, which is next."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np

from ..kernels.cuda import knobs as cuda
from ..kernels.knobs import DecodeKnobs, FewRows, ManyRows, PrefillKnobs
from .tasks import Kernel, Task

KNOBS: Final[dict[Kernel, type[Any]]] = {
    "product_few": FewRows,
    "product_many": ManyRows,
    "prefill": PrefillKnobs,
    "decode": DecodeKnobs,
    "gpu_product": cuda.ProductKnobs,
    "gpu_prefill": cuda.PrefillKnobs,
    "gpu_decode": cuda.DecodeKnobs,
}
Values = dict[str, int]
"""The parameters of a candidate that are not as by default."""
Choices = dict[str, tuple[int, ...]]
"""The values of each parameter."""


def knobs_of(kernel: Kernel, values: Mapping[str, int]) -> Any:
    """The parameters of a kernel. Raises TypeError for a name that it does not have."""
    return KNOBS[kernel](**values)


def default_of(task: Task, name: str) -> int:
    field = next(f for f in dataclasses.fields(KNOBS[task.kernel]) if f.name == name)
    default: Any = field.default
    return int(default)


def frozen(values: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(values.items()))


def propose(
    task: Task,
    choices: Choices,
    best: Values,
    tried: Collection[tuple[tuple[str, int], ...]],
    rng: np.random.Generator,
    possible: Callable[[Values], bool] = lambda values: True,
) -> Values | None:
    """The next candidate: a neighbour of the best that was not tried, else any; None when all were.

    Of one parameter all values are tried before two change at once: a hill is climbed coordinate by
    coordinate, and once it is, what is left is sampled evenly.
    """

    def canonical(values: Mapping[str, int]) -> Values:
        return {n: v for n, v in values.items() if v != default_of(task, n)}

    def fresh(candidates: Iterator[Values]) -> list[Values]:
        return [c for c in candidates if c and frozen(c) not in tried and possible(c)]

    near = fresh(canonical({**best, name: v}) for name, values in choices.items() for v in values)
    if near:
        return near[0]
    names = list(choices)
    whole = fresh(canonical(dict(zip(names, combo))) for combo in itertools.product(*choices.values()))
    return whole[int(rng.integers(len(whole)))] if whole else None
