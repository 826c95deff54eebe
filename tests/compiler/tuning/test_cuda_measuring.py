"""What cannot be measured on a GPU, and what ends the process that measures."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvc.runtime.cuda import Device
from kvc.tuning import runner, worker
from kvc.tuning.cuda import CudaTarget
from kvc_passes.errors import PlanningError, TargetError

from .cuda_cases import TARGET, TASKS, product

pytest.importorskip("triton")


def test_a_machine_that_cannot_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        TargetError, match=r"a GPU, and this machine has none.*no NVIDIA driver.*give --rpc HOST:PORT"
    ):
        TARGET.check()
    monkeypatch.setattr(Device, "find", lambda: Device((8, 9), 1, 1))
    with pytest.raises(TargetError, match=r"this machine's GPU is sm_89; tune for that, or give --rpc"):
        TARGET.check()
    CudaTarget("sm_89").check()
    monkeypatch.setattr(Device, "find", lambda: Device((10, 0), 1, 1))
    CudaTarget("sm_100").check()


def test_parameters_that_do_not_compile(tmp_path: Path) -> None:
    """The sums alone are more than registers hold: a candidate that fails, with its reason."""
    task, few = product(256, 256, most=0), {"depth": 32, "warps": 1, "stages": 1}
    with pytest.raises(PlanningError, match=r"kernel kvc_products_product_\w+ for sm_90 (spills|takes) "):
        TARGET.build(task, {"rows": 64, **few}, tmp_path / "kernel.so")
    assert not (tmp_path / "kernel.so").exists()


@pytest.mark.parametrize(
    ("error", "remote", "spoilt"),
    [
        (RuntimeError("CUDA: an illegal memory access"), False, True),
        (RuntimeError("CUDA: an illegal memory access"), True, False),
        (PlanningError("kernel spills"), False, False),
    ],
)
def test_an_error_of_the_gpu_ends_the_process_that_measures(
    error: Exception, remote: bool, spoilt: bool
) -> None:
    """CUDA remembers it; a server of RPC has a process for every session."""

    def measure(*_: Any) -> None:
        raise error

    bench = SimpleNamespace(target=TARGET, measure=measure)
    request = {"task": dataclasses.asdict(TASKS["decode"]), "values": {}, "rounds": 2}
    answer = worker._answer(bench, request, remote)
    assert answer == {"failed": f"{type(error).__name__}: {error}", "spoilt": spoilt}


@pytest.mark.parametrize("spoilt", [True, False])
def test_a_spoilt_process_is_replaced(spoilt: bool) -> None:
    answer = json.dumps({"failed": "why", "spoilt": spoilt})
    made = runner.Worker(TARGET.description, None, 60)
    made.command = (
        sys.executable,
        "-c",
        f"print('{{}}', flush=True); input(); print('{answer}', flush=True); input()",
    )
    try:
        assert made.measure(TASKS["decode"], {}, 2) == runner.Failure("failed", "why")
        assert (made._process is None) is spoilt
    finally:
        made.close()
