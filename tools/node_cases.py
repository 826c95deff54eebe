"""Runs the backend node cases of the installed onnx package through kvc's importer and LLVM.

    python -m tools.node_cases [--ops Attention,Gather] [--jobs 2] [--output docs/node-cases.md]

A case passes when every output has the expected type, shape and, within the case's own tolerances, numbers.
It is refused when the importer says why it does not take it. Anything else is a failure: wrong numbers, an
internal error, a crash, or more than 20 seconds. Cases run in processes of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, version_converter
from onnx.backend.test.case.node import collect_testcases
from tools.node_cases_report import OPERATORS, Outcome, report, table

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 20.0  # seconds a case
START = 60.0  # seconds for the first case of a process, which imports TVM

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Case:
    """A case that can be sent to another process.

    Attributes:
        name: without the leading "test_".
        op: the operator it is about; also for its spelled-out twin ("_expanded").
        model: the serialized model.
        data: inputs and expected outputs, one or more sets.
    """

    name: str
    op: str
    model: bytes
    data: tuple[tuple[Arrays, Arrays], ...]
    rtol: float
    atol: float


def cases(operators: Iterable[str] | None = None) -> list[Case]:
    """The cases of the installed onnx package for `operators`, by default those of `OPERATORS`."""
    wanted = set(operators or (op for group in OPERATORS.values() for op in group))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference computes with infinities and overflows
        np.random.seed(0)
        found = collect_testcases(None)
    single = {c.name: c.model.graph.node[0].op_type for c in found if len(c.model.graph.node) == 1}
    result = []
    for case in found:
        op = single.get(re.sub(r"_expanded(_ver\d+)?$", "", case.name), single.get(case.name, ""))
        if op in wanted:
            data = tuple((_arrays(inputs), _arrays(outputs)) for inputs, outputs in case.data_sets)
            model = case.model.SerializeToString()
            result.append(Case(case.name.removeprefix("test_"), op, model, data, case.rtol, case.atol))
    return result


def _arrays(values: Sequence[Any]) -> list[Any]:
    return [onnx.numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for v in values]


def run_case(case: Case) -> Outcome:
    """Import, compile and run one case in this process."""
    from kvc_passes.errors import UnsupportedModel

    model = _current(onnx.ModelProto.FromString(case.model))
    outcome = Outcome(case.name, case.op, "passed")
    try:
        try:
            halves = _run(model, case, range(len(model.graph.input)))
        except UnsupportedModel as error:
            kept = _constant_inputs(model, case)
            if kept is None:
                raise
            outcome = dataclasses.replace(outcome, constants=True)
            try:
                halves = _run(model, case, kept)
            except UnsupportedModel:
                raise error from None
    except UnsupportedModel as error:
        return Outcome(case.name, case.op, "refused", _reason(error))
    except Exception as error:  # whatever TVM raises is this case's failure
        return Outcome(case.name, case.op, "failed", f"{type(error).__name__}: {_reason(error)}")
    return dataclasses.replace(outcome, halves=halves)


def _current(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in opset 13, if it is older and onnx can convert it: what kvc tells people to do."""
    if all(entry.version >= 13 for entry in model.opset_import if entry.domain == ""):
        return model
    try:
        return version_converter.convert_version(model, 13)
    except Exception:  # kvc then refuses the old one
        return model


def _run(model: onnx.ModelProto, case: Case, kept: Sequence[int]) -> bool:
    """Compile and compare; True if that took two units in the last place of a float16."""
    import tvm
    from tvm import relax

    from kvc.frontend.importer import import_graph
    from kvc_passes.expand_markers import ExpandMarkers

    module = ExpandMarkers().run(import_graph(model, case.name)).module
    target = tvm.target.Target({"kind": "llvm", "opt-level": 0})
    machine = relax.VirtualMachine(
        tvm.compile(relax.transform.AttachGlobalSymbol()(module), target), tvm.cpu()
    )
    halves = False
    for inputs, expected in case.data:
        given = [tvm.runtime.tensor(np.array(inputs[i], order="C")) for i in kept]
        result = machine["main"](*given)
        many = [result] if hasattr(result, "numpy") else list(result)
        halves |= _compare([r.numpy() for r in many], expected, case)
    return halves


_LAST_PLACES = {"bfloat16": 2**-6, "float16": 2**-9}
"""Relative tolerances: two units in the last place. onnx's own runner allows them for bfloat16; the cases'
1e-3 is one unit of a float16, and their expectations were themselves rounded to float16 at every step."""


def _compare(got: Arrays, expected: Arrays, case: Case) -> bool:
    if len(got) != len(expected):
        raise AssertionError(f"{len(got)} outputs instead of {len(expected)}")
    halves = False
    for index, (a, b) in enumerate(zip(got, map(np.asarray, expected))):
        if a.dtype != b.dtype or a.shape != b.shape:
            raise AssertionError(f"output {index} is {a.dtype} {a.shape}, not {b.dtype} {b.shape}")
        if a.dtype.kind in "biu":
            np.testing.assert_array_equal(a, b, f"output {index}")
            continue
        wide, own = np.float64, a.dtype.name
        rtol = max(case.rtol, _LAST_PLACES.get(own, 0.0))
        np.testing.assert_allclose(a.astype(wide), b.astype(wide), rtol, case.atol, err_msg=f"output {index}")
        halves |= own == "float16" and not np.allclose(
            a.astype(wide), b.astype(wide), case.rtol, case.atol, equal_nan=True
        )
    return halves


def _constant_inputs(model: onnx.ModelProto, case: Case) -> list[int] | None:
    """Make scalars and integer vectors among the inputs into initializers, in place.

    Returns the places of the inputs that stay, None if nothing changed or the sets of data differ.
    """
    kept: list[int] = []
    constant: list[int] = []
    for index, value in enumerate(model.graph.input):
        kind = value.type.tensor_type
        rank, whole = len(kind.shape.dim), kind.elem_type in (TensorProto.INT64, TensorProto.INT32)
        (constant if rank == 0 or (rank == 1 and whole) else kept).append(index)
    if not constant or len(case.data) != 1:
        return None
    for index in constant:
        array = np.asarray(case.data[0][0][index])
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, model.graph.input[index].name))
    for index in reversed(constant):
        del model.graph.input[index]
    return kept


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(lines)[:400] if lines else type(error).__name__


def work(connection: Any) -> None:
    """A worker: receives cases, sends outcomes, until it receives None."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TVM warns about every function that was refused halfway
    while (case := connection.recv()) is not None:
        connection.send(run_case(case))


def run_all(selected: Sequence[Case], jobs: int = 2) -> list[Outcome]:
    """Run cases in `jobs` worker processes; a crash or a hang is the failure of its case alone."""
    queue: SimpleQueue[Case] = SimpleQueue()
    for case in selected:
        queue.put(case)
    outcomes: dict[str, Outcome] = {}
    threads = [threading.Thread(target=_drive, args=(queue, outcomes)) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[case.name] for case in selected]


def _drive(queue: SimpleQueue[Case], outcomes: dict[str, Outcome]) -> None:
    """Keep one worker busy; start another after a crash or a hang."""
    context = multiprocessing.get_context("spawn")
    worker, ours, fresh = None, None, True
    try:
        while True:
            case = queue.get_nowait()
            if worker is None:
                ours, theirs = context.Pipe()
                worker, fresh = context.Process(target=work, args=(theirs,), daemon=True), True
                worker.start()
                theirs.close()
            outcome = _ask(ours, case, START if fresh else TIMEOUT)
            fresh = False
            outcomes[case.name] = outcome
            if outcome.reason in (_HUNG, _CRASHED):
                worker.kill()
                worker = None
    except Empty:
        if worker is not None and ours is not None:
            ours.send(None)
            worker.join()


_HUNG = f"took more than {TIMEOUT:.0f} s"
_CRASHED = "the process crashed"


def _ask(connection: Any, case: Case, seconds: float) -> Outcome:
    try:
        connection.send(case)
        if connection.poll(seconds):
            answer: Outcome = connection.recv()
            return answer
        return Outcome(case.name, case.op, "failed", _HUNG)
    except (EOFError, OSError):
        return Outcome(case.name, case.op, "failed", _CRASHED)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ops", help="operators, separated by commas; no report is written")
    parser.add_argument("--match", default="", help="a regular expression that names must contain")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "node-cases.md")
    options = parser.parse_args(arguments)
    selected = cases(options.ops.split(",") if options.ops else None)
    outcomes = run_all([c for c in selected if re.search(options.match, c.name)], options.jobs)
    for outcome in outcomes:
        if outcome.status == "failed" or (options.ops and outcome.status == "refused"):
            print(f"{outcome.status} {outcome.name}: {outcome.reason}")
    print("\n".join(table(outcomes)))
    if not options.ops and not options.match:
        options.output.write_text(report(outcomes))
    return 1 if any(o.status == "failed" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
