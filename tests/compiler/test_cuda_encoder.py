"""Encoders in artifacts for NVIDIA GPUs, on a pretend GPU: rows and logits are those of both ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvc
from kvc.runtime.host_memory import padded
from kvc.widen import widen
from kvc_passes.errors import BudgetError
from pretend_gpu.run_artifact import LENGTHS, ROWS, STEPS, inputs_of, tokens_of
from support import OnnxRuntime

from .test_cuda import LIMITS, Built, few_shares, libraries, run

pytest.importorskip("triton")
__all__ = ["few_shares", "libraries"]

ModelFile = Callable[..., Path]
WORKLOAD = f"2x64+{max(ROWS)}"
LOADED = 16 * 4096
"""Bytes that come with the code: constants of the module. TVM rounds each, and the arena, up to a page."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("tiny-bart", "float32"),
        pytest.param("tiny-t5", "float32", marks=pytest.mark.slow),
        pytest.param("tiny-whisper", "float16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("few_shares")
def test_rows_and_logits_on_a_pretend_gpu(
    model_file: ModelFile, libraries: Path, tmp_path: Path, family: str, dtype: str
) -> None:
    model, encoder = (model_file(name, dtype=dtype) for name in (family, f"{family}-encoder"))
    built = Built(model, tmp_path / "m.kvc", tmp_path / "dump")
    options = {"encoder": encoder, "budget": "2GB", "workload": WORKLOAD, "target": "cuda:sm_90"}
    artifact = kvc.compile(model, output=built.artifact, dump=built.dump, **options)
    counted = artifact.plan.bytes
    assert counted.arena > LOADED  # a second one would be noticed
    done = run(built, libraries, PRETEND_MEMORY=str(counted.total - counted.runtime + LOADED))
    assert done.returncode == 0, done.stderr
    facts, plan = artifact.facts.encoder, artifact.plan.encoder
    assert facts is not None
    assert plan is not None
    found = np.load(built.artifact.with_suffix(".npz"))
    exact = [OnnxRuntime(widen(file, tmp_path / f"{file.stem}.onnx")) for file in (encoder, model)]
    tokens = tokens_of(artifact.facts.vocab)
    for i, (given, length) in enumerate(zip(inputs_of(facts, plan.longest), LENGTHS)):
        (rows,) = exact[0].run(given)
        np.testing.assert_allclose(found[f"memory_{i}"], rows[0], rtol=0, atol=LIMITS[dtype])
        logits = exact[1].run({"input_ids": np.array([tokens[i]]), "encoder_hidden_states": rows})[0][0]
        assert np.abs(found["logits"][:, i] - logits[length - 1 :]).max() < LIMITS[dtype]
    assert found["logits"].shape[0] == STEPS + 1


def test_what_is_counted_of_it(model_file: ModelFile) -> None:
    """Its inputs once: what requests come with stays on the host."""
    encoder = model_file("tiny-bart-encoder")
    options = {"encoder": encoder, "workload": WORKLOAD, "target": "cuda:sm_90"}
    plan = kvc.plan(model_file("tiny-bart"), budget="2GB", **options)
    assert plan.encoder is not None
    assert plan.bytes.encoder == 2 * padded("int64", (plan.encoder.longest,))  # ids and mask
    assert plan.bytes.arena >= plan.encoder.arena
    with pytest.raises(BudgetError) as refused:
        kvc.plan(model_file("tiny-bart"), budget="1MB", **options)
    needed = refused.value.needed
    assert kvc.plan(model_file("tiny-bart"), budget=needed, **options).bytes.total <= needed
