"""Compiles kernels for tune_worker, until its input ends: pickled (kernel, architecture) in, its code out.

A kernel that does not compile gives the reason, a text.
"""

from __future__ import annotations

import os
import pickle
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from kvc.kernels.cuda.device import compile_kernel
    from kvc_passes.errors import PlanningError

    while sys.stdin.buffer.peek(1):
        kernel, arch = pickle.load(sys.stdin.buffer)
        try:
            found: object = compile_kernel(kernel, arch)
        except PlanningError as error:
            found = str(error)
        pickle.dump(found, answers)
        answers.flush()


if __name__ == "__main__":
    main()
