"""The worker of `kvc tune` on the pretend GPU: kernels are compiled in another process, and interpreted here.

    tune_worker FOLDER OPTIONS

With PRETEND_WRONG=keys=16 in the environment decode attention with blocks of 16 keys computes something else.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretend_gpu.build import activate, build
from pretend_gpu.launches import Launches, run_triton


class Compiler:
    """Compiles kernels in a process of its own, where they are not interpreted."""

    def __init__(self) -> None:
        plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "pretend_gpu.compile_kernels"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=plain)

    def __call__(self, kernel: Any, arch: int) -> Any:
        from kvc_passes.errors import PlanningError

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((kernel, arch), self.process.stdin)
        self.process.stdin.flush()
        found = pickle.load(self.process.stdout)
        if isinstance(found, str):
            raise PlanningError(found)
        return found


def main() -> None:
    folder = Path(sys.argv.pop(1))
    compiler = Compiler()
    os.environ["TRITON_INTERPRET"] = "1"
    launches = Launches(activate(build(folder)))
    wrong = os.environ.get("PRETEND_WRONG", "")
    from kvc.tuning import worker

    load = worker.load_runtime

    def compiled(kernel: Any, arch: int) -> Any:
        code = compiler(kernel, arch)
        constants = dict(kernel.constants)
        if kernel.function == "attention.decode" and wrong == f"keys={constants['BN']}":
            constants["FACTOR"] *= 2
        launches.add(kernel.name, run_triton(kernel.load(), kernel.types, constants))
        return code

    def loaded(threads: int) -> Any:
        found = load(threads)
        from kvc.runtime.library import without_torch

        with without_torch():
            from kvc.tuning import cuda, measure, programs

        measure._LEAST_SECONDS = 1e-9  # type: ignore[misc]
        programs._MOST_COPIES = 1  # type: ignore[misc]
        cuda.compile_kernel = compiled
        return found

    worker.load_runtime = loaded
    worker.main()
    launches.check()


if __name__ == "__main__":
    main()
