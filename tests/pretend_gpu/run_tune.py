"""Runs the kvc command on the pretend GPU, also its processes that measure: `python -m pretend_gpu.run_tune`.

    run_tune FOLDER ARGUMENT...

FOLDER keeps compiled libraries, the arguments are kvc's. Kernels run in Triton's interpreter: what they take
means nothing, so that each is timed as shortly as possible.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pretend_gpu.build import activate, build


def main() -> None:
    folder = Path(sys.argv[1])
    activate(build(folder))
    from kvc import cli
    from kvc.tuning import search
    from kvc.tuning.runner import Worker

    search._ROUNDS = 2  # type: ignore[misc]
    Worker.command = (sys.executable, "-m", "pretend_gpu.tune_worker", str(folder))
    sys.exit(cli.main(sys.argv[2:]))


if __name__ == "__main__":
    main()
