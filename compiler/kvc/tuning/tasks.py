"""What there is to tune in a planned model: its distinct kernels, and how often a workload calls each."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from tvm import relax
from tvm.ir import GlobalVar

from kvc_passes.graph import dims, static
from kvc_passes.pack_matmuls import MATMUL
from kvc_passes.plans import Plan, Workload
from kvc_passes.sites import Sliced
from kvc_passes.weight_format import WeightFormat
from kvc_passes.weights import PackedWeight

from ..compilation import Lowered
from ..kernels.attention import AttentionShape
from ..kernels.shapes import attention_shape
from ..kernels.traits import CpuTraits
from ..planning.decide import Decision
from ..planning.times import answer_of

Kernel = Literal["product_few", "product_many", "prefill", "decode"]
"""product_few: at most as many rows as a register tile has."""
KERNELS: Final[dict[str, tuple[Kernel, ...]]] = {
    "gemm": ("product_few", "product_many"),
    "attention": ("prefill", "decode"),
}
"""What a person may ask for."""
TASKS: Final = "tasks.json"
"""The file of an artifact that says what its kernels are."""
_REBUILT: Final = ("x_absorbed", "mla_latent", "encoder_output")
"""Forms whose prefill has a kernel of its own where keys are made again."""


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
    """JSON: of a product `columns`, `depth` and `format`; else the fields of AttentionShape."""
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
            return f"product {data['columns']}x{data['depth']} {data['format']['dtype']}, {rows} rows"
        shared = " shared" if data["shared"] else ""
        heads = f"{data['heads']}/{data['kv_heads']} heads of {data['head_dim']}{shared}"
        return f"{self.kernel} attention, {heads}, {rows} tokens"

    def weight(self) -> tuple[int, int, WeightFormat]:
        """Columns, depth and format of a product."""
        return product_of(self.parameters)

    def shape(self) -> AttentionShape:
        return shape_of(self.parameters)

    @staticmethod
    def of(data: dict[str, Any]) -> Task:
        """The task of `dataclasses.asdict`'s value. Raises KeyError or TypeError if it is none."""
        return Task(data["kernel"], data["parameters"], tuple(Bucket(**b) for b in data["buckets"]))


def product_parameters(columns: int, depth: int, format: WeightFormat) -> str:
    data = {"columns": columns, "depth": depth, "format": dataclasses.asdict(format)}
    return json.dumps(data, sort_keys=True)


def product_of(parameters: str) -> tuple[int, int, WeightFormat]:
    data = json.loads(parameters)
    return data["columns"], data["depth"], WeightFormat(**data["format"])


def shape_parameters(shape: AttentionShape) -> str:
    return json.dumps(dataclasses.asdict(shape), sort_keys=True)


def shape_of(parameters: str) -> AttentionShape:
    data = json.loads(parameters)
    sliced = data["sliced"]
    return AttentionShape(**{**data, "sliced": None if sliced is None else Sliced(**sliced)})


def find_tasks(decision: Decision, traits: CpuTraits) -> tuple[Task, ...]:
    """The distinct products and attentions of a plan for a CPU, with the calls of its workload."""
    found: dict[tuple[Kernel, str], Counter[tuple[int, int]]] = {}
    for kernel, parameters, rows, length, calls in [*_products(decision, traits), *_attention(decision)]:
        found.setdefault((kernel, parameters), Counter())[rows, length] += calls
    return tuple(
        Task(*key, tuple(Bucket(*size, calls) for size, calls in sorted(sizes.items())))
        for key, sizes in sorted(found.items())
    )


def tasks_text(decision: Decision, traits: CpuTraits) -> str:
    """What `tasks.json` of an artifact holds."""
    tasks = [dataclasses.asdict(task) for task in find_tasks(decision, traits)]
    predicted = sum(t.seconds for t in decision.plan.times)
    return json.dumps({"predicted": predicted, "tasks": tasks}, indent=1) + "\n"


Found = tuple[Kernel, str, int, int, int]


def _products(decision: Decision, traits: CpuTraits) -> Iterator[Found]:
    plan, lowered = decision.plan, decision.variant.lowered
    for workload in plan.workload:
        prompt = workload.context - answer_of(workload)
        tokens = min(plan.chunk, workload.batch * prompt)
        chunks = -(-workload.batch * prompt // max(tokens, 1))
        asked = max(1, min(workload.batch, round(workload.batch / max(chunks, 1))))
        of_phase = {
            "prefill": ({"n": tokens, "r": asked}, chunks),
            "decode": ({"n": workload.batch, "r": workload.batch}, answer_of(workload)),
        }
        for phase, (bounds, calls) in of_phase.items():
            for weight, symbol in _calls(lowered, phase):
                rows = bounds.get(symbol, 1)
                if rows and calls:
                    kernel: Kernel = "product_few" if rows <= traits.tile_rows else "product_many"
                    parameters = product_parameters(weight.columns, weight.depth, weight.format)
                    yield kernel, parameters, rows, 0, calls


def _calls(lowered: Lowered, phase: Any) -> Iterator[tuple[PackedWeight, str]]:
    """Every call of a packed product: its weight, and the symbol of its rows."""
    for block in lowered.functions[phase]["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or not isinstance(call.op, GlobalVar):
                continue
            if not call.op.name_hint.startswith(MATMUL):
                continue
            tensors = [a for a in call.args if isinstance(a, relax.Var)]
            recipes = (lowered.recipes[a.name].weight for a in tensors if a.name in lowered.recipes)
            weight = next((w for w in recipes if isinstance(w, PackedWeight)), None)
            if weight is not None:
                symbols = [str(d) for d in dims(tensors[-1]) if static(d) is None]
                yield weight, symbols[0] if symbols else ""


def _attention(decision: Decision) -> Iterator[Found]:
    plan, variant = decision.plan, decision.variant
    for site in variant.model.facts.sites:
        if site.row is not None:  # whose kernels have no parameters
            continue
        parameters = shape_parameters(attention_shape(site, plan.page_size))
        for workload in plan.workload:
            keys, tokens, chunks = _sizes(plan, workload)
            memory = workload.memory if site.mask.reach.memory else 0
            if site.kept not in _REBUILT and tokens:
                middle = max(tokens // max(1, -(-tokens // keys)), (keys + plan.chunk) // 2)
                yield "prefill", parameters, tokens, memory or min(middle, keys), chunks
            answer = answer_of(workload)
            if answer:
                yield "decode", parameters, workload.batch, memory or keys + answer // 2, answer


def _sizes(plan: Plan, workload: Workload) -> tuple[int, int, int]:
    """Tokens of a prompt, tokens of a prefill call, and calls."""
    prompt = workload.context - answer_of(workload)
    tokens = min(plan.chunk, workload.batch * prompt)
    return prompt, tokens, -(-workload.batch * prompt // max(tokens, 1))
