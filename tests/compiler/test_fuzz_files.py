"""Files with bytes or fields changed: each ends in one message, or is imported. Nothing crashes or hangs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from tools.fuzz_changes import damaged, mutated
from tools.fuzz_files import BUGS, COUNT, Fate, Worker, counts, fuzz, make_model

FEW = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("fuzz") / "llama.onnx")


def check(fates: list[Fate], least_imported: int) -> None:
    assert not [fate for fate in fates if fate.kind in BUGS]
    found = counts(fates)
    assert found["imported"] >= least_imported  # changes of weights, and of names that nothing reads
    assert found["refused"] >= found["files"] // 2


def test_some_files(model: Path) -> None:
    check(list(fuzz(model, range(FEW))), FEW // 10)


@pytest.mark.slow
def test_all_files(model: Path) -> None:
    check(list(fuzz(model, range(COUNT))), COUNT // 10)


def test_the_file_itself_is_imported_and_mutations_are_other_files(model: Path) -> None:
    data = model.read_bytes()
    with Worker() as worker:
        assert worker.inspect(model, 0) == Fate(0, "imported")
    others = {change(data, number) for change in (mutated, damaged) for number in range(50)}
    assert len(others - {data}) > 85
    assert mutated(data, 7) == mutated(data, 7)
    assert damaged(data, 7) == damaged(data, 7)


def test_a_worker_that_dies_is_noticed_and_replaced(model: Path, tmp_path: Path) -> None:
    with Worker() as worker:
        worker.inspect(model, 0)
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait()
        assert worker.inspect(model, 1).kind == "crashed"
        assert worker.inspect(model, 2).kind == "imported"


def test_a_worker_that_hangs_is_noticed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker() as worker:
        worker.inspect(model, 0)
        monkeypatch.setattr("tools.fuzz_files.SECONDS", 0.0)
        assert worker.inspect(model, 1).kind == "hung"
