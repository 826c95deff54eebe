"""The worst planned workload, and the memory it took: `python -m kvc.runtime.peak MODEL.kvc`.

Every planned alternative is run in full: its whole batch at once, prompts that fill the context but for the
last tokens, which are generated. Prints the process's peak resident bytes, for a GPU those of device memory
that it holds.
"""

from __future__ import annotations

import sys

import numpy as np

from kvc.artifact import Artifact
from kvc.runtime import load
from kvc.runtime.cuda import used_bytes
from kvc.runtime.encoder import random_inputs

_GENERATED = 8


def main() -> None:
    artifact = Artifact.open(sys.argv[1], verify=False)
    plan, facts = artifact.plan, artifact.facts
    on_gpu = plan.target["kind"] == "cuda"
    before = used_bytes() if on_gpu else 0
    with load(artifact.path, verify=False) as session:
        random = np.random.default_rng(0)
        for workload in plan.workload:
            context = min(workload.context, plan.max_context)
            new = min(_GENERATED, context)
            length = max(1, context - new)
            prompts = [random.integers(0, facts.vocab, length).tolist() for _ in range(workload.batch)]
            memory = inputs = None
            if facts.encoder is not None:
                assert plan.encoder is not None
                longest = plan.encoder.longest
                inputs = [random_inputs(facts.encoder, longest, random) for _ in prompts]
            elif facts.memory is not None:
                shape = (workload.memory, facts.memory[0])
                memory = [random.standard_normal(shape, np.float32) for _ in prompts]
            session.generate(
                prompts,
                memory=memory,
                encoder_inputs=inputs,
                max_new_tokens=context - length or 1,
                ignore_eos=True,
            )
        # On a GPU everything is allocated when the model is loaded, and stays.
        print(used_bytes() - before if on_gpu else peak_bytes())


def peak_bytes() -> int:
    """Peak resident bytes of this process (VmHWM)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
