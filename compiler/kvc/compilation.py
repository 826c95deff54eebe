"""One compilation, stage by stage: understand, plan, build. `kvc.plan` stops after the second stage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax, tirx
from tvm.ir import GenericConst
from tvm.target import Target

from kvc_passes.errors import PlanningError, UnsupportedModel
from kvc_passes.facts import FLOAT_BYTES, ModelFacts, Plan
from kvc_passes.graph import Graph, dims, graph_of, op_name, operands, scalar, static
from kvc_passes.kernel_sets import TensorType
from kvc_passes.markers import DEQUANTIZE
from kvc_passes.place_arena import Arena
from kvc_passes.weights import WeightPart, table_of, weight_of

from .codegen.link import link
from .codegen.lower import finish, join, lower
from .frontend.importer import Imported
from .kernels.cpu import CpuAttention, CpuProducts
from .pipeline import Phase, Runner, Understood, prepare, serve, understand
from .planner import Costs
from .stored_weights import stored

Weight = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]
_ALIGNMENT = 64
_LARGEST_CONSTANT = 1 << 16  # bytes; what is larger would be memory that no plan counts
_PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Model:
    """A model that was imported and proved."""

    imported: Imported
    understood: Understood
    facts: ModelFacts


@dataclass(frozen=True)
class Lowered:
    """Both functions down to kernel calls; only the sizes that a plan decides are open."""

    functions: dict[Phase, IRModule]
    recipes: dict[str, WeightPart]
    tensors: dict[str, TensorType]
    """What each parameter holds, as it is stored."""
    attention: CpuAttention
    target: Target


def read_model(imported: Imported, runner: Runner) -> Model:
    """Prove what serving needs. Raises UnsupportedModel."""
    understood = understand(imported, runner)
    return Model(imported, understood, _facts(imported, understood))


def assets_of(path: Path) -> Path:
    """The folder with tokenizer and configuration: `<model>.assets` beside the model, else its own folder."""
    own = path.with_suffix(".assets")
    return own if own.is_dir() else path.parent


def _facts(imported: Imported, understood: Understood) -> ModelFacts:
    path = imported.file.path
    function = understood.module["main"]
    graph = graph_of(function)
    vocab = _rows_read(graph, function.params[0])
    if vocab is None:
        raise UnsupportedModel(f"{path}: the token ids do not index an embedding table of known size")
    columns = static(dims(function.body.body)[-1])
    if columns is None or len(dims(function.body.body)) != 3:
        raise UnsupportedModel(f"{path}: the first output is not logits [batch, sequence, vocabulary]")
    _check_types(path, imported, graph)
    known = (_rows_read(graph, function.params[1]), _configured_context(path), understood.limit)
    limits = [n for n in known if n]
    return ModelFacts(
        name=path.stem,
        vocab=vocab,
        logits=columns,
        context=min(limits) if limits else None,
        sites=understood.sites,
        positions=understood.positions,
        parameter_bytes=imported.file.parameter_bytes(),
        nodes=len(imported.file.graph.node),
    )


def _check_types(path: Path, imported: Imported, graph: Graph) -> None:
    """Refuse what would be stored as something else than it is: memory that no plan counts."""
    for var in graph.order:
        for constant in operands(graph.definitions[var]):
            if isinstance(constant, GenericConst) and constant.value.numpy().nbytes > _LARGEST_CONSTANT:
                what = f"{constant.value.dtype} {list(constant.value.shape)}"
                raise UnsupportedModel(
                    f"{path}: {imported.names.describe(var)} reads a constant of type {what}; "
                    "tables of this size must be weights: floats, or codes that are dequantized"
                )
        if op_name(graph.definitions[var]) == DEQUANTIZE and not _is_factor(graph, var):
            raise UnsupportedModel(
                f"{path}: {imported.names.describe(var)} dequantizes a weight for something other than a "
                "product with it or a lookup in it; it would have to be stored as floats"
            )
    for name, array in imported.weights.items():
        if str(array.dtype) not in (*FLOAT_BYTES, "int8", "uint8"):
            raise UnsupportedModel(
                f"{path}: initializer '{name}' is {array.dtype}; kvc stores weights of float32, float16, "
                "bfloat16, and of 4 and 8 bits"
            )


def _is_factor(graph: Graph, var: relax.Var) -> bool:
    """Whether a dequantized weight is only multiplied with or looked up in."""
    users = graph.users[var]
    for user in users:
        call = graph.definitions[user]
        name, last = op_name(call), graph.alias(call.args[-1]) if isinstance(call, relax.Call) else None
        if name in ("permute_dims", "astype", ""):
            if not _is_factor(graph, user):
                return False
        elif name == "matmul":
            if last != var or weight_of(graph, call.args[1]) is None:
                return False
        elif name != "take" or table_of(graph, call.args[0]) is None:
            return False
    return bool(users)


def _rows_read(graph: Graph, index: relax.Var) -> int | None:
    """How large `index` can be: rows of the smallest table that is read at it, or at it plus a constant.

    Raises:
        UnsupportedModel: a table is read at something else that depends on `index`.
    """
    offsets = {index: 0}
    dependent = graph.reachable_from([index])
    limits = []
    for var in graph.order:
        call = graph.definitions[var]
        if op_name(call) in ("reshape", "broadcast_to", "astype") and call.args[0] in offsets:
            offsets[var] = offsets[call.args[0]]
        elif op_name(call) == "add" and call.args[0] in offsets and scalar(call.args[1], graph) is not None:
            offsets[var] = offsets[call.args[0]] + int(scalar(call.args[1], graph) or 0)
        elif op_name(call) == "take" and call.args[1] in dependent and _is_index(call.args[1]):
            rows = static(dims(call.args[0])[int(call.attrs.axis or 0)])
            if rows is not None and _picked(graph, call.args[1], rows):
                continue
            if call.args[1] not in offsets or rows is None:
                raise UnsupportedModel(
                    f"value '{var.name}' reads a table at an index that has no known bound"
                )
            limits.append(rows - offsets[call.args[1]])
    return min(limits, default=None)


def _picked(graph: Graph, value: relax.Expr, rows: int) -> bool:
    """Whether an index was chosen as the place of the largest of at most `rows` values."""
    call = graph.resolve(value)
    if op_name(call) == "argmax":
        extent = static(dims(call.args[0])[int(call.attrs.axis)])
        return extent is not None and extent <= rows
    moved = ("reshape", "squeeze", "expand_dims", "broadcast_to", "concat", "astype", "permute_dims")
    return op_name(call) in moved and all(
        _picked(graph, o, rows) for o in operands(call) if isinstance(o, relax.Var)
    )


def _is_index(value: relax.Expr) -> bool:
    return "int" in str(value.ty.dtype.dtype)


def _configured_context(path: Path) -> int | None:
    """max_position_embeddings of a config.json beside the model: graphs with RoPE alone have no limit."""
    file = assets_of(path) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    value = (
        config.get("max_position_embeddings", config.get("n_positions")) if isinstance(config, dict) else None
    )
    return value if isinstance(value, int) and value > 0 else None


def lower_model(model: Model, target: Target, runner: Runner) -> Lowered:
    """Rewrite and lower both functions for `target`, without generating code."""
    attention = CpuAttention.for_sites(target, model.understood.sites)
    products = CpuProducts(attention.traits)
    merged = prepare(model.understood, products, runner)
    functions: dict[Phase, IRModule] = {}
    recipes: list[dict[str, WeightPart]] = []
    for phase in _PHASES:
        served = serve(merged, phase, attention, products, runner)
        recipes.append(served.recipes)
        functions[phase] = lower(served.module, phase, target, runner)
    if list(recipes[0].items()) != list(recipes[1].items()):
        raise PlanningError("prefill and decode use different weights")
    params = {p.name: p for p in functions["decode"]["main"].params}
    tensors = {
        name: TensorType(str(params[name].ty.dtype.dtype), tuple(int(d.value) for d in dims(params[name])))
        for name in recipes[0]
    }
    return Lowered(functions, recipes[0], tensors, attention, target)


def costs(model: Model, lowered: Lowered, runtime: int) -> Costs:
    """What the planner weighs."""
    arenas = {phase: Arena.of(mod) for phase, mod in lowered.functions.items()}

    @cache
    def arena(chunk: int, batch: int) -> int:
        return max(a.size(_bounds(phase, chunk, batch)) for phase, a in arenas.items())

    sizes = [tensor.bytes for tensor in lowered.tensors.values()]
    return Costs(
        facts=model.facts,
        target=_plain(lowered.target),
        weights=sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes),
        runtime=runtime,
        arena=arena,
        page_size=lowered.attention.page_size,
        tile=lowered.attention.tile,
    )


def _bounds(phase: Phase, chunk: int, batch: int) -> dict[str, int]:
    return {"n": chunk if phase == "prefill" else batch, "r": batch, "b": batch}


def _plain(target: Target) -> dict[str, Any]:
    """The target as JSON values."""
    attrs = {key: target.attrs[key] for key in target.attrs.keys()}  # noqa: SIM118  a TVM map
    kept = {
        k: str(v) if isinstance(v, str) else int(v)
        for k, v in attrs.items()
        if k in ("mcpu", "mtriple", "num-cores")
    }
    return {"kind": "llvm", **kept}


def build_library(lowered: Lowered, plan: Plan, output: Path, runner: Runner) -> None:
    """Generate code for both functions and link it into `output`. Raises TargetError without a linker."""
    finished = {
        phase: finish(mod, phase, _bounds(phase, plan.chunk, plan.max_batch), plan.bytes.arena, runner)
        for phase, mod in lowered.functions.items()
    }
    module = join(finished)
    kernels = sum(isinstance(f, tirx.PrimFunc) for f in module.functions.values())
    runner.report(f"generate code for {kernels} kernels")
    with lowered.target:
        executable = tvm.compile(
            module, lowered.target, relax_pipeline=tvm.transform.Sequential([]), tir_pipeline="default"
        )
    runner.report("link")
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:  # not where temporary files may be few
        executable.export_library(str(output), fcompile=link, workspace_dir=folder)


def packed_weights(model: Model, lowered: Lowered, runner: Runner) -> Iterator[Weight]:
    """The weights in parameter order, each made when it is asked for."""
    sources = model.imported.weights
    for number, (name, recipe) in enumerate(lowered.recipes.items(), 1):
        runner.report(f"write weight {number} of {len(lowered.recipes)}")
        tensor = lowered.tensors[name]
        yield name, tensor.shape, tensor.dtype, partial(stored, recipe, tensor, sources)
