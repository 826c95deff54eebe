"""Try the README as a newcomer would: clone HEAD into a temporary folder and run the make targets there.

    python tools/fresh_clone.py [demo] [test] [check]

Every target sets up its own virtual environment. Prints what was run and how long it took; exits with the
status of the first target that fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the targets; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("targets", nargs="*", default=["demo", "test"], help="make targets (demo test)")
    parser.add_argument("--keep", action="store_true", help="keep the clone")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvc-fresh-"))
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "KVC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "kvc")], check=True)
    for target in options.targets:
        start = time.perf_counter()
        done = subprocess.run(["make", target], cwd=folder / "kvc", env=environment, check=False)
        print(
            f"make {target}: exit status {done.returncode} after {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if done.returncode:
            return done.returncode
    if options.keep:
        print(folder / "kvc")
    else:
        subprocess.run(["rm", "-rf", str(folder)], check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
