"""Linking a compiled model into a shared library, also where there is no C compiler."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from kvc_passes.errors import TargetError


def find_linker() -> list[str]:
    """The command that links object files: $CC, a C compiler on the path, or the one in package `ziglang`.

    Raises:
        TargetError: there is none; says what to install.
    """
    if os.environ.get("CC"):
        try:
            return shlex.split(os.environ["CC"])
        except ValueError as error:
            raise TargetError(f"the environment variable CC is no command: {error}") from None
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise TargetError(
        "no linker: kvc needs a C compiler to link the compiled model. Install gcc or clang, or, without a "
        "system package, the Python package: pip install 'kvc[linker]'"
    )


def link(output: str, objects: Sequence[str], options: Sequence[str] = (), **ignored: object) -> None:
    """Link `objects` into the shared library `output`; the signature that TVM's export_library calls.

    Raises:
        TargetError: the linker failed; carries its last lines.
    """
    command = [*find_linker(), "-shared", "-fPIC", "-o", output, *objects, *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TargetError(
            f"the linker '{command[0]}' cannot be run ({error.strerror}); is CC right?"
        ) from None
    if result.returncode:
        lines = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise TargetError(f"linking the compiled model failed ({' '.join(command[:2])} ...):\n{lines}")
