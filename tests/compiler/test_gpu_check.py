"""The check for machines with a GPU, packed and tried on the pretend GPU; and a real model there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tools.gpu_cases import ATTENTION, FORMS, attention_inputs, rounded  # noqa: E402
from tools.gpu_weights import assembled, seeded  # noqa: E402

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_weights_depend_on_their_names_alone() -> None:
    weight = seeded("model.layers.0.weight", (64, 96), "float16")
    assert weight.dtype == np.float16
    np.testing.assert_array_equal(weight, seeded("model_layers_0_weight", (64, 96), "float16"))
    assert (weight != seeded("model.layers.1.weight", (64, 96), "float16")).mean() > 0.9
    assert weight.astype(float).std() == pytest.approx(0.02, rel=0.03)
    # The first numbers, so that no release of numpy changes them unseen.
    assert weight[0, :4].tolist() == pytest.approx(FIRST)


FIRST = [-0.01299285888671875, 0.005954742431640625, -0.0311279296875, 0.0286865234375]


def test_weights_are_put_together_row_by_row() -> None:
    sources = [
        {"name": "a", "shape": [8, 16], "transposed": False},
        {"name": "b", "shape": [16, 4], "transposed": True},
    ]
    whole = assembled(sources, "float16")
    np.testing.assert_array_equal(whole[:8], seeded("a", (8, 16), "float16"))
    np.testing.assert_array_equal(whole[8:], seeded("b", (16, 4), "float16").T)


def test_inputs_are_such_as_every_type_holds() -> None:
    x = rounded(np.random.default_rng(0).standard_normal(1000))
    np.testing.assert_array_equal(x.astype(np.float16).astype(np.float32), x)
    assert not (x.view(np.uint32) & 0xFFFF).any()
    made = attention_inputs(ATTENTION[0], [(70, 3), (1, 1)], 0)
    assert made.expected.shape == (4, ATTENTION[0].heads, ATTENTION[0].dim)
    assert np.isnan(made.inputs["k"][0]).all()  # a page that nothing may read


def test_queries_of_a_product_stand_beside_what_nothing_may_read() -> None:
    case = next(c for c in FORMS if c.turned)
    made = attention_inputs(case, [(70, 3), (1, 1)], 0)
    assert list(made.inputs)[:3] == ["q", "cos", "sin"]
    queries = case.heads * case.dim
    assert np.isfinite(made.inputs["q"][..., :queries]).all()
    assert np.isnan(made.inputs["q"][..., queries:]).all()
    np.testing.assert_allclose(made.inputs["cos"] ** 2 + made.inputs["sin"] ** 2, 1, rtol=0, atol=1e-6)


def process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / name) for name in ("tests", "compiler", "passes", "models")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=variables, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_packed_check_passes_on_a_pretend_gpu(tmp_path: Path) -> None:
    pack, dump, report = tmp_path / "pack", tmp_path / "dump", tmp_path / "report.json"
    arguments = [str(pack), "--small", "--python", PYTHON, "--dump", str(dump)]
    packed = process(["tools/gpu_pack.py", *arguments])
    assert packed.returncode == 0, packed.stderr
    # In bfloat16 the interpreter multiplies matrices wrongly.
    options = ["--quick", "--dtypes", "float16", "--json", str(report)]
    done = process(["-m", "pretend_gpu.run_check", str(pack), str(dump), str(tmp_path / "code"), *options])
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())["results"]
    assert {r["name"].split("_")[0] for r in results} >= {"prefill", "product", "tiny"}
    assert any(r["name"].endswith("in boxes") for r in results)
    assert all(r["passed"] for r in results)


@pytest.mark.slow
def test_smollm2_in_float16_says_the_same_on_a_pretend_gpu(tmp_path: Path) -> None:
    """Minutes: Triton's interpreter runs thirty layers."""
    import kvc
    from kvc_models.registry import export_named

    model = export_named("smollm2-135m", tmp_path / "smollm2.onnx", dtype="float16", opset=23)
    options = {"budget": "2GB", "workload": "1x256"}
    kvc.compile(model, target="cuda:sm_90", output=tmp_path / "gpu.kvc", dump=tmp_path / "dump", **options)
    kvc.compile(model, output=tmp_path / "cpu.kvc", **options)
    tokens = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]  # of France?
    prompt = [str(token) for token in tokens]
    pretended = {"PRETEND_DUMP": str(tmp_path / "dump"), "PRETEND_FOLDER": str(tmp_path / "code")}
    found = {}
    for name, environment in (("cpu", {}), ("gpu", pretended)):
        out = tmp_path / f"{name}.npz"
        arguments = ["-m", "pretend_gpu.generate", str(tmp_path / f"{name}.kvc"), str(out), "2", *prompt]
        done = process(arguments, **environment)
        assert done.returncode == 0, done.stderr
        found[name] = np.load(out)["logits"]
    np.testing.assert_array_equal(found["cpu"].argmax(1), found["gpu"].argmax(1))
    # Activations in float16, of 30 layers, where the CPU's are float32: 4 units of the largest logit.
    limit = 4 * 2.0**-10 * np.abs(found["cpu"]).max()
    assert np.abs(found["cpu"] - found["gpu"]).max() < limit
