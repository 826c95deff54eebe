import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_cases import FORMATS, Case, pack_into, unpacked

from kvc.kernels.packing import pack, packed_tensors
from kvc_passes.weight_format import WeightFormat

_CODED = [name for name, format in FORMATS.items() if format.coded]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 100), st.integers(1, 40), st.sampled_from([4, 8, 16]))
def test_every_format_comes_back_and_padding_is_zero(name: str, n: int, k: int, lanes: int) -> None:
    case = Case.random(n, k, FORMATS[name], np.random.default_rng(n * k))
    rows = unpacked(case.packed(lanes), k, case.format)
    assert len(rows) == -(-n // (2 * lanes)) * 2 * lanes
    assert (rows[:n] == case.value).all()
    assert (rows[n:] == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_several_sources_fill_slices_of_one_weight(name: str) -> None:
    rng = np.random.default_rng(3)
    first, second = (Case.random(n, 21, FORMATS[name], rng) for n in (32, 40))
    whole = Case.random(72, 21, FORMATS[name], rng).empty(8)
    first.pack([a[:2] for a in whole])
    second.pack([a[2:] for a in whole])
    rows = unpacked(whole, 21, FORMATS[name])
    assert (rows[:72] == np.concatenate([first.value, second.value])).all()


@pytest.mark.parametrize("name", FORMATS)
def test_any_strides_and_many_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvc.kernels.packing._STEP_BYTES", 1000)
    case = Case.random(150, 37, FORMATS[name], np.random.default_rng(4))
    turned = [None if p is None else np.ascontiguousarray(p.T).T for p in case.parts]
    out = case.empty(4)
    pack_into(out, turned[0], case.format, scales=turned[1], zeros=turned[2])
    assert all((a == b).all() for a, b in zip(out, case.packed(4), strict=True))


def test_a_bfloat16_weight_may_come_as_bits() -> None:
    case = Case.random(20, 9, FORMATS["bfloat16"], np.random.default_rng(5))
    out = case.empty(8)
    pack_into([out[0].view(np.uint16)], case.parts[0].view(np.uint16), case.format)
    assert (out[0] == case.packed(8)[0]).all()


def test_a_float16_weight_may_be_packed_as_float32() -> None:
    w = np.random.default_rng(6).standard_normal((9, 5)).astype(np.float16)
    assert (unpacked([pack(w, 4)], 5, WeightFormat())[:9] == w).all()


def test_packing_into_a_given_array_makes_no_other() -> None:
    w = np.random.default_rng(0).standard_normal((70, 9)).astype(np.float32)
    out = np.full((3, 9, 32), np.nan, np.float32)
    assert pack(w, 16, out) is out
    assert (out == pack(w, 16)).all()


@pytest.mark.parametrize("name", _CODED)
def test_codes_take_a_byte_or_half_of_one(name: str) -> None:
    format = FORMATS[name]
    data, scales, *zeros = packed_tensors(50257, 71, format, 16)
    assert data.dtype == "uint8"
    assert data.shape == (1571, 36 if format.dtype == "uint4" else 71, 32)
    assert scales == (format.scales, (1571, -(-71 // format.block), 32))
    assert [z.dtype for z in zeros] == ["uint8"] * format.zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 17}, "does not fill"),
        ({"depth": 8}, "do not fill"),
        ({"codes": np.int8}, "codes are uint8"),
        ({"scales": np.float32}, "expected float16"),
        ({"zeros": np.int8}, "zero points are uint8"),
    ],
)
def test_what_does_not_fit_the_format_is_refused(change: dict[str, object], message: str) -> None:
    format = WeightFormat("uint4", 4, "float16", zeros=True)
    n, k = change.get("rows", 16), change.get("depth", 12)
    codes = np.zeros((n, k), change.get("codes", np.uint8))
    scales = np.ones((n, -(-k // 4)), change.get("scales", np.float16))
    zeros = change.get("zeros", np.uint8)
    out = [np.zeros(t.shape, t.dtype) for t in packed_tensors(16, 12, format, 8)]
    with pytest.raises(ValueError, match=message):
        pack_into(out, codes, format, scales=scales, zeros=np.zeros(scales.shape, zeros))


def test_codes_without_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="block"):
        packed_tensors(8, 8, WeightFormat("uint4"), 8)
