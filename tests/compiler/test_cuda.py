"""Artifacts for NVIDIA GPUs: what is in them, what they compute on a pretend GPU, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pretend_gpu.run_artifact import LENGTHS, ROWS, STEPS, draws_of, memories_of, tokens_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tools.onnx_graph import Graph  # noqa: E402

import kvc  # noqa: E402
from kvc.kernels.cuda import host_pages  # noqa: E402
from kvc.kernels.cuda.host_pages import CudaPages  # noqa: E402
from kvc.planning.saved import SavedPlan, save_plan  # noqa: E402
from kvc.runtime.executor import Executor  # noqa: E402
from kvc.runtime.sampler import choose  # noqa: E402
from kvc.runtime.sequences import Sequences  # noqa: E402
from kvc.widen import widen  # noqa: E402
from kvc_passes.graph import graph_of  # noqa: E402
from kvc_passes.row_slices import is_kernel_call  # noqa: E402

pytest.importorskip("triton")

ModelFile = Callable[..., Path]
OPTIONS = {"budget": "2GB", "workload": "2x64"}
LIMITS = {"float16": 2e-2, "bfloat16": 2e-1, "float32": 1e-4}
"""As for coverage: activations, keys and values are of 16 bits, and the reference's are not."""


@dataclass
class Built:
    """A model, its artifact, and the folder of the generated CUDA text."""

    model: Path
    artifact: Path
    dump: Path


@pytest.fixture(scope="module")
def build(model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    made: dict[tuple[str, str, str], Built] = {}

    def built(family: str, dtype: str = "float16", archs: str = "sm_90") -> Built:
        key = (family, dtype, archs)
        if key not in made:
            model = model_file(family, True, dtype)
            folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
            target, dump = f"cuda:{archs}", folder / "dump"
            kvc.compile(model, target=target, output=folder / "m.kvc", dump=dump, **OPTIONS)
            made[key] = Built(model, folder / "m.kvc", dump)
        return made[key]

    return built


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def few_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of an encoder's output are decoded in as many shares as fill a GPU; the interpreter's is small."""
    monkeypatch.setattr(host_pages, "FULL", 20)


def run(built: Built, libraries: Path, **machine: str) -> subprocess.CompletedProcess[str]:
    """Run on the pretend GPU that the variables PRETEND_... describe."""
    paths = [str(ROOT / name) for name in ("tests", "compiler", "passes", "models")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **machine}
    arguments = [built.artifact, built.dump, libraries, built.artifact.with_suffix(".npz")]
    command = [sys.executable, "-m", "pretend_gpu.run_artifact", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)


def worst(built: Built, folder: Path, vocab: int = 512) -> float:
    """Largest difference of a logit from ONNX Runtime's, of the same graph in float32."""
    reference = folder / "reference.onnx"
    widen(built.model, reference)
    shutil.copytree(built.model.with_suffix(".assets"), reference.with_suffix(".assets"))
    graph, got = Graph(reference), np.load(built.artifact.with_suffix(".npz"))["logits"]
    assert got.shape[:2] == (STEPS + 1, len(LENGTHS))
    differences = [
        np.abs(got[:, i] - graph.logits(tokens)[length - 1 :]).max()
        for i, (tokens, length) in enumerate(zip(tokens_of(vocab), LENGTHS))
    ]
    return float(max(differences))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float16"),
        ("gpt2", "float16"),
        pytest.param("mistral", "float16", marks=pytest.mark.slow),
        ("gemma2", "float32"),
    ],
)
def test_logits_on_a_pretend_gpu(
    build: Callable[..., Built], libraries: Path, tmp_path: Path, family: str, dtype: str
) -> None:
    built = build(family, dtype)
    done = run(built, libraries)
    assert done.returncode == 0, done.stderr
    assert worst(built, tmp_path) < LIMITS[dtype]
    # Tokens are chosen there, after prefill and every step, as the host does it with the same logits.
    found = np.load(built.artifact.with_suffix(".npz"))
    expected = [choose(logits, draws_of(step)) for step, logits in enumerate(found["logits"])]
    np.testing.assert_array_equal(found["chosen"], expected)


@pytest.mark.parametrize(("family", "apart", "count"), [("llama", 15, 9), ("phi", 14, 11)])
def test_a_layer_has_so_many_kernels(
    model_file: ModelFile, monkeypatch: pytest.MonkeyPatch, family: str, apart: int, count: int
) -> None:
    """From one append of decode to the next; Phi has three products with biases for Llama's joint one."""
    model = model_file(family, True, "float16")
    for reads, expected in ((True, count), (False, apart)):
        monkeypatch.setattr(CudaPages, "reads_views", reads)
        planner = kvc.planner(model, target="cuda:sm_90")
        main = planner.variant(planner.usual()[0]).lowered.functions["decode"]["main"]
        calls = [call for call in graph_of(main).definitions.values() if is_kernel_call(call)]
        first, second = (i for i, call in enumerate(calls) if call.op.name_hint.startswith("append"))
        assert second - first == expected


def test_feed_forward_in_slices_on_a_pretend_gpu(
    model_file: ModelFile, libraries: Path, tmp_path: Path
) -> None:
    """Slices of 8 tokens: calls have 25 and 17, so slices behind their ends are not launched."""
    model, target = model_file("llama", True, "float16"), "cuda:sm_90"
    planner = kvc.planner(model, target=target)
    decision = planner.plan_of(planner.usual()[0], 128, 2 * 10**9, (kvc.Workload(2, 64),), 8)
    assert decision is not None
    save_plan(tmp_path / "plan.json", SavedPlan(planner.model.facts.name, target, (), decision.plan))
    built = Built(model, tmp_path / "m.kvc", tmp_path / "dump")
    artifact = kvc.compile(model, plan=tmp_path / "plan.json", output=built.artifact, dump=built.dump)
    assert artifact.plan.ffn_chunk == 8
    done = run(built, libraries)
    assert done.returncode == 0, done.stderr
    assert worst(built, tmp_path) < LIMITS["float16"]


def test_weights_of_four_bits_on_a_pretend_gpu(libraries: Path, tmp_path: Path) -> None:
    """What onnxruntime-genai's builder writes for GPUs: MatMulNBits and GroupQueryAttention in float16."""
    model = ROOT / "tests" / "fixtures" / "genai" / "llama-int4-cuda.onnx"
    built = Built(model, tmp_path / "m.kvc", tmp_path / "dump")
    kvc.compile(model, target="cuda:sm_90", output=built.artifact, dump=built.dump, **OPTIONS)
    layout = kvc.Artifact.open(built.artifact).layout()
    assert sum(spec.dtype == "uint8" for spec in layout) > 8  # codes stay codes
    done = run(built, libraries)
    assert done.returncode == 0, done.stderr
    assert worst(built, tmp_path, vocab=128) < LIMITS["float16"]


def test_windows_and_codes_on_a_pretend_gpu(model_file: ModelFile, libraries: Path, tmp_path: Path) -> None:
    """Two groups of layers, keys and values of 8 bits, against the same in the CPU's build.

    Rounding of activations to 16 bits moves some codes by one: a step of 1/127 of the largest element.
    """
    model, codes = model_file("gemma2", True, "float16"), {"allow": "kv-int8", "state": "kv-int8"}
    built = Built(model, tmp_path / "m.kvc", tmp_path / "dump")
    artifact = kvc.compile(
        model, target="cuda:sm_90", output=built.artifact, dump=built.dump, **codes, **OPTIONS
    )
    assert len(artifact.plan.groups) == 2
    done = run(built, libraries)
    assert done.returncode == 0, done.stderr
    cpu = kvc.compile(model, output=tmp_path / "cpu.kvc", **codes, **OPTIONS)
    assert from_cpu(built, cpu) < 3 * LIMITS["float16"]


def from_cpu(built: Built, cpu: kvc.Artifact) -> float:
    """Largest difference of a logit from those of the CPU's build."""
    executor = Executor(cpu)
    served = Sequences(executor)
    tokens, memory = tokens_of(executor.facts.vocab), executor.facts.memory
    kept = [served.open(*each) for each in (zip(tokens, memories_of(memory[0])) if memory else zip(tokens))]
    rows = [served.prefill(list(zip(kept, LENGTHS))).copy()]
    rows += [served.decode(kept).copy() for _ in range(STEPS)]
    executor.close()
    return float(np.abs(np.load(built.artifact.with_suffix(".npz"))["logits"] - np.stack(rows)).max())


@pytest.mark.parametrize(
    ("family", "dtype", "state"),
    [
        ("tiny-whisper", "float16", "paged_kv"),
        pytest.param("tiny-whisper", "float16", "x_absorbed,encoder_output", marks=pytest.mark.slow),
        ("tiny-t5", "float32", "x_absorbed,encoder_output"),
        pytest.param("tiny-t5", "float32", "paged_kv", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("few_shares")
def test_cross_attention_on_a_pretend_gpu(
    model_file: ModelFile, libraries: Path, tmp_path: Path, family: str, dtype: str, state: str
) -> None:
    """T5 has a learned bias by distance."""
    model = model_file(family, dtype=dtype)
    built = Built(model, tmp_path / "m.kvc", tmp_path / "dump")
    options = {"budget": "2GB", "workload": f"2x64+{max(ROWS)}", "state": state}
    artifact = kvc.compile(model, target="cuda:sm_90", output=built.artifact, dump=built.dump, **options)
    assert {site.kept for site in artifact.facts.sites} == set(state.split(","))
    assert any(site.bias for site in artifact.facts.sites) == (family == "tiny-t5")
    done = run(built, libraries)
    assert done.returncode == 0, done.stderr
    assert from_cpu(built, kvc.compile(model, output=tmp_path / "cpu.kvc", **options)) < LIMITS[dtype]


@pytest.mark.parametrize(
    ("family", "state"),
    [
        ("gpt2", "x_absorbed"),
        pytest.param("deepseek", "mla_latent", marks=pytest.mark.slow),
        ("phi", "k_plus_r"),
        pytest.param("phi", "x_gemm", marks=pytest.mark.slow),
        ("gemma4", "v_only,paged_kv"),
    ],
)
def test_other_forms_of_the_state_on_a_pretend_gpu(
    model_file: ModelFile, libraries: Path, tmp_path: Path, family: str, state: str
) -> None:
    model = model_file(family, False, "float16")
    built = Built(model, tmp_path / "m.kvc", tmp_path / "dump")
    artifact = kvc.compile(
        model, target="cuda:sm_90", state=state, output=built.artifact, dump=built.dump, **OPTIONS
    )
    assert {site.kept for site in artifact.facts.sites} == set(state.split(","))
    done = run(built, libraries)
    assert done.returncode == 0, done.stderr
    assert worst(built, tmp_path) < LIMITS["float16"]


def test_one_artifact_has_code_for_several_architectures(
    build: Callable[..., Built], libraries: Path, tmp_path: Path
) -> None:
    built = build("llama", archs="sm_80,sm_90")
    artifact = kvc.Artifact.open(built.artifact)
    assert artifact.plan.target == {"kind": "cuda", "archs": ["sm_80", "sm_90"]}
    for arch in ("sm_80", "sm_90"):
        library = (built.artifact / f"model.{arch}.so").read_bytes()
        assert library.count(b"\x7fELF\x02\x01\x01") > 10  # the library itself, and machine code of kernels
        assert b"__global__" not in library  # no text that would be compiled when it is loaded
    entries = json.loads((built.artifact / "kernels.json").read_text())
    assert {e["arch"] for e in entries} == {"sm_80", "sm_90"}
    assert all(0 < e["registers"] <= 255 for e in entries)
    done = run(built, libraries, PRETEND_CC="89")  # which runs code for sm_80
    assert done.returncode == 0, done.stderr
    assert worst(built, tmp_path) < LIMITS["float16"]


def test_code_in_bfloat16_is_generated(build: Callable[..., Built]) -> None:
    """It runs on a GPU only: Triton's interpreter multiplies matrices of bfloat16 wrongly."""
    built = build("llama", "bfloat16")
    types = [
        kind for e in json.loads((built.artifact / "kernels.json").read_text()) for _, kind in e["types"]
    ]
    assert "*bf16" in types
    assert "*fp16" not in types
    text = (built.dump / "kernels.sm_90.cu").read_text()
    # TVM reduces 16-bit numbers by threads that are taken to run in lockstep, which they need not.
    assert not re.search(r"\(volatile \w+\s*\*\)\s*\w+\)\[[^\]]*threadIdx", text)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"PRETEND_CC": "75"}, "this GPU is sm_75, the model was compiled for sm_80, sm_90"),
        ({"PRETEND_CC": "100"}, "this GPU is sm_100, .*--target cuda:sm_100"),
        ({"PRETEND_DRIVER": "12080"}, "the NVIDIA driver supports CUDA 12.8; kvc's code needs 13.0"),
        ({"PRETEND_DEVICES": "0"}, "CUDA shows no GPU"),
        ({"PRETEND_MEMORY": "1000000"}, "bytes of device memory, .* are free"),
    ],
)
def test_a_gpu_that_cannot_run_it(
    build: Callable[..., Built], libraries: Path, machine: dict[str, str], message: str
) -> None:
    done = run(build("llama", archs="sm_80,sm_90"), libraries, **machine)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("kvc_passes.errors.TargetError")
    assert re.search(message, error), error


def test_unknown_architectures_are_refused(model_file: ModelFile) -> None:
    for target in ("cuda:sm_42", "cuda:80", "cuda:sm_80,", "cuda:sm_80,sm_80x"):
        with pytest.raises(kvc.TargetError, match=r"unknown architecture .*sm_80, sm_86, sm_89, sm_90"):
            kvc.plan(model_file("llama"), target=target, **OPTIONS)


def test_without_triton_it_is_planned_but_not_compiled(
    model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    model = model_file("llama", True, "float16")
    assert kvc.plan(model, target="cuda", **OPTIONS).target["kind"] == "cuda"
    with pytest.raises(kvc.TargetError, match=r"pip install 'kvc\[cuda\]'"):
        kvc.compile(model, target="cuda", output=tmp_path / "m.kvc", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_a_gpu_says_so(build: Callable[..., Built]) -> None:
    with pytest.raises(kvc.TargetError, match=r"no NVIDIA driver.*--target cpu"):
        kvc.load(build("llama", archs="sm_80,sm_90").artifact)
