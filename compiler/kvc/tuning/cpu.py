"""CPUs as targets of tuning: their kernels in a plan, candidates, and programs that run one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import tvm
from tvm import relax

from kvc_passes.graph import dims, graph_of, static
from kvc_passes.pack_matmuls import MATMUL
from kvc_passes.row_slices import is_kernel_call
from kvc_passes.weights import PackedWeight

from ..kernels.attention import choose_tile
from ..kernels.shapes import attention_shape
from ..kernels.traits import CpuTraits
from ..machine import CpuMachine, export
from . import programs
from .database import version
from .programs import Operands
from .space import Choices
from .tasks import (
    Bucket,
    Found,
    Kernel,
    Task,
    calls_of,
    keys_of,
    phases,
    product_parameters,
    shape_parameters,
)

if TYPE_CHECKING:  # which processes that measure do not need
    from ..compilation import Lowered
    from ..planning.decide import Decision

_TOLERANCE: Final = 2e-4
"""Of the largest result: what sums of float32 in another order differ by."""
_REBUILT: Final = ("x_absorbed", "mla_latent", "encoder_output")
"""Forms whose prefill has a kernel of its own where keys are made again."""


@dataclass(frozen=True)
class CpuTarget:
    """Implements kvc.tuning.target.Target."""

    traits: CpuTraits
    key: str
    target: tvm.target.Target | None = None
    """What code is generated for; None where none is."""
    lasting: bool = False

    @property
    def version(self) -> str:
        return version()

    @property
    def description(self) -> dict[str, Any]:
        return CpuMachine(self.target).description

    def check(self) -> None:
        """Every machine has a CPU; that it is the one is up to who asks."""

    def found(self, decision: Decision) -> Iterator[Found]:
        yield from self._products(decision)
        yield from _attention(decision)

    def _products(self, decision: Decision) -> Iterator[Found]:
        for workload in decision.plan.workload:
            for phase in phases(decision.plan, workload):
                if not phase.calls:
                    continue
                for number, weight, symbol in _calls(decision.variant.lowered, phase.name):
                    parameters = product_parameters(weight.columns, weight.depth, weight.format)
                    for rows, calls in calls_of(decision, phase, number, phase.bounds.get(symbol, 1)):
                        kernel: Kernel = "product_few" if rows <= self.traits.tile_rows else "product_many"
                        if rows:
                            yield kernel, parameters, rows, 0, calls

    def space(self, task: Task, alone: bool) -> Choices:
        traits = self.traits
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
            splits = (0, *(traits.threads * n for n in (1, 2, 4)))
            return {"ahead": (0, 1, 2, 4), "keys": keys, "splits": splits}
        shape = task.shape()
        tile = choose_tile(shape.group, traits, shape.head_dim)
        some = sorted({max(1, round(tile * f)) for f in (0.25, 0.5, 0.75, 1.5, 2)} - {tile})
        return {"keys": (256, 64, 128, 512), "tile": (0, *some) if alone else (0,)}

    def possible(self, task: Task, values: Mapping[str, int]) -> bool:
        return True

    def operands(self, task: Task, bucket: Bucket, values: Mapping[str, int]) -> Operands:
        return programs.operands(task, bucket, values, self.traits)

    def build(self, task: Task, values: Mapping[str, int], library: Path) -> None:
        export(tvm.compile(programs.module_of(task, values, self.traits), self.target), library)

    def device(self, session: Any) -> Any:
        return session.cpu(0)

    def tolerance(self, task: Task) -> float:
        return _TOLERANCE


def _calls(lowered: Lowered, phase: Any) -> Iterator[tuple[int, PackedWeight, str]]:
    """Every call of a packed product: its binding's number, its weight, and the symbol of its rows."""
    graph = graph_of(lowered.functions[phase]["main"])
    for number, var in enumerate(graph.order):
        call = graph.definitions[var]
        if not is_kernel_call(call) or not call.op.name_hint.startswith(MATMUL):
            continue
        tensors = [a for a in call.args if isinstance(a, relax.Var)]
        recipes = (lowered.recipes[a.name].weight for a in tensors if a.name in lowered.recipes)
        weight = next((w for w in recipes if isinstance(w, PackedWeight)), None)
        if weight is not None:
            symbols = [str(d) for d in dims(tensors[-1]) if static(d) is None]
            yield number, weight, symbols[0] if symbols else ""


def _attention(decision: Decision) -> Iterator[Found]:
    plan, variant = decision.plan, decision.variant
    for site in variant.model.facts.sites:
        if site.row is not None:  # whose kernels have no parameters
            continue
        shape = attention_shape(site, plan.page_size)
        parameters = shape_parameters(shape)
        for workload in plan.workload:
            prefill, decode = phases(plan, workload)
            if site.kept not in _REBUILT and prefill.bounds["n"]:
                yield (
                    "prefill",
                    parameters,
                    prefill.bounds["n"],
                    keys_of(plan, workload, prefill, shape),
                    prefill.calls,
                )
            if decode.calls:
                yield (
                    "decode",
                    parameters,
                    workload.batch,
                    keys_of(plan, workload, decode, shape),
                    decode.calls,
                )
