"""What a database says of kernels: their parameters at compile time, and their seconds for plans."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvc_passes.errors import TargetError
from kvc_passes.weight_format import WeightFormat

from ..kernels.attention import AttentionShape
from ..kernels.knobs import AttentionTimes, DecodeKnobs, FewRows, ManyRows, PrefillKnobs, ProductKnobs
from ..kernels.packing import packed_tensors
from ..kernels.traits import CpuTraits
from ..machine import CpuMachine, Machine
from ..planning.decide import Decision
from ..planning.rates import Rates
from .database import Database, Record
from .space import Values, knobs_of
from .tasks import Kernel, Task, find_tasks, product_of, product_parameters, shape_of, shape_parameters

Source = Literal["measured", "transferred", "default"]
"""measured: of this kernel. transferred: of the most similar one. default: no record is near."""
_FAR = math.log(4)


@dataclass(frozen=True)
class Choice:
    """Where the parameters of a kernel come from, and what share of the default's time it took."""

    source: Source
    values: Values
    share: float = 1.0


class Records:
    """The best of what was measured for one target; implements kvc.kernels.knobs.Knobs."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.best: dict[Kernel, dict[str, Record]] = {}
        for record in records:
            if not record.default:
                continue
            kernel, _, parameters = record.task.partition(" ")
            known = self.best.setdefault(kernel, {})  # type: ignore[arg-type]
            if _rank(record) < _rank(known.get(parameters)):
                known[parameters] = record

    def product(self, columns: int, depth: int, format: WeightFormat) -> ProductKnobs:
        parameters = product_parameters(columns, depth, format)
        few, many = (self.choice(k, parameters).values for k in ("product_few", "product_many"))
        return ProductKnobs(FewRows(**few), ManyRows(**many))

    def prefill(self, shape: AttentionShape) -> PrefillKnobs:
        return PrefillKnobs(**self.choice("prefill", shape_parameters(shape)).values)

    def decode(self, shape: AttentionShape) -> DecodeKnobs:
        return DecodeKnobs(**self.choice("decode", shape_parameters(shape)).values)

    def attention_times(self, shape: AttentionShape) -> AttentionTimes:
        parameters = shape_parameters(shape)
        found = (self.best.get(kernel, {}).get(parameters) for kernel in ("prefill", "decode"))
        prefill, decode = ([] if record is None else _times(record) for record in found)
        return prefill, decode

    def choice(self, kernel: Kernel, parameters: str) -> Choice:
        """Parameters for a kernel: its own record's, else those of the nearest of its kind."""
        known = self.best.get(kernel, {})
        own = known.get(parameters)
        if own is not None:
            return _choice("measured", kernel, own)
        distance = _products_apart if kernel.startswith("product") else _shapes_apart
        apart = {other: distance(parameters, other) for other in known}
        nearest = min(apart, key=lambda other: apart[other], default=None)
        if nearest is None or apart[nearest] > _FAR:
            return Choice("default", {})
        return _choice("transferred", kernel, known[nearest])

    def of(self, task: Task) -> Choice:
        return self.choice(task.kernel, task.parameters)

    def product_times(self, lanes: int) -> dict[tuple[int, int], tuple[tuple[int, float], ...]]:
        """By (bits, weights) as plans count them: (rows, seconds) of every size that was measured."""
        found: dict[tuple[int, int], dict[int, float]] = {}
        for kernel in ("product_few", "product_many"):
            for parameters, record in self.best.get(kernel, {}).items():
                columns, depth, format = product_of(parameters)
                tensors = packed_tensors(columns, depth, format, lanes)
                size = sum(math.prod(t.shape) * _SIZES.get(t.dtype, 2) for t in tensors)
                number = columns * depth if format.coded else math.prod(tensors[0].shape)
                rows = {rows: seconds for rows, _, seconds in _times(record)}
                found.setdefault((round(8 * size / number), number), {}).update(rows)
        return {key: tuple(sorted(rows.items())) for key, rows in found.items()}


_SIZES = {"float32": 4, "uint8": 1}


def _times(record: Record) -> list[tuple[int, int, float]]:
    """(rows, keys, seconds) of what will be compiled."""
    times = record.seconds if record.outcome == "better" else record.default
    return [(rows, keys, seconds) for (rows, keys), seconds in zip(record.sizes, times)]


def _rank(record: Record | None) -> tuple[int, float]:
    """Better than the default first, then any that shows what the default takes."""
    if record is None:
        return (2, 0.0)
    return (0, record.share) if record.outcome == "better" else (1, 0.0)


def _choice(source: Source, kernel: Kernel, record: Record) -> Choice:
    if record.outcome != "better":
        return Choice(source, {})
    try:
        knobs_of(kernel, record.knobs)
    except TypeError:  # a parameter that there is not
        return Choice("default", {})
    return Choice(source, dict(record.knobs), record.share)


def _products_apart(one: str, other: str) -> float:
    (n, k, format), (m, j, formatted) = product_of(one), product_of(other)
    if format != formatted:
        return math.inf
    return abs(math.log(n / m)) + abs(math.log(k / j))


def _shapes_apart(one: str, other: str) -> float:
    a, b = shape_of(one), shape_of(other)
    same = replace(a, heads=1, kv_heads=1, scale=1.0) == replace(b, heads=1, kv_heads=1, scale=1.0)
    return abs(math.log(a.kv_heads / b.kv_heads)) if same and a.group == b.group else math.inf


@dataclass(frozen=True)
class TunedRates(Rates):
    """Rates that know what products of some weights take.

    kernels: by (bits, weights), (rows, seconds) of what was measured; other rows are in proportion.
    """

    kernels: Mapping[tuple[int, int], tuple[tuple[int, float], ...]]

    def product(self, bits: int, weights: int, rows: int) -> float:
        general = super().product(bits, weights, rows)
        known = self.kernels.get((bits, weights))
        if not known:
            return general
        near, seconds = min(known, key=lambda pair: abs(math.log(pair[0] / rows)))
        return general * seconds / super().product(bits, weights, near)


def chosen_kernels(decision: Decision, machine: CpuMachine) -> list[tuple[str, Choice]]:
    """Every kernel of a plan that can be tuned, and where its parameters come from."""
    if not isinstance(machine.knobs, Records):
        return []
    return [(task.name, machine.knobs.of(task)) for task in find_tasks(decision, machine.products.traits)]


def with_records(machine: Machine, folder: Path) -> CpuMachine:
    """The machine with tuned kernels, and rates that know them; warns of records that are of no use.

    Raises TargetError for other targets than CPUs, InputError without a database in `folder`.
    """
    if not isinstance(machine, CpuMachine):
        raise TargetError(f"{folder}: kernels are tuned for CPUs, not for the target cuda yet")
    database = Database(folder)
    contents = database.read(machine.key)
    for text in contents.notes(database.path):
        warnings.warn(text, stacklevel=2)
    records = Records(contents.records)
    return replace(machine, knobs=records, given_rates=_rates(machine, records))


def _rates(machine: CpuMachine, records: Records) -> Rates | None:
    times = records.product_times(CpuTraits.of(machine.target).lanes)
    if not times:
        return None
    general: dict[str, Any] = dict(vars(machine.rates))
    general["source"] += ", products as tuned"
    return TunedRates(**general, kernels=times)
