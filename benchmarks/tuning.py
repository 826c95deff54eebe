"""A tuning run on this CPU: every kernel beside its limit, the model with default and with tuned kernels.

    python -m benchmarks.tuning [--minutes 30] [--quick]

SmolLM2-135M is planned for 4 requests of 1,024 tokens. Reported:

    limits      float32 operations a second in registers, exponentials of softmax a second in registers, and
                bytes a second of reading, measured between candidates; the medians of the run
    kernels     microseconds by default and at best, and what share of the limit that is: what a call takes
                at least over what it took. At least it takes what its operations and exponentials, one after
                the other, or what its bytes take, whichever is more, by the limits while it was measured
    model       seconds of the prompts and of the answers, default and tuned artifact in turn, least of rounds
    again       a run that is killed (SIGKILL), then resumed: records before, after, measured twice; and a
                compilation with the database

Results are written to benchmarks/results/tuning.json.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final

from benchmarks.common import WORK, destination, parser, require_model, run_python, show, write_results
from benchmarks.limits import Bench, Limits, median

WORKLOAD: Final = "4x1024"
BUDGET: Final = "1GB"
ROUNDS: Final = 5


def least_seconds(task: Any, bucket: Any, limits: Limits, lanes: int) -> float:
    """What a call takes at least: its operations, or the bytes it has to read, at the measured limits."""
    from kvc.kernels.packing import packed_tensors

    size = {"float32": 4, "uint8": 1, "int8": 1}
    if task.kernel.startswith("product"):
        columns, depth, format = task.weight()
        tensors = packed_tensors(columns, depth, format, lanes)
        read = sum(_count(t.shape) * size.get(t.dtype, 2) for t in tensors)
        operations, exponentials = 2.0 * columns * depth * bucket.rows, 0.0
    else:
        shape = task.shape()
        width = size.get(shape.kv_dtype, 2)
        sequences = bucket.rows if task.kernel == "decode" else max(1, -(-bucket.rows // bucket.length))
        read = shape.kv_heads * (shape.head_dim + shape.value_dim) * bucket.length * width * sequences
        own = bucket.rows / sequences
        pairs = bucket.rows * (bucket.length - (own - 1) / 2)
        operations = 2 * shape.heads * (shape.query_dim + shape.value_dim) * pairs
        exponentials = shape.heads * pairs
    computed: float = operations / limits.flops + exponentials / limits.exponentials
    return max(float(read) / limits.read, computed)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def tuned(model: Path, db: Path, seconds: float, bench: Bench) -> dict[str, Any]:
    """One run, and every kernel beside its limit."""
    import kvc
    from kvc.targets import parse_target

    lanes = parse_target("cpu").products.traits.lanes  # type: ignore[attr-defined]
    trials: list[Any] = []
    limits: dict[Any, list[Limits]] = defaultdict(list)

    def tried(trial: Any) -> None:
        trials.append(trial)
        limits[trial.task.key].append(bench.measure())

    begin = time.perf_counter()
    outcome = kvc.tune(
        model,
        db=db,
        trials=100_000,
        seconds=seconds,
        budget=BUDGET,
        workload=WORKLOAD,
        on_trial=tried,
    )
    kernels = []
    for found in outcome.tasks:
        if found.default is None:
            continue
        limit = median(limits[found.task.key] or bench.found)
        least = sum(b.calls * least_seconds(found.task, b, limit, lanes) for b in found.task.buckets)
        calls = sum(b.calls for b in found.task.buckets)
        kernels.append(
            {
                "kernel": found.task.name,
                "calls": calls,
                "default_us": round(found.default / calls * 1e6, 2),
                "best_us": round(found.default * found.best / calls * 1e6, 2),
                "speedup": round(1 / found.best, 3),
                "of_limit_default": round(least / found.default, 3),
                "of_limit": round(least / (found.default * found.best), 3),
                "share": round(found.default / max(outcome.predicted, 1e-9), 4),
                "trials": found.trials,
                "parameters": found.values,
            }
        )
    kernels.sort(key=lambda k: -float(k["default_us"]) * float(k["calls"]))  # type: ignore[arg-type]
    outcomes = Counter(t.record.outcome for t in trials)
    taken = time.perf_counter() - begin
    return {"seconds": round(taken, 1), "trials": len(trials), "outcomes": outcomes, "kernels": kernels}


def end_to_end(model: Path, db: Path, rounds: int) -> dict[str, Any]:
    """Seconds of prompts and of answers, by default and tuned."""
    import kvc

    artifacts, seconds = {}, {}
    for name, records in (("default", None), ("tuned", db)):
        begin = time.perf_counter()
        out = WORK / f"tuning-{name}.kvc"
        kvc.compile(model, budget=BUDGET, workload=WORKLOAD, output=out, tune_db=records, force=True)
        artifacts[name], seconds[name] = out, round(time.perf_counter() - begin, 1)
    times: dict[str, list[list[float]]] = {name: [] for name in artifacts}
    for turn in range(rounds):
        for name in artifacts if turn % 2 else reversed(artifacts):
            script = f"from benchmarks.plan_times import serve; serve({str(artifacts[name])!r})"
            times[name].append(json.loads(run_python(["-c", script]).stdout))
    best = {name: [round(min(t[i] for t in found), 3) for i in (0, 1)] for name, found in times.items()}
    ratios = [round(best["default"][i] / best["tuned"][i], 3) for i in (0, 1)]
    return {"prompts_and_answers": best, "speedup": ratios, "compile_seconds": seconds, "rounds": times}


def resumed(model: Path, db: Path, seconds: float) -> dict[str, Any]:
    """Kill a run with SIGKILL, start it again, and look for what was lost or measured twice."""
    command = [sys.executable, "-m", "kvc.cli", "tune", str(model), "--db", str(db), "--trials", "40"]
    command += ["--budget", BUDGET, "--workload", WORKLOAD]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file = db / "records.jsonl"
    before = file.read_bytes().split(b"\n")[:-1]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = file.read_bytes().split(b"\n")[:-1]
    keys = Counter(_identity(line) for line in after)
    return {
        "records_when_killed": len(before),
        "lost": sum(line not in after for line in before),
        "records_after": len(after),
        "measured_twice": sum(count - 1 for count in keys.values()),
    }


def _identity(line: bytes) -> str:
    data = json.loads(line)
    return json.dumps([data["task"], data["sizes"], data["knobs"]], sort_keys=True)


def main() -> None:
    command = parser(__doc__, "tuning")
    command.add_argument("--minutes", type=float, default=30, help="minutes of tuning (30)")
    options = command.parse_args()
    from kvc.runtime.library import use_threads
    from kvc.targets import parse_target

    model, target = require_model(options.model), destination(options, "tuning")
    machine: Any = parse_target("cpu")
    use_threads(machine.products.traits.threads)
    bench = Bench(machine)
    bench.measure()
    db = WORK / "tune-db"
    shutil.rmtree(db, ignore_errors=True)
    found = tuned(model, db, 30 if options.quick else options.minutes * 60, bench)
    columns = ("kernel", "default_us", "best_us", "speedup", "of_limit_default", "of_limit", "share")
    show("kernels", columns, [tuple(kernel[c] for c in columns) for kernel in found["kernels"]])
    whole = end_to_end(model, db, 1 if options.quick else ROUNDS)
    for name, times in whole["prompts_and_answers"].items():
        print(f"{name}: {times[0]} s of prompts, {times[1]} s of answers")
    other = WORK / "tune-db-killed"
    shutil.rmtree(other, ignore_errors=True)
    again = resumed(model, other, 40)
    print(again)
    limits = {name: round(value) for name, value in vars(median(bench.found)).items()}
    body = {"workload": WORKLOAD, "limits": limits, "run": found, "model": whole, "again": again}
    write_results("tuning", body, target)


if __name__ == "__main__":
    main()
