"""The compile API behind `kvc.compile`, `kvc.plan` and `kvc.inspect`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvc_passes.errors import InputError
from kvc_passes.facts import ModelFacts, Plan, Workload

from .artifact import Artifact, ArtifactWriter
from .compilation import assets_of, build_library, costs, lower_model, packed_weights, read_model
from .options import parse_size, parse_workload
from .pipeline import Runner
from .planner import make_plan
from .runtime.overhead import measure
from .targets import parse_target

Report = Callable[[str], None]


def compile(
    path: str | os.PathLike[str],
    *,
    budget: str | int,
    workload: str | Iterable[str | Workload],
    output: str | os.PathLike[str] | None = None,
    target: str = "cpu",
    force: bool = False,
    dump: str | os.PathLike[str] | None = None,
    report: Report | None = None,
    runner: Runner | None = None,
) -> Artifact:
    """Compile an ONNX decoder into an artifact that keeps to a memory budget.

    Args:
        path: the .onnx file; tokenizer files are taken from `<model>.assets/` or the file's folder.
        budget: most bytes that the running process may use: "8GB" (10^9), "512MiB" (2^20) or a number.
        workload: batch x context in tokens, alternatives separated by commas: "8x256,1x2048".
        output: the artifact's folder, `<model>.kvc` beside the model by default.
        target: "cpu" (this machine's) or "cpu:<LLVM name of a CPU>", such as "cpu:x86-64-v3".
        force: replace an artifact that is there already.
        dump: folder for the IR after every pass, numbered.
        report: called with the name of every stage as it begins.
        runner: collects timings of the passes; made from `dump` and `report` by default.

    Returns:
        the artifact; `kvc.load(artifact.path)` runs it.

    Raises:
        InputError: a file or an option that cannot be used.
        UnsupportedModel: the model fails an import rule or a proof; names the ONNX node.
        BudgetError: the workload cannot fit; says the smallest budget that works.
        TargetError: an unknown target, or no linker.
    """
    source = Path(path)
    runner = runner or _runner(dump, report)
    destination = Path(output) if output is not None else source.with_suffix(".kvc")
    if destination.resolve() == source.resolve():
        raise InputError(f"{destination}: the output would replace the model; give another --output")
    size, alternatives, machine = parse_size(budget), parse_workload(workload), parse_target(target)
    with ArtifactWriter(destination, force=force) as writer:
        with ThreadPoolExecutor(1) as pool:
            runtime = pool.submit(measure, assets_of(source)) if source.is_file() else None
            model = read_model(source, runner)
            lowered = lower_model(model, machine, runner)
            overhead = runtime.result() if runtime else 0
        plan = make_plan(costs(model, lowered, overhead), size, alternatives)
        build_library(lowered, plan, writer.folder / "model.so", runner)
        writer.add("model.so")
        runner.report("write weights")
        writer.weights(packed_weights(model, lowered, runner))
        writer.facts(plan, model.facts)
        writer.assets(assets_of(source))
        writer.commit()
    return Artifact.open(destination, verify=False)


def plan(
    path: str | os.PathLike[str],
    *,
    budget: str | int,
    workload: str | Iterable[str | Workload],
    target: str = "cpu",
    report: Report | None = None,
) -> Plan:
    """The plan that `compile` would build, without generating code. Arguments and errors as for `compile`."""
    source, runner = Path(path), _runner(None, report)
    size, alternatives, machine = parse_size(budget), parse_workload(workload), parse_target(target)
    with ThreadPoolExecutor(1) as pool:
        runtime = pool.submit(measure, assets_of(source)) if source.is_file() else None
        model = read_model(source, runner)
        lowered = lower_model(model, machine, runner)
        overhead = runtime.result() if runtime else 0
    return make_plan(costs(model, lowered, overhead), size, alternatives)


def inspect(path: str | os.PathLike[str], *, report: Report | None = None) -> ModelFacts:
    """What can be proved about a model: attention sites, masks, positions, sizes.

    Raises:
        InputError: the file cannot be read.
        UnsupportedModel: a proof fails; names the ONNX node and the rule.
    """
    return read_model(Path(path), _runner(None, report)).facts


def _runner(dump: str | os.PathLike[str] | None, report: Report | None) -> Runner:
    return Runner(dump=None if dump is None else Path(dump), report=report or (lambda name: None))
