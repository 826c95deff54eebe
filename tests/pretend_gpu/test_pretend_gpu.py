"""The pretend GPU does what a GPU does, as far as TVM and kvc can see it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretend")


def run(kind: str, scenario: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "TRITON_CACHE_DIR": str(folder / "triton")}
    environment = {name: value for name, value in environment.items() if not name.startswith("PRETEND_")}
    command = [sys.executable, str(HERE / f"scenarios_{kind}.py"), scenario, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "scenario", ["guards", "errors", "limits", "maps", "graph", "deferred", "fibers", "rounding"]
)
def test_c_api(scenario: str, folder: Path) -> None:
    run("c", scenario, folder)


@pytest.mark.parametrize(
    "scenario",
    ["memory", "text_of_tvm", "text_of_tvm_in_float16", "text_of_tvm_in_bfloat16", "graph_of_the_vm"],
)
def test_tvm(scenario: str, folder: Path) -> None:
    run("tvm", scenario, folder)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton(folder: Path) -> None:
    run("tvm", "build_triton", folder)
    run("tvm", "run_of_triton", folder)
    run("tvm", "other_gpu_of_triton", folder)
