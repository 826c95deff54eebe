"""Memory that the target has free now: what `--budget auto` means."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvc_passes.errors import TargetError

_PROC: Final = Path("/proc/meminfo")
_GROUP: Final = Path("/sys/fs/cgroup")


def available(kind: str) -> int:
    """Free bytes of the GPU (kind "cuda"), or that Linux and this process's control group would still give.

    Raises TargetError where that cannot be read.
    """
    if kind == "cuda":
        from ..runtime.cuda import Device

        return Device.find().free
    try:
        lines = dict(line.split(":", 1) for line in _PROC.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        raise TargetError(f"{_PROC} does not say how much memory is available; give a --budget") from None
    return min([free, *_group_rests()])


def _group_rests() -> list[int]:
    """What the control groups above this process leave; file pages that can be dropped count as free."""
    rests = []
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
        path = next(line.split(":", 2)[2] for line in own if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = _GROUP / path.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            if limit != "max":
                rests.append(max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0))))
        except (OSError, ValueError):
            continue
    return rests
