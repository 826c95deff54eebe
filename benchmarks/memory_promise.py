"""Promised against measured peak memory: budgets x workloads on SmolLM2-135M.

Each combination is compiled, then a fresh process loads the artifact and runs the worst that was planned: the
largest prefill chunks, every planned workload in full, then requests until all pages hold tokens, decoded at
full batch. The peak is what the kernel counted for that process. Ends with status 1 when a promise is broken:
measured <= promised <= budget, and promised within 5% of measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import WORK, destination, parser, require_model, run_python, show, write_results

BUDGETS = ["800MB", "900MB", "1GB", "1.25GB", "1.5GB", "2GB"]
WORKLOADS = ["8x256", "1x2048", "8x256,1x2048", "32x500"]
SLACK = 0.05
"""Most that the promise may be above the measured peak, as a share of the peak."""


def worst(path: str) -> None:
    """In a fresh process: fill every page of an artifact, and print the peak of resident bytes."""
    import numpy as np

    import kvc

    random = np.random.default_rng(0)
    with kvc.load(path, verify=False) as session:
        artifact = kvc.Artifact.open(path, verify=False)
        plan, vocab = artifact.plan, artifact.facts.vocab

        def prompts(count: int, length: int) -> list[list[int]]:
            return [random.integers(0, vocab, max(1, length)).tolist() for _ in range(count)]

        for workload in plan.workload:
            room = min(16, workload.context - 1)
            batch = prompts(workload.batch, workload.context - room)
            session.generate(batch, max_new_tokens=max(1, room), ignore_eos=True)
        # Every page: as many sequences as a call takes, as long as the pages allow, and one that waits.
        pages = min(group.pages for group in plan.groups)
        each = min(pages // plan.max_batch * plan.page_size, session.limit)
        new = min(24, each - 1)
        used = 0
        for prompt in prompts(plan.max_batch + 1, each - new):
            session.add_request(prompt, kvc.SamplingParams(max_new_tokens=max(1, new), ignore_eos=True))
        while session.busy:
            session.step()
            used = max(used, sum(session.stats.pages_used))
        print(plan.chunk, sum(group.pages for group in plan.groups), used, _peak())


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("the peak of resident bytes cannot be read")


def measure(model: Path, budget: str, workload: str) -> dict[str, Any]:
    """Compile, run the worst, compare. A refusal is a result too."""
    out = WORK / "promise.kvc"
    row: dict[str, Any] = {"budget": budget, "workload": workload}
    start = time.perf_counter()
    arguments = ["-m", "kvc.cli", "compile", str(model), "--budget", budget, "--workload", workload]
    try:
        run_python([*arguments, "--output", str(out), "--force"])
    except RuntimeError as error:
        return {**row, "refused": str(error)}
    compiled = time.perf_counter()
    done = run_python(["-m", "benchmarks.memory_promise", "--worst", str(out)])
    chunk, pages, used, peak = (int(n) for n in done.stdout.split()[-4:])
    import kvc

    plan = kvc.Artifact.open(out, verify=False).plan
    promised = plan.bytes.total
    return {
        **row,
        "budget_bytes": plan.budget,
        "promised_bytes": promised,
        "measured_bytes": max(peak, done.peak_bytes),
        "promised_over_measured": round(promised / max(peak, done.peak_bytes), 4),
        "lines": {name: int(getattr(plan.bytes, name)) for name in plan.bytes.__dataclass_fields__},
        "chunk": chunk,
        "pages": pages,
        "pages_used": used,
        "compile_seconds": round(compiled - start, 1),
        "run_seconds": round(done.seconds, 1),
        "kept": bool(max(peak, done.peak_bytes) <= promised <= plan.budget),
        "tight": bool(promised <= (1 + SLACK) * max(peak, done.peak_bytes)),
    }


def main() -> int:
    options = _options()
    if options.worst:
        worst(options.worst)
        return 0
    rows = []
    model = require_model(options.model)
    for budget in options.budgets:
        for workload in options.workloads:
            row = measure(model, budget, workload)
            rows.append(row)
            print(_line(row), flush=True)
    shutil.rmtree(WORK / "promise.kvc", ignore_errors=True)
    ran = [row for row in rows if "refused" not in row]
    good = [row for row in ran if row["kept"] and row["tight"]]
    summary = {"combinations": len(rows), "ran": len(ran), "kept_and_tight": len(good)}
    path = write_results(
        "memory_promise",
        {"model": "SmolLM2-135M-Instruct, float32", "slack": SLACK, "summary": summary, "rows": rows},
        destination(options, "memory_promise"),
    )
    columns = ["budget", "workload", "chunk", "pages used", "promised MB", "measured MB", "ratio", "verdict"]
    show("promised and measured peak memory", columns, [_cells(row) for row in rows])
    print(f"{len(good)} of {len(ran)} promises kept within {SLACK:.0%}; written: {path.name}")
    return 0 if ran and len(good) == len(ran) else 1


def _options() -> argparse.Namespace:
    result = parser(__doc__, "memory_promise")
    result.add_argument("--budgets", nargs="*", default=BUDGETS)
    result.add_argument("--workloads", nargs="*", default=WORKLOADS)
    result.add_argument("--worst", metavar="MODEL.kvc", help=argparse.SUPPRESS)
    options = result.parse_args()
    if options.quick:
        options.budgets, options.workloads = ["1GB"], ["8x256"]
    return options


def _verdict(row: dict[str, Any]) -> str:
    if "refused" in row:
        return "refused"
    if not row["kept"]:
        return "BROKEN"
    return "kept" if row["tight"] else "kept, not tight"


def _line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"{row['budget']} {row['workload']}: refused: {row['refused']}"
    return (
        f"{row['budget']} {row['workload']}: promised {row['promised_bytes'] / 1e6:.1f} MB, "
        f"measured {row['measured_bytes'] / 1e6:.1f} MB: {_verdict(row)}"
    )


def _cells(row: dict[str, Any]) -> list[object]:
    if "refused" in row:
        return [row["budget"], row["workload"], "", "", "", "", "", "refused"]
    return [
        row["budget"],
        row["workload"],
        row["chunk"],
        f"{row['pages_used']}/{row['pages']}",
        f"{row['promised_bytes'] / 1e6:.1f}",
        f"{row['measured_bytes'] / 1e6:.1f}",
        row["promised_over_measured"],
        _verdict(row),
    ]


if __name__ == "__main__":
    sys.exit(main())
