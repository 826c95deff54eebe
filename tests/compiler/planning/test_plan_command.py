"""`kvc plan` as a person uses it: several budgets, the search the other way round, files, pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvc.planning.available import available
from kvc_passes.errors import TargetError

from ..cli_fixtures import Result

pytestmark = pytest.mark.usefixtures("fixed_rates")
Run = Callable[..., Result]
ModelFile = Callable[..., Path]
WORK = ("--workload", "32x250")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def gpt2(model_file: ModelFile) -> Path:
    return model_file("gpt2")


def test_budgets_side_by_side(run: Run, gpt2: Path) -> None:
    """Those that cannot work say what would."""
    shown = run("plan", gpt2, "--budget", "80MB,90MB,120MB", *WORK)
    assert (shown.status, shown.err) == (0, "")
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.out.splitlines() if "│" in line
    }
    needed = re.fullmatch(r"needs (\d+\.\d) MB", lines["workload"][0].strip())
    assert needed is not None
    assert 80 < float(needed[1]) < 90
    assert [cell.strip() for cell in lines["forms"]] == ["-", "paged_kv x1, x_absorbed x1", "paged_kv"]


def test_budgets_none_of_which_works(run: Run, gpt2: Path) -> None:
    for wanted in (WORK, ("--max-context", "32"), ("--max-batch", "250")):
        message = run("plan", gpt2, "--budget", "10MB,20MB", *wanted).refusal()
        assert "the smallest budget that works" in message


@pytest.mark.parametrize("wanted", [("--max-context", "32"), ("--max-batch", "250")])
def test_a_budget_for_nothing_beside_one_that_works(run: Run, gpt2: Path, wanted: tuple[str, str]) -> None:
    shown = run("plan", gpt2, "--budget", "10MB,90MB", *wanted)
    assert (shown.status, shown.err) == (0, "")
    workloads = next(line for line in shown.out.splitlines() if "workload" in line).split("│")[2:-1]
    assert re.fullmatch(r"needs \d+\.\d MB", workloads[0].strip())
    assert re.fullmatch(r"\d+x\d+", workloads[1].strip())


def test_the_longest_context_and_the_most_requests(run: Run, gpt2: Path) -> None:
    plan = json.loads(run("plan", gpt2, "--budget", "80MB", "--max-context", "32", "--json").out)
    (found,) = plan["workload"]
    assert found["batch"] == 32
    assert plan["bytes"]["arena"] + plan["bytes"]["pools"] > 0
    beyond = f"32x{found['context'] + 16}"
    assert "cannot hold" in run("plan", gpt2, "--budget", "80MB", "--workload", beyond).refusal()
    plan = json.loads(run("plan", gpt2, "--budget", "80MB", "--max-batch", "100", "--json").out)
    (found,) = plan["workload"]
    assert found["context"] == 100
    beyond = f"{found['batch'] + 1}x100"
    assert "cannot hold" in run("plan", gpt2, "--budget", "80MB", "--workload", beyond).refusal()


def test_what_is_free_now(run: Run, gpt2: Path) -> None:
    plan = json.loads(run("plan", gpt2, "--budget", "auto", *WORK, "--json").out)
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    assert 0 < sum(plan["bytes"].values()) <= plan["budget"] < total


def test_what_is_free_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvc.planning.available._PROC", tmp_path / "none")
    with pytest.raises(TargetError, match="does not say how much memory is available"):
        available("llvm")


def test_a_control_group_leaves_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].split(":", 2)[2].lstrip("/")
    folder = tmp_path / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("max", "5000000"), ("current", "3000000"), ("stat", "anon 1\ninactive_file 500000")):
        (folder / f"memory.{name}").write_text(text + "\n")
    monkeypatch.setattr("kvc.planning.available._GROUP", tmp_path)
    assert available("llvm") == 2_500_000


def test_a_saved_plan_is_compiled(
    run: Run, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvc.machine.measure", lambda *_, **__: 70 << 20)  # as much both times
    path, out = tmp_path / "plan.json", tmp_path / "m.kvc"
    assert run("plan", gpt2, "--budget", "90MB", *WORK, "--save", path).status == 0
    saved = json.loads(path.read_text())
    built = run("compile", gpt2, "--plan", path, "--output", out)
    assert built.status == 0
    plan = json.loads((out / "plan.json").read_text())
    for name in ("budget", "workload", "chunk", "forms", "groups", "times"):
        assert plan[name] == saved["plan"][name]


@pytest.mark.parametrize("name", ["c.svg", "c.png", "c.html"])
def test_the_curve_is_drawn(run: Run, gpt2: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert run("plan", gpt2, "--budget", "90MB", *WORK, "--plot", path).status == 0
    data = path.read_bytes()
    begins = {".svg": b"<?xml", ".png": b"\x89PNG", ".html": b"<!doctype html>"}[path.suffix]
    assert data.startswith(begins)
    if path.suffix != ".png":
        assert data.count(b"<svg") == 1


class _Page(HTMLParser):
    """Titles, and addresses that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "data") and v and not v.startswith("#")]


def test_the_report_needs_nothing_else(run: Run, gpt2: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    assert run("plan", gpt2, "--budget", "120MB", *WORK, "--report", path).status == 0
    page = _Page()
    page.feed(path.read_text())
    assert page.tags.count("svg") == 4
    assert page.loads == []
    assert "script" not in page.tags
    assert "kv-int8" in path.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_report_in_a_browser(run: Run, gpt2: Path, tmp_path: Path) -> None:
    """What a person sees: every picture is drawn and none is empty."""
    path, shot = tmp_path / "r.html", tmp_path / "r.png"
    assert run("plan", gpt2, "--budget", "120MB", *WORK, "--report", path).status == 0
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,2400"]
    done = subprocess.run(
        [
            str(CHROMIUM),
            *options,
            f"--user-data-dir={tmp_path}/profile",
            f"--screenshot={shot}",
            path.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3]
    assert pixels.shape[:2] == (2400, 1000)
    for colour in ("#4c72b0", "#dd8452", "#55a868", "#937860"):  # of the parts of the bar
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        near = (abs(pixels - wanted) < 0.02).all(axis=-1)
        assert near.sum() > 50, colour


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*WORK,), "the budget is missing"),
        (("--budget", "1GB"), "give a --workload"),
        (("--budget", "1GB", *WORK, "--max-context", "1"), "give no --workload beside them"),
        (("--budget", "1GB", "--max-context", "0"), "--max-context 0: give a number, at least 1"),
        (("--budget", "1GB", "--max-batch", "x"), "--max-batch x: give a number, at least 1"),
        (("--budget", "1GB", "--max-batch", "9999"), "the model has 256 positions"),
        (("--budget", "1GB", "--max-context", "1+9"), "the model reads none"),
        (("--budget", "1MB", "--max-context", "1"), "cannot hold the workload 1x1"),
        (("--budget", "1GB,x", *WORK), "'x' is not a size"),
        (("--budget", "1GB,2GB", *WORK, "--json"), "give one budget"),
        (("--budget", "1GB", *WORK, "--plot", "c.pdf"), "pictures are written as .svg, .png or .html"),
        (("--budget", "1GB", *WORK, "--report", "r.svg"), "a report is written as .html"),
        (("--budget", "1GB", *WORK, "--report", "/nowhere/r.html"), "cannot be written"),
        (("--budget", "1GB", *WORK, "--save", "/nowhere/p.json"), "cannot be written"),
        (("--budget", "1GB", *WORK, "--allow", "window=64,window=32"), "is allowed, too; give one"),
        (("--budget", "1GB", *WORK, "--state", "kv-int8"), "--allow kv-int8 would permit it"),
    ],
)
def test_what_cannot_be_planned(run: Run, gpt2: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in run("plan", gpt2, *arguments).refusal()


def test_pictures_without_matplotlib(run: Run, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    message = run("plan", gpt2, "--budget", "1GB", *WORK, "--plot", "c.svg").refusal()
    assert "pip install 'kvc[plot]'" in message


def test_rates_are_measured_for_this_machine_alone(run: Run) -> None:
    assert "not for the target cuda" in run("profile", "--target", "cuda").refusal()
