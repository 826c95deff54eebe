"""A process that measures candidates for another one, which may kill it at any time.

A line of JSON comes in for every candidate, and one goes out; the process ends when its input does.

    python -m kvc.tuning.worker '{"target": {...}, "rpc": ["host", 9190], "key": "gpu"}'
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Final

from kvc_passes.errors import Error

from ..runtime.library import load_runtime, without_torch

_WAIT: Final = 60
"""Seconds a server is waited for, and a session lasts."""
_TRIES: Final = 3


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    options = json.loads(sys.argv[1])
    load_runtime(int(options["target"].get("num-cores", 1)))
    with without_torch():
        from ..targets import described
        from .measure import Bench
        from .target import targets_of
    (target,) = targets_of(described(options["target"]))
    bench = Bench(target, _sessions(options))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(bench, json.loads(line), "rpc" in options)), file=answers, flush=True)


def _sessions(options: dict[str, Any]) -> Callable[[], Any]:
    """What opens a session: here, or on a server that the tracker gives."""
    from tvm import rpc

    from .measure import Here

    if "rpc" not in options:
        local = Here() if options["target"]["kind"] == "llvm" else rpc.LocalSession()
        return lambda: local

    def request() -> Any:
        tracker = rpc.connect_tracker(*options["rpc"])
        return tracker.request(options["key"], priority=1, session_timeout=_WAIT)

    return request


def _answer(bench: Any, request: dict[str, Any], remote: bool) -> dict[str, Any]:
    """What was measured, or {"failed": why, "spoilt": whether this process can measure no more}.

    Where a server was lost, another is asked.
    """
    from tvm.error import RPCError

    from .tasks import Task

    task, problem, spoilt = Task.of(request["task"]), "", False
    for _ in range(_TRIES if remote else 1):
        try:
            found = bench.measure(task, request["values"], request["rounds"])
            return {"seconds": found.seconds, "default": found.default, "wrong": found.wrong}
        except Exception as error:  # whatever a candidate does is its own failure
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
            spoilt = bench.target.lasting and not remote and not isinstance(error, Error)
            if not isinstance(error, RPCError | OSError | RuntimeError):
                break
        finally:
            gc.collect()  # virtual machines are parts of cycles, and keep a server busy while they last
    return {"failed": problem[:300], "spoilt": spoilt}


if __name__ == "__main__":
    main()
