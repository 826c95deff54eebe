"""Attack on the reader: a small .onnx file with bytes or fields changed ends in one message, or is imported.

    python tools/fuzz_files.py                       2,000 files
    python tools/fuzz_files.py --count 100 --first 500

Every file is inspected (imported and proved) in a worker process that a watchdog kills when it hangs. What
counts as a bug: an exception that is no `InputError` or `UnsupportedModel`, a message of several lines, a
process that dies, or one that needs more than `SECONDS` or `MEMORY`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: a package is called coverage, too

import onnx  # noqa: E402
from tools.fuzz_changes import damaged, mutated  # noqa: E402

SECONDS: Final = 20.0
START: Final = 120.0
"""Seconds that a worker may take to start."""
MEMORY: Final = 12 << 30
"""Bytes of address space of a worker; TVM and its threads take some GB of it."""
COUNT: Final = 2000
BUGS: Final = ("escaped", "crashed", "hung")


@dataclass(frozen=True)
class Fate:
    """What came of a file.

    Attributes:
        number: of the mutation.
        kind: "refused", "imported", or one of `BUGS`.
        text: the message, or the end of the traceback.
    """

    number: int
    kind: str
    text: str = ""


def make_model(out: Path) -> Path:
    """A llama of one layer, exported with weights so small that most bytes are structure; about 30 kB."""
    from kvc_models import make_tiny
    from kvc_models.export import export_decoder

    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = make_tiny("llama", **sizes, max_position_embeddings=64, head_dim=4)
    exported = onnx.load(export_decoder(model, out, with_past=True, external_data=False))
    del exported.metadata_props[:]
    for each in (*exported.graph.node, *exported.graph.value_info):
        del each.metadata_props[:]
        each.doc_string = ""
    onnx.save(exported, out)
    return out


@dataclass
class Worker:
    """A process that inspects one file after another."""

    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def inspect(self, path: Path, number: int) -> Fate:
        """Inspect one file; a worker that dies or hangs is replaced by the next call."""
        if self.process is None:
            self.process = self._start()
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._lost(number)
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            self._stop()
            return Fate(number, "hung", f"more than {SECONDS:.0f} s")
        line = process.stdout.readline()
        return Fate(number, **json.loads(line)) if line else self._lost(number)

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(p for p in (str(ROOT), *sys.path) if p)
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], START)[0] or not process.stdout.readline():
            process.kill()
            raise RuntimeError("a worker did not start")
        return process

    def _lost(self, number: int) -> Fate:
        assert self.process is not None
        status = self.process.wait()
        self.process = None
        return Fate(number, "crashed", f"exit status {status}")

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def work() -> None:
    """A worker: paths from the standard input, results as JSON to what was the standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may come between the results
    import kvc
    from kvc.api import inspect

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(_inspected(kvc, inspect, line.rstrip("\n"))), file=out, flush=True)


def _inspected(kvc: Any, inspect: Any, path: str) -> dict[str, str]:
    try:
        inspect(path)
    except (kvc.InputError, kvc.UnsupportedModel) as error:
        text = str(error)
        good = text.strip() and "\n" not in text
        return {"kind": "refused" if good else "escaped", "text": text}
    except BaseException as error:
        return {"kind": "escaped", "text": _ending(error)}
    return {"kind": "imported", "text": ""}


def _ending(error: BaseException) -> str:
    """The exception and the innermost place in this project's code."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "kvc" in f.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__} at {place}: {(lines or [''])[-1][:300]}"


def fuzz(model: Path, numbers: Sequence[int], workers: int = 2, keep: Path | None = None) -> Iterator[Fate]:
    """The fates of mutations of a file, in order; files of bugs are copied into the folder `keep`.

    Even numbers change bytes, odd ones fields.
    """
    data = model.read_bytes()
    with tempfile.TemporaryDirectory() as name:

        def share(first: int) -> list[Fate]:
            fates = []
            with Worker() as worker:
                for number in numbers[first::workers]:
                    path = Path(name) / f"{number}.onnx"
                    path.write_bytes((damaged if number % 2 else mutated)(data, number))
                    fates.append(worker.inspect(path, number))
                    if keep is not None and fates[-1].kind in BUGS:
                        shutil.copy(path, keep)
                    path.unlink()
            return fates

        with ThreadPoolExecutor(workers) as pool:
            found = [fate for fates in pool.map(share, range(workers)) for fate in fates]
    yield from sorted(found, key=lambda fate: fate.number)


def counts(fates: Sequence[Fate]) -> dict[str, int]:
    """How many files ended how."""
    found = Counter(fate.kind for fate in fates)
    return {"files": len(fates), **{kind: found[kind] for kind in ("refused", "imported", *BUGS)}}


def read_counts(path: Path = ROOT / "build" / "coverage" / "fuzz.json") -> dict[str, int] | None:
    """The counts of the last run, None if there was none."""
    if not path.exists():
        return None
    found: dict[str, int] = json.loads(path.read_text())
    return found


def main() -> int:
    """Run the command line; 1 if a file found a bug."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "coverage" / "fuzz" / "llama.onnx")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "coverage" / "fuzz.json")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the files of bugs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    if not options.model.exists():
        options.model.parent.mkdir(parents=True, exist_ok=True)
        make_model(options.model)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    numbers = range(options.first, options.first + options.count)
    fates = list(fuzz(options.model, numbers, options.workers, options.keep))
    for fate in fates:
        if fate.kind in BUGS:
            print(f"{fate.number}: {fate.kind}: {fate.text}")
    summary = counts(fates)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(summary))
    print(summary)
    return int(any(fate.kind in BUGS for fate in fates))


if __name__ == "__main__":
    sys.exit(main())
