import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine

from kvc.kernels import matmul
from kvc.kernels.matmul import pack, packed_embedding, packed_matmul, packed_shape

# (n, k, options): a last panel that is not full, several blocks along k, and a small serial one.
PRODUCTS = [
    (257, 70, {"bias": True, "flat": True}),
    (64, 2304, {"bias": True}),
    (96, 33, {}),
]


def check(machine: Machine, n: int, k: int, m: int, options: dict[str, bool], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, m, k), (n, k)))
    bias = [rng.standard_normal(n).astype(np.float32)] if options.get("bias") else []
    y = np.full((m, n) if options.get("flat") else (1, m, n), np.nan, np.float32)
    kernel = machine.build(_product, n, k, tuple(sorted(options.items())))
    result = machine.call(kernel, x, pack(w, machine.traits.lanes), *bias, y)[-1]
    exact = x[0].astype(float) @ w.T.astype(float) + sum(bias)
    # k products and k sums, each rounded once: error below (k + 2) eps sum |x w|.
    bound = (k + 2) * 2.0**-24 * (np.abs(x[0]) @ np.abs(w).T + sum(np.abs(b) for b in bias))
    assert (np.abs(result.reshape(m, n) - exact) <= bound).all()


def _product(n: int, k: int, options: tuple[tuple[str, bool], ...], traits: object) -> object:
    return packed_matmul(n, k, traits, **dict(options))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_every_row_count_up_to_two_tiles(machine: Machine, product: tuple[int, int, dict[str, bool]]) -> None:
    for m in range(1, 2 * machine.traits.tile_rows + 2):
        check(machine, *product[:2], m, product[2])


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(MACHINES)),
    product=st.sampled_from(PRODUCTS),
    m=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_any_row_count(name: str, product: tuple[int, int, dict[str, bool]], m: int, seed: int) -> None:
    check(MACHINES[name], *product[:2], m, product[2], seed)


def test_a_product_for_decode_alone(machine: Machine) -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((40, 24)).astype(np.float32)
    kernel = machine.build(_few, 40, 24)
    for m in (1, 3, 4):
        x = rng.standard_normal((1, m, 24)).astype(np.float32)
        y = np.zeros((1, m, 40), np.float32)
        result = machine.call(kernel, x, pack(w, machine.traits.lanes), y)[-1]
        np.testing.assert_allclose(result, x @ w.T, atol=1e-4)


def _few(n: int, k: int, traits: object) -> object:
    return packed_matmul(n, k, traits, max_rows=4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 100), st.integers(1, 40), st.sampled_from([4, 8, 16]), st.booleans())
def test_packing_pads_the_last_panel_with_zeros(n: int, k: int, lanes: int, transposed: bool) -> None:
    values = np.arange(1, n * k + 1, dtype=np.float32)
    w = values.reshape(k, n).T if transposed else values.reshape(n, k)
    packed = pack(w, lanes)
    flat = packed.transpose(0, 2, 1).reshape(-1, k)
    assert packed.shape == (-(-n // (2 * lanes)), k, 2 * lanes)
    assert (flat[:n] == w).all()
    assert (flat[n:] == 0).all()


def test_packing_into_a_given_array_makes_no_other() -> None:
    w = np.random.default_rng(0).standard_normal((70, 9)).astype(np.float32)
    out = np.full((3, 9, 32), np.nan, np.float32)
    assert pack(w, 16, out) is out
    assert (out == pack(w, 16)).all()


@pytest.mark.parametrize("n", [1, 3, 4, 33])
def test_embedding_reads_rows_of_the_packed_matrix(machine: Machine, n: int) -> None:
    rng = np.random.default_rng(n)
    w = rng.standard_normal((257, 70)).astype(np.float32)
    ids = rng.integers(0, 257, (1, n))
    ids[0, 0] = 256
    kernel = machine.build(packed_embedding, 257, 70)
    y = machine.call(kernel, pack(w, machine.traits.lanes), ids, np.zeros((1, n, 70), np.float32))[-1]
    assert (y == w[ids]).all()


def test_shapes_agree(machine: Machine) -> None:
    shape = packed_shape(50257, 24, machine.traits)
    assert shape == (-(-50257 // matmul.panel(machine.traits)), 24, matmul.panel(machine.traits))
