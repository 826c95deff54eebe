"""Rates: from data sheets, from measurements, and what is kept of them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from kvc.cuda_machine import ARCHS
from kvc.kernels.traits import CpuTraits
from kvc.machine import CpuMachine
from kvc.planning import profile as profiling
from kvc.planning.rates import ROWS, Rates, measured, nominal, nominal_gpu, profile_file, save
from kvc.targets import parse_target
from kvc_passes.errors import InputError

RATES = nominal(CpuTraits(lanes=8, registers=16, threads=2))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_products_are_read_off_the_table(bits: int) -> None:
    for rows, seconds in zip(ROWS, RATES.products[bits]):
        assert RATES.product(bits, 1000, rows) == pytest.approx(1000 * seconds)
    times = [RATES.product(bits, 1000, rows) for rows in range(1, 1025)]
    assert times == sorted(times)
    each = [seconds / rows for rows, seconds in enumerate(times, 1)]
    assert all(later <= earlier * 1.0001 for earlier, later in pairwise(each))
    assert RATES.product(bits, 1000, 1024) == pytest.approx(2 * RATES.product(bits, 1000, 512))


def test_other_bits_are_as_the_nearest() -> None:
    assert RATES.product(5, 1000, 8) == RATES.product(4, 1000, 8)
    assert RATES.product(24, 1000, 8) in (RATES.product(16, 1000, 8), RATES.product(32, 1000, 8))


def test_more_lanes_and_threads_are_no_slower() -> None:
    wide = nominal(CpuTraits(lanes=16, registers=32, threads=8))
    assert wide.read > RATES.read
    assert all(a <= b for bits in (4, 32) for a, b in zip(wide.products[bits], RATES.products[bits]))


def test_one_row_reads_the_weight_once() -> None:
    assert RATES.product(32, 1000, 1) == pytest.approx(4000 / RATES.read)
    assert nominal_gpu("sm_90").product(16, 1000, 1) == pytest.approx(2000 / nominal_gpu("sm_90").read)


def test_a_gpu_that_is_not_known_is_no_faster_than_any_that_is() -> None:
    unknown, known = nominal_gpu("sm_999"), [nominal_gpu(arch) for arch in ARCHS]
    assert len({rates.read for rates in known}) == len(ARCHS)
    for rates in known:
        assert unknown.read <= rates.read
        assert unknown.product(16, 1000, 512) >= rates.product(16, 1000, 512)


def test_what_was_measured_is_kept_by_target() -> None:
    assert measured("a, 2 threads") is None
    save(RATES, "a, 2 threads")
    save(replace(RATES, call=1.0), "b, 4 threads")
    assert measured("a, 2 threads") == RATES
    assert measured("b, 4 threads") == replace(RATES, call=1.0)
    assert measured("c, 2 threads") is None


def test_rates_from_before_codes_were_measured_are_of_use() -> None:
    save(RATES, "a")
    data = json.loads(profile_file().read_text())
    del data["a"]["codes"]
    profile_file().write_text(json.dumps(data))
    assert measured("a") == RATES
    data["a"]["codes"] = {"int8": [1.0, 1.0]}
    profile_file().write_text(json.dumps(data))
    assert measured("a") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', '{"a": {"source": "x"}}'])
def test_a_damaged_file_has_no_rates(text: str) -> None:
    profile_file().parent.mkdir(parents=True)
    profile_file().write_text(text)
    assert measured("a") is None
    save(RATES, "a")
    assert measured("a") == RATES


def test_a_table_of_other_rows_is_no_use() -> None:
    save(RATES, "a")
    data = json.loads(profile_file().read_text())
    data["a"]["products"]["32"].append(1.0)
    profile_file().write_text(json.dumps(data))
    assert measured("a") is None


def test_rates_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="the rates cannot be written"):
        save(RATES, "a")


def test_a_machine_is_measured_with_all_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_SIDE", 256)
    monkeypatch.setattr(profiling, "_PAGES", 256)
    monkeypatch.setattr(profiling, "_REPEATS", 1)
    monkeypatch.setenv("TVM_NUM_THREADS", "77")
    machine = parse_target("cpu")
    assert isinstance(machine, CpuMachine)
    stages: list[str] = []
    rates = profiling.profile(machine, stages.append)
    threads = machine.products.traits.threads
    assert os.environ["TVM_NUM_THREADS"] == str(threads)
    assert f"{threads} threads" in rates.source
    assert len(stages) == 8
    numbers = [
        rates.read,
        *rates.attention,
        *rates.shared,
        rates.rebuild,
        rates.element,
        rates.call,
    ]
    assert all(number > 0 for number in [*numbers, *(t for row in rates.products.values() for t in row)])
    assert all(0 < share <= 1 for pair in rates.codes.values() for share in pair)
    assert isinstance(rates, Rates)
    assert rates.launch >= 0
    for row in rates.products.values():  # more rows at once are never slower than in parts
        assert all(b <= a * -(-m // n) for a, n in zip(row, ROWS) for b, m in zip(row, ROWS) if m > n)
    save(rates, machine.key)
    assert CpuMachine(machine.target).rates == rates
