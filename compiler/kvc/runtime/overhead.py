"""How much memory a process needs before it holds a model: Bytes.runtime of a plan.

    python -m kvc.runtime.overhead [FOLDER]

Measured, not estimated: a fresh interpreter imports what `kvc run` imports, loads TVM's runtime with its
threads and the tokenizer of FOLDER, uses each once, and reports what it has resident then (`settled`) and the
most that it ever had (`peak`, more by about 25 MiB: reading a tokenizer takes memory for a moment). A model
is loaded after that moment, so a run's peak is `settled` plus the model's bytes, but never below `peak`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from kvc_passes.errors import TargetError

_MIB: Final = 1 << 20
MARGIN: Final = 8 * _MIB
"""Added to what was measured, for what the measured process does not do:

- about 4 MiB: the compiled library's code and data, the VM's own objects, and the session's and requests'
  Python objects (a request of 2048 tokens takes about 100 KiB);
- about 2 MiB: memory that malloc keeps back from tokenizing and detokenizing long texts;
- about 2 MiB: what differs from run to run and between machines (pages of libraries that the page cache maps
  around a fault, stacks of more threads).
"""


def measure(assets: Path | None = None, *, others: int = 0, threads: int | None = None) -> int:
    """Bytes that a process needs to run a model apart from the model's own, a multiple of a MiB.

    assets: folder with the tokenizer's files; None, or without tokenizer.json: a model that takes token ids.
    others: bytes that the model will have at least (its weights): the process's peak while it is loaded is
        covered by them. With 0 the peak itself is returned.
    threads: threads that the model will run with, by default one for each core.

    Runs of the same installation differ by less than a MiB. Raises TargetError if the process fails.
    """
    settled, peak = _run_probe(assets, threads)
    size = max(settled, peak - others) + MARGIN
    return -(-size // _MIB) * _MIB


def _run_probe(assets: Path | None, threads: int | None) -> tuple[int, int]:
    """Settled and peak bytes of a new process that runs `_probe`."""
    command = [sys.executable, "-c", "from kvc.runtime.overhead import _probe; _probe()"]
    command += [str(threads or len(os.sched_getaffinity(0)))]
    if assets and (assets / "tokenizer.json").is_file():
        command.append(str(assets))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise TargetError(f"the memory of the runtime cannot be measured: {reason}")
    settled, peak = (int(number) for number in done.stdout.split()[-2:])
    return settled, peak


def _probe() -> None:
    """The measured process: do once what a run does, and print how many bytes are and were resident."""
    import ctypes
    import importlib.util

    import jinja2.sandbox  # noqa: F401
    import rich.console
    import rich.live
    import rich.progress

    import kvc.runtime  # noqa: F401
    from kvc.runtime.library import load_runtime, runtime_library
    from kvc.runtime.text import Text

    if importlib.util.find_spec("kvc.cli"):
        importlib.import_module("kvc.cli")
    load_runtime(int(sys.argv[1]))
    task = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: 0)
    runtime_library().TVMBackendParallelLaunch(task, None, 0)
    if len(sys.argv) > 2:
        text = Text(Path(sys.argv[2]))
        tokens = text.encode("The quick brown fox jumps over the lazy dog, and 1234 other things. " * 130)
        text.decode(tokens)
        if text.has_template:
            text.chat([{"role": "user", "content": "Hello"}])
    rich.console.Console(file=sys.stderr).print("")
    print(_kilobytes("smaps_rollup", "Rss") * 1024, _kilobytes("status", "VmHWM") * 1024)


def _kilobytes(file: str, key: str) -> int:
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/{file} has no {key}")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    settled_, peak_ = _run_probe(folder, None)
    print(f"settled {settled_ / _MIB:.1f} MiB, peak {peak_ / _MIB:.1f} MiB, margin {MARGIN // _MIB} MiB")
