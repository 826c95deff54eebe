"""A worker that does what its candidates say: measures nothing, crashes, hangs, raises, or is wrong.

faulty_worker.py FOLDER OPTIONS: every start leaves a file in FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvc.tuning import worker
from kvc.tuning.measure import Bench, Measured

FOLDER = Path(sys.argv.pop(1))


def measured(self: Bench, task: Any, values: Mapping[str, int], rounds: int) -> Measured:
    kind = values.get("keys", 0)
    if kind == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 2:
        (FOLDER / "hangs").touch()
        time.sleep(600)
    if kind == 3:
        raise ValueError("the first line\nno such loop")
    if kind == 4:
        return Measured([], [], "3 rows: the result differs")
    if kind == 5:
        sys.exit(7)
    if kind == 6:
        print("noise on stdout")
        os.write(1, b"and more\n")
    if kind == 7:
        raise MemoryError
    if kind == 8:
        Path(os.environ["TMPDIR"], "left").write_text("behind")
    return Measured([[2.0] * rounds], [[float(os.getpid())] * rounds])


(FOLDER / str(os.getpid())).touch()
Bench.measure = measured
if len(sys.argv) > 2 and sys.argv[2] == "never":
    sys.exit(3)
worker.main()
