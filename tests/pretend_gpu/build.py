"""Builds the pretend driver and runtime, and loads them in place of the real ones.

Environment variables say which machine is pretended: PRETEND_CC (compute capability, 90), PRETEND_DRIVER
(version of the driver, 13000), PRETEND_DEVICES (1), PRETEND_MULTIPROCESSORS (132).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
DRIVER, RUNTIME = "libcuda.so.1", "libcudart.so.13"
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread"]


def build(folder: Path) -> Path:
    """Compiles both libraries into a folder below `folder` named after their source, and returns that one."""
    sources = sorted([*HERE.glob("*.c"), HERE / "pretend.h"])
    digest = hashlib.sha256(repr(FLAGS).encode())
    for source in sources:
        digest.update(source.read_bytes())
    out = Path(folder) / f"pretend-gpu-{digest.hexdigest()[:16]}"
    if out.is_dir():
        return out
    Path(folder).mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder))
    driver = [str(HERE / name) for name in ("driver.c", "memory.c", "cubin.c", "work.c")]
    _compile([*FLAGS, *driver, f"-Wl,-soname,{DRIVER}", "-o", str(part / DRIVER)])
    # TVM asks for the version under which the real runtime exports its functions.
    versions = part / "versions"
    versions.write_text(f"{RUNTIME} {{ global: *; }};\n")
    link = [f"-L{part}", "-Wl,--no-as-needed", f"-l:{DRIVER}", "-Wl,-rpath,$ORIGIN"]
    script = f"-Wl,--version-script={versions}"
    runtime = str(HERE / "runtime.c")
    _compile([*FLAGS, runtime, f"-Wl,-soname,{RUNTIME}", script, *link, "-o", str(part / RUNTIME)])
    try:
        part.rename(out)
    except OSError:  # another process was faster
        shutil.rmtree(part)
    return out


def activate(folder: Path) -> ctypes.CDLL:
    """Loads the libraries that `build` returned the folder of, and returns the driver's with types declared.

    Whatever asks for libcuda.so.1 or libcudart.so.13 afterwards gets them, as they go by these names: hence
    before TVM is imported.
    """
    assert "tvm" not in sys.modules, "the pretend GPU comes before TVM"
    driver = ctypes.CDLL(str(folder / DRIVER), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    ctypes.CDLL(str(folder / RUNTIME), mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for name, result, arguments in (
        ("pretend_set_memory", None, [size]),
        ("pretend_current", size, []),
        ("pretend_peak", size, []),
        ("pretend_reset_peak", None, []),
        ("pretend_blocks", size, []),
        ("pretend_extent", size, [pointer]),
        ("pretend_check", ctypes.c_int, []),
        ("pretend_problems", ctypes.c_char_p, []),
        ("pretend_forget", None, []),
        ("pretend_defer", None, [ctypes.c_int]),
        ("pretend_launches", ctypes.c_long, []),
        ("pretend_graph_launches", ctypes.c_long, []),
        ("pretend_copies", ctypes.c_long, [ctypes.c_int]),
        ("pretend_copied", size, [ctypes.c_int]),
        ("pretend_declare", None, [ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int)]),
        ("pretend_on_launch", None, [pointer]),
    ):
        function = getattr(driver, name)
        function.restype, function.argtypes = result, arguments
    return driver


def runtime(folder: Path) -> ctypes.CDLL:
    """The pretend runtime, for calls through ctypes."""
    return ctypes.CDLL(str(folder / RUNTIME))


def _compile(arguments: list[str]) -> None:
    done = subprocess.run(["cc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cc failed:\n{done.stderr}")
