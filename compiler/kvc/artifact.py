"""The artifact: the folder `model.kvc/` that a compile writes and the runtime reads.

    manifest.json         format, kvc version, size and sha256 of every other file
    model.so              the compiled functions
    weights.safetensors   the parameters, each on a 64-byte boundary, to be memory-mapped
    plan.json, facts.json what was decided and what was proved
    tokenizer.json, ...   copied from beside the model, when they stood there

It is written into a hidden sibling folder and renamed when complete, so that a folder with the final name is
always whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import kvc
from kvc_passes.errors import InputError, PlanningError
from kvc_passes.facts import ModelFacts, Plan, facts_from_json, plan_from_json, to_json

FORMAT: Final = 2
ALIGNMENT: Final = 64
"""Generated code loads whole cache lines: every tensor starts on one, in the file and so in memory."""

REQUIRED: Final = ("model.so", "weights.safetensors", "plan.json", "facts.json")
ASSETS: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")

# dtype: (its name in safetensors, bytes an element)
_DTYPES: Final = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
}
_DTYPE_OF: Final = {code: name for name, (code, _) in _DTYPES.items()}

Weight = tuple[str, Sequence[int], str, Callable[[], NDArray[Any]]]
"""Name, shape, dtype and the function that makes the array when its turn to be written comes."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a safetensors file; `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype called `name`. bfloat16 comes from ml_dtypes, which is imported only for it."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk, opened for reading."""

    path: Path
    plan: Plan
    facts: ModelFacts
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Artifact:
        """Open the artifact folder `path`; with `verify`, compare every file's sha256 with the manifest.

        Raises InputError if it is no artifact, was written by a newer kvc, or a file is missing or changed.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        sizes = manifest["files"]
        for name, entry in sizes.items():
            _check_size(path, name, entry["bytes"])
        if verify:
            with ThreadPoolExecutor(max_workers=min(len(sizes), os.cpu_count() or 1)) as threads:
                digests = threads.map(lambda name: _sha256(path / name), sizes)
                for name, digest in zip(sizes, digests, strict=True):
                    if digest != sizes[name]["sha256"]:
                        raise _damaged(path, f"{name} does not have the sha256 that the manifest gives")
        try:
            plan = plan_from_json((path / "plan.json").read_text(encoding="utf-8"))
            facts = facts_from_json((path / "facts.json").read_text(encoding="utf-8"))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"plan.json or facts.json cannot be read ({error})") from None
        return cls(path, plan, facts, manifest)

    def file(self, name: str) -> Path | None:
        """The path of a file that belongs to the artifact, None if it has no such file."""
        return self.path / name if name in self.manifest["files"] else None

    def layout(self) -> tuple[TensorSpec, ...]:
        """The weights in the order in which the compiled functions take them."""
        return read_layout(self.path / "weights.safetensors")

    def weights(self) -> dict[str, NDArray[Any]]:
        """Read-only views of the memory-mapped weights by name, in the compiled functions' order."""
        file = self.path / "weights.safetensors"
        bytes_ = np.memmap(file, dtype=np.uint8, mode="r")
        return {
            spec.name: bytes_[spec.offset : spec.offset + spec.bytes]
            .view(numpy_dtype(spec.dtype))
            .reshape(spec.shape)
            for spec in read_layout(file)
        }


def read_layout(file: Path) -> tuple[TensorSpec, ...]:
    """Where the tensors of a weights file lie, in the order that its metadata gives.

    Raises InputError if the header is damaged or a tensor is not aligned.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        order = json.loads(header["__metadata__"]["order"])
        start = 8 + length
        specs = []
        for name in order:
            entry = header[name]
            first, end = entry["data_offsets"]
            width = numpy_dtype(_DTYPE_OF[entry["dtype"]]).itemsize
            if not 0 <= first <= start + end <= file.stat().st_size:
                raise ValueError(f"{name} lies outside the file")
            if end - first != math.prod(entry["shape"]) * width:
                raise ValueError(f"{name} has other bytes than its shape")
            specs.append(
                TensorSpec(name, _DTYPE_OF[entry["dtype"]], tuple(entry["shape"]), start + first, end - first)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a weights file of kvc ({error}); compile the model again") from None
    for spec in specs:
        if spec.offset % ALIGNMENT:
            raise InputError(f"{file}: {spec.name} is not on a {ALIGNMENT}-byte boundary; compile again")
    return tuple(specs)


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
        self._lock = -1

    def __enter__(self) -> ArtifactWriter:
        _check_target(self.path, self.force)
        _remove_leftovers(self.path)
        try:
            self.folder.mkdir()
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._lock = os.open(self.folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells other runs that this one is alive
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
        self._files[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}

    def facts(self, plan: Plan, facts: ModelFacts) -> None:
        """Write plan.json and facts.json."""
        self.text("plan.json", to_json(plan))
        self.text("facts.json", to_json(facts))

    def assets(self, beside: Path) -> None:
        """Copy the tokenizer's files that stand in the folder `beside`."""
        for name in ASSETS:
            if (beside / name).is_file():
                self.copy(name, beside / name)

    def weights(self, items: Iterable[Weight]) -> None:
        """Write weights.safetensors, holding one array at a time.

        The order of `items` is the order in which the compiled functions take the weights. Raises
        PlanningError if a producer returns another shape or dtype than announced, or a name comes twice.
        """
        items = list(items)
        if len({name for name, *_ in items}) != len(items):
            raise PlanningError("two weights have the same name")
        header, pads = _header(items)
        with self._create("weights.safetensors") as write:
            write(header)
            for (name, shape, dtype, produce), pad in zip(items, pads, strict=True):
                array = produce()
                if array.dtype != numpy_dtype(dtype) or array.shape != tuple(shape):
                    raise PlanningError(
                        f"weight {name} is {array.dtype}{array.shape}, not {dtype}{tuple(shape)} as announced"
                    )
                write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                write(bytes(pad))
                del array  # before the next one is made

    def commit(self) -> None:
        """Write the manifest, force everything to disk, and give the folder its final name."""
        missing = [name for name in REQUIRED if name not in self._files]
        if missing:
            raise PlanningError(f"the artifact lacks {', '.join(missing)}")
        manifest = {"format": FORMAT, "kvc": kvc.__version__, "files": self._files}
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


def _header(items: Sequence[Weight]) -> tuple[bytes, list[int]]:
    """The safetensors header, padded so that the data starts aligned, and the pad bytes after each tensor."""
    entries: dict[str, Any] = {"__metadata__": {"order": json.dumps([name for name, *_ in items])}}
    pads: list[int] = []
    offset = 0
    for name, shape, dtype, _ in items:
        code, width = _DTYPES[dtype]
        end = offset + math.prod(shape) * width
        entries[name] = {"dtype": code, "shape": [int(s) for s in shape], "data_offsets": [offset, end]}
        pad = -end % ALIGNMENT
        if pad:  # the format allows no holes
            entries[f"__pad.{len(pads)}"] = {"dtype": "U8", "shape": [pad], "data_offsets": [end, end + pad]}
        pads.append(pad)
        offset = end + pad
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, pads


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not path.is_dir() or not file.is_file():
        what = "is not a compiled model: it has no manifest.json" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; compile a model with `kvc compile`")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        form, files = manifest["format"], manifest["files"]
        if form <= FORMAT:
            [(e["bytes"] + 0, e["sha256"] + "") for e in files.values()]
            if any(Path(name).name != name for name in files) or not set(REQUIRED) <= set(files):
                raise ValueError("its list of files is wrong")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"manifest.json cannot be read ({error})") from None
    if form > FORMAT:
        raise InputError(
            f"{path} has format {form}, written by kvc {manifest.get('kvc', '?')}; this kvc reads format "
            f"{FORMAT}: upgrade kvc, or compile the model again with this one"
        )
    return manifest


def _check_size(path: Path, name: str, size: int) -> None:
    try:
        found = (path / name).stat().st_size
    except OSError:
        raise _damaged(path, f"{name} is missing") from None
    if found != size:
        raise _damaged(path, f"{name} has {found} bytes where the manifest gives {size}")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} is damaged: {what}; copy it again or compile the model again")


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


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
