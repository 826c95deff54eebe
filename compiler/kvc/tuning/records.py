"""The best of what was measured: parameters of kernels, their own or those of similar ones, and times."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from kvc_passes.kernel_sets import MatmulKernels
from kvc_passes.weight_format import WeightFormat

from ..kernels.attention import AttentionShape
from ..kernels.cuda import knobs as cuda
from ..kernels.knobs import AttentionTimes, DecodeKnobs, FewRows, ManyRows, PrefillKnobs, ProductKnobs
from .database import Record
from .space import Values, knobs_of
from .tasks import KERNELS, Kernel, Task, product_of, product_parameters, shape_of, shape_parameters

Source = Literal["measured", "transferred", "default"]
"""measured: of this kernel. transferred: of the most similar one. default: no record is near."""
_FAR: Final = math.log(4)
_OWN: Final = ("columns", "depth", "bias", "residual", "flat")
"""What of products' parameters may differ between similar ones."""
_SHARED: Final = ("tile", "splits")
"""Parameters that are the same for all architectures of an artifact."""


@dataclass(frozen=True)
class Choice:
    """Where the parameters of a kernel come from, and what share of the default's time it took."""

    source: Source
    values: Values
    share: float = 1.0


class Records:
    """The best of what was measured for one target; of a CPU it implements kvc.kernels.knobs.Knobs."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.best: dict[Kernel, dict[str, Record]] = {}
        for record in records:
            kernel, _, parameters = record.task.partition(" ")
            if not record.default or not _readable(kernel, parameters):
                continue
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
        prefill, decode = ([] if record is None else times_of(record) for record in found)
        return prefill, decode

    def choice(self, kernel: Kernel, parameters: str) -> Choice:
        """Parameters for a kernel: its own record's, else those of the nearest of its kind."""
        known = self.best.get(kernel, {})
        own = known.get(parameters)
        if own is not None:
            return _choice("measured", kernel, own)
        distance = _products_apart if kernel in KERNELS["gemm"] else _shapes_apart
        apart = {other: distance(parameters, other) for other in known}
        nearest = min(apart, key=lambda other: apart[other], default=None)
        if nearest is None or apart[nearest] > _FAR:
            return Choice("default", {})
        return _choice("transferred", kernel, known[nearest])

    def of(self, task: Task) -> Choice:
        return self.choice(task.kernel, task.parameters)

    def product_times(self, products: MatmulKernels) -> dict[tuple[int, int], tuple[tuple[int, float], ...]]:
        """By (bits, weights) as plans count them: (rows, seconds) of every size that was measured."""
        found: dict[tuple[int, int], dict[int, float]] = {}
        for kernel in KERNELS["gemm"]:
            for parameters, record in self.best.get(kernel, {}).items():
                columns, depth, format = product_of(parameters)
                tensors = products.packed(columns, depth, format)
                size = sum(math.prod(t.shape) * _SIZES.get(t.dtype, 2) for t in tensors)
                number = columns * depth if format.coded else math.prod(tensors[0].shape)
                rows = {rows: seconds for rows, _, seconds in times_of(record)}
                found.setdefault((round(8 * size / number), number), {}).update(rows)
        return {key: tuple(sorted(rows.items())) for key, rows in found.items()}


_SIZES = {"float32": 4, "uint8": 1}


def _readable(kernel: str, parameters: str) -> bool:
    """Whether a record says what it is of, in words of this version."""
    try:
        (product_of if kernel in KERNELS["gemm"] else shape_of)(parameters)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def times_of(record: Record) -> list[tuple[int, int, float]]:
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
    rests = [{k: v for k, v in json.loads(text).items() if k not in _OWN} for text in (one, other)]
    if rests[0] != rests[1]:
        return math.inf
    (n, k, _), (m, j, _) = product_of(one), product_of(other)
    return abs(math.log(n / m)) + abs(math.log(k / j))


def _shapes_apart(one: str, other: str) -> float:
    a, b = shape_of(one), shape_of(other)
    same = replace(a, heads=1, kv_heads=1, scale=1.0) == replace(b, heads=1, kv_heads=1, scale=1.0)
    return abs(math.log(a.kv_heads / b.kv_heads)) if same and a.group == b.group else math.inf


class CudaRecords:
    """Records of several architectures; implements kvc.kernels.cuda.knobs.Knobs.

    of: by architecture such as 90.
    """

    def __init__(self, of: Mapping[int, Iterable[Record]]) -> None:
        def usable(record: Record) -> bool:
            return len(of) == 1 or not any(name in record.knobs for name in _SHARED)

        self.of = {arch: Records(filter(usable, records)) for arch, records in of.items()}

    def product(self, arch: int, product: cuda.Product) -> cuda.ProductKnobs:
        more: dict[str, Any] = {**vars(product)}
        weight = [more.pop(name) for name in ("columns", "depth", "format")]
        return cuda.ProductKnobs(**self._values(arch, "gpu_product", product_parameters(*weight, **more)))

    def prefill(self, arch: int, shape: AttentionShape, tile: int) -> cuda.PrefillKnobs:
        parameters = shape_parameters(shape, tile=tile)
        return cuda.PrefillKnobs(**self._values(arch, "gpu_prefill", parameters))

    def decode(self, arch: int, shape: AttentionShape, splits: int) -> cuda.DecodeKnobs:
        parameters = shape_parameters(shape, splits=splits)
        return cuda.DecodeKnobs(**self._values(arch, "gpu_decode", parameters))

    def attention_times(self, arch: int, shape: AttentionShape) -> AttentionTimes:
        """Whatever tiles and shares were usual where they were measured."""

        def found(kernel: Kernel) -> list[tuple[int, int, float]]:
            known = self.of[arch].best.get(kernel, {}).items()
            same = (record for parameters, record in known if shape_of(parameters) == shape)
            return [time for record in same for time in times_of(record)]

        return found("gpu_prefill"), found("gpu_decode")

    def _values(self, arch: int, kernel: Kernel, parameters: str) -> Values:
        return self.of[arch].choice(kernel, parameters).values
