"""What the benchmarks share: the machine, JSON results, fresh Python processes, tables."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build"
WORK = BUILD / "benchmarks"
MODEL = BUILD / "smollm2-135m.onnx"
_PACKAGES = ("kvc", "apache-tvm", "onnxruntime", "onnx", "numpy", "torch", "transformers")


def machine() -> dict[str, Any]:
    """CPU model, instruction sets, cores, memory, system and how busy the machine is (processes that run)."""
    facts = _pairs("/proc/cpuinfo")
    flags = facts.get("flags", "").split()
    vectors = [f for f in flags if f.startswith(("avx", "fma", "amx"))]
    total = int(_pairs("/proc/meminfo").get("MemTotal", "0 kB").split()[0]) * 1024
    return {
        "cpu": facts.get("model name", platform.processor()),
        "cpu_family_model": f"{facts.get('cpu family', '?')}/{facts.get('model', '?')}",
        "vector_extensions": vectors,
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": total,
        "os": platform.platform(),
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that are there."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_results(name: str, body: Mapping[str, Any], output: Path | None = None) -> Path:
    """Write a result with date, machine and versions; returns the file."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = {"benchmark": name, "date": now, "machine": machine(), "versions": versions()}
    path.write_text(json.dumps({**head, **body}, indent=2) + "\n")
    return path


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=(description or "").strip())
    result.add_argument("--model", type=Path, default=MODEL, help="the cache-less ONNX export (%(default)s)")
    result.add_argument(
        "--output", type=Path, help=f"the JSON file (benchmarks/results/{name}.json; --quick: below build)"
    )
    result.add_argument("--quick", action="store_true", help="a short run that only shows that it works")
    return result


def destination(options: argparse.Namespace, name: str) -> Path:
    """Where the result belongs: a quick run never replaces a measured one."""
    if options.output is not None:
        return Path(options.output)
    return (WORK / "quick" if options.quick else RESULTS) / f"{name}.json"


def require_model(path: Path) -> Path:
    """The model's file. Raises SystemExit, saying how it is made, when it is not there."""
    if not path.is_file():
        name = "smollm2-135m --with-past" if "past" in path.stem else "smollm2-135m"
        raise SystemExit(f"{path} is not there; make it with: python -m kvc_models export {name} {path}")
    return path


@dataclass(frozen=True)
class Finished:
    """A process that ended well: seconds, most resident bytes of it alone, what it wrote."""

    seconds: float
    peak_bytes: int
    stdout: str


def run_python(arguments: Sequence[str], python: str = sys.executable) -> Finished:
    """Run `python arguments...` as a fresh process. Raises RuntimeError with its last line if it fails.

    The peak is what the kernel counted for that process when it was reaped (ru_maxrss, as GNU time shows).
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    start = time.perf_counter()
    with (
        subprocess.Popen(
            [python, *arguments],
            stdout=subprocess.PIPE,
            stderr=(errors := _unlinked()).fileno(),
            text=True,
            env=environment,
        ) as process,
        errors,
    ):
        assert process.stdout is not None
        stdout = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {process.returncode}")
    return Finished(seconds, usage.ru_maxrss * 1024, stdout)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers stand right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _unlinked() -> Any:
    import tempfile

    return tempfile.TemporaryFile()


def _pairs(file: str) -> dict[str, str]:
    """The first `name: value` of every name in a file of /proc."""
    found: dict[str, str] = {}
    path = Path(file)
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found
