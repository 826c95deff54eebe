"""CPU features that compiled code needs, and the number of threads."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from kvc.runtime.library import check_cpu, required_features, thread_count
from kvc_passes.errors import InputError, TargetError

AVX2 = "fpu cx16 popcnt sse4_1 sse4_2 ssse3 abm avx avx2 bmi1 bmi2 f16c fma movbe"


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nflags\t\t: {AVX2}\n\nprocessor\t: 1\nflags\t\t: {AVX2}\n"
    )
    return tmp_path / "cpuinfo"


def test_features_grow_with_the_generations() -> None:
    chain = [
        "x86-64",
        "x86-64-v2",
        "x86-64-v3",
        "x86-64-v4",
        "cascadelake",
        "icelake-server",
        "znver4",
        "znver5",
    ]
    sets = [required_features({"mcpu": name}) for name in chain]
    assert all(small < large for small, large in itertools.pairwise(sets))
    assert "avx512f" in required_features({"mcpu": "znver4"})
    assert "avx512f" not in required_features({"mcpu": "znver3"})


def test_attributes_add_and_remove_features() -> None:
    features = required_features(
        {"mcpu": "x86-64-v3", "mattr": ["+avx512vnni", "+avx512f", "-fma", "+prfchw"]}
    )
    assert features == required_features({"mcpu": "haswell"}) - {"fma"} | {"avx512_vnni", "avx512f"}
    assert required_features({"mattr": ["+sse4.1", "+lzcnt", "+bmi"]}) == {"sse4_1", "abm", "bmi1"}


def test_unknown_cpu_needs_nothing_that_is_known() -> None:
    assert required_features({"mcpu": "made-up"}) == frozenset()


def test_code_for_avx512_is_refused_on_avx2(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    check_cpu({"mcpu": "znver3"}, cpuinfo)
    with pytest.raises(TargetError, match=r"compiled for znver4; this CPU lacks avx512_bf16, .*avx512f"):
        check_cpu({"mcpu": "znver4"}, cpuinfo)


def test_code_for_another_architecture_is_refused() -> None:
    with pytest.raises(TargetError, match="compiled for riscv32"):
        check_cpu({"mtriple": "riscv32-unknown-linux-gnu"})


def test_threads_are_those_of_the_plan_and_of_the_process() -> None:
    available = len(os.sched_getaffinity(0))
    assert thread_count({}) == available
    assert thread_count({"num-cores": 1}) == 1
    assert thread_count({"num-cores": available + 5}) == available


def test_threads_whose_memory_is_not_planned_are_refused() -> None:
    cores = len(os.sched_getaffinity(0)) + 5
    assert [thread_count({"num-cores": cores}, wanted) for wanted in (1, cores)] == [1, cores]
    for wanted in (-1, 0, cores + 1):
        with pytest.raises(InputError, match=f"threads={wanted}: the plan counts the memory of {cores}"):
            thread_count({"num-cores": cores}, wanted)
