"""Running a compiled model: `kvc.runtime.load("model.kvc")`.

Nothing here imports TVM's compiler, ONNX or torch: what the process imports counts against the budget.
"""

from __future__ import annotations

from pathlib import Path

from kvc.artifact import Artifact
from kvc.runtime.answers import Completion, Event, Stats, Timings
from kvc.runtime.executor import Executor
from kvc.runtime.sampler import SamplingParams
from kvc.runtime.session import Session
from kvc.runtime.text import Text

__all__ = ["Completion", "Event", "SamplingParams", "Session", "Stats", "Timings", "load"]


def load(
    path: Path | str,
    *,
    verify: bool = True,
    threads: int | None = None,
    warm: bool = True,
    share: bool = True,
) -> Session:
    """Load the artifact `path`; all memory that it will ever use is taken here.

    verify: compare the files with the manifest's sha256 first (about 1 s for each 2 GB).
    threads: threads to compute with, by default those that the plan was made for, and no more: their memory
        is in the budget.
    warm: run the largest call once: its temporaries are allocated now and not at the first long prompt.
    share: let requests that begin with the same tokens keep them once, and compute them once.

    Raises InputError if the artifact is damaged, memory is lacking or `threads` are too many, TargetError if
    it was compiled for features that this CPU lacks.
    """
    artifact = Artifact.open(path, verify=verify)
    # First, since reading a tokenizer takes memory for a moment that the model can have afterwards.
    text = Text(artifact.path) if artifact.file("tokenizer.json") else None
    return Session(Executor(artifact, threads=threads, warm=warm), artifact.path, text, share=share)
