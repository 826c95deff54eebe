"""Running the kvc command as a person does, and looking at what it says and leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
SOURCES = [str(ROOT / name) for name in ("compiler", "passes", "models")]
COMMAND = [sys.executable, "-m", "kvc.cli"]
BUDGET = ("--budget", "1GB", "--workload", "4x64")
"""A budget and a workload that fit every tiny model."""


@dataclass(frozen=True)
class Result:
    """What one command did."""

    status: int
    out: str
    err: str

    def refusal(self, status: int = 2) -> str:
        """The one message of a command that failed as it should; nothing else was printed."""
        assert self.status == status, self
        assert self.out == ""
        assert "Traceback" not in self.err
        assert self.err.startswith("kvc: ")
        assert self.err.endswith("\n")
        message = self.err.removeprefix("kvc: ").removesuffix("\n")
        assert message
        assert "\n" not in message
        assert "fault of kvc" not in message
        return message


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with the checkout's packages; None removes a variable."""
    values = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), **changes}
    return {name: value for name, value in values.items() if value is not None}


def kvc(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 120, **variables: str | None
) -> Result:
    """Run the command in a process of its own, without a terminal."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment(**variables),
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def start(*arguments: str | Path, **variables: str | None) -> subprocess.Popen[str]:
    """Start the command in a process group of its own; the caller waits for it."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
        start_new_session=True,
    )


def files_in(folder: Path) -> dict[str, int]:
    """Every file and folder below `folder`, hidden ones too, with when it was last changed."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def copy_artifact(source: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, folder / "copy.kvc"))


def seal(artifact: Path) -> None:
    """Make the manifest agree with the files again, as if they had been written like that."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (artifact / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def scale_weights(artifact: Path, factor: float) -> None:
    """Multiply all of an artifact's weights, and seal it."""
    file = artifact / "weights.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    values = np.frombuffer(data, np.float32, offset=start)
    values *= np.float32(factor)
    file.write_bytes(data)
    seal(artifact)
