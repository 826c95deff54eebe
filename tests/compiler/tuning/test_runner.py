"""Processes that measure: what a candidate does to its process costs that candidate alone."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvc.targets import parse_target
from kvc.tuning.api import parse_fleet
from kvc.tuning.database import Database
from kvc.tuning.measure import Measured
from kvc.tuning.runner import Failure, Fleet, Worker
from kvc.tuning.search import Search
from kvc_passes.errors import InputError

from .tuning_cases import CPU, TARGET, TASKS

SCRIPT = Path(__file__).with_name("faulty_worker.py")
TASK = TASKS["decode"]
CRASH, HANG, RAISE, WRONG, EXIT, NOISE, MEMORY, LITTER, GOOD = (
    {"keys": n} for n in (1, 2, 3, 4, 5, 6, 7, 8, 32)
)


class Faulty(Worker):
    """A worker whose process is the script's."""

    def __init__(self, folder: Path, timeout: float = 60.0) -> None:
        super().__init__(parse_target("cpu").description, None, timeout)
        self.command = (sys.executable, str(SCRIPT), str(folder))
        self.folder = folder

    def starts(self) -> int:
        return sum(path.name.isdigit() for path in self.folder.iterdir())


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Faulty]:
    (tmp_path / "starts").mkdir()
    made = Faulty(tmp_path / "starts")
    yield made
    made.close()


def process_of(found: object) -> int:
    assert isinstance(found, Measured)
    return int(found.default[0][0])


def test_what_a_candidate_does_costs_it_alone(worker: Faulty) -> None:
    """A crash ends the process, whose place another takes; what the process survives does not."""
    first = process_of(worker.measure(TASK, GOOD, 3))
    assert worker.measure(TASK, RAISE, 3) == Failure("failed", "ValueError: no such loop")
    assert worker.measure(TASK, MEMORY, 3) == Failure("failed", "MemoryError: ")
    assert worker.measure(TASK, WRONG, 3) == Failure("wrong", "3 rows: the result differs")
    assert process_of(worker.measure(TASK, NOISE, 3)) == first
    assert worker.starts() == 1
    assert worker.measure(TASK, CRASH, 3) == Failure("failed", "the process ended with status -9")
    second = process_of(worker.measure(TASK, GOOD, 3))
    assert second != first
    assert worker.measure(TASK, EXIT, 3) == Failure("failed", "the process ended with status 7")
    worker.timeout = 0.3
    begin = time.monotonic()
    hung = worker.measure(TASK, HANG, 3) if worker._process else None
    if hung is None:  # the process that exited is replaced first, which takes longer than the timeout
        hung = worker.measure(TASK, HANG, 3)
    assert hung == Failure("timeout", "no result within 0 s")
    assert time.monotonic() - begin < 60
    worker.timeout = 60
    last = worker.measure(TASK, GOOD, 5)
    assert process_of(last) not in (first, second)
    assert isinstance(last, Measured)
    assert last.seconds == [[2.0] * 5]
    assert worker.starts() == 4


def test_a_process_that_hangs_is_gone(worker: Faulty) -> None:
    process_of(worker.measure(TASK, GOOD, 3))
    process = worker._process
    assert process is not None
    worker.timeout = 0.2
    assert worker.measure(TASK, HANG, 3).outcome == "timeout"  # type: ignore[union-attr]
    assert worker._process is None
    assert process.returncode == -9
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_process_that_cannot_be_started(worker: Faulty) -> None:
    worker.command = (sys.executable, "-c", "raise SystemExit(3)")
    with pytest.raises(InputError, match=r"no process to measure in could be started: .* status 3"):
        worker.measure(TASK, GOOD, 3)


def test_a_process_that_is_closed_while_it_measures(worker: Faulty) -> None:
    """As at an interrupt; the thread that waits gets no result and no error."""
    worker.measure(TASK, GOOD, 3)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(worker.measure(TASK, HANG, 3)))
    thread.start()
    while not (worker.folder / "hangs").exists():
        time.sleep(0.01)
    assert worker._process is not None
    worker._process.kill()
    thread.join(30)
    assert found == [Failure("failed", "the process ended with status -9")]


def test_temporary_files_go_with_the_process(
    worker: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    worker.measure(TASK, LITTER, 3)
    assert [path.read_text() for path in tmp_path.glob("kvc-tune-*/left")] == ["behind"]
    worker.measure(TASK, CRASH, 3)
    assert list(tmp_path.glob("kvc-tune-*")) == []
    worker.measure(TASK, GOOD, 3)
    worker.close()
    worker.close()
    assert list(tmp_path.glob("kvc-tune-*")) == []


def test_a_search_survives_its_processes(worker: Faulty, tmp_path: Path) -> None:
    """Of the values of `keys`, one crashes and one is wrong; both are recorded, the rest is measured."""
    database = Database(tmp_path)
    database.create()
    search = Search([TASK], CPU, database, trials=5)
    search.states[0].choices = {"keys": (128, 3, 1, 32, 4, 64), "splits": (0,)}
    search.run([worker])
    found = {r.knobs["keys"]: r.outcome for r in database.read(TARGET).records}
    assert {n: found[n] for n in (1, 3, 4)} == {1: "failed", 3: "failed", 4: "wrong"}
    assert {found[32], found[64]} <= {"better", "worse", "even"}


def test_a_real_process_measures(tmp_path: Path) -> None:
    made = Worker(parse_target("cpu").description, None, 60)
    try:
        task = replace(TASKS["product_few"])
        found = made.measure(task, {"accumulators": 4}, 3)
        assert isinstance(found, Measured)
        assert [len(times) for times in (*found.seconds, *found.default)] == [3, 3]
        lost = made.measure(task, {"gone": 4}, 3)
        assert isinstance(lost, Failure)
        assert "gone" in lost.detail
    finally:
        made.close()


@pytest.mark.parametrize(
    ("rpc", "key", "message"),
    [
        ("a:1", None, "belong together"),
        (None, "k", "belong together"),
        ("a", "k", "write it as HOST:PORT"),
        ("a:", "k", "write it as HOST:PORT"),
        (":1", "k", "write it as HOST:PORT"),
        ("a:b", "k", "write it as HOST:PORT"),
        ("a:0", "k", "write it as HOST:PORT"),
        ("a:65536", "k", "write it as HOST:PORT"),
        ("a:-1", "k", "write it as HOST:PORT"),
        ("", "", "write it as HOST:PORT"),
    ],
)
def test_what_is_no_tracker(rpc: str | None, key: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_fleet(rpc, key)


def test_a_tracker_is_a_host_a_port_and_a_key() -> None:
    assert parse_fleet(None, None) is None
    assert parse_fleet("host:9190", "k") == Fleet("host", 9190, "k")
    assert parse_fleet("::1:9190", "k") == Fleet("::1", 9190, "k")


def test_a_tracker_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        fleet, begin = Fleet("127.0.0.1", unused.getsockname()[1], "k"), time.monotonic()
        with pytest.raises(InputError, match=r"no tracker of TVM's RPC can be reached there .*refused"):
            fleet.servers()
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_a_tracker_that_is_something_else(answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server, one that hangs up, and one that never says anything."""
    monkeypatch.setattr("kvc.tuning.runner._GREET_SECONDS", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        held: list[socket.socket] = []

        def serve() -> None:
            connection = server.accept()[0]
            held.append(connection)
            if answer is not None:
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(InputError, match="no tracker of TVM's RPC can be reached"):
            Fleet("127.0.0.1", server.getsockname()[1], "k").servers()
        thread.join()
        for connection in held:
            connection.close()
