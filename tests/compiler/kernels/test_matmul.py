import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine, baseline
from weight_cases import FORMATS, Case

from kvc.kernels import matmul
from kvc.kernels.emit import compiled
from kvc.kernels.knobs import PRODUCT, FewRows, ManyRows, ProductKnobs
from kvc.kernels.matmul import pack, packed_embedding, packed_matmul, packed_shape
from kvc_passes.weight_format import WeightFormat

# (n, k, options): a last panel that is not full, several blocks along k, and a small serial one.
PRODUCTS = [
    (257, 70, {"bias": True, "flat": True}),
    (64, 2304, {"bias": True}),
    (96, 33, {}),
]


KNOBS = [
    ProductKnobs(FewRows(accumulators=4), ManyRows(rows=5, depth=256)),
    ProductKnobs(FewRows(accumulators=16, ahead=16), ManyRows(depth=256, row_bytes=1)),
    ProductKnobs(FewRows(accumulators=24, ahead=64), ManyRows(rows=3, depth=4096, groups=1)),
    ProductKnobs(FewRows(ahead=8), ManyRows(rows=4, depth=512, row_bytes=64 * 1024, groups=2)),
]


def check(
    machine: Machine,
    n: int,
    k: int,
    m: int,
    options: dict[str, bool],
    seed: int = 0,
    knobs: ProductKnobs = PRODUCT,
) -> None:
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, m, k), (n, k)))
    bias = [rng.standard_normal(n).astype(np.float32)] if options.get("bias") else []
    y = np.full((m, n) if options.get("flat") else (1, m, n), np.nan, np.float32)
    kernel = machine.build(_product, n, k, tuple(sorted(options.items())), knobs)
    result = machine.call(kernel, x, pack(w, machine.traits.lanes), *bias, y)[-1]
    exact = x[0].astype(float) @ w.T.astype(float) + sum(bias)
    # k products and k sums, each rounded once: error below (k + 2) eps sum |x w|.
    bound = (k + 2) * 2.0**-24 * (np.abs(x[0]) @ np.abs(w).T + sum(np.abs(b) for b in bias))
    assert (np.abs(result.reshape(m, n) - exact) <= bound).all()


def _product(
    n: int, k: int, options: tuple[tuple[str, bool], ...], knobs: ProductKnobs, traits: object
) -> object:
    return packed_matmul(n, k, traits, knobs=knobs, **dict(options))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_every_row_count_up_to_two_tiles(machine: Machine, product: tuple[int, int, dict[str, bool]]) -> None:
    for m in range(1, 2 * machine.traits.tile_rows + 2):
        check(machine, *product[:2], m, product[2])


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_products_as_they_may_be_tuned(
    machine: Machine, product: tuple[int, int, dict[str, bool]], knobs: ProductKnobs
) -> None:
    limit = machine.traits.tile_rows
    for m in (*range(1, limit + 2), 3 * limit + 2, 200):
        check(machine, *product[:2], m, product[2], knobs=knobs)


def test_parameters_that_are_derived_may_be_given(machine: Machine) -> None:
    """Zeros stand for what the template derives; nothing else of the kernel changes."""

    def text(few: FewRows, many: ManyRows) -> str:
        return packed_matmul(320, 2304, traits, knobs=ProductKnobs(few, many)).script()

    traits = machine.traits
    default = packed_matmul(320, 2304, traits).script()
    assert default == text(FewRows(8, 0), ManyRows(0, 1024, 448 * 1024, 0))
    assert default == text(FewRows(), ManyRows(rows=traits.tile_rows))
    panels = -(-320 // matmul.panel(traits))
    groups = matmul._column_groups(panels, traits.threads)
    assert default == text(FewRows(), ManyRows(groups=groups))
    for few, many in (
        (FewRows(4), ManyRows()),
        (FewRows(ahead=8), ManyRows()),
        (FewRows(), ManyRows(rows=traits.tile_rows - 1)),
        (FewRows(), ManyRows(depth=4096)),
        (FewRows(), ManyRows(row_bytes=1)),
    ):
        assert default != text(few, many)


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


# A last panel that is not full and an odd depth; for some, several blocks along k.
DEEP = ["bfloat16", "uint4, as ONNX exports have it", "uint4, odd blocks", "uint8, a column's scale"]
FORMATTED = [(name, 72, 71) for name in FORMATS if name != "float32"] + [(name, 41, 2307) for name in DEEP]


def check_format(
    machine: Machine, name: str, n: int, k: int, m: int, seed: int = 0, knobs: ProductKnobs = PRODUCT
) -> None:
    rng = np.random.default_rng(seed)
    case = Case.random(n, k, FORMATS[name], rng)
    x = rng.standard_normal((1, m, k)).astype(np.float32)
    kernel = machine.build(_formatted, n, k, name, knobs)
    y = np.full((1, m, n), np.nan, np.float32)
    result = machine.call(kernel, x, *case.packed(machine.traits.lanes), y)[-1]
    # As for float32, and two more roundings an element: code - zero is exact, the scale is applied once, to
    # the weight or to the sum of a block.
    bound = (k + 4) * 2.0**-24 * (np.abs(x[0]) @ np.abs(case.value).T)
    assert (np.abs(result[0] - x[0].astype(float) @ case.value.T) <= bound).all()


def _formatted(n: int, k: int, name: str, knobs: ProductKnobs, traits: object) -> object:
    return packed_matmul(n, k, traits, format=FORMATS[name], bias=False, knobs=knobs)


@pytest.mark.parametrize("case", FORMATTED, ids=str)
def test_formats_at_every_kind_of_row_count(machine: Machine, case: tuple[str, int, int]) -> None:
    limit = machine.traits.tile_rows
    for m in (*range(1, limit + 2), 3 * limit + 2, 200):
        check_format(machine, *case, m)


@pytest.mark.parametrize("knobs", KNOBS[:2], ids=str)
@pytest.mark.parametrize("name", DEEP)
def test_formats_as_they_may_be_tuned(machine: Machine, name: str, knobs: ProductKnobs) -> None:
    limit = machine.traits.tile_rows
    for m in (1, 2, 4, limit, limit + 1, 40):
        check_format(machine, name, 41, 2307, m, knobs=knobs)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(MACHINES)),
    case=st.sampled_from(FORMATTED),
    m=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_formats_at_any_row_count(name: str, case: tuple[str, int, int], m: int, seed: int) -> None:
    check_format(MACHINES[name], *case, m, seed)


@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 90),
    block=st.integers(1, 90),
    dtype=st.sampled_from(["uint4", "uint8"]),
    m=st.sampled_from([1, 9]),
)
def test_any_shape_and_block(n: int, k: int, block: int, dtype: str, m: int) -> None:
    machine = MACHINES[sorted(MACHINES)[0]]
    rng = np.random.default_rng(n)
    format = WeightFormat(dtype, block, zeros=True)
    case = Case.random(n, k, format, rng)
    x = rng.standard_normal((1, m, k)).astype(np.float32)
    kernel = compiled(packed_matmul(n, k, machine.traits, format=format), machine.target)
    y = np.full((1, m, n), np.nan, np.float32)
    result = machine.call(kernel, x, *case.packed(machine.traits.lanes), y)[-1]
    bound = (k + 4) * 2.0**-24 * (np.abs(x[0]) @ np.abs(case.value).T)
    assert (np.abs(result[0] - x[0].astype(float) @ case.value.T) <= bound).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "uint4, odd blocks", "uint8"])
def test_a_coded_product_with_bias_written_flat(machine: Machine, name: str) -> None:
    rng = np.random.default_rng(2)
    case = Case.random(40, 24, FORMATS[name], rng)
    bias = rng.standard_normal(40).astype(np.float32)
    kernel = machine.build(_with_bias, 40, 24, name)
    for m in (3, 30):
        x = rng.standard_normal((1, m, 24)).astype(np.float32)
        packed = case.packed(machine.traits.lanes)
        result = machine.call(kernel, x, *packed, bias, np.zeros((m, 40), np.float32))[-1]
        np.testing.assert_allclose(result, x[0] @ case.value.T + bias, atol=1e-4)


def _with_bias(n: int, k: int, name: str, traits: object) -> object:
    return packed_matmul(n, k, traits, format=FORMATS[name], bias=True, flat=True)


def test_four_lanes_without_the_instructions_of_wider_ones() -> None:
    machine = baseline()
    assert machine.traits.lanes == 4
    for name in ("float16", "bfloat16", "uint4, as ONNX exports have it", "uint8"):
        for m in (1, 4, 20):
            check_format(machine, name, 41, 71, m)


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_of_every_format(machine: Machine, name: str) -> None:
    rng = np.random.default_rng(8)
    case = Case.random(257, 71, FORMATS[name], rng)
    kernel = machine.build(_embedding, 257, 71, name)
    for n in (1, 33):
        ids = rng.integers(0, 257, (1, n))
        ids[0, 0] = 256
        packed = case.packed(machine.traits.lanes)
        y = machine.call(kernel, *packed, ids, np.zeros((1, n, 71), np.float32))[-1]
        # code - zero is exact, and so is float32(scale): one rounding, as numpy's.
        assert (y == case.value[ids].astype(np.float32)).all()


def _embedding(n: int, k: int, name: str, traits: object) -> object:
    return packed_embedding(n, k, traits, format=FORMATS[name])


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
