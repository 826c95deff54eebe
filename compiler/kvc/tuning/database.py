"""Records of what was measured: one file, only ever appended to, that many processes may write at once.

A record is a line of JSON that is written with one call while the file is locked. A process that is killed
leaves whole lines, or at worst the beginning of one, which is no JSON: readers pass over it, and the next
writer ends it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from kvc_passes import sites, weight_format
from kvc_passes.errors import InputError

from .. import __version__, kernels

NAME: Final = "records.jsonl"
_FORMAT: Final = 1
_TEXTS: Final = ("task", "target", "version", "outcome", "detail")


@dataclass(frozen=True)
class Record:
    """One candidate that was measured beside the default.

    Attributes:
        task: `Task.key`.
        sizes: the (rows, keys of a sequence) that it was measured with.
        target: the CPU's name and threads, or the GPU's architecture.
        version: kvc's version, and what the templates' text hashes to.
        knobs: the fields that are not as by default.
        outcome: "better" or "worse" than the default beyond the spread, "even", or why it has no time:
            "wrong" for a result that differs, "failed", "timeout".
        seconds, default: median seconds of a call for each size, of it and of the default beside it.
        share: of the workload's time in this kernel, what the candidate takes: below 1 is faster.
        detail: of what failed.
    """

    task: str
    sizes: tuple[tuple[int, int], ...]
    target: str
    version: str
    knobs: dict[str, int]
    outcome: str
    seconds: tuple[float, ...] = ()
    default: tuple[float, ...] = ()
    share: float = 1.0
    detail: str = ""

    @staticmethod
    def of(data: dict[str, Any]) -> Record:
        """Raises KeyError, TypeError or ValueError if `data` is no record."""
        if data.pop("format") != _FORMAT:
            raise ValueError("another format")
        if not all(isinstance(data.get(name, ""), str) for name in _TEXTS):
            raise TypeError("no text")
        sizes = tuple((int(a), int(b)) for a, b in data["sizes"])
        times = {name: tuple(float(t) for t in data[name]) for name in ("seconds", "default")}
        knobs = {str(name): int(value) for name, value in data["knobs"].items()}
        share = float(data["share"])
        return Record(**{**data, "sizes": sizes, "knobs": knobs, "share": share, **times})

    def line(self) -> str:
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, sort_keys=True)


@cache
def version(folder: str = ".") -> str:
    """kvc's version and a hash of the text of what records depend on.

    folder: of templates in kvc.kernels, beside its own: "." for CPUs. What names parameters counts, too.
    """
    text, own = hashlib.sha256(), Path(kernels.__file__).parent
    nouns = [Path(module.__file__ or "") for module in (sites, weight_format)]
    for path in sorted({*own.glob("*.py"), *(own / folder).glob("*.py"), *nouns}):
        text.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{__version__}-{text.hexdigest()[:16]}"


@dataclass(frozen=True)
class Contents:
    """What a database has for some targets.

    Attributes:
        records: those of the targets, by this version of kvc.
        others: records of other targets.
        stale: records of other versions of the kernels.
        broken: lines that are no record.
    """

    records: tuple[Record, ...] = ()
    others: int = 0
    stale: int = 0
    broken: int = 0

    def notes(self, path: Path) -> list[str]:
        """What was left aside, in words."""
        found = [
            (self.others, "for another target"),
            (self.stale, "of other kernels, measured before this version"),
            (self.broken, "unreadable"),
        ]
        notes = [f"{path}: {count} records ignored: {why}" for count, why in found if count]
        return notes if self.records else [*notes, f"{path}: no record is of use here"]


class Database:
    """The records in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def create(self) -> None:
        """Make the folder and file if they are not there. Raises InputError where that is not possible."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def append(self, *records: Record) -> None:
        """Add records, whole or not at all. Raises InputError where they cannot be written: a full disk."""
        text = "".join(record.line() + "\n" for record in records).encode()
        try:
            # For the byte before, the file is opened for reading, too.
            with open(self.path, "a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    text = b"\n" + text
                written = file.write(text)
                if written != len(text):
                    file.truncate(end)
                    raise InputError(f"{self.path}: the disk is full; what was measured before is kept")
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); what was measured before is kept"
            ) from None

    def read(self, *targets: str, wanted: str | None = None) -> Contents:
        """Everything of use for `targets`. Raises InputError without a file, or if no line is a record.

        wanted: the version of their kernels, by default that of CPUs.
        """
        wanted = version() if wanted is None else wanted
        records, counts = [], {"others": 0, "stale": 0, "broken": 0}
        lines = self._lines()
        for line in lines:
            try:
                record = Record.of(json.loads(line))
            except (KeyError, TypeError, ValueError, AttributeError):
                counts["broken"] += 1
                continue
            if record.target not in targets:
                counts["others"] += 1
            elif record.version != wanted:
                counts["stale"] += 1
            else:
                records.append(record)
        if lines and counts["broken"] == len(lines):
            raise InputError(f"{self.path}: no line of it is a record of kvc tune")
        return Contents(tuple(records), **counts)

    def merge(self, *others: Database) -> int:
        """Add the records of other databases that are not here; how many. Raises InputError."""
        known = set(self._lines()) if self.path.is_file() else set()
        missing: dict[str, Record] = {}
        for other in others:
            found = False
            for line in other._lines():
                try:
                    record = Record.of(json.loads(line))
                except (KeyError, TypeError, ValueError, AttributeError):
                    continue
                found = True
                if record.line() not in known:
                    missing[record.line()] = record
            if not found:
                raise InputError(f"{other.path}: no line of it is a record of kvc tune")
        self.create()
        if missing:
            self.append(*missing.values())
        return len(missing)

    def _lines(self) -> list[str]:
        try:
            return self.path.read_bytes().decode(errors="replace").split("\n")[:-1]
        except FileNotFoundError:
            raise InputError(f"{self.path.parent}: there is no database of kvc tune") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
