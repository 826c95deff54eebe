"""The package: what a wheel holds, and that it works where only the wheel is installed."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import kvc

from .cli_fixtures import BUDGET, ROOT, SOURCES, environment

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: building writes into them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("compiler", "passes", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content alone."""
    folder = tmp_path_factory.mktemp("installed")
    command = [*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_content(wheel: Path) -> None:
    assert wheel.name == f"kvc-{kvc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"kvc-{kvc.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry = archive.read(f"{info}/entry_points.txt").decode()
    wanted = {
        f"{package.name}/{file.relative_to(package)}"
        for package in (ROOT / "compiler/kvc", ROOT / "passes/kvc_passes", ROOT / "models/kvc_models")
        for file in package.rglob("*")
        if file.suffix in (".py", ".j2") or file.name in ("py.typed", "sample_text.txt")
    }
    assert {name for name in names if not name.startswith(info)} == wanted
    assert {f"{name}/py.typed" for name in ("kvc", "kvc_passes", "kvc_models")} <= names
    assert f"{info}/licenses/LICENSE" in names
    assert "kvc = kvc.cli:main" in entry
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: apache-tvm==0.27.0.post1" in metadata
    assert len(metadata.split("\n\n", 1)[1]) > 500  # the README


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kvc.__version__


def _python(code: str, path: Sequence[Path | str], *arguments: object) -> str:
    """Run code in a process without this checkout, but with the installed dependencies."""
    # -S leaves out the .pth files, by which the checkout may be installed.
    packages = [sysconfig.get_paths()["purelib"], *site.getsitepackages()]
    where = ":".join(map(str, [*path, *dict.fromkeys(packages)]))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=where),
        cwd=path[0],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MAIN = "import sys, kvc; print(kvc.__file__); from kvc.cli import main; sys.exit(main())"


def test_the_installed_wheel_works(installed: Path, llama: Path) -> None:
    assert _python(MAIN, [installed], "--version").splitlines() == [
        str(installed / "kvc" / "__init__.py"),
        f"kvc {kvc.__version__}",
    ]
    assert "promised" in _python(MAIN, [installed], "plan", llama, *BUDGET)
    assert "kvc.cli" in (installed / "bin" / "kvc").read_text()


def test_a_bare_checkout_works(llama: Path) -> None:
    """Nothing is installed but the dependencies."""
    out = _python(MAIN, SOURCES, "plan", llama, *BUDGET)
    assert out.splitlines()[0] == str(ROOT / "compiler/kvc/__init__.py")
    assert "promised" in out


def _interpreters() -> list[str]:
    """Other Python versions that the package promises to run on and that are here."""
    found = []
    for version in ("3.11", "3.12", "3.13"):
        candidates = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
        path = str(candidates[-1]) if candidates else shutil.which(f"python{version}")
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            found.append(path)
    return found


def test_other_pythons_read_the_sources(tmp_path: Path) -> None:
    """Syntax alone: every version that is here, at least this one."""
    for number, python in enumerate([sys.executable, *_interpreters()]):
        for source in SOURCES:
            command = [python, "-W", "error", "-m", "compileall", "-q", "-f", "-j", "1", source]
            cache = environment(PYTHONPYCACHEPREFIX=str(tmp_path / str(number)))
            done = subprocess.run(command, capture_output=True, text=True, env=cache, check=False)
            assert done.returncode == 0, f"{python}: {done.stdout}{done.stderr}"


@pytest.mark.slow
def test_the_newest_python(wheel: Path, llama: Path, tmp_path: Path) -> None:
    """A new environment of the newest version that is here: install, compile, run."""
    python = [*_interpreters(), sys.executable][-2:][0]
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True, capture_output=True)
    own = str(tmp_path / "venv" / "bin" / "python")
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    command = str(tmp_path / "venv" / "bin" / "kvc")
    output = tmp_path / "m.kvc"
    clean = environment(PYTHONPATH=None)
    subprocess.run([command, "compile", str(llama), *BUDGET, "-o", str(output)], check=True, env=clean)
    done = subprocess.run(
        [command, "run", str(output), "--prompt", "The weights", "--max-new-tokens", "4"],
        check=True,
        capture_output=True,
        text=True,
        env=clean,
    )
    with kvc.load(output) as session:
        (wanted,) = session.generate(["The weights"], chat=True, max_new_tokens=4)
    assert done.stdout == wanted.text + "\n"
