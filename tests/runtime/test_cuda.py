"""Choosing a GPU's library, and what is said where there is no GPU."""

from __future__ import annotations

import pytest

from kvc.runtime import cuda
from kvc.runtime.cuda import Device
from kvc_passes.errors import TargetError


@pytest.mark.parametrize(
    ("capability", "archs", "chosen"),
    [
        ((9, 0), ("sm_80", "sm_90"), "sm_90"),
        ((8, 9), ("sm_80", "sm_90"), "sm_80"),  # machine code runs on later minor versions
        ((8, 9), ("sm_80", "sm_86", "sm_89"), "sm_89"),
        ((8, 6), ("sm_89", "sm_80"), "sm_80"),
        ((10, 0), ("sm_90", "sm_100"), "sm_100"),
    ],
)
def test_the_best_code_that_runs_is_chosen(
    capability: tuple[int, int], archs: tuple[str, ...], chosen: str
) -> None:
    assert Device(capability, 1, 1).choose(archs) == chosen


@pytest.mark.parametrize(
    ("capability", "archs"), [((7, 5), ("sm_80",)), ((9, 0), ("sm_80", "sm_100")), ((8, 0), ("sm_86",))]
)
def test_a_gpu_that_no_code_is_for(capability: tuple[int, int], archs: tuple[str, ...]) -> None:
    number = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(TargetError, match=f"this GPU is {number}.*--target cuda:{number}"):
        Device(capability, 1, 1).choose(archs)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    with pytest.raises(TargetError, match=r"no NVIDIA driver.*--target cpu"):
        Device.find()
