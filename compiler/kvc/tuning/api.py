"""`kvc.tune`: a tuning run, from a model or an artifact to a database."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvc_passes.errors import InputError, TargetError
from kvc_passes.plans import Workload

from ..api import budget_of, planner
from ..artifact import Artifact
from ..options import parse_workload
from ..targets import parse_target
from .cuda import CudaTarget
from .database import Database
from .runner import Fleet, Worker
from .search import Search, Trial, Tuned
from .target import Target, targets_of
from .tasks import KERNELS, TASKS, Task, find_tasks

_DEFAULT_CONTEXT: Final = 1024


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        tasks: what is known of every kernel.
        database: the file that has the records.
        predicted: seconds that the plan says the workload takes, with kernels that are not tuned.
    """

    tasks: tuple[Tuned, ...]
    database: Path
    predicted: float


def tune(
    path: str | os.PathLike[str],
    *,
    db: str | os.PathLike[str],
    trials: int = 200,
    seconds: float | None = None,
    budget: str | int = "auto",
    workload: str | Workload | Iterable[str | Workload] | None = None,
    target: str = "cpu",
    allow: str | Iterable[str] = (),
    state: str | None = None,
    kernels: Iterable[str] = tuple(KERNELS),
    rpc: str | None = None,
    key: str | None = None,
    timeout: float = 60.0,
    seed: int = 0,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    report: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Measure candidates for the kernels of a planned model, and record them for `compile(tune_db=db)`.

    Args:
        path: an ONNX file, which is planned first, or an artifact, whose plan is taken.
        db: the folder of records; a run goes on where those that are there end.
        trials: most candidates that are measured.
        seconds: most time for them; None for no limit.
        budget, workload, target, allow, state: as for `compile`, for an ONNX file; by default all that is
            free, and one request of 1,024 tokens or of as many as the model has.
        kernels: what is tuned: "gemm", "attention".
        rpc, key: "HOST:PORT" of a tracker of TVM's RPC, and the key of the servers that measure; by default
            this machine does.
        timeout: seconds after which a candidate is given up.
        seed: of the order of candidates.
        on_trial: called after every candidate, from any thread.
        report: called with the name of every stage as it begins.

    Raises:
        InputError: a file, option, database, tracker or key that cannot be used; what was measured is kept.
        UnsupportedModel, BudgetError, TargetError: as for `compile`; and for several architectures of GPUs,
            or without a GPU to measure on.
    """
    wanted = _kernels(kernels)
    if trials < 1:
        raise InputError(f"--trials {trials}: at least one candidate has to be measured")
    if seconds is not None and seconds <= 0:
        raise InputError(f"--time: {seconds} seconds are no time")
    if not timeout > 0:
        raise InputError(f"--timeout {timeout:g}: a candidate needs some time")
    fleet = parse_fleet(rpc, key)
    source = Path(path)
    artifact = Artifact.open(source, verify=False) if source.is_dir() else None
    own = _single(target) if artifact is None else _of_artifact(artifact, target)
    if fleet is None:
        own.check()
    elif isinstance(own, CudaTarget) and artifact is None and budget == "auto":
        raise InputError("what the servers' GPUs have free is not known here: give a --budget")
    tasks, predicted = (
        _tasks_of(artifact)
        if artifact is not None
        else _of_model(source, budget, workload, own, target, allow, state, report)
    )
    chosen = [task for task in tasks if task.kernel in wanted]
    if not chosen:
        raise InputError(f"{source}: the model has none of the kernels asked for: {', '.join(kernels)}")
    database = Database(Path(db))
    database.create()
    count = 1 if fleet is None else fleet.servers()
    search = Search(chosen, own, database, trials=trials, seconds=seconds, report=on_trial, seed=seed)
    report("measure")
    found = search.run([Worker(own.description, fleet, timeout) for _ in range(count)])
    return Outcome(tuple(found), database.path, predicted)


def parse_fleet(rpc: str | None, key: str | None) -> Fleet | None:
    """Raises InputError for an address that is none, or one of the two without the other."""
    if rpc is None and key is None:
        return None
    if rpc is None or key is None:
        raise InputError("--rpc HOST:PORT and --key NAME belong together")
    host, _, port = rpc.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--rpc {rpc}: write it as HOST:PORT")
    return Fleet(host, int(port), key)


def _kernels(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        if name not in KERNELS:
            raise InputError(f"--kernels {name}: there are: {', '.join(KERNELS)}")
        found.update(KERNELS[name])
    return found


def _single(text: str) -> Target:
    """The target that is tuned. Raises TargetError for several architectures."""
    found = targets_of(parse_target(text))
    if len(found) > 1:
        names = " or ".join(f"--target cuda:{target.key}" for target in found)
        raise TargetError(
            f"--target {text}: the kernels of one architecture are tuned at a time: give {names}"
        )
    return found[0]


def _of_artifact(artifact: Artifact, text: str) -> Target:
    """The target of an artifact's library; of several the one that --target says."""
    described = artifact.plan.target
    if described["kind"] != "cuda":
        return _single(f"cpu:{described['mcpu']}")
    asked = text.removeprefix("cuda:")
    return _single(f"cuda:{asked if asked in described['archs'] else ','.join(described['archs'])}")


def _of_model(
    source: Path,
    budget: str | int,
    workload: str | Workload | Iterable[str | Workload] | None,
    own: Target,
    target: str,
    allow: str | Iterable[str],
    state: str | None,
    report: Callable[[str], None],
) -> tuple[Sequence[Task], float]:
    built = planner(source, target=target, allow=allow, state=state, report=report)
    if workload is None:
        context = min(_DEFAULT_CONTEXT, built.model.facts.context or _DEFAULT_CONTEXT)
        workload = Workload(1, context, memory=1500 if built.model.facts.reads_memory else 0)
    decision = built.decide(budget_of(budget, built.machine), parse_workload(workload))
    predicted = sum(t.seconds for t in decision.plan.times)
    return find_tasks(decision, own), predicted


def _tasks_of(artifact: Artifact) -> tuple[Sequence[Task], float]:
    file = artifact.file(TASKS)
    if file is None:
        raise InputError(
            f"{artifact.path}: the artifact does not say what its kernels are; tune its ONNX file"
        )
    try:
        data = json.loads(file.read_text())
        return [Task.of(task) for task in data["tasks"]], float(data["predicted"])
    except (KeyError, TypeError, ValueError, OSError):
        raise InputError(f"{file}: the artifact is damaged; compile it again") from None
