"""The environment that TVM reads when it is imported, and the tiny models, exported and compiled once."""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("TVM_BIND_THREADS", "0")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take the folder of the process that starts them
    # Plans must not depend on what was measured for the person who runs the tests.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="kvc-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parent))

ModelFile = Callable[..., Path]


def _exporter_version() -> str:
    """Names what the exported files depend on."""
    models = Path(__file__).parents[1] / "models" / "kvc_models"
    digest = hashlib.sha256()
    for name in ("tiny.py", "export.py", "families.py", "adapt.py", "others.py", "pairs.py", "encoders.py"):
        digest.update((models / name).read_bytes())
    for package in ("torch", "transformers", "onnxscript"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session", autouse=True)
def _processes_measured_once() -> Iterator[None]:
    """Every plan asks what a process takes with a model's tokenizer: a process of half a second.

    It is the same for all tiny models but a few. Commands in processes of their own measure it themselves.
    """
    from kvc.runtime import overhead

    probe, known = overhead._run_probe, dict[tuple[str, int | None], tuple[int, int]]()

    @functools.wraps(probe)
    def once(assets: Path | None, threads: int | None) -> tuple[int, int]:
        digest = hashlib.sha256()
        for file in sorted(assets.iterdir()) if assets and (assets / "tokenizer.json").is_file() else ():
            if file.is_file():
                digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
        key = digest.hexdigest(), threads
        if key not in known:
            known[key] = probe(assets, threads)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overhead, "_run_probe", once)
        yield


@pytest.fixture(scope="session")
def model_file(pytestconfig: pytest.Config) -> ModelFile:
    """`model_file(family, with_past=False, dtype="float32")` exports a tiny model.

    Families beside those of kvc_models.tiny: "cnn", "encoder", and decoders and encoders of encoder-decoder
    pairs, such as "tiny-whisper" and "tiny-whisper-encoder".

    An export takes 5 to 10 s and always gives the same file, so that pytest's cache keeps it between runs.
    """
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(f"models-{_exporter_version()}")

    @functools.cache
    def export(family: str, with_past: bool = False, dtype: str = "float32") -> Path:
        suffix = ("-past" if with_past else "") + ("" if dtype == "float32" else f"-{dtype}")
        out = folder / f"{family}{suffix}.onnx"
        # Tests run in several processes: what one exports the others wait for.
        with out.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write(out, family, with_past, dtype)
        return out

    def write(out: Path, family: str, with_past: bool, dtype: str) -> None:
        if not out.exists():
            from kvc_models import export_cnn, export_encoder, export_tiny
            from kvc_models.encoders import export_pair_encoder
            from kvc_models.pairs import PAIRS, export_pair_decoder, make_pair

            part = out.with_suffix(f".{os.getpid()}.onnx")
            others = {"cnn": export_cnn, "encoder": export_encoder}
            if family in others:
                others[family](part)
            elif family.endswith("-encoder"):
                export_pair_encoder(make_pair(family.removesuffix("-encoder"), dtype), part)
            else:
                if family in PAIRS:
                    export_pair_decoder(make_pair(family, dtype), part)
                else:
                    export_tiny(family, part, with_past=with_past, dtype=dtype)
                shutil.rmtree(out.with_suffix(".assets"), ignore_errors=True)  # of a run that was killed
                part.with_suffix(".assets").replace(out.with_suffix(".assets"))
            part.replace(out)

    return export
