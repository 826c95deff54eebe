"""A compile that is killed, interrupted or runs out of disk leaves no artifact, and the next one works."""

from __future__ import annotations

import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvc.artifact import Artifact
from kvc.codegen.link import link
from kvc_passes.errors import TargetError, UnsupportedModel

from .cli_fixtures import BUDGET, COMMAND, ROOT, Result, environment, files_in, kvc, start
from .conftest import Run


def _wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Wait until a path below `folder` appears, or the process ends."""
    end = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < end
        if process.poll() is not None:
            return
        time.sleep(0.005)


def _stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    """Send a signal to the process and its children, and wait for it."""
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


MOMENTS = [".*.partial", ".*.partial/model.so", ".*.partial/weights.safetensors", ".*.partial/manifest.json"]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """A folder for temporary files of the command."""
    path = tmp_path / "temporary"
    path.mkdir()
    return path


def test_kill(llama: Path, tmp_path: Path, temporary: Path) -> None:
    """Killed at moments that are seen from outside; the last run cleans up after all of them."""
    output = tmp_path / "out" / "model.kvc"
    output.parent.mkdir()
    for pattern in MOMENTS[:2]:
        process = start("compile", llama, *BUDGET, "-o", output, TMPDIR=str(temporary))
        _wait_for(output.parent, pattern, process)
        status, out, _ = _stop(process, signal.SIGKILL)
        assert (status, out) == (-signal.SIGKILL, "")
        assert not output.exists()
        (leftover,) = output.parent.iterdir()  # those of earlier runs are gone
        assert leftover.name == f".model.kvc.{process.pid}.partial"
    assert "does not exist" in kvc("run", output, "--prompt", "hi").refusal()
    assert kvc("compile", llama, *BUDGET, "-o", output).status == 0
    assert list(output.parent.iterdir()) == [output]
    assert kvc("run", output, "--prompt", "hi", "--max-new-tokens", "2").status == 0


@pytest.mark.slow
def test_kill_at_any_moment(llama: Path, artifact: Path, tmp_path: Path) -> None:
    """With --force: what is there is always the old artifact or the new one, whole."""
    output = Path(shutil.copytree(artifact, tmp_path / "model.kvc"))
    start_ = time.monotonic()
    assert kvc("compile", llama, "--budget", "1GB", "--workload", "2x32", "-o", output, "--force").status == 0
    whole = time.monotonic() - start_
    moments = random.Random(0)
    seen = set()
    for turn in range(6):
        workload = ("4x64", "2x32")[turn % 2]
        process = start("compile", llama, "--budget", "1GB", "--workload", workload, "-o", output, "--force")
        time.sleep(moments.uniform(0.3, 1.15) * whole)
        _stop(process, signal.SIGKILL)
        seen.add(str(Artifact.open(output).plan.workload[0]))
        assert len([p for p in tmp_path.iterdir() if p != output]) <= 1
    assert seen <= {"4x64", "2x32"}
    assert kvc("compile", llama, *BUDGET, "-o", output, "--force").status == 0
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("pattern", MOMENTS[:2])
def test_interrupt(llama: Path, tmp_path: Path, temporary: Path, pattern: str) -> None:
    output = tmp_path / "out" / "model.kvc"
    output.parent.mkdir()
    process = start("compile", llama, *BUDGET, "-o", output, TMPDIR=str(temporary))
    _wait_for(output.parent, pattern, process)
    assert _stop(process, signal.SIGINT) == (130, "", "kvc: interrupted\n")
    assert files_in(output.parent) == {}
    assert files_in(temporary) == {}


@pytest.mark.parametrize("error", [RuntimeError, UnsupportedModel])
def test_interrupt_inside_tvm(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Callbacks of TVM turn an interrupt into an error without a message; it is an interrupt all the same."""

    def callback(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise error("") from None

    monkeypatch.setattr("kvc.api.import_onnx", callback)
    handler = signal.getsignal(signal.SIGINT)
    try:
        result = run("compile", llama, *BUDGET, "-o", tmp_path / "m.kvc")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert result == Result(130, "", "kvc: interrupted\n")
    assert files_in(tmp_path) == {}


@pytest.mark.slow
def test_interrupt_at_any_moment(llama: Path, tmp_path: Path, temporary: Path) -> None:
    output = tmp_path / "out" / "model.kvc"
    output.parent.mkdir()
    start_ = time.monotonic()
    assert kvc("compile", llama, *BUDGET, "-o", output, TMPDIR=str(temporary)).status == 0
    whole = time.monotonic() - start_
    shutil.rmtree(output)
    moments = random.Random(1)
    for _ in range(6):
        process = start("compile", llama, *BUDGET, "-o", output, TMPDIR=str(temporary))
        time.sleep(moments.uniform(0.1, 0.9) * whole)
        status, out, err = _stop(process, signal.SIGINT)
        assert files_in(temporary) == {}
        if status:
            assert (status, out) == (130, "")
            assert "kvc: interrupted" in err.splitlines()  # TVM may warn of a graph that it did not finish
            assert "Traceback" not in err
            assert files_in(output.parent) == {}
        else:
            shutil.rmtree(output)


def test_a_running_compile_is_not_a_leftover(llama: Path, tmp_path: Path) -> None:
    """Two compiles to the same place: the second does not remove what the first is writing."""
    output = tmp_path / "model.kvc"
    first = start("compile", llama, *BUDGET, "-o", output)
    _wait_for(tmp_path, MOMENTS[0], first)
    (mine,) = tmp_path.iterdir()
    message = kvc("compile", llama, "--budget", "1MB", "--workload", "4x64", "-o", output).refusal()
    assert "budget" in message
    assert mine.exists() or output.exists()
    _, err = first.communicate(timeout=60)
    assert (first.returncode, err) == (0, "")
    assert list(tmp_path.iterdir()) == [output]


def _limited(size: int) -> None:
    """No file may grow beyond `size` bytes: what a full disk looks like to a program."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _compile_limited(llama: Path, output: Path, size: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "compile", str(llama), *BUDGET, "-o", str(output)],
        capture_output=True,
        text=True,
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
        preexec_fn=lambda: _limited(size),
        check=False,
    )


def test_disk_full_while_writing_weights(llama: Path, artifact: Path, tmp_path: Path) -> None:
    size = 1_000_000
    assert (artifact / "model.so").stat().st_size < size < (artifact / "weights.safetensors").stat().st_size
    done = _compile_limited(llama, tmp_path / "model.kvc", size)
    message = Result(done.returncode, done.stdout, done.stderr).refusal()
    assert str(tmp_path / "model.kvc") in message
    assert files_in(tmp_path) == {}


@pytest.mark.slow
def test_disk_full_while_generating_code(llama: Path, tmp_path: Path) -> None:
    """LLVM ends the process by itself then; what it leaves is removed by the next compile."""
    output = tmp_path / "model.kvc"
    done = _compile_limited(llama, output, 100_000)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert not output.exists()
    assert kvc("compile", llama, *BUDGET, "-o", output).status == 0
    assert list(tmp_path.iterdir()) == [output]


@pytest.fixture(params=["1m", "2m"], ids=["for the library", "for the weights"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that is too small. Where none may be mounted, /dev/full has to do: it is always full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "kvc-test", str(disk)]
    if shutil.which("mount") and not subprocess.run(command, capture_output=True, check=False).returncode:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
    else:
        (disk / "full").symlink_to("/dev/full")
        yield disk / "full"


def test_small_disk(run: Run, llama: Path, small_disk: Path) -> None:
    result = run("compile", llama, *BUDGET, "-o", small_disk / "model.kvc")
    if result.err.startswith("kvc: linking the compiled model failed"):  # the linker's own words follow
        assert (result.status, result.out) == (2, "")
        assert "No space left" in result.err
    else:
        assert str(small_disk / "model.kvc") in result.refusal()
    assert not (small_disk / "model.kvc").exists()
    if small_disk.name == "disk":
        assert "No space left" in result.err
        assert list(small_disk.iterdir()) == []


def _without_linkers(tmp_path: Path, **more: str) -> dict[str, str | None]:
    """An environment whose path has Python and no C compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    return {"PATH": str(folder), "CC": None, **more}


def test_no_linker(run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "kvc.codegen.link.importlib.util.find_spec",
        lambda name, *rest: None if name == "ziglang" else find(name, *rest),
    )
    for name, value in _without_linkers(tmp_path).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    before = files_in(tmp_path)
    message = run("compile", llama, *BUDGET, "-o", tmp_path / "model.kvc").refusal()
    for text in ("gcc", "clang", "pip install 'kvc[linker]'"):
        assert text in message
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("compiler", ["/no/such/cc", "'unclosed", "/", "false"])
def test_a_linker_that_does_not_work(tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(TargetError, match=f"CC|{compiler}"):
        link(str(tmp_path / "model.so"), [])


@pytest.mark.slow
def test_linking_with_ziglang(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.kvc"
    cache = str(tmp_path / "zig-cache")
    variables = _without_linkers(tmp_path, ZIG_GLOBAL_CACHE_DIR=cache, ZIG_LOCAL_CACHE_DIR=cache)
    result = kvc("compile", llama, *BUDGET, "-o", output, timeout=300, **variables)
    assert result.status == 0, result.err
    checked = kvc("verify", output, "--against", llama)
    assert checked.status == 0, checked.out + checked.err


def test_sources_are_where_the_tests_look() -> None:
    """The processes above run this checkout."""
    code = "import kvc; print(kvc.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(ROOT / "compiler")
