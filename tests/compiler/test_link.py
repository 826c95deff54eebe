"""Linking: which linker is found, and what a failure says."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from kvc.codegen.link import find_linker, link
from kvc_passes.errors import TargetError


def test_the_environment_names_the_linker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache 'my cc' -m64")
    assert find_linker() == ["ccache", "my cc", "-m64"]


@pytest.mark.parametrize("name", ["cc", "gcc", "clang"])
def test_a_compiler_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda asked: f"/bin/{asked}" if asked == name else None)
    assert find_linker() == [f"/bin/{name}"]


def test_the_python_package_is_used_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda asked: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    assert find_linker() == [sys.executable, "-m", "ziglang", "cc"]


def test_without_any_linker_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda asked: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"Install gcc or clang, or, .* pip install 'kvc\[linker\]'"):
        find_linker()


def test_a_failing_linker_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\nfor i in 1 2 3 4 5 6; do echo line $i >&2; done\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(TargetError, match="linking the compiled model failed") as failed:
        link(str(tmp_path / "out.so"), ["x.o"])
    assert "line 1" not in str(failed.value)
    assert "line 6" in str(failed.value)


@pytest.mark.parametrize("command", ["/nowhere/cc", "'unbalanced"])
def test_a_wrong_cc_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    monkeypatch.setenv("CC", command)
    with pytest.raises(TargetError, match="CC"):
        link(str(tmp_path / "out.so"), ["x.o"])


def test_an_object_becomes_a_shared_library(tmp_path: Path) -> None:
    source = tmp_path / "add.c"
    source.write_text("int add(int a, int b) { return a + b; }\n")
    link(str(tmp_path / "add.so"), [str(source)])
    assert ctypes.CDLL(str(tmp_path / "add.so")).add(2, 3) == 5
