"""Small tasks of every kernel, records about them, and a worker that measures nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvc.kernels.attention import AttentionShape
from kvc.kernels.traits import CpuTraits
from kvc.tuning.cpu import CpuTarget
from kvc.tuning.database import NAME, Record, version
from kvc.tuning.measure import Measured
from kvc.tuning.runner import Failure
from kvc.tuning.space import Values
from kvc.tuning.tasks import Bucket, Kernel, Task, product_parameters, shape_parameters
from kvc_passes.weight_format import FLOAT32, WeightFormat

TARGET = "a CPU, 2 threads"
TRAITS = CpuTraits(16, 32, 2)
CPU = CpuTarget(TRAITS, TARGET)
CODES = WeightFormat("uint4", 32, "float16")
SHAPE = AttentionShape(4, 2, 32, 32, 0.2)


def product(
    kernel: Kernel = "product_few",
    columns: int = 64,
    depth: int = 48,
    format: WeightFormat = FLOAT32,
    buckets: tuple[Bucket, ...] | None = None,
) -> Task:
    rows = (Bucket(2, 0, 10.0),) if kernel == "product_few" else (Bucket(40, 0, 3.0),)
    return Task(kernel, product_parameters(columns, depth, format), buckets or rows)


def attention(kernel: Kernel, shape: AttentionShape = SHAPE) -> Task:
    rows = 3 if kernel == "decode" else 50
    return Task(kernel, shape_parameters(shape), (Bucket(rows, 100, 8.0),))


TASKS = {
    "product_few": product(),
    "product_many": product("product_many"),
    "prefill": attention("prefill"),
    "decode": attention("decode"),
}
CODED = {
    "product_few": product(format=CODES),
    "product_many": product("product_many", format=CODES),
}
OTHERS: dict[Kernel, Values] = {
    "product_few": {"accumulators": 16, "ahead": 32},
    "product_many": {"rows": 3, "depth": 256, "row_bytes": 65536, "groups": 2},
    "prefill": {"tile": 5, "keys": 32},
    "decode": {"splits": 3, "keys": 64, "ahead": 2},
}
"""Of every kernel parameters none of which is as by default."""


def record(task: Task = TASKS["product_few"], **changes: Any) -> Record:
    """A record of `task` in which {"accumulators": 16} took 0.8 of the default's time."""
    sizes = len(task.buckets)
    fields: dict[str, Any] = {
        "task": task.key,
        "sizes": task.sizes,
        "target": TARGET,
        "version": version(),
        "knobs": {"accumulators": 16},
        "outcome": "better",
        "seconds": (0.8e-3,) * sizes,
        "default": (1e-3,) * sizes,
        "share": 0.8,
    }
    return Record(**{**fields, **changes})


Times = Callable[[Task, Values, int], float | Failure]


class FakeWorker:
    """Answers with made-up times: `times(task, values, n)` is the share of the default's time.

    n: how often this candidate was measured before. The default takes as long as `defaults` says, by
    kernel, and every second round differs by `spread` of it.
    """

    def __init__(
        self,
        times: Times,
        defaults: Mapping[str, float] | None = None,
        spread: float = 0.0,
    ) -> None:
        self.times, self.defaults, self.spread = times, defaults or {}, spread
        self.asked: list[tuple[Task, Values, int]] = []
        self.closed = 0
        self.lock = threading.Lock()

    def measure(self, task: Task, values: Values, rounds: int) -> Measured | Failure:
        with self.lock:
            before = sum(asked[:2] == (task, values) for asked in self.asked)
            self.asked.append((task, dict(values), rounds))
        share = self.times(task, values, before)
        if isinstance(share, Failure):
            return share
        default = self.defaults.get(task.kernel, 1e-3)

        def side(seconds: float) -> list[list[float]]:
            times = [seconds + (i % 2) * self.spread * default for i in range(rounds)]
            return [times for _ in task.buckets]

        return Measured(side(default * share), side(default))

    def close(self) -> None:
        self.closed += 1


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of the database in a folder."""
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def times(task: Task, values: Values, n: int) -> float:
    """Half the time with the parameters of OTHERS."""
    return 0.5 if values.items() <= OTHERS[task.kernel].items() else 1.1
