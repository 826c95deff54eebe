"""Runs an artifact that was compiled for CUDA on the pretend GPU: `python -m pretend_gpu.run_artifact`.

    run_artifact ARTIFACT DUMP FOLDER OUT

DUMP is the folder that `kvc compile --dump` wrote the generated CUDA text to, FOLDER keeps compiled
libraries, OUT.npz gets the logits: of two prompts in a ragged call that goes on with one of them, and of
steps after them; the tokens that are chosen from them on the device; and what they have of an encoder's
output, which the encoder makes where there is one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from pretend_gpu.build import activate, build
from pretend_gpu.cuda_text import compile_text
from pretend_gpu.interpreter import hasten
from pretend_gpu.launches import Launches, run_triton

LENGTHS = (37, 5)
CHUNKS = (20, 17)
STEPS = 4
ROWS = (90, 3)
"""Of an encoder's output, where the model reads one."""


def tokens_of(vocab: int) -> list[list[int]]:
    """The tokens of both sequences, those of the steps among them."""
    import numpy as np

    random = np.random.default_rng(0)
    return [[int(t) for t in random.integers(0, vocab, n + STEPS)] for n in LENGTHS]


def draws_of(step: int) -> list[Any]:
    """How tokens are chosen after a call: of the first sequence the most likely one, of the second any."""
    import numpy as np

    from kvc.runtime.sampler import Draw, SamplingParams

    ways = (SamplingParams(), SamplingParams(temperature=1.5, top_k=200, top_p=0.9))
    return [Draw(params, np.random.default_rng(step)) for params in ways]


def memories_of(width: int) -> list[Any]:
    """What both sequences have of an encoder's output, float32 [rows, width]."""
    import numpy as np

    random = np.random.default_rng(1)
    return [random.standard_normal((rows, width)).astype(np.float32) for rows in ROWS]


def inputs_of(encoder: Any, longest: int) -> list[Any]:
    """What both sequences have of an encoder's inputs: of facts.encoder, `longest` at most."""
    import numpy as np

    from kvc.runtime.encoder import random_inputs

    random = np.random.default_rng(2)
    extents = (longest, (encoder.least + longest) // 2)
    return [random_inputs(encoder, extent, random) for extent in extents]


def add_kernels(launches: Launches, built: Path, text: Path, arch: str, folder: Path) -> None:
    """What Triton's and TVM's kernels of a built library do, by its kernels.json and the text."""
    from kvc.kernels.cuda.device import DeviceKernel

    hasten(overflow=False)
    for entry in json.loads((built / "kernels.json").read_text()):
        fields = {k: entry[k] for k in ("function", "types", "constants", "aligned", "warps", "stages")}
        pairs = {k: tuple(tuple(p) for p in fields[k]) for k in ("types", "constants")}
        kernel = DeviceKernel(**{**fields, **pairs, "aligned": tuple(fields["aligned"])})
        if entry["arch"] == arch:
            launches.add(entry["name"], run_triton(kernel.load(), kernel.types, dict(kernel.constants)))
    if text.exists():  # single kernels have none of TVM's
        for name, call in compile_text(text.read_text(), folder).items():
            launches.add(name, call)


def main() -> None:
    artifact, dump, folder, out = (Path(a) for a in sys.argv[1:])
    os.environ["TRITON_INTERPRET"] = "1"
    driver = activate(build(folder))
    if "PRETEND_MEMORY" in os.environ:
        driver.pretend_set_memory(int(os.environ["PRETEND_MEMORY"]))
    launches = Launches(driver)
    import numpy as np

    from kvc.artifact import Artifact
    from kvc.runtime.cuda import Device
    from kvc.runtime.executor import Executor, Segment

    opened = Artifact.open(artifact)
    arch = Device.find().choose(tuple(opened.plan.target["archs"]))
    add_kernels(launches, artifact, dump / f"kernels.{arch}.cu", arch, folder)
    executor = Executor(opened, warm=False)
    tokens = tokens_of(executor.facts.vocab)
    pages = [[each] * len(executor.plan.groups) for each in ([3, 1], [0, 2])]
    memories: list[Any] = []
    if executor.facts.memory is not None:
        memories, encoder = memories_of(executor.facts.memory[0]), executor.facts.encoder
        if encoder is not None:
            assert executor.plan.encoder is not None
            given = inputs_of(encoder, executor.plan.encoder.longest)
            memories = [executor.run_encoder(each) for each in given]
        (group,) = (g for g, each in enumerate(executor.plan.groups) if each.reach.memory)
        for each, own in zip(memories, pages):
            executor.encode(each, own[group])
    memory = [len(each) for each in memories] or [0, 0]
    rows: list[np.ndarray] = []
    chosen: list[Any] = []
    first = [Segment(tokens[0][: CHUNKS[0]], 0, pages[0], wanted=False, memory=memory[0])]
    executor.prefill(first)
    second = [
        Segment(tokens[0][CHUNKS[0] : LENGTHS[0]], CHUNKS[0], pages[0], memory=memory[0]),
        Segment(tokens[1][: LENGTHS[1]], 0, pages[1], memory=memory[1]),
    ]
    rows.append(executor.prefill(second).copy())
    chosen.append(executor.choose(draws_of(0)))
    for step in range(STEPS):
        segments = [
            Segment([t[n + step]], n + step, p, memory=m)
            for t, n, p, m in zip(tokens, LENGTHS, pages, memory)
        ]
        rows.append(executor.decode(segments).copy())
        chosen.append(executor.choose(draws_of(step + 1)))
    launches.check()
    # The first call launches kernels, the second records them; that and all others are one launch each.
    assert driver.pretend_graph_launches() == (STEPS - 1) + STEPS
    encoded = {f"memory_{i}": each for i, each in enumerate(memories)}
    np.savez(out, logits=np.stack(rows), chosen=chosen, launches=len(launches.log), **encoded)


if __name__ == "__main__":
    main()
