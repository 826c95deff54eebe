"""The compile API behind `kvc.compile`, `kvc.plan` and `kvc.inspect`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from kvc_passes.errors import InputError
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Plan, Workload
from kvc_passes.sites import STATE_FORMS, FormName

from .artifact import Artifact
from .artifact_writer import ArtifactWriter
from .options import parse_size, parse_workload
from .permissions import Permissions, parse_permissions
from .runtime.library import without_torch
from .runtime.text import Text

with without_torch():
    import tvm.relax  # noqa: F401  before anything else imports it

# ruff: isort: split
from tvm import IRModule

from kvc_passes.state_forms import KEYS

from .compilation import build_libraries, packed_weights, read_model
from .configuration import assets_of
from .encoder import read_encoder
from .frontend.importer import import_onnx
from .frontend.reader import require_file
from .layer_forms import forced_forms, judged
from .machine import Machine
from .pipeline import FunctionName, Runner
from .planning.available import available
from .planning.decide import Decision, Planner
from .planning.saved import checked, read_plan
from .targets import parse_target
from .tuning.records import Choice
from .tuning.target import targets_of
from .tuning.tasks import TASKS, tasks_text
from .tuning.tuned import chosen_kernels, with_records

Report = Callable[[str], None]


def compile(
    path: str | os.PathLike[str],
    *,
    budget: str | int | None = None,
    workload: str | Workload | Iterable[str | Workload] | None = None,
    output: str | os.PathLike[str] | None = None,
    target: str = "cpu",
    allow: str | Iterable[str] = (),
    state: str | None = None,
    plan: str | os.PathLike[str] | None = None,
    encoder: str | os.PathLike[str] | None = None,
    encoder_dims: Mapping[str, int] | None = None,
    tune_db: str | os.PathLike[str] | None = None,
    force: bool = False,
    dump: str | os.PathLike[str] | None = None,
    report: Report | None = None,
    timings: list[tuple[str, float, int]] | None = None,
    kernels: list[tuple[str, Choice]] | None = None,
) -> Artifact:
    """Compile an ONNX decoder into an artifact that keeps to a memory budget.

    Args:
        path: the .onnx file; tokenizer files are taken from `<model>.assets/` or the file's folder.
        budget: most bytes that the running process may use: "8GB" (10^9), "512MiB" (2^20), a number, or
            "auto", what the target's memory has free now.
        workload: batch x context in tokens, alternatives separated by commas: "8x256,1x2048".
        output: the artifact's folder, `<model>.kvc` beside the model by default.
        target: "cpu" (this machine's), "cpu:<LLVM name of a CPU>", such as "cpu:x86-64-v3", or "cuda" and
            "cuda:sm_80,sm_90" for GPUs, whose memory is then what the budget counts.
        allow: permissions to change results beyond rounding, none by default: "window=4096,sinks=4",
            "kv-int8", ...: all are in permissions.KNOWN. Codes are for as few layers as must be in them, or
            where they gain enough time; with `state` "kv-int8" for all.
        state: the form that all layers keep their state in, one of STATE_FORMS, or one for attention over
            the model's own tokens and "encoder_output": "x_absorbed,encoder_output"; "v_only,paged_kv" keeps
            K and V in layers where values alone are not legal. By default the exact forms and the prefill
            chunk with which the workload is predicted to take the least time.
        plan: a file that `kvc plan --save` wrote, perhaps edited: budget, workload, target, permissions and
            forms are taken from it, and everything is checked again.
        encoder: the ONNX file of the encoder whose output the decoder reads, compiled into the same artifact.
        encoder_dims: extents of its inputs that the file leaves open and requests may not choose, by name.
        tune_db: a folder of records of `kvc tune`, which kernels get their parameters from.
        force: replace an artifact that is there already.
        dump: folder for the IR after every pass, numbered.
        report: called with the name of every stage as it begins.
        timings: filled with (pass, seconds, changed places) of every pass.
        kernels: with `tune_db`, filled with (kernel, where its parameters come from).

    Returns:
        the artifact; `kvc.load(artifact.path)` runs it.

    Raises:
        InputError: a file or an option that cannot be used.
        UnsupportedModel: the model fails an import rule or a proof; names the ONNX node.
        BudgetError: the workload cannot fit; says the smallest budget that works.
        TargetError: an unknown target, no linker, or for GPUs no Triton or NVIDIA compiler.
    """
    source = Path(path)
    require_file(source)
    runner = _runner(dump, report, timings)
    destination = Path(output) if output is not None else source.with_suffix(".kvc")
    if destination.resolve() == source.resolve():
        raise InputError(f"{destination}: the output would replace the model; give another --output")
    pair = Pair(source, encoder, encoder_dims)
    decide = _wanted(pair, budget, workload, target, allow, state, plan, tune_db, runner)
    with ArtifactWriter(destination, force=force) as writer:
        decision = decide()
        model, lowered = decision.variant.model, decision.variant.lowered
        made, bounds = decision.encoder, dict[str, int]()
        more: dict[FunctionName, IRModule] = {}
        if made is not None:
            more, bounds = made.functions(decision.plan), made.bounds(decision.plan)
        for library in build_libraries(lowered, decision.plan, writer.folder, runner, more, bounds):
            writer.add(library)
        weights = packed_weights(model, lowered, runner)
        writer.weights(chain(weights, made.packed_weights() if made else ()))
        writer.functions(lowered.takes | ({"encoder": made.takes} if made else {}))
        writer.facts(decision.plan, model.facts)
        writer.assets(assets_of(source))
        writer.text(TASKS, tasks_text(decision, targets_of(lowered.machine)[0]))
        writer.commit()
    if kernels is not None:
        kernels += chosen_kernels(decision, lowered.machine)
    return Artifact.open(destination, verify=False)


def plan(
    path: str | os.PathLike[str],
    *,
    budget: str | int,
    workload: str | Workload | Iterable[str | Workload],
    target: str = "cpu",
    allow: str | Iterable[str] = (),
    state: str | None = None,
    encoder: str | os.PathLike[str] | None = None,
    encoder_dims: Mapping[str, int] | None = None,
    report: Report | None = None,
) -> Plan:
    """The plan that `compile` would build, without generating code. Arguments and errors as for `compile`."""
    alternatives, machine = parse_workload(workload), parse_target(target)
    size = budget_of(budget, machine)
    built = planner(
        path,
        target=target,
        allow=allow,
        state=state,
        encoder=encoder,
        encoder_dims=encoder_dims,
        report=report,
    )
    return built.decide(size, alternatives).plan


def planner(
    path: str | os.PathLike[str],
    *,
    target: str = "cpu",
    allow: str | Iterable[str] = (),
    state: str | None = None,
    encoder: str | os.PathLike[str] | None = None,
    encoder_dims: Mapping[str, int] | None = None,
    tune_db: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> Planner:
    """A model, proved, to be planned for any budgets and workloads: `planner.decide(budget, workload)`.

    Arguments and errors as for `compile`; importing and proving is done once, here.
    """
    pair, machine = Pair(Path(path), encoder, encoder_dims), _machine(target, tune_db)
    require_file(pair.decoder)
    return planner_of(pair, machine, parse_permissions(allow), state, _runner(None, report))


def budget_of(budget: str | int, machine: Machine) -> int:
    """Bytes of a budget; of "auto" what the target's memory has free. Raises InputError, TargetError."""
    if budget == "auto":
        return available(machine.description["kind"])
    return parse_size(budget)


def _wanted(
    pair: Pair,
    budget: str | int | None,
    workload: str | Workload | Iterable[str | Workload] | None,
    target: str,
    allow: str | Iterable[str],
    state: str | None,
    plan: str | os.PathLike[str] | None,
    tune_db: str | os.PathLike[str] | None,
    runner: Runner,
) -> Callable[[], Decision]:
    """Check what was asked for; what is returned decides it."""
    if plan is None:
        if budget is None or workload is None:
            raise InputError("a budget and a workload are needed, or a saved plan")
        machine = _machine(target, tune_db)
        size, alternatives, allowed = (
            budget_of(budget, machine),
            parse_workload(workload),
            parse_permissions(allow),
        )
        return lambda: planner_of(pair, machine, allowed, state, runner).decide(size, alternatives)
    given = {"budget": budget, "workload": workload, "state": state, "allow": tuple(allow) or None}
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--plan says the {name}, too: give one of them, or edit the plan")
    if target != "cpu":
        raise InputError("--plan says the target, too: give one of them, or edit the plan")
    saved = read_plan(Path(plan))
    machine, allowed = _machine(saved.target, tune_db), parse_permissions(saved.allow)
    return lambda: checked(planner_of(pair, machine, allowed, None, runner), saved, Path(plan))


def _machine(target: str, tune_db: str | os.PathLike[str] | None) -> Machine:
    """The target, with kernels as they were tuned for it. Raises TargetError, InputError."""
    machine = parse_target(target)
    return machine if tune_db is None else with_records(machine, Path(tune_db))


@dataclass(frozen=True)
class Pair:
    """A decoder, and the encoder that is compiled with it; arguments as for `compile`."""

    decoder: Path
    encoder: str | os.PathLike[str] | None = None
    encoder_dims: Mapping[str, int] | None = None


def planner_of(
    pair: Pair, machine: Machine, allow: Permissions, state: str | None, runner: Runner
) -> Planner:
    """Import and prove a model; meanwhile measure what a process takes here."""
    names, source = _forms(state), pair.decoder
    if pair.encoder is not None:
        require_file(Path(pair.encoder))
    elif pair.encoder_dims:
        raise InputError("--encoder-dim is for an encoder: give it, too")
    runner.report("import")
    imported = import_onnx(source, allow.names)
    Text.check(assets_of(source))
    weights = sum(imported.file.parameter_bytes().values())
    with ThreadPoolExecutor(1) as pool:
        runtime = pool.submit(machine.runtime_bytes, assets_of(source), weights)
        model = read_model(imported, allow, machine.page_size, runner)
        kind = machine.description["kind"]
        for form in names:
            if form not in machine.forms:
                raise InputError(f"--state {form}: there are no kernels for it on the target {kind} yet")
        if set(names) & set(KEYS):
            model = judged(model, runner)
        encoder = None
        if pair.encoder is not None:
            wanted, fixed = imported.roles.memory, pair.encoder_dims or {}
            encoder = read_encoder(Path(pair.encoder), model.facts, wanted, fixed, machine, runner)
            model = replace(model, facts=replace(model.facts, encoder=encoder.facts))
        forced = forced_forms(model, names) if names else ()
        return Planner(model, machine, runtime.result(), runner, forced, encoder)


def _forms(state: str | None) -> tuple[FormName, ...]:
    """The forms that are asked for: one at most for each kind of attention, and K and V for what is left."""
    found: list[FormName] = []
    for part in state.split(",") if state is not None else ():
        name = next((name for name in STATE_FORMS if name == part.strip()), None)
        if name is None:
            raise InputError(
                f"there is no form of state '{part.strip()}'; there are: {', '.join(STATE_FORMS)}"
            )
        found.append(name)
    others = [name for name in found if name != "paged_kv"]
    if len({name == "encoder_output" for name in others}) != len(others):
        raise InputError(
            f"--state {state}: all layers of a kind have one form; give one, encoder_output, and paged_kv "
            "for layers that it is not legal for"
        )
    return tuple(found)


def inspect(
    path: str | os.PathLike[str], *, allow: str | Iterable[str] = (), report: Report | None = None
) -> ModelFacts:
    """What can be proved about a model: attention sites, masks, positions, sizes.

    Raises:
        InputError: the file cannot be read.
        UnsupportedModel: a proof fails; names the ONNX node and the rule.
    """
    runner = _runner(None, report)
    runner.report("import")
    permissions = parse_permissions(allow)
    model = read_model(import_onnx(Path(path), permissions.names), permissions, 1, runner)
    return judged(model, runner).facts


def _runner(
    dump: str | os.PathLike[str] | None,
    report: Report | None,
    timings: list[tuple[str, float, int]] | None = None,
) -> Runner:
    return Runner(
        dump=None if dump is None else Path(dump),
        report=report or (lambda name: None),
        timings=[] if timings is None else timings,
    )
