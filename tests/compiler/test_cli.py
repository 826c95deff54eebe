"""The command as a person uses it: compile, plan, inspect, run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvc
from kvc.artifact import Artifact
from kvc_passes.facts import to_json

from .cli_fixtures import BUDGET, COMMAND, Result, environment, start
from .cli_fixtures import kvc as command
from .conftest import Run

SHORT = ("--max-new-tokens", "8")


def test_version(run: Run) -> None:
    assert run("--version") == Result(0, f"kvc {kvc.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("frobnicate",), ("plan", "m.onnx"), ("run",)])
def test_wrong_usage(run: Run, arguments: tuple[str, ...]) -> None:
    assert "--help" in run(*arguments).refusal()


@pytest.mark.parametrize("name", ["compile", "plan", "inspect", "verify", "run"])
def test_every_command_has_help(run: Run, name: str) -> None:
    result = run(name, "--help")
    assert result.status == 0
    assert f"usage: kvc {name}" in result.out


def test_compile_beside_the_model(run: Run, model: Path, tmp_path: Path) -> None:
    dump = tmp_path / "ir"
    result = run(
        "compile", model, *BUDGET, "--target", "cpu:x86-64-v3", "--dump", dump, "--time-passes", "--force"
    )
    assert result.status == 0
    assert result.err == ""
    output = tmp_path / "model.kvc"
    assert f"{output}: compiled in " in result.out
    built = Artifact.open(output)
    assert built.plan.target["mcpu"] == "x86-64-v3"
    assert f"{built.plan.bytes.total:,}" in result.out
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.assets", "model.kvc", "ir"}
    _check_dump(dump, result.out)


def _check_dump(dump: Path, out: str) -> None:
    """Numbered from 1 in the order of the passes; each names its pass; some change nothing and say so."""
    files = sorted(dump.iterdir())
    assert [f.name[:3] for f in files] == [f"{i:02d}-" for i in range(1, len(files) + 1)]
    names = [f.stem[3:] for f in files]
    assert "prefill-write-logits" in names
    assert "decode-page-attention" in names
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    timed = {cells[1].strip(): cells[3].strip() for cells in rows if len(cells) == 5}
    assert set(names) <= timed.keys()
    assert sum(float(line[2]) >= 0 for line in rows if len(line) == 5) == len(names) + 1  # and their sum
    for name, file in zip(names, files):
        if timed[name] == "(unchanged)":
            assert file.read_text() == "(unchanged)\n"
        else:
            assert "def main" in file.read_text()
    assert "(unchanged)" in timed.values()


def test_plan_as_json(run: Run, llama: Path) -> None:
    result = run("plan", llama, *BUDGET, "--json")
    assert result.status == 0
    assert result.err == ""
    given = json.loads(result.out)
    wanted = json.loads(to_json(kvc.plan(llama, budget="1GB", workload="4x64")))
    assert wanted["workload"] == [{"batch": 4, "context": 64, "prefix": 0, "memory": 0}]
    # What a process takes is measured each time.
    assert abs(given["bytes"].pop("runtime") - wanted["bytes"].pop("runtime")) <= 4 << 20
    for one, other in zip(given.pop("capacities"), wanted.pop("capacities"), strict=True):
        assert one["context"] == other["context"]
        assert one["batch"] == pytest.approx(other["batch"], rel=0.02)
    assert given == wanted


def test_plan_as_a_table(run: Run, llama: Path, artifact: Path) -> None:
    result = run("plan", llama, *BUDGET)
    assert result.status == 0
    for line in ("weights", "KV pages", "temporaries", "logits", "tables", "process", "promised", "budget"):
        assert f"│ {line} " in result.out
    assert "llama: 4x64 in 1.0 GB" in result.out
    assert f"{Artifact.open(artifact).plan.bytes.weights:,}" in result.out


def test_inspect(run: Run, llama: Path) -> None:
    given = json.loads(run("inspect", llama, "--json").out)
    assert given == json.loads(to_json(kvc.inspect(llama)))
    table = run("inspect", llama)
    assert table.status == 0
    for text in ("512 tokens, 512 logits", "256 positions", "1,024 bytes a token over 2 layers", "causal"):
        assert text in table.out


def _answer(result: Result) -> str:
    """What was printed; the speed goes to stderr."""
    assert result.status == 0, result.err
    assert "tokens/s" in result.err
    assert len(result.err.splitlines()) == 1
    return result.out


def test_run_streams_one_prompt(artifact: Path) -> None:
    with kvc.load(artifact) as session:
        (wanted,) = session.generate(["Once upon a time"], chat=True, max_new_tokens=8)
        (plain,) = session.generate(["Once upon a time"], chat=False, max_new_tokens=8)
    assert wanted.text != plain.text
    once = ("run", artifact, "--prompt", "Once upon a time", *SHORT)
    assert _answer(command(*once)) == wanted.text + "\n"
    assert _answer(command(*once, "--chat")) == wanted.text + "\n"
    assert _answer(command(*once, "--no-chat")) == plain.text + "\n"


def test_run_several_prompts(run: Run, artifact: Path, tmp_path: Path) -> None:
    prompts = ["The weights", "Every token looks back", "0 1 2 3", "café ☕", "Pages", "of memory"]
    several = [text for prompt in prompts for text in ("--prompt", prompt)]
    out = _answer(run("run", artifact, *several, *SHORT, "--no-chat"))
    with kvc.load(artifact) as session:
        wanted = session.generate(prompts, max_new_tokens=8)
    assert out == "".join(f"> {p}\n{c.text.strip()}\n\n" for p, c in zip(prompts, wanted))
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(prompts) + "\n  \n", encoding="utf-8")
    assert _answer(run("run", artifact, "--prompts-file", file, *SHORT, "--no-chat")) == out


def test_run_one_prompt_of_a_file(run: Run, artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The weights", encoding="utf-8")
    out = _answer(run("run", artifact, "--prompts-file", file, *SHORT))
    assert out == _answer(run("run", artifact, "--prompt", "The weights", *SHORT))


def test_sampling_is_repeatable(run: Run, artifact: Path) -> None:
    prompt = ("run", artifact, "--prompt", "The weights", "--max-new-tokens", "40", "--no-chat")
    hot = ("--temperature", "1.5", "--top-k", "300", "--top-p", "0.99", "--seed")
    first = _answer(run(*prompt, *hot, "7"))
    assert first == _answer(run(*prompt, *hot, "7"))
    assert first != _answer(run(*prompt, *hot, "8"))
    greedy = _answer(run(*prompt))
    assert greedy == _answer(run(*prompt, "--temperature", "2", "--top-k", "1"))
    assert greedy != first


def test_stop_text(run: Run, artifact: Path) -> None:
    prompt = ("run", artifact, "--prompt", "The weights", "--max-new-tokens", "30", "--no-chat")
    whole = _answer(run(*prompt))
    stop = whole[10:13]
    assert _answer(run(*prompt, "--stop", "never seen", "--stop", stop)) == whole[: whole.index(stop)] + "\n"


def test_more_tokens_than_the_context(run: Run, artifact: Path) -> None:
    context = Artifact.open(artifact).plan.max_context
    result = run("run", artifact, "--prompt", "a b c", "--no-chat", "--max-new-tokens", "100000")
    assert result.status == 0
    counts = [int(word) for word in result.err.replace(",", "").split() if word.isdigit()]
    assert context - 1 <= sum(counts) <= context + 1


def test_debug_alone_shows_tracebacks(run: Run, tmp_path: Path) -> None:
    missing = tmp_path / "missing.onnx"
    message = run("inspect", missing).refusal()
    shown = run("inspect", missing, "--debug")
    assert shown.status == 2
    assert shown.err.startswith("Traceback")
    assert "InputError" in shown.err
    assert shown.err.endswith(f"kvc: {message}\n")


def test_a_bug_is_not_blamed_on_the_input(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("two and two\nare five")

    monkeypatch.setattr("kvc.api.import_onnx", broken)
    result = run("inspect", llama)
    assert result.status == 1
    assert "fault of kvc" in result.err
    assert "--debug" in result.err
    assert "Traceback" not in result.err
    shown = run("inspect", llama, "--debug")
    assert shown.status == 1
    assert "in broken" in shown.err


@pytest.mark.parametrize("arguments", [("plan", "--json"), ("inspect",), ("run",)])
def test_nobody_reads_the_output(arguments: tuple[str, ...], llama: Path, artifact: Path) -> None:
    name, *options = arguments
    extra = {"plan": BUDGET, "inspect": (), "run": ("--prompt", "The weights")}[name]
    process = start(name, artifact if name == "run" else llama, *options, *extra)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert "fault of kvc" not in err


def test_output_that_cannot_show_a_character(artifact: Path) -> None:
    """A terminal with another encoding gets replacements, not an error."""
    prompts = [text for prompt in ("☕", "é") for text in ("--prompt", prompt)]
    result = command("run", artifact, *prompts, *SHORT, PYTHONIOENCODING="ascii")
    assert result.status == 0, result.err
    assert result.out.isascii()


def test_interrupt_while_running(artifact: Path) -> None:
    process = start("run", artifact, *[t for _ in range(4000) for t in ("--prompt", "The weights")])
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "kvc: interrupted\n")


def test_run_maps_no_compiler(artifact: Path) -> None:
    """A process that runs a model has TVM's runtime and no compiler, ONNX or PyTorch."""
    code = f"""if True:
        import sys
        from kvc import chat, cli

        def show(session):  # where the speed would be printed: the model is still loaded
            heavy = {{"tvm", "onnx", "torch", "onnxruntime", "transformers"}} & sys.modules.keys()
            print(sorted(heavy), open("/proc/self/maps").read(), sep="\\n")

        chat._summary = show
        sys.exit(cli.main(["run", {str(artifact)!r}, "--prompt", "hi", "--max-new-tokens", "3"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    _, seen, maps = done.stdout.split("\n", 2)
    assert seen == "[]"
    assert "libtvm_runtime.so" in maps
    assert str(artifact / "model.so") in maps
    assert str(artifact / "weights.safetensors") in maps
    for library in ("libtvm_compiler", "libLLVM", "libtorch", "libonnx", "onnx_cpp2py"):
        assert library not in maps


def test_command_of_a_module() -> None:
    done = subprocess.run(
        [*COMMAND, "--version"], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout == f"kvc {kvc.__version__}\n"
