"""Greedy tokens and logits of an artifact: `python -m pretend_gpu.generate ARTIFACT OUT STEPS PROMPT...`.

With PRETEND_DUMP (the folder of generated CUDA text) and PRETEND_FOLDER (for compiled libraries) in the
environment the artifact runs on the pretend GPU, else on the CPU it was compiled for. PROMPT are token ids.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pretend_gpu.build import activate, build
from pretend_gpu.launches import Launches
from pretend_gpu.run_artifact import add_kernels


def main() -> None:
    artifact, out = Path(sys.argv[1]), Path(sys.argv[2])
    steps, prompt = int(sys.argv[3]), [int(t) for t in sys.argv[4:]]
    launches = None
    if "PRETEND_DUMP" in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        folder, dump = Path(os.environ["PRETEND_FOLDER"]), Path(os.environ["PRETEND_DUMP"])
        launches = Launches(activate(build(folder)))
        add_kernels(launches, artifact, dump / "kernels.sm_90.cu", "sm_90", folder)
    import numpy as np

    from kvc.artifact import Artifact
    from kvc.runtime.executor import Executor, Segment

    executor = Executor(Artifact.open(artifact), warm=False)
    pages = [range(-(-(len(prompt) + steps) // executor.plan.page_size))] * len(executor.plan.groups)
    rows = [executor.prefill([Segment(prompt, 0, pages)])[0].copy()]
    for step in range(steps - 1):
        call = [Segment([int(rows[-1].argmax())], len(prompt) + step, pages)]
        rows.append(executor.decode(call)[0].copy())
    if launches is not None:
        launches.check()
    np.savez(out, logits=np.stack(rows))


if __name__ == "__main__":
    main()
