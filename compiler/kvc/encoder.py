"""The encoder of an encoder-decoder pair: compiled into its decoder's artifact, under the same budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from tvm import IRModule, relax

from kvc_passes.compute_in_float32 import ComputeInFloat32
from kvc_passes.errors import BudgetError, InputError, PlanningError, UnsupportedModel
from kvc_passes.expand_markers import ExpandMarkers
from kvc_passes.facts import EncoderFacts, ModelFacts
from kvc_passes.graph import dims, graph_of, op_name
from kvc_passes.kernel_sets import TensorType
from kvc_passes.merge_products import MergeProducts
from kvc_passes.narrow_products import NarrowProducts
from kvc_passes.pack_matmuls import PackMatmuls
from kvc_passes.place_arena import ALIGNMENT, Arena
from kvc_passes.plans import EncoderPlan, Plan, Workload
from kvc_passes.rebuild import drop_unused
from kvc_passes.simplify_powers import SimplifyPowers
from kvc_passes.weights import PackedWeight, WeightPart

from .codegen.lower import allocated, finish, fused, to_vm
from .compilation import Weight
from .encoder_facts import Extents, prove_encoder
from .frontend.encoders import ImportedEncoder, import_encoder
from .graphs import LoweredGraph, Lowering, Search, within
from .machine import Machine
from .pipeline import FunctionName, Runner

PREFIX: Final = "encoder."
"""Of the names of its weights in the artifact."""
_ATTEMPTS: Final = 8


@dataclass(frozen=True)
class Encoder:
    """An encoder that fits its decoder, lowered; implements planning.budget.EncoderCosts.

    Attributes:
        imported: the ONNX graph.
        facts: what was proved.
        extents: of all that is computed.
        module: `main(inputs..., weights...) -> f32 [1, rows, width]`, kernel calls as the graph stands.
        recipes, tensors: its weights in the function's order, and how they are stored.
        made: other kernel calls that take less memory, for one workload; None for those of `module`.
    """

    imported: ImportedEncoder
    facts: EncoderFacts
    extents: Extents
    module: IRModule
    recipes: Mapping[str, WeightPart]
    tensors: Mapping[str, TensorType]
    machine: Machine
    runner: Runner
    made: LoweredGraph | None = None

    def plan(self, workload: tuple[Workload, ...]) -> EncoderPlan:
        """What it takes for a workload. Raises InputError where that has no room for any output."""
        return self._sizes(self._longest(workload))[0]

    def workspace(self, workload: tuple[Workload, ...]) -> int:
        """Bytes that its kernels allocate for themselves, on all threads. Raises as `plan` does."""
        return self._sizes(self._longest(workload))[1]

    def bounds(self, plan: Plan) -> dict[str, int]:
        """Of the symbols in its shapes."""
        assert plan.encoder is not None
        return self.extents.bounds(plan.encoder.longest)

    def within(self, room: int, workload: tuple[Workload, ...]) -> Encoder:
        """The same in `room` bytes of temporaries and workspace. Raises BudgetError with the least."""
        lowering = self._lowering(self._longest(workload))
        made, _, _ = within(lowering.of(self.module), room, lowering, Search())
        return replace(self, made=made)

    def least(self, workload: tuple[Workload, ...]) -> Encoder:
        """The same in as little memory as is reached."""
        room = 0
        for _ in range(_ATTEMPTS):
            try:
                return self.within(room, workload)
            except BudgetError as error:  # the least that it names may leave out gaps between places
                room = max(error.needed, room + room // 16)
        raise PlanningError(f"the encoder {self.facts.name} does not fit the memory that it was said to fit")

    def functions(self, plan: Plan) -> dict[FunctionName, IRModule]:
        """The function, and one that returns nothing.

        TVM's virtual machine holds what it returned last, here the arena, until another call has returned;
        that one takes no arena of its own.
        """
        builder = relax.BlockBuilder()
        with builder.function("main", []):
            builder.emit_func_output(relax.Tuple([]))
        return {"encoder": self.finished(plan), "release": to_vm(builder.get(), self.runner, "release-")}

    def finished(self, plan: Plan) -> IRModule:
        """The function `encoder` with its temporaries, the output among them, in the plan's arena."""
        kernels = allocated((self.made or self._base).kernels, self.runner, "encoder-")
        return finish(kernels, "encoder", self.bounds(plan), plan.bytes.arena, self.runner)

    @property
    def takes(self) -> list[str]:
        """Its weights' names in the artifact, in the function's order."""
        return [PREFIX + name for name in self.recipes]

    def packed_weights(self) -> Iterator[Weight]:
        """Its weights, each made when it is asked for."""
        for number, (name, recipe) in enumerate(self.recipes.items(), 1):
            self.runner.report(f"write the encoder's weight {number} of {len(self.recipes)}")
            tensor = self.tensors[name]
            store = partial(self.machine.store, recipe, tensor, self.imported.weights)
            yield PREFIX + name, tensor.shape, tensor.dtype, store

    def _longest(self, workload: tuple[Workload, ...]) -> int:
        """The largest extent of a request whose rows a workload has room for; 0 where it has no choice."""
        rows, least = max(w.memory for w in workload), self.extents.rows(self.facts.least)
        if least > rows:
            more = "" if not self.facts.least else " or more"
            raise InputError(
                f"the output of the encoder '{self.facts.name}' has {least} rows{more}; the workload "
                f"{','.join(map(str, workload))} has room for {rows}: write BATCHxCONTEXT+{least}"
            )
        return self.extents.longest(self.facts.least, rows) if self.facts.least else 0

    def _lowering(self, longest: int) -> Lowering:
        return Lowering.of_graph(self.machine, self.extents.bounds(longest), self.runner, self.module)

    def _sizes(self, longest: int) -> tuple[EncoderPlan, int]:
        """The part of a plan, and bytes of workspace; remembered, since a planner asks again and again."""
        if longest not in self._known:
            bounds, chosen = self.extents.bounds(longest), self.made or self._base
            natural = self._natural.size(bounds)
            arena = natural if self.made is None else self._arena(self.made).size(bounds)
            weights = sum(-(-tensor.bytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors.values())
            plan = EncoderPlan(self.facts.name, longest, arena, natural, weights)
            self._known[longest] = plan, self.machine.workspace_bytes([chosen.kernels], bounds)
        return self._known[longest]

    @cached_property
    def _known(self) -> dict[int, tuple[EncoderPlan, int]]:
        return {}

    @cached_property
    def _base(self) -> LoweredGraph:
        return self._lowering(self.facts.least).of(self.module, overwriting=True)

    @cached_property
    def _natural(self) -> Arena:
        return self._arena(self._base)

    def _arena(self, lowered: LoweredGraph) -> Arena:
        return Arena.of(allocated(lowered.kernels, self.runner), "within")


def read_encoder(
    path: Path,
    decoder: ModelFacts,
    wanted: str | None,
    fixed: Mapping[str, int],
    machine: Machine,
    runner: Runner,
) -> Encoder:
    """Import and prove the encoder of a decoder.

    Args:
        path: its ONNX file.
        decoder: facts of the decoder.
        wanted: what the decoder calls its input.
        fixed: extents of inputs that the file leaves open and requests may not choose, by name.
        machine: the target.
        runner: runs the passes.

    Raises:
        InputError: the file cannot be read, the output is not what the decoder reads, an extent has no bound.
        UnsupportedModel: an operator that cannot be imported, a proof that fails.
    """
    runner.report("import the encoder")
    imported = import_encoder(path, wanted, fixed)
    mod = runner.apply_tvm(
        imported.module,
        "encoder-canonicalize",
        relax.transform.CanonicalizeBindings(),
        relax.transform.EliminateCommonSubexpr(),
        relax.transform.DeadCodeElimination(),
    )
    mod = runner.apply(mod, SimplifyPowers(), "encoder-").module
    mod = runner.apply(mod, ExpandMarkers(), "encoder-").module
    facts, extents = prove_encoder(imported, mod, decoder)
    mod = runner.apply(mod, ComputeInFloat32() if machine.widens else NarrowProducts(), "encoder-").module
    mod = runner.apply(mod, MergeProducts(machine.products.panel), "encoder-").module
    packed = runner.apply(mod, PackMatmuls(machine.products), "encoder-")
    mod = drop_unused(packed.module, len(imported.inputs))
    _check_markers(imported, mod)
    params = mod["main"].params[len(imported.inputs) :]
    recipes = {p.name: packed.facts.get(p.name, WeightPart(PackedWeight.kept(p.name))) for p in params}
    tensors = {
        p.name: TensorType(str(p.ty.dtype.dtype), tuple(int(d.value) for d in dims(p))) for p in params
    }
    for step in machine.fuse:
        mod = runner.apply(mod, step, "encoder-").module
    lowered = fused(mod, machine.target, runner, "encoder-")
    return Encoder(imported, facts, extents, lowered, recipes, tensors, machine, runner)


def _check_markers(imported: ImportedEncoder, mod: IRModule) -> None:
    graph = graph_of(mod["main"])
    for var in graph.order:
        name = op_name(graph.definitions[var])
        if name.startswith("kvc."):
            raise UnsupportedModel(
                f"{imported.file.path}: {imported.names.describe(var)}: an encoder cannot have it"
            )
