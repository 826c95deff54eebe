"""Which decoders go in: every family, by every exporter, with numbers of every type.

    python tools/coverage.py                                  all rows; hours
    python tools/coverage.py --only 'llama/*/float32'         some; a pattern, any number of times
    python tools/coverage.py --list

Each row is exported, proved, compiled and run in a process of its own, and its logits are compared with ONNX
Runtime's on the same file: prompts, chunks, decoding, ragged batches, and for graphs with a past batches
padded at the left. Results are kept in the work folder; docs/coverage.md is written from all that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: a package is called coverage, too

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tools.coverage_page import Outcome, write_page  # noqa: E402
from tools.coverage_rows import Row, all_rows, fixture, model_file  # noqa: E402
from tools.onnx_graph import without_rings  # noqa: E402

BUDGET: Final = "2GB"
WORKLOAD: Final = "4x64"
LIMITS: Final = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}
"""Most that a logit of up to 8 may differ, by what the graph computes in. The two 16-bit types are compared
with the graph widened to float32; roundings between operators differ from it by some units of 2^-11, 2^-8."""
ALIKE: Final = ("prompt of 1",)
"""What is compared of activations that are quantized at run time: ONNX Runtime has one scale for all tokens
of a call, kvc (with the permission token-scales) one for each. For one token that is the same."""
ACTIVATIONS_LIMIT: Final = 2e-1
"""The same for integer activations, which a rounding can move by a whole step."""


def cover(row: Row, work: Path) -> Outcome:
    """Export, prove, compile, run and compare one row in this process."""
    start = time.monotonic()
    stage, errors = "export", {}
    try:
        path = model_file(row, work)
        stage = "compile"
        errors = compare_file(row, path, work)
        stage = "compare"
    except Exception as error:
        outcome = _failed(row, stage, error, work)
        return dataclasses.replace(outcome, seconds=time.monotonic() - start)
    held = judged(row, errors)
    worst = max(held.values(), default=math.nan)
    limit = limit_of(row)
    good = bool(worst <= limit)
    reason = "" if good else "; ".join(f"{k}: {v:.1e}" for k, v in held.items() if not v <= limit)
    return Outcome(str(row), "proved" if good else "wrong", worst, reason, time.monotonic() - start)


def judged(row: Row, errors: dict[str, float]) -> dict[str, float]:
    """The errors that must be small."""
    return {name: x for name, x in errors.items() if name in ALIKE or not row.dtype.startswith("dynamic")}


def limit_of(row: Row) -> float:
    """Most that a logit may differ."""
    loose = row.dtype.startswith(("dynamic", "static"))
    return ACTIVATIONS_LIMIT if loose else LIMITS[row.width]


def compare_file(row: Row, path: Path, work: Path) -> dict[str, float]:
    """Compile `path` and run it: the largest error of every kind of call.

    Raises:
        kvc.Error: it is refused.
    """
    from tools.coverage_compare import Comparison
    from tools.onnx_graph import Graph

    import kvc

    output = work / "compiled" / (str(row).replace("/", "-") + ".kvc")
    output.parent.mkdir(parents=True, exist_ok=True)
    allow = "token-scales" if row.dtype.startswith("dynamic") else ()
    artifact = kvc.compile(path, budget=BUDGET, workload=WORKLOAD, output=output, force=True, allow=allow)
    comparison = Comparison(artifact)
    padded = row.with_past and row.exporter != "genai"  # its attention takes lengths, and those from the left
    try:
        reference = Graph(_reference_file(row, path, work))
        return {each.name: each.error for each in comparison.against(reference, padded)}
    finally:
        comparison.close()
        shutil.rmtree(output)


def _reference_file(row: Row, path: Path, work: Path) -> Path:
    """What ONNX Runtime runs: the file; widened if it holds 16-bit floats; with caches that only grow."""
    from kvc.widen import widen

    if str(row) == "qwen3/genai/float16-cuda":  # only ONNX Runtime's GPU kernel normalizes heads in attention
        row = dataclasses.replace(row, dtype="float32")
        path = fixture(row)
    out = work / "reference" / (str(row).replace("/", "-") + ".onnx")
    if row.width == "float32" and row.exporter != "genai":
        return path
    widen(path, out)
    if row.exporter == "genai":
        without_rings(out, out)
    settings = path.with_suffix(".assets")
    if settings.exists():
        shutil.copytree(settings, out.with_suffix(".assets"), dirs_exist_ok=True)
    return out


def _failed(row: Row, stage: str, error: Exception, work: Path) -> Outcome:
    """What an exception means: the exporter's fault, a refusal, or a bug."""
    import kvc
    from kvc_models import ModelError

    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    for folder in (work, ROOT):
        reason = reason.replace(f"{folder}/", "")
    if stage == "export" and isinstance(error, ModelError):
        return Outcome(str(row), "not exported", math.nan, reason)
    if isinstance(error, kvc.Error) and not isinstance(error, kvc.PlanningError):
        _, _, after = reason.partition(".onnx: ")
        return Outcome(str(row), "refused", math.nan, after or reason)
    traceback.print_exception(error)
    return Outcome(str(row), "crashed", math.nan, f"{type(error).__name__}: {reason}")


def run_row(row: Row, work: Path, limit: float) -> Outcome:
    """`cover` in a process of its own, of at most `limit` seconds."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", str(work), "--one", str(row)]
    path = os.pathsep.join(p for p in (str(ROOT), *sys.path[1:]) if p)
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(str(row), "crashed", math.nan, f"not done after {limit:.0f} s", limit)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    (work / "log").mkdir(parents=True, exist_ok=True)
    (work / "log" / (str(row).replace("/", "-") + ".txt")).write_text(done.stdout + done.stderr)
    if done.returncode or not last.startswith("{"):
        reason = f"exit status {done.returncode}"
        return Outcome(str(row), "crashed", math.nan, reason, time.monotonic() - start)
    return Outcome(**json.loads(last))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "coverage", help="folder for all files")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="family/exporter/dtype, with * and ?"
    )
    parser.add_argument("--missing", action="store_true", help="only rows that have no result yet")
    parser.add_argument("--limit", type=float, default=300, help="seconds a row (%(default)s)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--list", action="store_true", help="print the rows and do nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run the command line; 1 if a row crashed or was wrong."""
    options = _parser().parse_args()
    work = options.work.resolve()
    if options.one:
        print(json.dumps(dataclasses.asdict(cover(Row.parse(options.one), work))))
        return 0
    every = all_rows()
    wanted = options.only or ["*"]
    rows = [row for row in every if any(fnmatch.fnmatch(str(row), pattern) for pattern in wanted)]
    work.mkdir(parents=True, exist_ok=True)
    results = work / "results.json"
    known: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    if options.missing:
        rows = [row for row in rows if str(row) not in known]
    if options.list:
        print("\n".join(map(str, rows)))
        return 0
    table = Table("row", "result", "logit error", "s", "reason")
    outcomes = []
    for row in rows:
        outcome = run_row(row, work, options.limit)
        outcomes.append(outcome)
        known[str(row)] = dataclasses.asdict(outcome)
        results.write_text(json.dumps(known, indent=1))
        print(f"{outcome.row}: {outcome.result} {outcome.shown} {outcome.reason}", flush=True)
        table.add_row(outcome.row, outcome.result, outcome.shown, f"{outcome.seconds:.0f}", outcome.reason)
    Console().print(table)
    write_page(options.page, [Outcome(**each) for each in known.values()], every)
    return int(any(outcome.result in ("wrong", "crashed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
