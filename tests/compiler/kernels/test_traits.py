import pytest
from tvm.target import Target

from kvc.kernels import matmul
from kvc.kernels.attention import call_tile, choose_tile
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


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("group", "heads"), [(1, 12), (3, 3), (4, 1), (4, 8)])
def test_tiles_of_small_calls_keep_all_threads_busy(threads: int, group: int, heads: int) -> None:
    traits = CpuTraits.of(target("x86-64-v4", **{"num-cores": threads}))
    whole = choose_tile(group, traits)

    def busiest(tile: int, tokens: int) -> int:
        """Register tiles of the thread that has the most."""
        sizes = [min(tile, tokens - i) for i in range(0, tokens, tile)]
        tasks = [-(-size * group // traits.tile_rows) for size in sizes for _ in range(heads)]
        return max(sum(tasks[i::threads]) for i in range(threads))

    for tokens in (1, 16, 32, 100, 512):
        tile = call_tile(whole, tokens, [(group, heads)], traits)
        assert 0 < tile <= whole
        assert busiest(tile, tokens) <= busiest(whole, tokens)
    if threads == 1:
        assert call_tile(whole, 512, [(group, heads)], traits) == whole
    assert call_tile(whole, 32, [], traits) == whole  # a tuned one


def test_threads_share_a_call_that_whole_tiles_would_leave_to_one() -> None:
    traits = CpuTraits.of(target("x86-64-v4", **{"num-cores": 2}))
    assert choose_tile(3, traits) == 28  # 28 and 4 tokens of 3 heads: 13 register tiles and 8
    assert call_tile(28, 32, [(3, 3)], traits) == 18  # 11 and 10
