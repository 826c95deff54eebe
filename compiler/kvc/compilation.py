"""One compilation, stage by stage: understand, plan, build. `kvc.plan` stops after the second stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from tvm import IRModule, tirx

from kvc_passes.errors import PlanningError
from kvc_passes.facts import ModelFacts
from kvc_passes.graph import dims
from kvc_passes.kernel_sets import AttentionKernels, TensorType
from kvc_passes.place_arena import Arena
from kvc_passes.plans import Plan
from kvc_passes.row_segments import FINEST, segments_of
from kvc_passes.row_slices import Segment
from kvc_passes.weights import WeightPart

from .codegen.lower import allocated, finish, join, lower, to_vm
from .frontend.importer import Imported
from .machine import Machine
from .model_facts import facts_of
from .permissions import Permissions
from .pipeline import (
    FunctionName,
    Phase,
    Runner,
    Understood,
    forms_of,
    prepare,
    serve,
    tables_of,
    understand,
)
from .planning.budget import Costs
from .reconstruction import WithKeyWeights

Weight = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]
_ALIGNMENT = 64
_LEAST_SLICE = 32
"""Tokens, where a slice reads weights."""
_SMALL = 1 << 14
"""Bytes up to which they are those of norms."""
_WORTH = 64
"""What is alive has to fall by one part in so many, or smaller slices are no option."""


@dataclass(frozen=True)
class Model:
    """A model that was imported and proved."""

    imported: Imported
    understood: Understood
    facts: ModelFacts


@dataclass(frozen=True)
class Lowered:
    """The functions down to kernel calls; only the sizes that a plan decides are open."""

    functions: dict[Phase, IRModule]
    recipes: dict[str, WeightPart]
    tensors: dict[str, TensorType]
    """What each weight holds, as it is stored."""
    takes: dict[Phase, list[str]]
    """The weights of each function, in its order."""
    attention: AttentionKernels
    machine: Machine
    segments: tuple[Segment, ...] = ()
    """Of prefill: what may run for a part of the tokens after another."""
    choosing: IRModule | None = None
    """The function that chooses tokens, where the host does not."""

    @property
    def least_slice(self) -> int:
        """Tokens of the smallest slice worth trying: with fewer, all time goes into reading weights."""
        return _LEAST_SLICE if any(segment.weights > _SMALL for segment in self.segments) else 1

    @property
    def unit(self) -> int:
        """Tokens that slices are multiples of."""
        return max((segment.unit for segment in self.segments), default=1)


def read_model(imported: Imported, allow: Permissions, page: int, runner: Runner) -> Model:
    """Prove what serving needs, then change what is allowed, for pages of `page` tokens.

    Keys and values in codes are forms that layers may have then, no more.

    Raises UnsupportedModel, and InputError for a permission that does not apply.
    """
    proved = understand(imported, runner)
    facts = facts_of(imported, proved)  # with what config.json says of the graph itself
    sites = allow.applied(proved.sites, page)
    understood = replace(proved, sites=sites)
    forms = forms_of(understood, imported.names, tables_of(imported), allow.codes)
    allow.check(forms)
    facts = replace(facts, sites=sites, allowed=allow.used(imported.allowed), forms=forms)
    return Model(imported, understood, facts)


def lower_model(model: Model, machine: Machine, runner: Runner) -> Lowered:
    """Rewrite and lower both functions for `machine`, without generating code."""
    attention, products = machine.attention(model.understood.sites, model.facts.context), machine.products
    merged = prepare(model.understood, attention, products, machine.widens, runner)
    functions: dict[Phase, IRModule] = {}
    recipes: list[dict[str, WeightPart]] = []
    for phase in merged.phases:
        served = serve(merged, phase, attention, products, runner)
        recipes.append(served.recipes)
        functions[phase] = lower(
            served.module, phase, machine.target, machine.fuse, machine.schedule(phase), runner
        )
    if list(recipes[0].items()) != list(recipes[1].items()):
        raise PlanningError("prefill and decode use different weights")
    together: dict[str, WeightPart] = {}
    for each in recipes:
        if any(together.get(name, recipe) != recipe for name, recipe in each.items()):
            raise PlanningError("a weight is stored in two ways")
        together |= each
    params = {p.name: p for mod in functions.values() for p in mod["main"].params}
    tensors = {
        name: TensorType(str(params[name].ty.dtype.dtype), tuple(int(d.value) for d in dims(params[name])))
        for name in together
    }
    takes = {phase: list(each) for phase, each in zip(functions, recipes)}
    segments = segments_of(functions["prefill"])
    choosing = machine.choosing(model.facts.choices, model.facts.logits)
    return Lowered(functions, together, tensors, takes, attention, machine, segments, choosing)


def costs(model: Model, lowered: Lowered, runtime: int) -> Costs:
    """What the planner weighs."""
    arenas = {phase: Arena.of(mod) for phase, mod in lowered.functions.items()}
    in_slices = Arena.of(lowered.functions["prefill"], segments=lowered.segments)

    @cache
    def size(phase: Phase, chunk: int, batch: int, ffn: int) -> int:
        return (in_slices if ffn else arenas[phase]).size(bounds_of(phase, chunk, batch), ffn)

    def arena(chunk: int, batch: int, ffn: int) -> int:
        return max(size(phase, chunk, batch, ffn if phase == "prefill" else 0) for phase in arenas)

    @cache
    def slices(chunk: int, batch: int) -> tuple[int, ...]:
        bounds, found = bounds_of("prefill", chunk, batch), []
        least = max(arenas["prefill"].alive(bounds), default=0)
        rows = chunk // 2 if lowered.segments else 0
        while rows >= lowered.least_slice and rows % lowered.unit == 0 and rows * FINEST >= chunk:
            alive = max(in_slices.alive(bounds, rows))
            if alive < least - least // _WORTH:
                found.append(rows)
            least, rows = min(least, alive), rows // 2
        return tuple(found)

    sizes = [tensor.bytes for tensor in lowered.tensors.values()]
    return Costs(
        facts=model.facts,
        target=lowered.machine.description,
        chunks=lowered.machine.chunks,
        weights=sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes),
        runtime=runtime,
        arena=arena,
        slices=slices,
        page_size=lowered.attention.page_size,
        tile=lowered.attention.tile_of,
        keys_transposed=lowered.attention.keys_transposed,
        workspaces=lowered.machine.workspace_bytes(lowered.functions.values()),
    )


def bounds_of(phase: Phase, chunk: int, batch: int) -> dict[str, int]:
    return {"n": batch if phase == "decode" else chunk, "r": batch, "b": batch}


def build_libraries(
    lowered: Lowered,
    plan: Plan,
    folder: Path,
    runner: Runner,
    more: Mapping[FunctionName, IRModule] | None = None,
    bounds: Mapping[str, int] | None = None,
) -> list[str]:
    """Generate code for the functions and link it, in `folder`; the libraries' names.

    more: further functions, finished. bounds: of symbols in their kernels.

    Raises TargetError without a linker, or without what else the target needs.
    """
    finished: dict[FunctionName, IRModule] = {
        phase: finish(
            mod,
            phase,
            bounds_of(phase, plan.chunk, plan.max_batch),
            plan.bytes.arena,
            runner,
            lowered.segments if phase == "prefill" else (),
            plan.ffn_chunk if phase == "prefill" else 0,
        )
        for phase, mod in lowered.functions.items()
    }
    if lowered.choosing is not None:
        finished["choose"] = to_vm(allocated(lowered.choosing, runner, "choose-"), runner, "choose-")
    module = join({**finished, **(more or {})})
    own = lowered.machine.workspace_bytes([module], bounds or {})
    if own > plan.bytes.workspaces:
        planned = plan.bytes.workspaces
        raise PlanningError(f"local buffers of kernels take {own} bytes, {planned} were planned")
    kernels = sum(isinstance(f, tirx.PrimFunc) for f in module.functions.values())
    runner.report(f"generate code for {kernels} kernels")
    return lowered.machine.build(module, folder, runner, bounds or {})


def packed_weights(model: Model, lowered: Lowered, runner: Runner) -> Iterator[Weight]:
    """The weights in parameter order, each made when it is asked for."""
    sources = WithKeyWeights(model.imported.weights, model.understood.key_weights)
    for number, (name, recipe) in enumerate(lowered.recipes.items(), 1):
        runner.report(f"write weight {number} of {len(lowered.recipes)}")
        tensor = lowered.tensors[name]
        yield name, tensor.shape, tensor.dtype, partial(lowered.machine.store, recipe, tensor, sources)
