"""500 requests on an artifact with few pages: `python stress_run.py MODEL.kvc SEED` prints JSON.

Requests come at random, of random lengths, many with a common beginning; some are cancelled. Printed are
what each request was asked and answered, pages that are still held, and the most memory that the process had.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from kvc.runtime import SamplingParams, load
from kvc.runtime.peak import peak_bytes

REQUESTS = 500


def run(folder: str, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    with load(folder) as session:
        vocab = session._model.facts.vocab
        common = random.integers(0, vocab, session.limit).tolist()
        asked: dict[int, dict[str, Any]] = {}
        most, arrived = 0, 0
        while arrived < REQUESTS or session.busy:
            for _ in range(random.poisson(1.5) if arrived < REQUESTS else 0):
                length = int(random.integers(1, session.limit + 1))
                begin = int(random.integers(0, length)) if random.random() < 0.5 else 0
                prompt = common[:begin] + random.integers(0, vocab, length - begin).tolist()
                new = int(random.integers(1, 24))
                id = session.add_request(prompt, SamplingParams(max_new_tokens=new, ignore_eos=True))
                asked[id] = {"prompt": prompt, "new": new, "tokens": [], "end": None}
                arrived += 1
            for event in session.step():
                if event.token is not None:
                    asked[event.id]["tokens"].append(event.token)
                asked[event.id]["end"] = event.finish_reason
            live = [id for id, each in asked.items() if each["end"] is None]
            if live and random.random() < 0.05:
                session.cancel(int(random.choice(live)))
            most = max(most, sum(session.stats.pages_used))
        stats = session.stats
        peak = peak_bytes()
    return {
        "requests": list(asked.values()),
        "held": sum(stats.pages_used),
        "most": most,
        "pages": sum(stats.pages_total),
        "preemptions": stats.preemptions,
        "shared": stats.shared_tokens,
        "peak": peak,
    }


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]))))
