"""What shared prefixes save and too few pages cost: 32 requests of 500 tokens, of which 400 are the same.

Every case is a fresh process with an artifact of the smallest budget for its workload at which prompts are
computed in the largest chunks, and the same requests:

    nothing shared       32x500; pages are not shared
    shared               32x500; the same artifact
    shared, as planned   32x500/400; the plan counts the common prefix once
    a half, a quarter    32x250, 32x125; pages for a half and a quarter of the tokens, nothing shared: the
                         youngest requests give their pages up and are computed again

    python -m benchmarks.sharing [--quick]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from benchmarks.common import WORK, destination, parser, require_model, run_python, show, write_results
from benchmarks.longest import kvc_budget

BATCH: Final = 32
CONTEXT: Final = 500
PREFIX: Final = 400
NEW: Final = 64
CASES: Final = {
    "nothing shared": (f"{BATCH}x{CONTEXT}", False),
    "shared": (f"{BATCH}x{CONTEXT}", True),
    "shared, as planned": (f"{BATCH}x{CONTEXT}/{PREFIX}", True),
    "a half": (f"{BATCH}x{CONTEXT // 2}", False),
    "a quarter": (f"{BATCH}x{CONTEXT // 4}", False),
}


def serve(artifact: str, share: bool) -> dict[str, Any]:
    """Answer all requests; what it took."""
    import time

    import kvc
    from kvc.runtime.peak import peak_bytes

    random = np.random.default_rng(0)
    with kvc.load(artifact, share=share) as session:
        vocab = kvc.Artifact.open(artifact, verify=False).facts.vocab
        common = random.integers(0, vocab, PREFIX).tolist()
        length = CONTEXT - PREFIX - NEW
        prompts = [common + random.integers(0, vocab, length).tolist() for _ in range(BATCH)]
        params = kvc.SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        start = time.perf_counter()
        tokens: dict[int, list[int]] = {session.add_request(prompt, params): [] for prompt in prompts}
        most, full = 0, 0.0
        while session.busy:
            for event in session.step():
                if event.token is not None:
                    tokens[event.id].append(event.token)
            stats = session.stats
            if sum(stats.pages_used) >= most:
                most, full = sum(stats.pages_used), stats.utilization[0]
        seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "prefill_tokens": stats.prefill_tokens,
        "shared_tokens": stats.shared_tokens,
        "preemptions": stats.preemptions,
        "pages": sum(stats.pages_total),
        "most_pages_used": most,
        "utilization": round(full, 4),
        "peak_bytes": peak_bytes(),
        "answers": hashlib.sha256(json.dumps(list(tokens.values())).encode()).hexdigest()[:16],
    }


def compiled(model: Path, workload: str) -> tuple[Path, int]:
    """An artifact of the smallest budget that has the largest prefill chunk, and the promise."""
    import kvc

    out = WORK / f"sharing-{workload.replace('/', '-')}.kvc"
    budget = kvc_budget(model, workload)
    artifact = kvc.compile(model, budget=budget, workload=workload, output=out, force=True)
    return out, artifact.plan.bytes.total


def main() -> int:
    options = parser(__doc__, "sharing").parse_args()
    model = require_model(options.model)
    rows: dict[str, dict[str, Any]] = {}
    for name, (workload, share) in CASES.items():
        if options.quick and name not in ("nothing shared", "shared, as planned"):
            continue
        artifact, promised = compiled(model, workload)
        done = run_python(["-m", "benchmarks.sharing", "--serve", str(artifact), str(int(share))])
        rows[name] = {"workload": workload, "promised_bytes": promised, **json.loads(done.stdout)}
        print(f"{name}: {rows[name]}", file=sys.stderr)
    first = next(iter(rows.values()))
    body = {
        "requests": f"{BATCH} of {CONTEXT} tokens, the first {PREFIX} in common, {NEW} of them generated",
        "same_answers": all(row["answers"] == first["answers"] for row in rows.values()),
        "cases": rows,
    }
    path = write_results("sharing", body, destination(options, "sharing"))
    columns = ["", "computed", "preempted", "pages used", "of", "full to", "peak MB", "seconds"]
    cells = [
        (
            name,
            row["prefill_tokens"],
            row["preemptions"],
            row["most_pages_used"],
            row["pages"],
            f"{row['utilization']:.1%}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            row["seconds"],
        )
        for name, row in rows.items()
    ]
    show(f"{body['requests']}; same answers: {body['same_answers']}", columns, cells)
    print(path)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        print(json.dumps(serve(sys.argv[2], sys.argv[3] == "1")))
    else:
        sys.exit(main())
