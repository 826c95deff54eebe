"""Measuring on servers of TVM's RPC: a tracker and two servers on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvc
from kvc.targets import parse_target
from kvc.tuning.database import Database
from kvc.tuning.runner import Fleet, Worker
from kvc.tuning.search import Trial
from kvc_passes.errors import InputError

from ..cli_fixtures import environment

for needed in ("tornado", "psutil", "cloudpickle"):
    pytest.importorskip(needed)

QUICK = (sys.executable, str(Path(__file__).with_name("quick_worker.py")))
HOST = "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        return int(unused.getsockname()[1])


@contextlib.contextmanager
def _running(module: str, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of TVM's servers at `port`, in a process group of its own."""
    command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", HOST, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--port-end", str(port + 1), *options],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def _wait_for_servers(fleet: Fleet, count: int) -> None:
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(InputError):
            if fleet.servers() == count:
                return
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def servers() -> Iterator[tuple[Fleet, list[subprocess.Popen[bytes]]]]:
    """A tracker that knows two servers under the key "cpus"."""
    port = _free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_running("rpc_tracker", port))
        options = ("--tracker", f"{HOST}:{port}", "--key", "cpus")
        found = [stack.enter_context(_running("rpc_server", _free_port(), *options)) for _ in range(2)]
        fleet = Fleet(HOST, port, "cpus")
        _wait_for_servers(fleet, 2)
        yield fleet, found


def test_two_servers_one_of_which_is_killed(
    servers: tuple[Fleet, list[subprocess.Popen[bytes]]],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it measured then is measured by the other one; all candidates have a result."""
    monkeypatch.setattr(Worker, "command", QUICK)
    fleet, processes = servers
    with pytest.raises(InputError, match="no server under this key; it has servers for: cpus"):
        Fleet(fleet.host, fleet.port, "gpus").servers()

    def shown(trial: Trial) -> None:
        if trial.trial == 3:
            _kill(processes[0])

    address = f"{fleet.host}:{fleet.port}"
    kvc.tune(
        llama, db=tmp_path, trials=8, rpc=address, key="cpus", kernels=["gemm"], on_trial=shown, timeout=100
    )
    records = Database(tmp_path).read(parse_target("cpu").key).records
    assert len(records) == 8
    assert {r.outcome for r in records} <= {"better", "worse", "even"}, [r.detail for r in records]
    _wait_for_servers(fleet, 1)
