"""The CPU's attention kernels against numpy in float64."""

import numpy as np
import pytest
from attention_case import PAGE, SHAPES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_machines import MACHINES, Machine, baseline
from page_cases import check_codes, numbers, numpy_type, poisoned
from tvm import tirx
from tvm_ffi import structural_walk

from kvc.kernels.append import append_kv
from kvc.kernels.attention import (
    AttentionShape,
    choose_tile,
    decode_attention,
    decode_splits,
    pools,
    prefill_attention,
)
from kvc.kernels.emit import compiled
from kvc.kernels.knobs import DECODE, DecodeKnobs, PrefillKnobs


def _decode_in(knobs: DecodeKnobs, name: str, traits: object) -> object:
    return decode_attention(SHAPES[name], traits, knobs)


def _prefill_in(tile: int, keys: int, name: str, traits: object) -> object:
    return prefill_attention(SHAPES[name], tile, traits, keys)


def prefill(case: Case, knobs: PrefillKnobs | None = None) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """q and out [tokens, heads, ...] of all sequences one after the other, and every sequence's positions."""
    shape = case.shape
    case.append()
    case.forget_what_no_query_sees()
    tile = choose_tile(shape.group, case.machine.traits)
    kernel = case.build("prefill")
    if knobs is not None:
        tile = knobs.tile or tile
        kernel = case.machine.build(_prefill_in, tile, knobs.keys, case.name)
    tiles, positions, at = [], [], 0
    for row, s in enumerate(case.sequences):
        tiles += [(row, at + i, min(tile, s.new - i)) for i in range(0, s.new, tile)]
        positions.append(np.arange(s.length - s.new, s.length))
        at += s.new
    q = 2 * case.normal(at, shape.heads, shape.query_dim)
    out = case.machine.call(
        kernel,
        q.transpose(1, 0, 2)[None],
        *case.state.values(),
        np.concatenate(positions),
        np.array(case.rng.permutation(tiles), np.int32),
        case.table,
        *case.extras,
        np.full((1, at, shape.heads, shape.value_dim), np.nan, np.float32),
    )[-1][0]
    return q, out, positions


def check_prefill(case: Case, knobs: PrefillKnobs | None = None) -> None:
    q, out, positions = prefill(case, knobs)
    at = 0
    for s, where in zip(case.sequences, positions):
        case.check(q[at : at + s.new], out[at : at + s.new], s, where)
        at += s.new


def decode(case: Case, knobs: DecodeKnobs = DECODE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q and out [sequences, heads, ...], and the positions."""
    shape, count = case.shape, len(case.sequences)
    case.append()
    case.forget_what_no_query_sees()
    q = 2 * case.normal(count, shape.heads, shape.query_dim)
    positions = np.array([s.length - 1 for s in case.sequences])
    splits = knobs.splits or decode_splits(shape.kv_heads, case.machine.traits)
    part = (count, splits, shape.heads, shape.value_dim + 2)
    out = case.machine.call(
        case.machine.build(_decode_in, knobs, case.name),
        q.transpose(1, 0, 2)[None],
        *case.state.values(),
        positions,
        case.table,
        *case.extras,
        np.full(part, np.nan, np.float32),
        np.full((1, count, shape.heads, shape.value_dim), np.nan, np.float32),
    )[-1][0]
    return q, out, positions


def check_decode(case: Case, knobs: DecodeKnobs = DECODE) -> None:
    q, out, positions = decode(case, knobs)
    for i, s in enumerate(case.sequences):
        case.check(q[i : i + 1], out[i : i + 1], s, positions[i : i + 1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [16, 48, 80, 144])
def test_a_tile_of_one_token_at_the_end_of_a_page(machine: Machine, shape: str, length: int) -> None:
    """Pages pass in pairs; of an odd number the last is computed twice, and must count once."""
    check_prefill(Case(machine, shape, [(length, 1)], 3))


LENGTHS = st.lists(
    st.integers(1, 180).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=3
)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MACHINES)), st.sampled_from(sorted(SHAPES)), LENGTHS, st.integers(0, 99))
def test_prefill_of_ragged_sequences(
    machine: str, shape: str, lengths: list[tuple[int, int]], seed: int
) -> None:
    check_prefill(Case(MACHINES[machine], shape, lengths, seed))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(MACHINES)), st.sampled_from(sorted(SHAPES)), LENGTHS, st.integers(0, 99))
def test_decode_of_a_batch(machine: str, shape: str, lengths: list[tuple[int, int]], seed: int) -> None:
    check_decode(Case(MACHINES[machine], shape, [(length, 1) for length, _ in lengths], seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_contexts_of_several_blocks(machine: Machine, shape: str) -> None:
    check_prefill(Case(machine, shape, [(700, 300)], 5))
    check_decode(Case(machine, shape, [(700, 1)], 6))


@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_that_end_beside_pages_chunks_and_windows(machine: Machine, shape: str) -> None:
    lengths = [(180, 97), (1, 1), (51, 2), (16, 16), (50, 50), (57, 20), (101, 1), (16, 1), (48, 1), (64, 1)]
    check_prefill(Case(machine, shape, lengths, 8))
    check_decode(Case(machine, shape, [(length, 1) for length, _ in lengths], 9))


@pytest.mark.parametrize("shape", ["learned sinks", "sink keys", "predicate, bfloat16"])
def test_more_shares_than_pages(machine: Machine, shape: str) -> None:
    check_decode(Case(machine, shape, [(1, 1), (33, 1), (150, 1)], 10), DecodeKnobs(splits=5))


TUNED = ["grouped", "window", "shared", "int8", "one head of four and a half vectors", "sink keys"]


@pytest.mark.parametrize(
    "knobs", [PrefillKnobs(keys=32), PrefillKnobs(1, 512), PrefillKnobs(50, 64)], ids=str
)
@pytest.mark.parametrize("shape", TUNED)
def test_prefill_as_it_may_be_tuned(machine: Machine, shape: str, knobs: PrefillKnobs) -> None:
    check_prefill(Case(machine, shape, [(600, 130), (33, 33), (1, 1)], 12), knobs)


DECODE_KNOBS = [DecodeKnobs(keys=32, ahead=1), DecodeKnobs(1, 512, 4), DecodeKnobs(8, 64)]


@pytest.mark.parametrize("knobs", DECODE_KNOBS, ids=str)
@pytest.mark.parametrize("shape", TUNED)
def test_decode_as_it_may_be_tuned(machine: Machine, shape: str, knobs: DecodeKnobs) -> None:
    check_decode(Case(machine, shape, [(600, 1), (33, 1), (1, 1)], 13), knobs)


def test_parameters_that_are_derived_may_be_given(machine: Machine) -> None:
    """Zeros stand for what the template derives; nothing else of the kernel changes."""
    traits, shape = machine.traits, SHAPES["grouped"]
    default = decode_attention(shape, traits).script()
    splits = decode_splits(shape.kv_heads, traits)
    assert default == decode_attention(shape, traits, DecodeKnobs(splits, 128)).script()
    assert default != decode_attention(shape, traits, DecodeKnobs(splits + 1)).script()
    assert default != decode_attention(shape, traits, DecodeKnobs(keys=64)).script()
    assert prefill_attention(shape, 8, traits).script() == prefill_attention(shape, 8, traits, 256).script()
    assert prefill_attention(shape, 8, traits).script() != prefill_attention(shape, 8, traits, 64).script()


# Ties in both directions, the largest that do not overflow, subnormal numbers, infinities, and NaN whose
# rounding would reach the sign.
EDGES = np.array(
    [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65519, 65520, -3.3e38, 3.4e38]
)
EDGES = np.concatenate([EDGES, [2.0**-24, 2.0**-25, 3 * 2.0**-25, 1e-40, -0.0, np.inf, -np.inf]]).astype(
    np.float32
)
EDGES = np.concatenate(
    [EDGES, np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)]
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("target", [*MACHINES, "x86-64"])
def test_keys_and_values_are_rounded_to_the_nearest(target: str, dtype: str) -> None:
    machine = MACHINES[target] if target in MACHINES else baseline()
    shape = AttentionShape(1, 1, 40, 40, 1.0, kv_dtype=dtype)
    x = np.random.default_rng(11).standard_normal((1, 1, 3, 40)).astype(np.float32)
    x[0, 0, 1, : len(EDGES)] = EDGES
    empty = [np.zeros(s, numpy_type(dtype)) for s in ((1, 1, 40, PAGE), (1, 1, PAGE, 40))]
    kernel = compiled(append_kv(shape, machine.traits), machine.target)
    *_, kpool, vpool = machine.call(kernel, x, x, np.array([2, 5, 9], np.int32), *empty)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x[0, 0].astype(numpy_type(dtype)).astype(np.float32)
    for stored in (kpool[0, 0, :, [2, 5, 9]], vpool[0, 0, [2, 5, 9]]):
        np.testing.assert_array_equal(stored.astype(np.float32), expected)


@pytest.mark.parametrize("stored", ["int8", "fp8", "int4"])
def test_rows_that_have_no_scale_or_an_extreme_one(machine: Machine, stored: str) -> None:
    """Zeros are exact, small and large numbers keep their relative precision."""
    shape = AttentionShape(1, 1, 32, 32, 1.0, stored=stored)
    x = np.random.default_rng(3).standard_normal((1, 1, 3, 32)).astype(np.float32)
    x[0, 0] *= np.array([[0], [1e-30], [1e30]], np.float32)
    empty = [poisoned(str(p.dtype), tuple(map(int, p.shape))) for p in pools(shape, 1).values()]
    kernel = compiled(append_kv(shape, machine.traits), machine.target)
    k, v, ks, vs = machine.call(kernel, x, x, np.arange(3, dtype=np.int32), *empty)[3:]
    for codes, scales in ((k.swapaxes(2, 3), ks), (v, vs)):
        found = numbers(shape, codes, scales)[0, 0, :3]
        assert (found[0] == 0).all()
        check_codes(shape, x[0, 0, 1:3], found[1:3], scales[0, 0, 1:3])


def test_a_batch_that_merges_in_parallel(machine: Machine) -> None:
    check_decode(Case(machine, "grouped", [(n, 1) for n in (1, 2, 15, 16, 17, 31, 32, 33, 64, 3)], 7))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_row_that_sees_no_number(machine: Machine, guarded: bool, bad: float) -> None:
    case = Case(machine, "guarded" if guarded else "window", [(200, 200)], 12)
    case.sequences[0].k[:, 180] = bad
    sees = np.arange(200) >= 180
    for (_, out, _), rows in ((prefill(case), sees), (decode(case), sees[-1:])):
        found = out == 0 if guarded else np.isnan(out)
        assert (found == rows[:, None, None]).all()


def test_a_page_that_no_vector_fits_is_refused(machine: Machine) -> None:
    shape = AttentionShape(2, 1, 16, 16, 0.25, page_size=machine.traits.lanes * 3)
    with pytest.raises(ValueError, match="page size"):
        prefill_attention(shape, 4, machine.traits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_keys": 4}, "sink keys need a window"),
        ({"window": 0}, "hides a token from itself"),
        ({"chunk": 0}, "hides a token from itself"),
        ({"predicate": "k <= q + x"}, "'x' is no number"),
    ],
)
def test_a_mask_that_is_none_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_attention(AttentionShape(2, 1, 16, 16, 0.25, **options), MACHINES["native"].traits)


@pytest.mark.parametrize(
    ("shape", "knobs"),
    [
        (AttentionShape(12, 1, 768, 768, 0.1, shared=True), DECODE),
        (AttentionShape(16, 1, 40, 32, 0.1, shared=True), DECODE),
        (AttentionShape(8, 2, 64, 64, 0.1), DecodeKnobs(ahead=1)),
    ],
)
def test_sums_stay_in_registers_where_keys_are_fetched(shape: AttentionShape, knobs: DecodeKnobs) -> None:
    """LLVM stores sums in every iteration of a loop that fetches, too."""
    innermost: list[str] = []

    def look(loop: tirx.For) -> None:
        text = str(loop.body)
        if loop.kind != tirx.ForKind.UNROLLED and " in range(" not in text:
            innermost.append(text)

    structural_walk(decode_attention(shape, baseline().traits, knobs).body, [(tirx.For, look)])
    assert any("acc" in text for text in innermost)
    fetching = [text for text in innermost if "prefetch" in text]
    assert fetching or shape.shared  # whose fetches stand before the loop of sums
    assert not [text for text in fetching if "acc" in text]
