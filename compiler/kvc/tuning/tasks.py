"""What there is to tune in a planned model: its distinct kernels, and how often a workload calls each."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from kvc_passes.plans import Plan, Workload
from kvc_passes.sites import Sliced
from kvc_passes.weight_format import WeightFormat

from ..kernels.attention import AttentionShape
from ..planning.times import answer_of

if TYPE_CHECKING:
    from ..planning.decide import Decision
    from .target import Target

Kernel = Literal[
    "product_few", "product_many", "prefill", "decode", "gpu_product", "gpu_prefill", "gpu_decode"
]
"""product_few: at most as many rows as a register tile of a CPU has."""
KERNELS: Final[dict[str, tuple[Kernel, ...]]] = {
    "gemm": ("product_few", "product_many", "gpu_product"),
    "attention": ("prefill", "decode", "gpu_prefill", "gpu_decode"),
}
"""What a person may ask for."""
PREFILL: Final[tuple[Kernel, ...]] = ("prefill", "gpu_prefill")
TASKS: Final = "tasks.json"
"""The file of an artifact that says what its kernels are."""
Found = tuple[Kernel, str, int, int, int]
"""A call: kernel, parameters, rows, keys of a sequence, and how often."""


@dataclass(frozen=True, order=True)
class Bucket:
    """One size that a kernel is called with.

    Attributes:
        rows: of a product, or query tokens.
        length: keys that a sequence has, 0 for products.
        calls: how often a workload calls it so.
    """

    rows: int
    length: int
    calls: float


@dataclass(frozen=True)
class Task:
    """A kernel of fixed parameters, and the sizes that it is tuned for."""

    kernel: Kernel
    parameters: str
    """JSON: of a product `columns`, `depth` and `format`; else the fields of AttentionShape; of GPUs more."""
    buckets: tuple[Bucket, ...]

    @property
    def key(self) -> str:
        """What a record is found by: kernel and parameters."""
        return f"{self.kernel} {self.parameters}"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((b.rows, b.length) for b in self.buckets)

    @property
    def name(self) -> str:
        """For people."""
        data = json.loads(self.parameters)
        rows = "/".join(dict.fromkeys(str(b.rows) for b in self.buckets))
        if self.kernel in KERNELS["gemm"]:
            more = "".join(f" + {name}" for name in ("bias", "residual") if data.get(name))
            more += " as float32" if data.get("flat") else ""
            return f"product {data['columns']}x{data['depth']} {data['format']['dtype']}{more}, {rows} rows"
        shared = " shared" if data["shared"] else ""
        heads = f"{data['heads']}/{data['kv_heads']} heads of {data['head_dim']}{shared}"
        return f"{self.kernel.removeprefix('gpu_')} attention, {heads}, {rows} tokens"

    def weight(self) -> tuple[int, int, WeightFormat]:
        """Columns, depth and format of a product."""
        return product_of(self.parameters)

    def shape(self) -> AttentionShape:
        return shape_of(self.parameters)

    @staticmethod
    def of(data: dict[str, Any]) -> Task:
        """The task of `dataclasses.asdict`'s value. Raises KeyError or TypeError if it is none."""
        return Task(data["kernel"], data["parameters"], tuple(Bucket(**b) for b in data["buckets"]))


def product_parameters(columns: int, depth: int, format: WeightFormat, **more: Any) -> str:
    data = {"columns": columns, "depth": depth, "format": dataclasses.asdict(format), **more}
    return json.dumps(data, sort_keys=True)


def product_of(parameters: str) -> tuple[int, int, WeightFormat]:
    data = json.loads(parameters)
    return data["columns"], data["depth"], WeightFormat(**data["format"])


def shape_parameters(shape: AttentionShape, **more: Any) -> str:
    return json.dumps({**dataclasses.asdict(shape), **more}, sort_keys=True)


def shape_of(parameters: str) -> AttentionShape:
    given = json.loads(parameters)
    data = {field.name: given[field.name] for field in dataclasses.fields(AttentionShape)}
    sliced = data["sliced"]
    return AttentionShape(**{**data, "sliced": None if sliced is None else Sliced(**sliced)})


def find_tasks(decision: Decision, target: Target) -> tuple[Task, ...]:
    """The distinct kernels of a plan that can be tuned for a target, with the calls of its workload."""
    found: dict[tuple[Kernel, str], Counter[tuple[int, int]]] = {}
    for kernel, parameters, rows, length, calls in target.found(decision):
        found.setdefault((kernel, parameters), Counter())[rows, length] += calls
    return tuple(
        Task(*key, tuple(Bucket(*size, calls) for size, calls in sorted(sizes.items())))
        for key, sizes in sorted(found.items())
    )


def tasks_text(decision: Decision, target: Target) -> str:
    """What `tasks.json` of an artifact holds."""
    tasks = [dataclasses.asdict(task) for task in find_tasks(decision, target)]
    predicted = sum(t.seconds for t in decision.plan.times)
    return json.dumps({"predicted": predicted, "tasks": tasks}, indent=1) + "\n"


@dataclass(frozen=True)
class Serving:
    """The calls of one function that a workload makes.

    Attributes:
        bounds: its symbolic sizes: n tokens, r rows of logits, b sequences.
    """

    name: Literal["prefill", "decode"]
    bounds: dict[str, int]
    calls: int


def phases(plan: Plan, workload: Workload) -> tuple[Serving, Serving]:
    """How prefill and decode are called."""
    prompt = workload.context - answer_of(workload)
    tokens = min(plan.chunk, workload.batch * prompt)
    chunks = -(-workload.batch * prompt // max(tokens, 1))
    asked = max(1, min(workload.batch, round(workload.batch / max(chunks, 1))))
    prefill = Serving("prefill", {"n": tokens, "r": asked, "b": workload.batch}, chunks)
    return prefill, Serving("decode", dict.fromkeys("nrb", workload.batch), answer_of(workload))


def calls_of(decision: Decision, phase: Serving, number: int, rows: int) -> Iterator[tuple[int, int]]:
    """Rows and calls of the kernel of binding `number`, which a phase calls for `rows` or slices of them."""
    plan, segments = decision.plan, decision.variant.lowered.segments
    inside = phase.name == "prefill" and any(s.first <= number <= s.last for s in segments)
    if not inside or not 0 < plan.ffn_chunk < rows:
        yield rows, phase.calls
        return
    whole, rest = divmod(rows, plan.ffn_chunk)
    yield plan.ffn_chunk, whole * phase.calls
    if rest:
        yield rest, phase.calls


def keys_of(plan: Plan, workload: Workload, phase: Serving, shape: AttentionShape) -> int:
    """Keys of a sequence in the middle of what a phase computes."""
    prompt = workload.context - answer_of(workload)
    if shape.whole:
        return workload.memory
    if phase.name == "decode":
        return prompt + answer_of(workload) // 2
    tokens = phase.bounds["n"]
    middle = max(tokens // max(1, -(-tokens // prompt)), (prompt + plan.chunk) // 2)
    return min(middle, prompt)
