"""What planning a 7-billion-parameter model costs: wall seconds and peak memory of `kvc plan`.

The model has Llama-2-7B's shapes in float16, 13.5 GB that are not read:

    python -m kvc_models make-big build/llama-7b.onnx --params 7b --dtype float16 --sparse

Aims: a peak below 1 GB, and 1.3 times the file in any case; the status is 1 when one is missed.
"""

from __future__ import annotations

import json
import statistics
import sys

from benchmarks.common import BUILD, destination, parser, run_python, show, write_results

MOST_BYTES, MOST_RATIO = 1_000_000_000, 1.3


def main() -> int:
    result = parser(__doc__, "big_plan")
    result.set_defaults(model=BUILD / "llama-7b.onnx")
    result.add_argument("--budget", default="24GB")
    result.add_argument("--workload", default="32x500,1x4000")
    result.add_argument("--repeats", type=int, default=3)
    options = result.parse_args()
    if not options.model.is_file():
        raise SystemExit(f"{options.model} is not there; the head of this script says how it is made")
    arguments = [str(options.model), "--budget", options.budget, "--workload", options.workload, "--json"]
    runs = [
        run_python(["-m", "kvc.cli", "plan", *arguments])
        for _ in range(1 if options.quick else options.repeats)
    ]
    data = options.model.with_name(options.model.name + ".data")
    size = options.model.stat().st_size + data.stat().st_size
    peak = max(run.peak_bytes for run in runs)
    met = {"peak": peak < MOST_BYTES, "peak_over_file": peak < MOST_RATIO * size}
    body = {
        "model": "Llama-2-7B's shapes, float16, no data",
        "budget": options.budget,
        "workload": options.workload,
        "file_bytes": size,
        "seconds": [round(run.seconds, 2) for run in runs],
        "seconds_median": round(statistics.median(run.seconds for run in runs), 2),
        "peak_bytes": [run.peak_bytes for run in runs],
        "planned": json.loads(runs[-1].stdout)["bytes"],
        "met": met,
    }
    path = write_results("big_plan", body, destination(options, "big_plan"))
    rows = [
        ("seconds", f"{body['seconds_median']}", ""),
        ("peak, GB", f"{peak / 1e9:.2f}", f"{MOST_BYTES / 1e9:.0f}"),
        ("file, GB", f"{size / 1e9:.1f}", ""),
    ]
    show("planning a 7B model", ["", "measured", "aim, below"], rows)
    print(f"written: {path.name}")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
