"""Measuring a candidate beside the default on a machine: this one, or one behind an RPC tracker of TVM's."""

from __future__ import annotations

import statistics
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tvm_ffi
from tvm import relax, runtime

from kvc_passes.kernel_sets import TensorType

from ..runtime.host_memory import placed
from ..runtime.library import DEVICE_CPU
from .programs import Operands, filled
from .target import Target
from .tasks import Task

_LEAST_SECONDS: Final = 0.004
"""One timing takes so long at least."""
_KEPT: Final = 4


@dataclass(frozen=True)
class Measured:
    """Seconds of one call, of every round, for each size; or what is wrong with the results."""

    seconds: list[list[float]]
    default: list[list[float]]
    wrong: str = ""


class Here:
    """This machine's CPU in the place of a session of TVM's RPC, which would copy operands elsewhere."""

    def upload(self, path: str) -> None:
        self._folder = Path(path).parent

    def load_module(self, name: str) -> Any:
        return runtime.load_module(str(self._folder / name))

    def remove(self, name: str) -> None:
        """Nothing was copied."""

    def cpu(self, number: int) -> Any:
        return runtime.cpu(number)


class Bench:
    """Builds kernels for a target, and measures them where `open_session` says."""

    def __init__(self, target: Target, open_session: Callable[[], Any]) -> None:
        self.target, self.open = target, open_session
        self._folder = tempfile.TemporaryDirectory(prefix="kvc-tune-")
        self._libraries: OrderedDict[tuple[Any, ...], Path] = OrderedDict()
        self._number = 0

    def measure(self, task: Task, values: Mapping[str, int], rounds: int) -> Measured:
        """Check a candidate's results against the default's, then time both in turn."""
        libraries = [self._built(task, {}), self._built(task, values)]
        session = self.open()
        device = self.target.device(session)
        try:
            runs = []
            for path in libraries:
                session.upload(str(path))
                runs.append(relax.VirtualMachine(session.load_module(path.name), device))
            found = Measured([], [])
            for number, bucket in enumerate(task.buckets):
                pair = [self.target.operands(task, bucket, v) for v in ({}, values)]
                wrong = self._prepare(task, runs, pair, f"size{number}", device)
                if wrong:
                    return Measured([], [], f"{bucket.rows} rows: {wrong}")
                default, seconds = self._times(runs, f"size{number}", pair[0].copies, rounds, device)
                found.default.append(default)
                found.seconds.append(seconds)
            return found
        finally:
            for path in libraries:
                session.remove(path.name)

    def _built(self, task: Task, values: Mapping[str, int]) -> Path:
        """A library of the kernel; the last few are kept, the default's among them."""
        key = (task.key, task.sizes, tuple(sorted(values.items())))
        if key in self._libraries:
            self._libraries.move_to_end(key)
            return self._libraries[key]
        self._number += 1
        path = Path(self._folder.name) / f"kernel{self._number}.so"
        self.target.build(task, values, path)
        self._libraries[key] = path
        while len(self._libraries) > _KEPT:
            self._libraries.popitem(last=False)[1].unlink()
        return path

    def _prepare(self, task: Task, runs: list[Any], pair: list[Operands], function: str, device: Any) -> str:
        """Give both their operands and run them once; how the results differ, empty if they do not."""
        results = []
        tensors = [_copies(each, pair[0].copies, device) for each in pair[0].cold.values()]
        cold = [tensor for copy in zip(*tensors, strict=True) for tensor in copy]
        for run, given in zip(runs, pair):
            warm = [_tensor(a, str(a.dtype), device) for a in given.warm.values()]
            run.set_input(function, *warm, *cold)
            run.invoke_stateful(function)
            results.append(run.get_outputs(function)[-1].numpy().astype(np.float32))
        default, candidate = results
        if not np.isfinite(candidate).all():
            return "the result has numbers that are not finite"
        apart, most = float(np.abs(default - candidate).max()), float(np.abs(default).max())
        if apart > self.target.tolerance(task) * most:
            return f"the result differs by {apart:.2g} from the default's, of at most {most:.2g}"
        return ""

    def _times(
        self, runs: list[Any], function: str, copies: int, rounds: int, device: Any
    ) -> tuple[list[float], list[float]]:
        """Seconds of a call in every round, of the default and of the candidate."""
        once = [run.time_evaluator("invoke_stateful", device, number=1, repeat=1) for run in runs]
        number = max(1, round(_LEAST_SECONDS / max(once[0](function).mean, 1e-7)))
        timers = [run.time_evaluator("invoke_stateful", device, number=number, repeat=1) for run in runs]
        found: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 else (1, 0):
                found[which].append(float(timers[which](function).mean) / copies)
        return found


def _copies(type_: TensorType, count: int, device: Any) -> list[Any]:
    """Tensors of a type; what goes to another machine goes once."""
    values = filled(type_)
    if _is_here(device):
        return [_tensor(values, type_.dtype, device) for _ in range(count)]
    first = _tensor(values, type_.dtype, device)
    return [first, *(first.copyto(runtime.empty(first.shape, first.dtype, device)) for _ in range(count - 1))]


def _is_here(device: Any) -> bool:
    """Whether it is this machine's CPU: those of servers have larger numbers."""
    return bool(device.dlpack_device_type() == DEVICE_CPU)


def _tensor(array: Any, dtype: str, device: Any) -> Any:
    """An array of what numpy holds a dtype in; on this CPU where the runtime would have it, in huge pages."""
    if _is_here(device):
        return placed(tvm_ffi, array, dtype)
    if dtype != "bfloat16":
        return runtime.tensor(array, device)
    tensor = runtime.empty(array.shape, "bfloat16", device)
    tensor.copyfrom(array)
    return tensor


def compared(measured: Measured, calls: Sequence[float]) -> tuple[str, float, list[float], list[float]]:
    """Outcome, share of the default's time, and the medians of each size, of the candidate and the default.

    Better or worse is what differs by more than both vary: half the range of the middle half of the rounds.
    """
    medians = [[statistics.median(t) for t in side] for side in (measured.seconds, measured.default)]
    totals = [sum(c * t for c, t in zip(calls, side)) for side in medians]
    spread = 0.0
    for side in (measured.seconds, measured.default):
        for times, count in zip(side, calls):
            low, _, high = statistics.quantiles(times, n=4)
            spread += count * (high - low) / 2
    apart = totals[1] - totals[0]
    outcome = "even" if abs(apart) <= spread else "better" if apart > 0 else "worse"
    return outcome, totals[0] / totals[1], medians[0], medians[1]
