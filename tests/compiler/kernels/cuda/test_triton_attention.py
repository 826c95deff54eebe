"""The attention kernels on Triton's interpreter, against float64."""

import dataclasses

import numpy as np
import pytest
import torch
from triton_case import DTYPES, SHAPES, Case, sliced
from triton_interpreter import run
from triton_made import LATENT, MADE, REKEYED, MadeCase, RekeyedCase
from triton_viewed import VIEWED, ViewedCase

from kvc.kernels.attention import AttentionShape
from kvc.kernels.cuda import predicates
from kvc.kernels.cuda.attention import append_kernel, choose_tile, merge_blocks, merge_kernel
from kvc.kernels.cuda.knobs import BY_ENGINE, PrefillKnobs

pytest.importorskip("triton")


def prefill(case: Case, tile: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """q and out [tokens, heads, ...] of all sequences one after the other, and every sequence's positions."""
    shape = case.shape
    tile = tile or choose_tile(shape.group, shape.head_dim)
    tiles, positions, at = [], [], 0
    for row, s in enumerate(case.sequences):
        tiles += [(row, at + i, min(tile, s.new - i)) for i in range(0, s.new, tile)]
        positions.append(s.positions(shape.whole))
        at += s.new
    given, q = case.asked(positions)
    out = torch.full((1, at, shape.heads, shape.value_dim), torch.nan, dtype=case.out_type)
    kernel, programs = case.prefill_kernel(tile)
    matrices = [pool.flatten(0, 2) for pool in case.state] if "kbox" in dict(kernel.types) else []
    run(
        kernel,
        (len(tiles), programs),
        *(*given, *case.state, torch.from_numpy(np.concatenate(positions))),
        *(torch.tensor(tiles[::-1], dtype=torch.int32), case.table, *case.extras, *matrices),
        *(out, at, case.table.shape[1]),
    )
    return q, out[0], positions


def check_prefill(case: Case, tile: int = 0) -> None:
    q, out, positions = prefill(case, tile)
    at = 0
    for s, where in zip(case.sequences, positions):
        case.check(q[at : at + s.new], out[at : at + s.new], s, where)
        at += s.new


def decode(case: Case, splits: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """q and out [sequences, heads, ...], and the positions."""
    shape, count = case.shape, len(case.sequences)
    positions = np.array([s.length - 1 for s in case.sequences])
    given, q = case.asked([positions])
    part = torch.full((count, splits, shape.heads, shape.value_dim + 2), torch.nan)
    out = torch.full((1, count, shape.heads, shape.value_dim), torch.nan, dtype=case.out_type)
    kernel, programs = case.decode_kernel(splits)
    run(
        kernel,
        (count, programs, splits),
        *(*given, *case.state, torch.from_numpy(positions), case.table, *case.extras),
        *(part, count, case.table.shape[1]),
    )
    grid = (count, shape.heads, merge_blocks(shape, splits))
    run(merge_kernel(shape, splits, case.dtype), grid, part, out, count, splits)
    return q, out[0], positions


def check_decode(case: Case, splits: int) -> None:
    q, out, positions = decode(case, splits)
    for i, s in enumerate(case.sequences):
        case.check(q[i : i + 1], out[i : i + 1], s, positions[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_sequences_that_end_beside_pages_chunks_and_windows(name: str, dtype: str) -> None:
    lengths = [(180, 67), (1, 1), (51, 2), (64, 34), (57, 20), (129, 1)]
    if dtype == "float32":  # interpreted as the same operations
        lengths = [(101, 37), (1, 1), (64, 2)]
    check_prefill(Case(SHAPES[name], dtype, lengths, 1))
    check_decode(Case(SHAPES[name], dtype, [(length, 1) for length, _ in lengths], 2), 3)


@pytest.mark.parametrize("name", ["wide window", "wide chunks", "sink keys, wide window", "grouped"])
def test_contexts_of_several_blocks(name: str) -> None:
    check_prefill(Case(SHAPES[name], "float16", [(1300, 70), (300, 100)], 3))
    check_decode(Case(SHAPES[name], "float16", [(1300, 1)], 4), 5)


@pytest.mark.parametrize("name", ["wide window", "grouped", "odd heads"])
def test_whole_blocks_in_boxes(name: str) -> None:
    """Keys that no row sees, NaN, lie in blocks with masks, which are read by pointers."""
    odd = AttentionShape(6, 2, 80, 72, 0.11, softcap=20.0, slopes=True)
    shape = dataclasses.replace(SHAPES.get(name, odd), page_size=64)
    knobs = PrefillKnobs(copy=BY_ENGINE)
    longest = (1300, 70) if shape.window else (250, 70)
    case = Case(shape, "float16", [longest, (100, 33), (1, 1)], 3, knobs=knobs)
    assert "kbox" in dict(case.prefill_kernel(16)[0].types)
    check_prefill(case)


@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("name", ["whole", "whole, shared"])
def test_more_tokens_than_rows_of_an_encoders_output(name: str, page: int) -> None:
    shape = dataclasses.replace(SHAPES[name], page_size=page)
    check_prefill(Case(shape, "float16", [(64, 150), (1, 3), (129, 40)], 16))


@pytest.mark.parametrize("name", ["whole", "whole, shared"])
def test_an_encoders_output_without_rows_is_no_number(name: str) -> None:
    for guarded in (True, False):
        case = Case(dataclasses.replace(SHAPES[name], guarded=guarded), "float16", [(0, 1)], 17)
        for _, out, _ in (prefill(case), decode(case, 2)):
            assert ((out == 0) if guarded else out.isnan()).all()


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["sink keys", "window", "predicate", "wide window"])
def test_pages_of_every_size(name: str, page: int) -> None:
    shape = dataclasses.replace(SHAPES[name], page_size=page)
    check_prefill(Case(shape, "float16", [(170, 30), (128, 20)], 5))
    check_decode(Case(shape, "float16", [(170, 1), (128, 1)], 6), 2)


@pytest.mark.parametrize(
    ("dim", "group"),
    [
        (48, 3),
        (56, 5),
        (64, 16),
        (72, 1),
        (80, 7),
        (96, 12),
        (112, 2),
        (128, 4),
        (160, 9),
        (192, 6),
        (256, 8),
    ],
)
def test_heads_of_every_size(dim: int, group: int) -> None:
    shape = AttentionShape(group, 1, dim, dim, dim**-0.5, page_size=32)
    check_prefill(Case(shape, "float16", [(70, 37)], 7))
    check_decode(Case(shape, "float16", [(70, 1)], 8), 1)


@pytest.mark.parametrize("tile", [1, 5, 40, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_any_size(dtype: str, tile: int) -> None:
    check_prefill(Case(SHAPES["odd group, softcap"], dtype, [(90, 45), (30, 2)], 9), tile)


@pytest.mark.parametrize(("dtype", "kv"), [("float32", "float16"), ("float16", "float32")])
def test_pages_of_another_type_than_the_queries(dtype: str, kv: str) -> None:
    check_prefill(Case(SHAPES["grouped"], dtype, [(90, 45)], 10, kv))
    check_decode(Case(SHAPES["grouped"], dtype, [(90, 1)], 11, kv), 2)


@pytest.mark.parametrize("name", ["wide group, sinks", "sink keys", "predicate"])
def test_more_shares_than_blocks(name: str) -> None:
    check_decode(Case(SHAPES[name], "float32", [(1, 1), (33, 1), (150, 1)], 12), 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_kept_keys_than_heads_of_a_program(dtype: str) -> None:
    shape = sliced(34, 34, 8, rest=24, half=4, sink_scores=True, softcap=20.0, page_size=16)
    check_decode(Case(shape, dtype, [(70, 1), (1, 1)], 19), 2)
    check_prefill(Case(shape, dtype, [(17, 2)], 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MADE)
def test_keys_and_values_that_are_made_again(name: str, dtype: str) -> None:
    lengths = [(101, 37), (1, 1), (64, 2)]
    check_prefill(MadeCase(name, dtype, lengths, 21))
    if name not in LATENT:
        check_decode(MadeCase(name, dtype, [(length, 1) for length, _ in lengths], 22), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REKEYED)
def test_keys_that_are_made_of_values(name: str, dtype: str) -> None:
    lengths = [(70, 9), (1, 1)] if name == "wide" else [(101, 37), (1, 1), (64, 2)]
    check_prefill(RekeyedCase(name, dtype, lengths, 23))
    check_decode(RekeyedCase(name, dtype, [(length, 1) for length, _ in lengths], 24), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VIEWED)
def test_queries_and_keys_that_are_turned_when_they_are_read(name: str, dtype: str) -> None:
    lengths = [(101, 37), (1, 1), (64, 2)]
    check_prefill(ViewedCase(name, dtype, lengths, 25))
    check_decode(ViewedCase(name, dtype, [(length, 1) for length, _ in lengths], 26), 2)


def test_many_shares_of_wide_values() -> None:
    shape = AttentionShape(2, 1, 576, 520, 0.05, shared=True, page_size=64)
    assert merge_blocks(shape, 64) == 3
    check_decode(Case(shape, "float16", [(130, 1), (1, 1)], 18), 64)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_row_that_sees_no_number(guarded: bool, bad: float) -> None:
    shape = dataclasses.replace(SHAPES["guarded"], guarded=guarded)
    case = Case(shape, "float16", [(200, 200)], 13)
    page = int(case.table[0, 180 // shape.page_size])
    case.state[0][page, :, 180 % shape.page_size] = bad
    sees = np.arange(200) >= 180
    for (_, out, _), rows in ((prefill(case), sees), (decode(case, 3), sees[-1:])):
        found = out.numpy() == 0 if guarded else np.isnan(out.numpy())
        assert (found == rows[:, None, None]).all()


def test_a_row_that_sees_no_key_is_no_number() -> None:
    for guarded in (True, False):
        shape = dataclasses.replace(SHAPES["guarded"], guarded=guarded, predicate="k < q")
        case = Case(shape, "float16", [(40, 40)], 14)
        for (_, out, _), rows in ((prefill(case), np.arange(40) == 0), (decode(case, 2), np.array([False]))):
            found = out.numpy() == 0 if guarded else np.isnan(out.numpy())
            assert (found == rows[:, None, None]).all()


def test_keys_and_values_are_rounded_to_the_nearest() -> None:
    shape = AttentionShape(1, 1, 40, 24, 1.0, kv_dtype="float16")
    x = torch.randn(1, 1, 3, 40, generator=torch.Generator().manual_seed(15))
    x[0, 0, 1, :6] = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519, 65520, 2.0**-25, torch.nan])
    y = x[..., :24].contiguous()
    kpool, vpool = (torch.zeros(1, 1, 16, d, dtype=torch.float16) for d in (40, 24))
    slots = torch.tensor([2, 5, 9], dtype=torch.int32)
    run(append_kernel(shape, "float32"), (1, 1), x, y, slots, kpool, vpool, 3)
    for stored, given in ((kpool, x), (vpool, y)):
        np.testing.assert_array_equal(stored[0, 0, [2, 5, 9]].numpy(), given[0, 0].half().numpy())


def test_the_tree_of_a_predicate() -> None:
    assert predicates.tree("0 <= k < min(q, 5, h) - -3") == (
        "and",
        ("<=", ("int", 0), ("k",)),
        ("<", ("k",), ("-", ("min", ("min", ("q",), ("int", 5)), ("h",)), ("int", -3))),
    )
    with pytest.raises(ValueError, match="'x' is no number"):
        predicates.tree("k <= x")
