"""The artifact: the folder `model.kvc/` that a compile writes and the runtime reads.

manifest.json         format, kvc version, size and sha256 of every other file
model.so              the compiled functions; for GPUs one library an architecture, model.sm_90.so
weights.safetensors   the parameters, each on a 64-byte boundary, to be memory-mapped
plan.json, facts.json what was decided and what was proved
tokenizer.json, ...   copied from beside the model, when they stood there
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from kvc_passes.errors import InputError
from kvc_passes.facts import ModelFacts, facts_from_json
from kvc_passes.plans import Plan, plan_from_json

from .weights_file import TensorSpec, map_weights, read_layout

FORMAT: Final = 8

REQUIRED: Final = ("weights.safetensors", "plan.json", "facts.json")


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
                digests = threads.map(lambda name: sha256_of(path / name), sizes)
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

    def takes(self, function: str) -> list[str]:
        """The weights that a compiled function takes, in its order; of one that is not listed all of them."""
        there = [spec.name for spec in self.layout()]
        names: list[str] = self.manifest["functions"].get(function, there)
        if not set(names) <= set(there):
            raise _damaged(self.path, f"manifest.json says that {function} takes weights that are not there")
        return names

    def layout(self) -> tuple[TensorSpec, ...]:
        """The weights in the order in which they stand in their file."""
        return read_layout(self.path / "weights.safetensors")

    def weights(self) -> dict[str, NDArray[Any]]:
        """Read-only views of the memory-mapped weights by name, in the file's order."""
        return map_weights(self.path / "weights.safetensors")


def missing_files(files: Iterable[str]) -> list[str]:
    """What no artifact lacks; libraries are called model.so, or by architecture model.sm_90.so."""
    libraries = [name for name in files if name.startswith("model.") and name.endswith(".so")]
    lacking = [] if libraries else ["model.so"]
    return lacking + [name for name in REQUIRED if name not in set(files)]


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not path.is_dir() or not file.is_file():
        what = "is not a compiled model: it has no manifest.json" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; compile a model with `kvc compile`")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        form, files = manifest["format"], manifest["files"]
        if form + 0 == FORMAT:
            [(e["bytes"] + 0, e["sha256"] + "") for e in files.values()]
            [name + "" for names in manifest["functions"].values() for name in names]
            if any(Path(name).name != name for name in files) or missing_files(files):
                raise ValueError("its list of files is wrong")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"manifest.json cannot be read ({error})") from None
    if form != FORMAT:
        newer = form > FORMAT
        advice = "upgrade kvc, or compile the model again with this one" if newer else "compile it again"
        raise InputError(
            f"{path} has format {form}, written by kvc {manifest.get('kvc', '?')}; this kvc reads format "
            f"{FORMAT}: {advice}"
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


def sha256_of(file: Path) -> str:
    """The hexadecimal sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
