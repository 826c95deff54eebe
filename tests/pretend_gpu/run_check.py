"""Runs the GPU check of a pack on the pretend GPU: `python -m pretend_gpu.run_check`.

    run_check PACK DUMP FOLDER [OPTION...]

DUMP is the folder that `gpu_pack.py --dump` wrote the generated CUDA text to, FOLDER keeps compiled
libraries. What runs is the pack's own copy of everything.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from pretend_gpu.build import activate, build
from pretend_gpu.launches import Launches
from pretend_gpu.run_artifact import add_kernels


def main() -> None:
    pack, dump, folder = (Path(a) for a in sys.argv[1:4])
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(pack), str(pack / "python")]
    launches = Launches(activate(build(folder)))
    for built in (pack / "kernels", pack / "boxed", *sorted((pack / "models").iterdir())):
        add_kernels(launches, built, dump / built.name / "kernels.sm_90.cu", "sm_90", folder)
    sys.argv = [str(pack / "tools" / "gpu_check.py"), *sys.argv[4:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        launches.check()


if __name__ == "__main__":
    main()
