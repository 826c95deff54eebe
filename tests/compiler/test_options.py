"""What the user gives: sizes and workloads, and every error a bad value causes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvc.options import format_size, parse_size, parse_workload
from kvc_passes.errors import InputError
from kvc_passes.plans import Workload


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8_000_000_000),
        ("8 gb", 8_000_000_000),
        (" 512MiB ", 512 << 20),
        ("1.5KB", 1500),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
        ("0.5GiB", 1 << 29),
        ("1000000", 1_000_000),
        ("7B", 7),
        (123456, 123456),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GB",
        "8XB",
        "0x5",
        "ax b",
        "-1",
        "-1GB",
        "1e9",
        "8,5GB",
        "1GB 2",
        "1 000",
        ".5GB",
        "٣GB",
        "nan",
        "1G",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a size; write for example 8GB .* 512MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0MiB", 0, "0.4"])
def test_a_budget_of_nothing_is_refused(text: str | int) -> None:
    with pytest.raises(InputError, match="holds nothing; give a positive size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 30, "9" * 400 + "GB", "9300000TB"])
def test_a_budget_beyond_all_machines_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_size(text)


@given(st.integers(1, 10**15), st.sampled_from(["", "B", "KB", "MB", "KiB", "MiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    scale = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "KiB": 1024, "MiB": 1024**2}[unit]
    if number * scale < 1 << 63:
        assert parse_size(f"{number}{unit}") == number * scale


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x256", [(8, 256)]),
        ("8x256,1x2048", [(8, 256), (1, 2048)]),
        ("8x256/100,1x2048", [(8, 256, 100), (1, 2048)]),
        (" 8 X 256 , 1x2 ", [(8, 256), (1, 2)]),
        (["8x256", Workload(1, 2)], [(8, 256), (1, 2)]),
    ],
)
def test_workloads(text: str | list[str | Workload], expected: list[tuple[int, ...]]) -> None:
    assert parse_workload(text) == tuple(Workload(*pair) for pair in expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "8",
        "ax b",
        "axb",
        "-1x5",
        "5x-1",
        "8x",
        "x8",
        "8x2x3",
        "8*256",
        "8x256;1x2",
        "1.5x2",
        "8x256,",
    ],
)
def test_what_is_no_workload_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not a workload; write BATCHxCONTEXT, for example 8x256"):
        parse_workload(text)


@pytest.mark.parametrize("text", ["0x5", "5x0", "0x0", "8x256,0x5"])
def test_an_empty_workload_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is empty: batch and context must be at least 1"):
        parse_workload(text)


@pytest.mark.parametrize("text", ["8x256/256", "8x256/1000"])
def test_a_prefix_without_anything_behind_it_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="has no tokens behind its common prefix"):
        parse_workload(text)


def test_no_workload_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="the workload is empty"):
        parse_workload([])


@pytest.mark.parametrize("workload", [Workload(0, 5), Workload(5, 0), Workload(-1, 5)])
def test_a_workload_object_is_checked_too(workload: Workload) -> None:
    with pytest.raises(InputError):
        parse_workload([workload])


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 KB"),
        (512_300_000, "512.3 MB"),
        (8 * 10**9, "8.0 GB"),
        (2 * 10**12, "2.0 TB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text
