"""The artifact on disk: whole or absent, checked when opened, readable by other safetensors readers."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from kvc.artifact import FORMAT, Artifact
from kvc.artifact_writer import ArtifactWriter
from kvc.weights_file import ALIGNMENT
from kvc_passes.errors import InputError, PlanningError
from kvc_passes.facts import ModelFacts
from kvc_passes.plans import Bytes, Plan, StateGroup, Workload
from kvc_passes.sites import AttentionSite, MaskFact, Reach

MASK = MaskFact("causal", None, "test")
FACTS = ModelFacts(
    "m", 11, 11, 64, (AttentionSite(0, "n", 2, 1, 4, 4, 0.5, None, MASK, None),), ("p",), {}, 3
)
GROUPS = (StateGroup((0,), Reach(window=9, sinks=2), "form", 256, 16),)
PLAN = Plan(
    1 << 20,
    (Workload(2, 32, 8),),
    {"kind": "llvm"},
    4,
    GROUPS,
    8,
    4,
    2,
    32,
    Bytes(1, 2, 3, 4, 5, 6),
    capacities=(Workload(1, 90), Workload(7, 32)),
)
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "w.float32": np.arange(15, dtype=np.float32).reshape(3, 5),
    "a.float16": np.arange(7, dtype=np.float16),
    "b.bfloat16": np.arange(33).astype(ml_dtypes.bfloat16),
    "q.int8": np.arange(-64, 64, dtype=np.int8).reshape(2, 64),
    "q.uint8": np.arange(3, dtype=np.uint8),
    "i.int32": np.array(7, dtype=np.int32),
    "empty.int64": np.zeros((0, 4), dtype=np.int64),
    "z.int64": np.arange(9, dtype=np.int64).reshape(3, 3),
}


def write(path: Path, *, force: bool = False, beside: Path | None = None) -> None:
    with ArtifactWriter(path, force=force) as writer:
        (writer.folder / "model.so").write_bytes(b"code")
        writer.add("model.so")
        writer.weights((name, a.shape, a.dtype.name, lambda a=a: a) for name, a in ARRAYS.items())
        writer.facts(PLAN, FACTS)
        if beside:
            writer.assets(beside)
        writer.commit()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write(tmp_path / "m.kvc")
    return tmp_path / "m.kvc"


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Folder permissions do not stop root: act as nobody where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_round_trip(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    assert (opened.plan, opened.facts) == (PLAN, FACTS)
    weights = opened.weights()
    assert list(weights) == list(ARRAYS) == [spec.name for spec in opened.layout()]
    for name, array in ARRAYS.items():
        assert weights[name].dtype == array.dtype
        np.testing.assert_array_equal(weights[name], array)
        assert not weights[name].flags.writeable
    assert all(spec.offset % ALIGNMENT == 0 for spec in opened.layout())
    assert all(w.ctypes.data % ALIGNMENT == 0 for w in weights.values() if w.size)
    assert opened.file("model.so") == artifact / "model.so"
    assert opened.file("tokenizer.json") is None
    assert sorted(os.listdir(artifact.parent)) == ["m.kvc"]


def test_safetensors_library_reads_the_weights(artifact: Path) -> None:
    with safe_open(artifact / "weights.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["order"]) == list(ARRAYS)
        for name, array in ARRAYS.items():
            if array.dtype != ml_dtypes.bfloat16:
                np.testing.assert_array_equal(file.get_tensor(name), array)
        assert set(file.keys()) - set(ARRAYS) == {k for k in file.keys() if k.startswith("__pad.")}  # noqa: SIM118


def test_weights_are_produced_one_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []

    def produce() -> Any:
        assert all(array() is None for array in made)
        array = np.zeros(8, dtype=np.float32)
        made.append(weakref.ref(array))
        return array

    with ArtifactWriter(tmp_path / "m.kvc") as writer:
        writer.weights((f"w{i}", (8,), "float32", produce) for i in range(4))
    assert len(made) == 4


@pytest.mark.parametrize(("shape", "dtype"), [((5, 3), "float32"), ((3, 5), "float16")])
def test_weight_other_than_announced(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(PlanningError, match="w is float32"), ArtifactWriter(tmp_path / "m.kvc") as writer:
        writer.weights([("w", shape, dtype, lambda: np.zeros((3, 5), np.float32))])
    assert os.listdir(tmp_path) == []


def test_commit_refuses_an_incomplete_artifact(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "m.kvc") as writer:
        writer.text("plan.json", "{}")
        with pytest.raises(PlanningError, match=r"lacks model\.so, weights\.safetensors, facts\.json"):
            writer.commit()
    assert os.listdir(tmp_path) == []


def test_assets_are_copied(tmp_path: Path) -> None:
    beside = tmp_path / "source"
    beside.mkdir()
    (beside / "tokenizer.json").write_text("{}")
    (beside / "other.txt").write_text("no")
    write(tmp_path / "m.kvc", beside=beside)
    opened = Artifact.open(tmp_path / "m.kvc")
    assert opened.file("tokenizer.json") is not None
    assert opened.file("other.txt") is None


def test_existing_needs_force(artifact: Path) -> None:
    before = artifact.stat().st_ino
    with pytest.raises(InputError, match="exists; give --force"):
        write(artifact)
    assert artifact.stat().st_ino == before
    write(artifact, force=True)
    assert artifact.stat().st_ino != before
    Artifact.open(artifact)
    assert os.listdir(artifact.parent) == ["m.kvc"]


def test_force_keeps_the_old_one_when_the_new_one_fails(artifact: Path) -> None:
    with pytest.raises(RuntimeError), ArtifactWriter(artifact, force=True):
        raise RuntimeError
    Artifact.open(artifact)
    assert os.listdir(artifact.parent) == ["m.kvc"]


def test_swap_without_renameat2(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    write(artifact, force=True)
    Artifact.open(artifact)
    assert os.listdir(artifact.parent) == ["m.kvc"]


def test_force_replaces_only_artifacts(tmp_path: Path) -> None:
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    file.write_text("precious")
    write(tmp_path / "m.kvc")
    link.symlink_to(tmp_path / "m.kvc")
    for target in (folder, file, link):
        with pytest.raises(InputError, match="not a compiled model"):
            write(target, force=True)
    assert (folder / "thesis.txt").read_text() == file.read_text() == "precious"


@pytest.mark.usefixtures("unprivileged")
def test_read_only_folder() -> None:
    with pytest.raises(InputError, match=r"/proc/m\.kvc: cannot be written"):
        write(Path("/proc/m.kvc"))


def test_missing_parent_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "absent" / "m.kvc")


def test_full_disk_is_an_input_error(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "m.kvc") as writer:
        (writer.folder / "plan.json").symlink_to("/dev/full")
        with pytest.raises(InputError, match="No space left"):
            writer.text("plan.json", "{}")
    assert os.listdir(tmp_path) == []


def test_killed_run_leaves_no_artifact_and_the_next_cleans_up(tmp_path: Path) -> None:
    script = """
        import sys, time
        from kvc.artifact_writer import ArtifactWriter
        with ArtifactWriter(sys.argv[1]) as writer:
            writer.text("plan.json", "{}")
            print("ready", flush=True)
            time.sleep(60)
    """
    target = tmp_path / "m.kvc"
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(target)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    (leftover,) = tmp_path.iterdir()
    write(target)  # the other run is alive: its folder stays
    assert {target, leftover} == set(tmp_path.iterdir())
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    write(target, force=True)
    assert list(tmp_path.iterdir()) == [target]


def test_leftover_of_an_earlier_process_with_our_number(tmp_path: Path) -> None:
    (tmp_path / f".m.kvc.{os.getpid()}.partial").mkdir()
    write(tmp_path / "m.kvc")
    assert os.listdir(tmp_path) == ["m.kvc"]


def test_locked_folder_is_not_a_leftover(tmp_path: Path) -> None:
    """A process of another container: its number means nothing here, its lock does."""
    other = tmp_path / ".m.kvc.4194999.partial"
    other.mkdir()
    handle = os.open(other, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write(tmp_path / "m.kvc")
    assert other.is_dir()
    os.close(handle)
    write(tmp_path / "m.kvc", force=True)
    assert not other.exists()


def test_cut_swap_is_finished(artifact: Path) -> None:
    artifact.rename(artifact.parent / ".m.kvc.4194999.old")
    with pytest.raises(RuntimeError), ArtifactWriter(artifact, force=True):
        raise RuntimeError
    Artifact.open(artifact)
    assert os.listdir(artifact.parent) == ["m.kvc"]


@pytest.mark.parametrize("name", ["model.so", "weights.safetensors", "plan.json"])
def test_changed_byte_is_found(artifact: Path, name: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} does not have the sha256"):
        Artifact.open(artifact)


@pytest.mark.parametrize("verify", [True, False])
def test_cut_and_missing_files_are_found(artifact: Path, verify: bool) -> None:
    os.truncate(artifact / "weights.safetensors", 100)
    with pytest.raises(InputError, match=r"weights\.safetensors has 100 bytes where the manifest gives \d+"):
        Artifact.open(artifact, verify=verify)
    (artifact / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights\.safetensors is missing"):
        Artifact.open(artifact, verify=verify)


@pytest.mark.parametrize(("step", "advice"), [(1, "upgrade kvc"), (-1, "compile it again")])
def test_another_format(artifact: Path, step: int, advice: str) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["format"] == FORMAT
    other = {"format": FORMAT + step, "kvc": "9.9", "other": 1, "files": []}
    (artifact / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=rf"format {FORMAT + step}, written by kvc 9\.9.*{advice}"):
        Artifact.open(artifact)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 3}',
        '{"format": "3", "files": {}}',
        f'{{"format": {FORMAT}, "functions": {{}}, "files": {{"../x": {{}}}}}}',
        f'{{"format": {FORMAT}, "functions": {{"prefill": [1]}}, "files": {{}}}}',
    ],
)
def test_damaged_manifest(artifact: Path, text: str) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        Artifact.open(artifact)


def test_a_function_takes_all_weights_or_those_that_are_listed(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    names = [spec.name for spec in opened.layout()]
    assert opened.takes("prefill") == names
    opened.manifest["functions"]["encode"] = names[:1]
    assert opened.takes("encode") == names[:1]
    opened.manifest["functions"]["encode"] = ["other"]
    with pytest.raises(InputError, match="encode takes weights that are not there"):
        opened.takes("encode")


def test_manifest_cannot_name_files_elsewhere(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="list of files is wrong"):
        Artifact.open(artifact)


def test_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match="is not a compiled model"):
        Artifact.open(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="is not a compiled model"):
        Artifact.open(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        Artifact.open(tmp_path / "absent.kvc")


def test_opening_does_not_read_the_weights_without_verify(artifact: Path) -> None:
    data = bytearray((artifact / "weights.safetensors").read_bytes())
    data[Artifact.open(artifact).layout()[-1].offset] ^= 1
    (artifact / "weights.safetensors").write_bytes(data)
    weights = Artifact.open(artifact, verify=False).weights()
    assert not np.array_equal(weights["z.int64"], ARRAYS["z.int64"])
