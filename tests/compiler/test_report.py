"""The tables that people look at, and the options that they write."""

from __future__ import annotations

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from kvc.checks import Check
from kvc.options import format_size, parse_size, parse_workload
from kvc.plan_report import plan_tables
from kvc.report import check_table, model_tables, timing_table
from kvc_passes.errors import InputError
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Bytes, Plan, StateGroup, Workload
from kvc_passes.sites import AttentionSite, MaskFact, Reach

CAUSAL = MaskFact("causal", None, "SMT: mask == (key <= query)")
SITE = AttentionSite(0, "/layers.0/Softmax", 4, 2, 32, 32, 0.125, None, CAUSAL, "rotate_half")
FACTS = ModelFacts("tiny", 512, 520, 256, (SITE,), ("position_ids",), {"float32": 1_700_000}, 212)
BYTES = Bytes(weights=40_000, pools=30_000, tables=2_000, arena=10_000, outputs=3_000, runtime=5_000)
GROUPS = (
    StateGroup((0, 1, 2, 4), Reach(window=32, sinks=4), "form a", 2_048, 10),
    StateGroup((3,), Reach(), "form b", 512, 19),
)
PLAN = Plan(
    100_000,
    (Workload(4, 64), Workload(1, 256)),
    {"kind": "llvm"},
    16,
    GROUPS,
    64,
    8,
    4,
    160,
    BYTES,
    capacities=(Workload(1, 700), Workload(12, 64), Workload(1, 256)),
)


def _text(*tables: Table) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _cells(table: Table) -> list[list[str]]:
    lines = [line for line in _text(table).splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_plan_accounts_for_every_byte() -> None:
    table, _ = plan_tables(PLAN, "tiny")
    rows = {cells[0]: cells for cells in _cells(table)}
    lines = ["weights", "KV pages", "temporaries", "logits", "tables", "process"]
    assert list(rows) == [*lines, "promised", "budget"]
    assert sum(int(rows[name][1].replace(",", "")) for name in lines) == BYTES.total == 90_000
    assert rows["promised"][1:3] == ["90,000", "90.0%"]
    assert rows["budget"][1] == "100,000"
    assert "160 tokens" in rows["budget"][3]
    assert "chunks of 64" in rows["temporaries"][3]
    assert "tiny: 4x64,1x256 in 100.0 KB" in _text(table)


def test_plan_shows_what_every_group_of_layers_keeps() -> None:
    _, table = plan_tables(PLAN, "tiny")
    assert _cells(table) == [
        ["0-2,4", "form a", "the first 4 and the last 32", "10", "160", "20,480", "128"],
        ["3", "form b", "all tokens", "19", "304", "9,728", "32"],
    ]
    text = " ".join(_text(table).split())
    assert "at most: 700 tokens for one request; 12 requests of 64 tokens; 1 request of 256 tokens" in text


def test_model() -> None:
    text = _text(*model_tables(FACTS))
    for part in (
        "1.7 MB float32",
        "512 tokens, 520 logits",
        "256 positions",
        "512 bytes a token over 1 layers",
    ):
        assert part in text
    assert "position_ids" in text
    assert "unbounded" in _text(*model_tables(dataclasses.replace(FACTS, context=None)))
    assert "uses none" in _text(*model_tables(dataclasses.replace(FACTS, positions=())))


def test_layers_of_one_geometry_share_a_row() -> None:
    window = MaskFact("window", 8, "SMT")
    sites = [dataclasses.replace(SITE, index=i, node=f"n{i}") for i in range(7)]
    for i in (2, 3):
        sites[i] = dataclasses.replace(sites[i], mask=window, softcap=50.0)
    sites[6] = dataclasses.replace(sites[6], value_dim=64, rope=None)
    rows = _cells(model_tables(dataclasses.replace(FACTS, sites=tuple(sites)))[1])
    assert [(r[0], r[1], r[9]) for r in rows] == [
        ("0-1", "n0", "causal"),
        ("2-3", "n2", "window 8"),
        ("4-5", "n4", "causal"),
        ("6", "n6", "causal"),
    ]
    assert [r[6] for r in rows] == ["", "50", "", ""]
    assert [r[4] for r in rows] == ["32", "32", "32", "32/64"]
    assert [r[7] for r in rows] == ["rotate_half"] * 3 + ["none"]


def test_checks() -> None:
    kept, broken = Check("prefill", "5 tokens", 2e-6, 1e-3), Check("decode", "", float("nan"), 1e-3)
    memory = Check("peak memory", "under 1x8", 2_000_000, 1_999_999, "bytes")
    rows = _cells(check_table([kept, broken, memory], "m.kvc"))
    assert [row[-1] for row in rows] == ["kept", "BROKEN", "BROKEN"]
    assert rows[0][2:4] == ["2.00e-06", "1.00e-03"]
    assert rows[2][2:4] == ["2,000,000", "1,999,999"]


def test_timings() -> None:
    rows = _cells(timing_table([("first", 0.25, 3), ("second", 0.5, 0)]))
    assert rows == [["first", "0.250", "3"], ["second", "0.500", "(unchanged)"], ["all", "0.750", ""]]


@pytest.mark.parametrize("name", ["[bold]x", "a[/b]", "[/", "x[red]y[/red]", "\\[x]", ":smile:"])
def test_names_are_not_markup(name: str) -> None:
    """Names of files and ONNX nodes hold brackets as they like."""
    mask = dataclasses.replace(CAUSAL, proof=name)
    site = dataclasses.replace(SITE, node=name, mask=mask, rope=name)
    facts = dataclasses.replace(FACTS, name=name, positions=(name,), sites=(site,))
    assert _text(*model_tables(facts)).count(name) == 5
    assert name in _text(*plan_tables(PLAN, name))
    assert _text(check_table([Check(name, name, 0, 1)], name)).count(name) == 3
    assert name in _text(timing_table([(name, 0.1, 1)]))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (8 * 10**9, "8.0 GB"), (512 << 20, "536.9 MB"),
     (3 * 10**12, "3.0 TB"), (5 * 10**15, "5000.0 TB")],
)  # fmt: skip
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8gb", 8 * 10**9), ("8 GiB", 8 << 30), ("1.5MB", 1_500_000), (" 12 ", 12),
     ("7B", 7), ("512mib", 512 << 20), ("0.5KiB", 512), ("2TB", 2 * 10**12), ("1TiB", 1 << 40), (4096, 4096)],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(1, (1 << 63) - 1))
def test_bytes_are_exact(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == parse_size(f"{size}B") == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except InputError as error:
        message = str(error)
    else:
        message = text if size > 0 else ""
    assert text in message


def test_workloads() -> None:
    wanted = (Workload(8, 256), Workload(1, 2048))
    for given_ in ("8x256,1x2048", " 8 x 256 , 1X2048", ["8x256", Workload(1, 2048)], wanted):
        assert parse_workload(given_) == wanted
    assert parse_workload(Workload(2, 3) for _ in range(1)) == (Workload(2, 3),)


@pytest.mark.parametrize(
    "workload", [[], [Workload(0, 8)], [Workload(8, 0)], [Workload(-1, 8)], ["8x256,1x8"]]
)
def test_workloads_from_python(workload: list[str | Workload]) -> None:
    with pytest.raises(InputError, match="workload"):
        parse_workload(workload)


@given(st.text(alphabet="0123456789xX, ab", max_size=10))
def test_any_text_is_a_workload_or_refused(text: str) -> None:
    try:
        workloads = parse_workload(text)
    except InputError as error:
        message = str(error)
    else:
        message = "workload" if all(w.batch > 0 and w.context > 0 for w in workloads) else ""
    assert "workload" in message
