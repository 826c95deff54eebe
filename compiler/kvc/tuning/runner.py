"""Processes that measure: what crashes or hangs in one costs one candidate."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvc_passes.errors import InputError

from .measure import Measured
from .space import Values
from .tasks import Task

_START_SECONDS: Final = 120
_GREET_SECONDS: Final = 10


@dataclass(frozen=True)
class Fleet:
    """Servers of TVM's RPC that a tracker knows under a key."""

    host: str
    port: int
    key: str

    def servers(self) -> int:
        """How many there are. Raises InputError if the tracker cannot be reached, or knows none."""
        from tvm import rpc

        try:
            self._greet()
            summary = rpc.connect_tracker(self.host, self.port).summary()
        except Exception as error:
            raise InputError(
                f"--rpc {self.host}:{self.port}: no tracker of TVM's RPC can be reached there ({error})"
            ) from None
        known = sum(str(s["key"]) == f"server:{self.key}" for s in summary["server_info"])
        if not known:
            keys = sorted({str(s["key"]).partition(":")[2] for s in summary["server_info"]})
            there = f"; it has servers for: {', '.join(keys)}" if keys else "; it has no servers at all"
            raise InputError(f"--key {self.key}: the tracker has no server under this key{there}")
        return known

    def _greet(self) -> None:
        """Raises OSError at once where TVM's client would wait a minute, or for ever, for a tracker."""
        from tvm.rpc.base import RPC_TRACKER_MAGIC, recvall

        with socket.create_connection((self.host, self.port), timeout=_GREET_SECONDS) as connection:
            connection.sendall(struct.pack("<i", RPC_TRACKER_MAGIC))
            if struct.unpack("<i", recvall(connection, 4))[0] != RPC_TRACKER_MAGIC:
                raise OSError("something else answers")


@dataclass(frozen=True)
class Failure:
    """A candidate without a result."""

    outcome: Literal["failed", "timeout", "wrong"]
    detail: str


class Worker:
    """One process that measures, started when it is first needed and again after it was lost."""

    command: Sequence[str] = (sys.executable, "-m", "kvc.tuning.worker")

    def __init__(self, target: dict[str, Any], fleet: Fleet | None, timeout: float) -> None:
        self.options: dict[str, Any] = {"target": target}
        if fleet is not None:
            self.options |= {"rpc": [fleet.host, fleet.port], "key": fleet.key}
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._rest = b""

    def measure(self, task: Task, values: Values, rounds: int) -> Measured | Failure:
        """Measure a candidate. Raises InputError if no process can be started."""
        if self._process is None:
            self._start()
        request = {"task": dataclasses.asdict(task), "values": values, "rounds": rounds}
        answer = self._ask(request, self.timeout)
        if isinstance(answer, Failure):
            self.close()
            return answer
        if "failed" in answer:
            if answer["spoilt"]:
                self.close()
            return Failure("failed", answer["failed"])
        if answer["wrong"]:
            return Failure("wrong", answer["wrong"])
        return Measured(answer["seconds"], answer["default"])

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process, self._rest = None, b""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        # The process is killed in the end, and leaves its temporary files.
        self._folder = tempfile.TemporaryDirectory(prefix="kvc-tune-")
        paths = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [*self.command, json.dumps(self.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "TMPDIR": self._folder.name},
        )
        answer = self._ask(None, _START_SECONDS)
        if isinstance(answer, Failure):
            self.close()
            raise InputError(f"no process to measure in could be started: {answer.detail}")

    def _ask(self, request: dict[str, Any] | None, seconds: float) -> dict[str, Any] | Failure:
        """The process's answer to a request, or to being started."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        end, out = time.monotonic() + seconds, process.stdout.fileno()
        try:
            if request is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            while b"\n" not in self._rest:
                if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
                    return Failure("timeout", f"no result within {seconds:.0f} s")
                part = os.read(out, 1 << 16)
                if not part:
                    status = process.wait()
                    return Failure("failed", f"the process ended with status {status}")
                self._rest += part
        except OSError as error:
            return Failure("failed", f"the process was lost ({error.strerror})")
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found
