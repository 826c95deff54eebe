"""What compiling costs: wall seconds and peak memory of `kvc compile`, seconds of `kvc plan`.

Each is a fresh process. Aims for SmolLM2-135M: compile under 90 s with a peak below 2.5 times the bytes of
the weights, plan under 5 s; the status is 1 when one is missed.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from typing import Any

from benchmarks.common import (
    WORK,
    Finished,
    destination,
    parser,
    require_model,
    run_python,
    show,
    write_results,
)

MOST_SECONDS, MOST_RATIO, MOST_PLAN_SECONDS = 90.0, 2.5, 5.0


def main() -> int:
    result = parser(__doc__, "compile_cost")
    result.add_argument("--budget", default="1GB")
    result.add_argument("--workload", default="8x256,1x2048")
    result.add_argument("--repeats", type=int, default=3)
    options = result.parse_args()
    repeats = 1 if options.quick else options.repeats
    model, out = require_model(options.model), WORK / "cost.kvc"
    WORK.mkdir(parents=True, exist_ok=True)
    common = [str(model), "--budget", options.budget, "--workload", options.workload]
    compiles = [
        run_python(["-m", "kvc.cli", "compile", *common, "--output", str(out), "--force"])
        for _ in range(repeats)
    ]
    plans = [run_python(["-m", "kvc.cli", "plan", *common, "--json"]) for _ in range(repeats)]
    import kvc

    artifact = kvc.Artifact.open(out, verify=False)
    weights = sum(artifact.facts.parameter_bytes.values())
    size = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    compile_, plan = _summary(compiles), _summary(plans)
    ratio = max(run.peak_bytes for run in compiles) / weights
    met = {
        "compile_seconds": compile_["seconds_median"] < MOST_SECONDS,
        "compile_peak": ratio < MOST_RATIO,
        "plan_seconds": plan["seconds_median"] < MOST_PLAN_SECONDS,
    }
    body = {
        "model": "SmolLM2-135M-Instruct, float32",
        "budget": options.budget,
        "workload": options.workload,
        "weight_bytes": weights,
        "artifact_bytes": size,
        "compile": {**compile_, "peak_over_weights": round(ratio, 3)},
        "plan": plan,
        "aims": {
            "compile_seconds": MOST_SECONDS,
            "compile_peak_over_weights": MOST_RATIO,
            "plan_seconds": MOST_PLAN_SECONDS,
        },
        "met": met,
    }
    path = write_results("compile_cost", body, destination(options, "compile_cost"))
    rows = [
        ("compile, seconds", f"{compile_['seconds_median']:.1f}", MOST_SECONDS),
        ("compile, peak / weights", f"{ratio:.2f}", MOST_RATIO),
        ("plan, seconds", f"{plan['seconds_median']:.1f}", MOST_PLAN_SECONDS),
    ]
    show("cost of compiling SmolLM2-135M", ["", "measured", "aim, below"], rows)
    print(f"written: {path.name}")
    return 0 if all(met.values()) else 1


def _summary(runs: list[Finished]) -> dict[str, Any]:
    return {
        "seconds": [round(run.seconds, 2) for run in runs],
        "seconds_median": round(statistics.median(run.seconds for run in runs), 2),
        "peak_bytes": [run.peak_bytes for run in runs],
    }


if __name__ == "__main__":
    sys.exit(main())
