"""Writing an artifact: into a hidden sibling folder that is renamed when complete.

So a folder with the final name is always whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import kvc
from kvc_passes.errors import InputError, PlanningError
from kvc_passes.facts import ModelFacts, to_json
from kvc_passes.plans import Plan

from .artifact import FORMAT, missing_files, sha256_of
from .weights_file import Weight, write_weights

ASSETS: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


class ArtifactWriter:
    """Writes an artifact; a context manager that leaves nothing behind unless `commit` was reached.

        with ArtifactWriter("model.kvc") as writer:
            library.export_library(writer.folder / "model.so")
            writer.add("model.so")
            writer.weights(items)
            writer.facts(plan, facts)
            writer.assets(model.parent)
            writer.commit()

    Raises InputError on entry if `path` exists (with `force`: if it exists and is no artifact), and on entry
    or later if its parent folder cannot be written.
    """

    def __init__(self, path: Path | str, *, force: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        self.force = force
        self.folder = self.path.parent / f".{self.path.name}.{os.getpid()}.partial"
        self._files: dict[str, dict[str, Any]] = {}
        self._functions: dict[str, list[str]] = {}
        self._lock = -1

    def __enter__(self) -> ArtifactWriter:
        _check_target(self.path, self.force)
        _remove_leftovers(self.path)
        try:
            self.folder.mkdir()
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells other runs that this one is alive
        except OSError as error:
            raise _unwritable(self.path, error) from None
        except BaseException:  # an interrupt: __exit__ is not called
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        shutil.rmtree(self.folder, ignore_errors=True)  # after a commit: the artifact that was replaced

    def data(self, name: str, data: bytes) -> None:
        """Write one file."""
        with self._create(name) as write:
            write(data)

    def text(self, name: str, text: str) -> None:
        """Write one file of UTF-8 text."""
        self.data(name, text.encode("utf-8"))

    def copy(self, name: str, source: Path) -> None:
        """Copy the file `source` as `name`."""
        try:
            shutil.copyfile(source, self.folder / name)
        except OSError as error:
            raise InputError(f"{source}: cannot be copied to {self.path} ({error.strerror})") from None
        self.add(name)

    def add(self, name: str) -> None:
        """Take a file that something else wrote into `folder`."""
        file = self.folder / name
        self._files[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    def facts(self, plan: Plan, facts: ModelFacts) -> None:
        """Write plan.json and facts.json."""
        self.text("plan.json", to_json(plan))
        self.text("facts.json", to_json(facts))

    def functions(self, takes: Mapping[Any, list[str]]) -> None:
        """Say which weights each compiled function takes, in its order."""
        self._functions = dict(takes)

    def assets(self, beside: Path) -> None:
        """Copy the tokenizer's files that stand in the folder `beside`."""
        for name in ASSETS:
            if (beside / name).is_file():
                self.copy(name, beside / name)

    def weights(self, items: Iterable[Weight]) -> None:
        """Write weights.safetensors, holding one array at a time.

        Raises PlanningError if a producer returns another shape or dtype than announced, or a name comes
        twice.
        """
        items = list(items)
        if len({name for name, *_ in items}) != len(items):
            raise PlanningError("two weights have the same name")
        with self._create("weights.safetensors") as write:
            write_weights(items, write)

    def commit(self) -> None:
        """Write the manifest, force everything to disk, and give the folder its final name."""
        missing = missing_files(self._files)
        if missing:
            raise PlanningError(f"the artifact lacks {', '.join(missing)}")
        manifest = {
            "format": FORMAT,
            "kvc": kvc.__version__,
            "functions": self._functions,
            "files": self._files,
        }
        self.text("manifest.json", json.dumps(manifest, indent=2) + "\n")
        for file in self.folder.iterdir():
            _fsync(file)
        _fsync(self.folder)
        _check_target(self.path, self.force)  # it may have appeared meanwhile
        if self.path.exists():
            _swap(self.folder, self.path)
        else:
            self.folder.rename(self.path)
        _fsync(self.path.parent)

    @contextlib.contextmanager
    def _create(self, name: str) -> Iterator[Callable[[Any], None]]:
        """Open `name` for writing: a write function that also counts and hashes."""
        digest, size = hashlib.sha256(), 0
        with (self.folder / name).open("wb", buffering=0) as stream:

            def write(data: Any) -> None:
                nonlocal size
                view = memoryview(data)
                digest.update(view)
                size += len(view)
                try:
                    while view:
                        view = view[stream.write(view) :]
                except OSError as error:
                    raise _unwritable(self.path, error) from None

            yield write
        self._files[name] = {"bytes": size, "sha256": digest.hexdigest()}


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); choose another --output")


def _check_target(path: Path, force: bool) -> None:
    """Refuse an output path that would overwrite something (with `force`: something kvc did not write)."""
    try:
        if not path.exists() and not path.is_symlink():
            return
    except OSError as error:  # such as a name that is too long
        raise _unwritable(path, error) from None
    if not force:
        raise InputError(f"{path} exists; give --force to replace it")
    if path.is_symlink() or not (path / "manifest.json").is_file():
        raise InputError(f"{path} exists and is not a compiled model: --force does not replace it")


def _remove_leftovers(path: Path) -> None:
    """Remove what runs that were killed left beside `path`; finish a swap that was cut in the middle."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.(partial|old)")
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(folder.name)
        if match and _abandoned(folder, int(match[1])):
            if match[2] == "old" and not path.exists():
                folder.rename(path)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path, pid: int) -> bool:
    """Whether no live process holds the folder. The lock also answers for processes of other containers."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if pid != os.getpid():  # one that has our number is dead, or it would hold the lock
            os.kill(pid, 0)
            return False
    except ProcessLookupError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _swap(new: Path, old: Path) -> None:
    """Exchange two folders, atomically where the system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    rename = getattr(libc, "renameat2", None)
    if rename and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_suffix(".old")
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
