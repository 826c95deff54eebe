"""Artifacts that were damaged and prompts that cannot be served: one clear message, exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvc.artifact import FORMAT, Artifact

from .cli_fixtures import copy_artifact, edit_json, kvc, seal
from .conftest import Run

FILES = [
    "model.so",
    "weights.safetensors",
    "plan.json",
    "facts.json",
    "tokenizer.json",
    "chat_template.jinja",
]


@pytest.fixture
def damaged(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be damaged."""
    return copy_artifact(artifact, tmp_path)


def _refused(run: Run, artifact: Path) -> str:
    """`run` and `verify` refuse it with the same message."""
    message = run("run", artifact, "--prompt", "The weights").refusal()
    assert run("verify", artifact, "--against", "model.onnx").refusal() == message
    assert str(artifact) in message
    return message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_flipped_byte(run: Run, damaged: Path, name: str, where: float) -> None:
    data = bytearray((damaged / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (damaged / name).write_bytes(data)
    message = _refused(run, damaged)
    assert "damaged" in message
    assert name in message


@pytest.mark.parametrize("name", FILES)
def test_missing_file(run: Run, damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    message = _refused(run, damaged)
    assert name in message
    assert "missing" in message


@pytest.mark.parametrize("name", FILES)
def test_truncated_file(run: Run, damaged: Path, name: str) -> None:
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:-1])
    message = _refused(run, damaged)
    assert name in message
    assert f"{len(data) - 1} bytes" in message


def test_library_from_elsewhere(run: Run, damaged: Path) -> None:
    (damaged / "model.so").write_bytes(b"\x7fELF" + bytes(4000))
    seal(damaged)
    message = run("run", damaged, "--prompt", "The weights").refusal()
    assert "model.so" in message


def test_truncated_weights_with_a_manifest_that_agrees(run: Run, damaged: Path) -> None:
    file = damaged / "weights.safetensors"
    file.write_bytes(file.read_bytes()[: -(1 << 16)])
    seal(damaged)
    assert "weights.safetensors" in run("run", damaged, "--prompt", "The weights").refusal()


def test_tensors_of_another_model(run: Run, damaged: Path) -> None:
    """Shapes that the compiled functions do not take are refused before they are called."""
    file = damaged / "weights.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = json.loads(header["__metadata__"]["order"])[0]
    header[name]["shape"] = [1, *header[name]["shape"]]
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(data[:8] + text + b" " * (length - len(text)) + data[8 + length :])
    seal(damaged)
    message = run("run", damaged, "--prompt", "The weights").refusal()
    assert str(damaged) in message


MANIFESTS: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "no files": lambda text: json.dumps({**json.loads(text), "files": {}}),
    "files in a list": lambda text: json.dumps({**json.loads(text), "files": ["model.so"]}),
    "outside": lambda text: text.replace('"tokenizer.json"', '"../../tokenizer.json"'),
    "format in words": lambda text: text.replace(f'"format": {FORMAT}', '"format": "one"'),
    "size in words": lambda text: text.replace('"bytes": ', '"bytes": "x", "b": '),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_broken_manifest(run: Run, damaged: Path, kind: str) -> None:
    file = damaged / "manifest.json"
    text = file.read_text()
    file.write_text(MANIFESTS[kind](text))
    assert file.read_text() != text
    message = _refused(run, damaged)
    assert "manifest.json" in message


@pytest.mark.parametrize("name", ["plan.json", "facts.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"bytes": 3}', "\xff"])
def test_broken_json_with_a_manifest_that_agrees(run: Run, damaged: Path, name: str, text: str) -> None:
    (damaged / name).write_bytes(text.encode("latin-1"))
    seal(damaged)
    assert name in _refused(run, damaged)


def test_newer_format(run: Run, damaged: Path) -> None:
    change = {"format": FORMAT + 1, "kvc": "9.9", "files": "in another way"}
    edit_json(damaged / "manifest.json", lambda data: data.update(change))
    message = _refused(run, damaged)
    for text in (f"format {FORMAT + 1}", "kvc 9.9", "upgrade"):
        assert text in message


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder"])
def test_no_artifact(run: Run, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.kvc"
    if kind == "file":
        path.write_text("")
    elif kind == "empty folder":
        path.mkdir()
    assert "kvc compile" in _refused(run, path)


def test_model_in_place_of_the_artifact(run: Run, llama: Path) -> None:
    message = run("run", llama, "--prompt", "The weights").refusal()
    assert str(llama) in message
    assert "kvc compile" in message


def test_compiled_for_another_cpu(run: Run, damaged: Path) -> None:
    edit_json(damaged / "plan.json", lambda data: data["target"].update(mtriple="riscv64-unknown-linux-gnu"))
    seal(damaged)
    message = run("run", damaged, "--prompt", "The weights").refusal()
    assert "riscv64" in message
    assert "compile it again" in message


def test_no_tokenizer(run: Run, damaged: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    edit_json(damaged / "manifest.json", lambda data: data["files"].pop("tokenizer.json"))
    message = run("run", damaged, "--prompt", "The weights").refusal()
    assert "tokenizer" in message


def test_nothing_to_run() -> None:
    """Without a terminal there is nobody to chat with."""
    assert "--prompt" in kvc("run", "model.kvc").refusal()


SAMPLING = [
    ("--temperature", "-1"),
    ("--temperature", "nan"),
    ("--temperature", "inf"),
    ("--top-k", "-1"),
    ("--top-p", "0"),
    ("--top-p", "1.5"),
    ("--seed", "-1"),
    ("--max-new-tokens", "0"),
    ("--stop", ""),
    ("--temperature", "warm"),
    ("--top-k", "2.5"),
]


@pytest.mark.parametrize("option", SAMPLING, ids=" ".join)
def test_impossible_sampling(run: Run, option: tuple[str, str]) -> None:
    """Refused before the model is loaded: it does not even exist."""
    name = option[0].removeprefix("--")
    message = run("run", "missing.kvc", "--prompt", "hi", *option).refusal()
    assert name in message.replace("_", "-")
    assert "missing.kvc" not in message


def test_prompt_longer_than_the_context(run: Run, artifact: Path) -> None:
    context = Artifact.open(artifact).plan.max_context
    message = run("run", artifact, "--prompt", "word " * 2000).refusal()
    assert str(context) in message or str(context - 1) in message
    fits = run("run", artifact, "--prompt", "hi", "--prompt", "word " * 2000)
    assert fits.refusal() == message  # nothing is run when one of several cannot be


def test_empty_prompt(run: Run, artifact: Path) -> None:
    assert "empty" in run("run", artifact, "--prompt", "", "--no-chat").refusal()
    assert (
        run("run", artifact, "--prompt", "", "--max-new-tokens", "2").status == 0
    )  # the template has tokens


def test_prompt_that_is_no_text(artifact: Path) -> None:
    message = kvc("run", artifact, "--prompt", b"caf\xe9".decode(errors="surrogateescape")).refusal()
    assert "UTF-8" in message


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("missing.txt", None, "No such file"),
        ("folder", None, "directory"),
        ("empty.txt", b"", "no prompts"),
        ("blank.txt", b" \n\t\n\r\n", "no prompts"),
        ("binary.txt", bytes(range(256)), "UTF-8"),
    ],
)
def test_prompts_files(
    run: Run, artifact: Path, tmp_path: Path, name: str, data: bytes | None, reason: str
) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    elif name == "folder":
        file.mkdir()
    message = run("run", artifact, "--prompts-file", file).refusal()
    assert str(file) in message
    assert reason in message


def test_prompts_from_both(run: Run, artifact: Path) -> None:
    arguments = ("--prompt", "hi", "--prompts-file", "prompts.txt")
    assert "--prompts-file" in run("run", artifact, *arguments).refusal()


def test_a_copy_is_an_artifact(run: Run, artifact: Path, tmp_path: Path) -> None:
    """What the tests damage works before."""
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    seal(copy)
    assert run("run", copy, "--prompt", "The weights", "--max-new-tokens", "2").status == 0
