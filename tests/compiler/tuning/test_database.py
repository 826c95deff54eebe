"""Records: whatever is cut off, mixed in or written at once, whole lines are found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.tuning.database import NAME, Database
from kvc_passes.errors import InputError

from ..cli_fixtures import environment
from .tuning_cases import TARGET, TASKS, record

RECORDS = [
    record(),
    record(TASKS["decode"], knobs={"keys": 32, "splits": 4}, outcome="worse", share=1.5),
    record(knobs={"ahead": 8}, outcome="failed", seconds=(), default=(), share=1.0, detail='ä \n"b"'),
]
HALF = record().line()[:40]


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path / "db")
    made.create()
    return made


def write(database: Database, *parts: str) -> None:
    with database.path.open("a") as file:
        file.write("".join(parts))


def test_what_is_appended_is_read(database: Database) -> None:
    assert database.read(TARGET).records == ()
    database.append(RECORDS[0])
    database.append(*RECORDS[1:])
    found = database.read(TARGET)
    assert found.records == tuple(RECORDS)
    assert found.notes(database.path) == []


def test_to_create_again_changes_nothing(database: Database) -> None:
    database.append(RECORDS[0])
    database.create()
    assert database.read(TARGET).records == (RECORDS[0],)


def test_half_a_record_at_the_end_is_passed_over_and_ended(database: Database) -> None:
    database.append(RECORDS[0])
    write(database, HALF)
    assert database.read(TARGET).records == (RECORDS[0],)
    assert database.read(TARGET).broken == 0
    database.append(RECORDS[1])
    found = database.read(TARGET)
    assert (found.records, found.broken) == (tuple(RECORDS[:2]), 1)


def test_a_whole_record_without_its_newline_counts_once_it_is_ended(database: Database) -> None:
    write(database, RECORDS[0].line())
    database.append(RECORDS[1])
    assert database.read(TARGET).records == tuple(RECORDS[:2])


BROKEN = [
    HALF,
    "{",
    "[]",
    "3",
    "null",
    '"text"',
    "{}",
    "\x00\x00",
    "ü",
    "",
    record().line().replace("1", "x"),
]


@pytest.mark.parametrize("line", BROKEN, ids=repr)
def test_a_line_in_the_middle_that_is_no_record(database: Database, line: str) -> None:
    database.append(RECORDS[0])
    write(database, line, "\n")
    database.append(RECORDS[1])
    found = database.read(TARGET)
    assert (found.records, found.broken) == (tuple(RECORDS[:2]), 1)
    assert found.notes(database.path) == [f"{database.path}: 1 records ignored: unreadable"]


@pytest.mark.parametrize("line", BROKEN, ids=repr)
def test_a_file_of_something_else(database: Database, line: str) -> None:
    write(database, line, "\n", "hello\n")
    with pytest.raises(InputError, match="no line of it is a record"):
        database.read(TARGET)


def test_bytes_that_are_no_text(database: Database) -> None:
    database.append(RECORDS[0])
    database.path.write_bytes(b"\xff\xfe\x00\n" + database.path.read_bytes())
    found = database.read(TARGET)
    assert (found.records, found.broken) == ((RECORDS[0],), 1)


FIELDS = sorted(json.loads(record().line()))


WRONG = [
    (field, value)
    for field in FIELDS
    for value in (None, [None], {"a": None}, "text", 1e300)
    if not (value == "text" and field in ("task", "target", "version", "outcome", "detail"))
    if not (value == 1e300 and field == "share")
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_a_field_of_another_type_breaks_its_line_alone(database: Database, field: str, value: Any) -> None:
    data = json.loads(record().line())
    write(database, json.dumps({**data, field: value}), "\n")
    database.append(RECORDS[0])
    found = database.read(TARGET)
    assert (found.records, found.broken) == ((RECORDS[0],), 1)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_or_one_too_many(database: Database, field: str) -> None:
    data = json.loads(RECORDS[1].line())
    short = {name: value for name, value in data.items() if name != field}
    write(database, json.dumps(short), "\n", json.dumps({**data, f"{field}_": 1}), "\n")
    database.append(RECORDS[0])
    found = database.read(TARGET)
    # What has a default may be left out.
    if field == "detail":
        assert (len(found.records), found.broken) == (2, 1)
    else:
        assert (found.records, found.broken) == ((RECORDS[0],), 2)


def test_records_of_other_targets_and_kernels_are_counted(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.append(record(target="other"), record(target="third"), record(target="third"))
    monkeypatch.setattr("kvc.tuning.database.version", lambda: "later")
    database.append(RECORDS[0], RECORDS[1], record(version="later"))
    found = database.read(TARGET)
    assert found.records == (record(version="later"),)
    assert (found.others, found.stale, found.broken) == (3, 2, 0)
    notes = found.notes(database.path)
    assert len(notes) == 2
    assert "3 records ignored: for another target" in notes[0]
    assert "2 records ignored: of other kernels, measured before this version" in notes[1]
    assert database.read("nowhere").notes(database.path)[-1].endswith("no record is of use here")


def test_an_empty_database_is_of_no_use_and_says_so(database: Database) -> None:
    (note,) = database.read(TARGET).notes(database.path)
    assert note == f"{database.path}: no record is of use here"


def test_the_version_is_that_of_the_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvc.tuning.database import version

    found = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "matmul.py").write_text(text)
        monkeypatch.setattr("kvc.kernels.__file__", str(tmp_path / "__init__.py"))
        version.cache_clear()
        found.append(version())
    monkeypatch.undo()
    version.cache_clear()
    assert found[0] == found[2]
    assert len({*found, version()}) == 3


def test_no_database(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no database of kvc tune"):
        Database(tmp_path / "missing").read(TARGET)
    with pytest.raises(InputError, match="there is no database of kvc tune"):
        Database(tmp_path).read(TARGET)


def test_a_database_that_cannot_be_read_or_made(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        Database(tmp_path).read(TARGET)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(InputError, match="cannot be written"):
            Database(folder).create()
    with pytest.raises(InputError, match="cannot be written"):
        Database(tmp_path).append(RECORDS[0])


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to("/dev/full")
    with pytest.raises(
        InputError, match=r"cannot be written.*No space left.*what was measured before is kept"
    ):
        Database(tmp_path).append(RECORDS[0])


def test_a_disk_that_takes_half_a_record(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written of it is taken back."""
    database.append(RECORDS[0])
    before = database.path.read_bytes()

    class Full:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = open(*args, **options)  # noqa: SIM115  closed below

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return self.file.write(data[:20])

    monkeypatch.setattr("kvc.tuning.database.open", Full, raising=False)
    with pytest.raises(InputError, match="the disk is full; what was measured before is kept"):
        database.append(RECORDS[1])
    monkeypatch.undo()
    assert database.path.read_bytes() == before
    database.append(RECORDS[2])
    assert database.read(TARGET).records == (RECORDS[0], RECORDS[2])


WRITER = """if True:
    import sys
    from pathlib import Path
    from kvc.tuning.database import Database, Record
    import json

    database, base = Database(Path(sys.argv[1])), json.loads(sys.argv[2])
    for number in range(int(sys.argv[3])):
        data = {**base, "knobs": {**base["knobs"], "number": number}}
        database.append(Record.of(data))
"""


def writer(database: Database, name: str, count: int) -> subprocess.Popen[bytes]:
    """A process that appends `count` records, which `name` tells apart from others'."""
    base = record(detail=name + "-" * 3000).line()
    command = [sys.executable, "-c", WRITER, str(database.path.parent), base, str(count)]
    return subprocess.Popen(command, env=environment())


def test_processes_that_append_at_once_lose_nothing(database: Database) -> None:
    processes = [writer(database, name, 50) for name in "abcd"]
    assert [p.wait(60) for p in processes] == [0] * 4
    found = database.read(TARGET)
    assert found.broken == 0
    written = sorted((r.detail[0], r.knobs["number"]) for r in found.records)
    assert written == [(name, number) for name in "abcd" for number in range(50)]


def test_a_process_that_is_killed_while_it_appends(database: Database) -> None:
    """The rest of the records are whole, and in order; the next process goes on."""
    for round in range(3):
        process = writer(database, "abc"[round], 10**6)
        begin, end = len(database._lines()), time.monotonic() + 60
        while len(database._lines()) < begin + 5 + 3 * round:
            assert time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    database.append(RECORDS[0])
    found = database.read(TARGET)
    assert found.broken <= 3
    assert found.records[-1] == RECORDS[0]
    for name in "abc":
        numbers = [r.knobs["number"] for r in found.records if r.detail[:1] == name]
        assert len(numbers) >= 5
        assert numbers == list(range(len(numbers)))


def test_merge_adds_what_is_missing(tmp_path: Path) -> None:
    one, two, three = (Database(tmp_path / name) for name in ("one", "two", "three"))
    for database, records in ((one, RECORDS[:2]), (two, [RECORDS[1], record(target="other")])):
        database.create()
        database.append(*records)
    assert three.merge(one, two) == 3
    assert three.merge(one, two) == 0
    assert three.read(TARGET).records == (RECORDS[0], RECORDS[1])
    assert three.read("other").records == (record(target="other"),)
    assert one.merge(two, three) == 1
    assert one.read(TARGET).records == tuple(RECORDS[:2])


def test_merge_passes_over_what_is_broken(tmp_path: Path, database: Database) -> None:
    other = Database(tmp_path / "other")
    other.create()
    other.append(RECORDS[0])
    write(other, HALF)
    write(database, HALF)
    assert database.merge(other) == 1
    assert database.read(TARGET).records == (RECORDS[0],)


def test_merge_of_a_database_that_is_missing_or_empty(tmp_path: Path, database: Database) -> None:
    with pytest.raises(InputError, match="there is no database"):
        Database(tmp_path / "new").merge(Database(tmp_path / "missing"))
    with pytest.raises(InputError, match="no line of it is a record"):
        Database(tmp_path / "new").merge(database)
    assert not (tmp_path / "new").exists()
    write(database, "hello\n")
    with pytest.raises(InputError, match="no line of it is a record"):
        Database(tmp_path / "new").merge(database)


@settings(max_examples=60, deadline=None)
@given(
    details=st.lists(st.text(max_size=8), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_a_file_that_ends_anywhere_keeps_every_whole_line(details: list[str], share: float) -> None:
    records = [replace(RECORDS[0], detail=detail) for detail in details]
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder))
        database.append(*records)
        whole = database.path.read_bytes()
        size = round(share * len(whole))
        os.truncate(database.path, size)
        kept = whole[:size].count(b"\n")
        assert database.read(TARGET).records == tuple(records[:kept])
        database.append(RECORDS[1])
        found = database.read(TARGET).records
        # A cut right before a newline leaves a whole record, which the next append ends.
        assert found in ((*records[:kept], RECORDS[1]), (*records[: kept + 1], RECORDS[1]))
        assert len(found) == kept + 1 or whole[size : size + 1] == b"\n"
