"""THE LIST of passes, in order: read this first.

`understand` turns an imported model into a graph of proved facts, `absorb` changes the form of its state
where that is chosen, `prepare` and `serve` turn that graph into one compiled function: prefill or decode.
Nothing here knows a model by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tvm import IRModule, relax, transform
from tvm_ffi import structural_equal

from kvc_passes.absorb_projections import AbsorbProjections
from kvc_passes.base import Pass, Result, pass_name
from kvc_passes.bound_context import BoundContext
from kvc_passes.compute_in_float32 import ComputeInFloat32
from kvc_passes.encode_memory import EncodeMemory
from kvc_passes.errors import InputError, PlanningError
from kvc_passes.expand_markers import ExpandMarkers
from kvc_passes.facts import StateForm
from kvc_passes.flatten_tokens import FlattenTokens
from kvc_passes.graph import graph_of
from kvc_passes.keep_keys import KeepKeys, KeyWeights
from kvc_passes.keep_values import KeepValues
from kvc_passes.kernel_sets import AttentionKernels, MatmulKernels
from kvc_passes.merge_products import MergeProducts
from kvc_passes.narrow_products import NarrowProducts
from kvc_passes.nodes import NodeNames
from kvc_passes.pack_matmuls import PackMatmuls
from kvc_passes.page_attention import PageAttention
from kvc_passes.positions_to_input import PositionsToInput
from kvc_passes.prove_memory import ProveMemory
from kvc_passes.prove_tokenwise import ProveTokenwise
from kvc_passes.read_in_place import ReadInPlace
from kvc_passes.recognize_attention import RecognizeAttention
from kvc_passes.remake_keys import RemakeKeys
from kvc_passes.select_rows import SelectRows
from kvc_passes.simplify_powers import SimplifyPowers
from kvc_passes.sites import AttentionSite, FormName
from kvc_passes.state_forms import Forms, Illegal
from kvc_passes.weights import PackedWeight, WeightPart
from kvc_passes.write_logits import WriteLogits

from .frontend.importer import Imported

Phase = Literal["prefill", "decode", "encode"]
"""A compiled function. encode: of an encoder's output, where the model reads one."""
FunctionName = Phase | Literal["encoder", "release", "choose"]
"""A function of the library. encoder: makes what `encode` keeps; release: gives its memory back."""
_LARGEST_TABLE = 1 << 20  # elements


@dataclass
class Runner:
    """Runs passes one after another; verifies, times and dumps.

    Attributes:
        dump: folder for the numbered IR after every pass, None for none.
        report: called with the name of every pass before it runs.
        timings: (pass, seconds, sites) of every pass that ran, in order.
    """

    dump: Path | None = None
    report: Callable[[str], None] = lambda name: None
    timings: list[tuple[str, float, int]] = field(default_factory=list)

    def apply(self, mod: IRModule, step: Pass, label: str = "") -> Result:
        """Run one pass. Raises UnsupportedModel when it refuses, PlanningError when it breaks the IR."""
        return self._timed(mod, f"{label}{pass_name(step)}", step.run)

    def apply_tvm(self, mod: IRModule, name: str, *passes: transform.Pass) -> IRModule:
        """Run passes of TVM as one step."""

        def run(mod: IRModule) -> Result:
            result = transform.Sequential(list(passes))(mod)
            return Result(result, 0 if result.same_as(mod) else 1)

        return self._timed(mod, name, run).module

    def _timed(self, mod: IRModule, name: str, run: Callable[[IRModule], Result]) -> Result:
        self.report(name)
        start = time.perf_counter()
        result = run(mod)
        try:
            relax.analysis.well_formed(result.module)
        except Exception as error:
            raise PlanningError(f"the pass {name} left an ill-formed module: {error}") from error
        self.timings.append((name, time.perf_counter() - start, result.sites))
        if self.dump is not None:
            self._write(name, result.module, structural_equal(result.module, mod))
        return result

    def _write(self, name: str, mod: IRModule, unchanged: bool) -> None:
        assert self.dump is not None
        text = "(unchanged)" if unchanged else mod.script(show_meta=False)
        try:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / f"{len(self.timings):02d}-{name}.py").write_text(f"{text}\n")
        except OSError as error:
            raise InputError(f"{self.dump}: the dump cannot be written ({error.strerror})") from None


@dataclass(frozen=True)
class Understood:
    """A model of which everything that serving needs has been proved."""

    module: IRModule
    sites: tuple[AttentionSite, ...]
    positions: tuple[str, ...]
    limit: int | None
    """Most tokens of a sequence for which the proofs hold, None for any number."""
    key_weights: tuple[KeyWeights, ...] = ()
    """Weights that were added, and what they are made of."""
    memory: str | None = None
    """The parameter that is an encoder's output."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The functions that serving needs."""
        return ("prefill", "decode") if self.memory is None else ("prefill", "decode", "encode")


@dataclass(frozen=True)
class Served:
    """One function of the compiled model, kernels called by name, and its weights in parameter order."""

    module: IRModule
    recipes: dict[str, WeightPart]


def understand(imported: Imported, runner: Runner) -> Understood:
    """Prove the premises. Raises UnsupportedModel with the node and the rule."""
    names, roles = imported.names, imported.roles
    mod = runner.apply(imported.module, SimplifyPowers()).module
    mod = runner.apply_tvm(
        mod,
        "canonicalize",
        relax.transform.CanonicalizeBindings(),
        relax.transform.EliminateCommonSubexpr(),
        relax.transform.DeadCodeElimination(),
    )
    found = runner.apply(mod, RecognizeAttention(roles, names, tables_of(imported)))
    mod = runner.apply(found.module, ExpandMarkers()).module
    bounded = runner.apply(mod, BoundContext(roles, names))
    mod = bounded.module
    positions = runner.apply(mod, PositionsToInput(roles, names))
    mod = runner.apply(positions.module, ProveTokenwise(roles, names)).module
    if roles.memory is not None:
        mod = runner.apply(mod, ProveMemory(roles, names)).module
    mod = runner.apply(mod, FlattenTokens(roles)).module
    limits = [limit for limit in (imported.limit, bounded.facts) if limit is not None]
    return Understood(mod, found.facts, positions.facts, min(limits, default=None), memory=roles.memory)


def tables_of(imported: Imported) -> dict[str, np.ndarray]:
    """Parameters that may be parts of masks or rotations: small ones."""
    return {name: a for name, a in imported.weights.items() if a.size <= _LARGEST_TABLE}


def forms_of(
    model: Understood, names: NodeNames, tables: Mapping[str, np.ndarray], allowed: Container[FormName] = ()
) -> tuple[tuple[StateForm, ...], ...]:
    """For every site, the forms that its state may be kept in, and why others are not legal.

    allowed: those of codes that are.
    """
    forms = Forms(graph_of(model.module["main"]), names, tables, allowed)
    markers = forms.markers()
    return tuple(forms.of(markers[site.index], site) for site in model.sites)


def absorb(model: Understood, sites: frozenset[int], runner: Runner) -> Understood:
    """Keep at `sites` what keys and values are projections of, where that is legal."""
    done = runner.apply(model.module, AbsorbProjections(model.sites, sites))
    return replace(model, module=done.module, sites=done.facts)


def key_weights(model: Understood) -> tuple[KeyWeights, ...]:
    """What values would be made of in every layer whose keys could be kept alone."""
    forms = Forms(graph_of(model.module["main"]))
    found = {}
    for index, marker in forms.markers().items():
        try:
            found[index] = forms.keys(marker, model.sites[index])
        except Illegal:
            continue
    return KeepKeys(model.sites, dict.fromkeys(found, 0)).weights(forms, found)


def keep_keys(model: Understood, rest: Mapping[int, int], runner: Runner) -> Understood:
    """Keep keys alone at the sites `rest`, with so many directions of what they are projections of."""
    done = runner.apply(model.module, KeepKeys(model.sites, rest))
    sites, weights = done.facts
    return replace(model, module=done.module, sites=sites, key_weights=weights)


def keep_values(
    model: Understood, sites: frozenset[int], tables: Mapping[str, np.ndarray], runner: Runner
) -> Understood:
    """Keep values alone at `sites`, of which keys are made whenever they are read, where that is legal."""
    done = runner.apply(model.module, KeepValues(model.sites, sites, tables))
    return replace(model, module=done.module, sites=done.facts)


def remake(model: Understood, sites: frozenset[int], runner: Runner) -> Understood:
    """Keep at `sites` what keys and values are made of again whenever they are read, where that is legal."""
    done = runner.apply(model.module, RemakeKeys(model.sites, sites))
    return replace(model, module=done.module, sites=done.facts)


def prepare(
    model: Understood, attention: AttentionKernels, products: MatmulKernels, widens: bool, runner: Runner
) -> Understood:
    """Once for both phases, before rows are selected: which products share a value must not depend on it.

    widens: whether the target computes graphs of 16-bit floats in float32.
    """
    mod = runner.apply(model.module, ComputeInFloat32() if widens else NarrowProducts()).module
    mod = runner.apply(mod, MergeProducts(products.panel)).module
    if not attention.reads_views:
        return replace(model, module=mod)
    done = runner.apply(mod, ReadInPlace(model.sites))
    return replace(model, module=done.module, sites=done.facts)


def serve(
    model: Understood,
    phase: Phase,
    attention: AttentionKernels,
    products: MatmulKernels,
    runner: Runner,
) -> Served:
    """Rewrite the graph into the function `phase`."""
    mod, label = model.module, f"{phase}-"
    if phase == "encode":
        assert model.memory is not None
        mod = runner.apply(mod, EncodeMemory(model.sites, attention, model.memory), label).module
        packed = runner.apply(mod, PackMatmuls(products), label)
        pools = sum(len(site.state(1, False)) for site in model.sites if site.mask.reach.memory)
        return Served(packed.module, _recipes(packed.module, 2 + pools, packed.facts))
    if phase == "prefill":
        mod = runner.apply(mod, SelectRows(), label).module
    mod = runner.apply(mod, PageAttention(model.sites, attention, phase), label).module
    packed = runner.apply(mod, PackMatmuls(products), label)
    mod = runner.apply(packed.module, WriteLogits(products, packed.facts), label).module
    pools = sum(len(site.state(1, False)) for site in model.sites)
    first = [p.name for p in mod["main"].params].index("logits") + 1 + pools
    return Served(mod, _recipes(mod, first, packed.facts))


def _recipes(mod: IRModule, first: int, packed: dict[str, WeightPart]) -> dict[str, WeightPart]:
    """Weights in parameter order, from parameter `first` on."""
    names = [p.name for p in mod["main"].params][first:]
    return {name: packed.get(name, WeightPart(PackedWeight.kept(name))) for name in names}
