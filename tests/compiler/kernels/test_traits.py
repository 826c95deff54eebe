import pytest
from tvm.target import Target

from kvc.kernels import matmul
from kvc.kernels.attention import choose_tile
from kvc.kernels.traits import CpuTraits, default_target


def target(mcpu: str, **options: object) -> Target:
    return Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu, **options})


def test_the_vector_width_follows_the_cpu() -> None:
    assert CpuTraits.of(target("x86-64-v4", **{"num-cores": 4})) == CpuTraits(16, 32, 4)
    assert CpuTraits.of(target("x86-64-v3")) == CpuTraits(8, 16, 1)
    assert CpuTraits.of(target("x86-64")) == CpuTraits(4, 16, 1)


def test_this_machine_has_a_target() -> None:
    traits = CpuTraits.of(default_target())
    assert traits.threads >= 1
    assert matmul.panel(traits) == 2 * traits.lanes


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("mcpu", ["x86-64-v3", "x86-64-v4"])
def test_prefill_tiles_waste_few_rows(group: int, mcpu: str) -> None:
    traits = CpuTraits.of(target(mcpu))
    rows = choose_tile(group, traits) * group
    assert 56 <= rows <= 128
    assert -(-rows // traits.tile_rows) * traits.tile_rows <= 1.08 * rows
