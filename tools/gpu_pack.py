"""Packs what tools/gpu_check.py needs on a machine that has a GPU and no package registry.

    python tools/gpu_pack.py OUT [--archs sm_80,sm_90] [--python 3.12] [--small]

OUT becomes a folder of less than 60 MiB: kvc's and TVM's runtime, libraries of single kernels, models without
their weights (which are made there, from their names), the logits that are expected of them, and
gpu_check.py. There: `python3 OUT/tools/gpu_check.py --json FILE`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tools.gpu_kernels import build_boxed, build_kernels  # noqa: E402
from tools.gpu_weights import seeded  # noqa: E402

import kvc  # noqa: E402
from kvc.compilation import build_libraries, costs, lower_model, read_model  # noqa: E402
from kvc.cuda_machine import CudaMachine, parse_archs  # noqa: E402
from kvc.frontend.importer import import_onnx  # noqa: E402
from kvc.options import parse_size, parse_workload  # noqa: E402
from kvc.permissions import Permissions  # noqa: E402
from kvc.pipeline import Runner  # noqa: E402
from kvc.planning.budget import make_plan  # noqa: E402
from kvc.runtime.executor import Executor  # noqa: E402
from kvc.runtime.library import tvm_library  # noqa: E402
from kvc.runtime.sequences import Sequences  # noqa: E402
from kvc_models.big import INSIDE, make_big  # noqa: E402
from kvc_passes.facts import to_json  # noqa: E402

LARGEST: Final = 60 << 20
LLAMA_8B: Final = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
SMOLLM2: Final = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
TINY: Final = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
CHECKED: Final = {
    "smollm2": (SMOLLM2, "4GB", "4x512"),
    "llama-8b-2-layers": ({**LLAMA_8B, "num_hidden_layers": 2, "vocab_size": 32000}, "8GB", "4x512"),
}
"""Sizes, budget and workload of the models whose logits are compared with the CPU's."""
TIMED: Final = {"llama-8b": (LLAMA_8B, "70GB", "32x2048,8x16384,1x131072")}
"""The same of models that are only timed: any weights will do."""
LENGTHS: Final = (130, 41)
STEPS: Final = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--archs", default="sm_90")
    parser.add_argument("--python", default="3.12", help="version of the Python there (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a model of two small layers alone, for a test")
    parser.add_argument("--dump", type=Path, help="folder for the generated CUDA text, for a test")
    options = parser.parse_args()
    archs = parse_archs(options.archs)
    shutil.rmtree(options.out, ignore_errors=True)
    (options.out / "python").mkdir(parents=True)
    _runtime(options.out / "python", options.python)
    for name in ("gpu_check.py", "gpu_cases.py", "gpu_weights.py", "gpu_bench.py"):
        (options.out / "tools").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tools" / name, options.out / "tools")
    kernels = options.out / "kernels"
    kernels.mkdir()
    build_kernels(archs, kernels, Runner(dump=_below(options.dump, "kernels")))
    build_boxed(archs, options.out / "boxed", Runner(dump=_below(options.dump, "boxed")))
    checked = {"tiny": (TINY, "2GB", "2x256")} if options.small else CHECKED
    with tempfile.TemporaryDirectory() as work:
        for name, (sizes, budget, workload) in checked.items():
            model = _model(Path(work) / f"{name}.onnx", sizes)
            dump = _below(options.dump, name)
            _pack_model(options.out / "models" / name, model, archs, budget, workload, dump)
            _expect(options.out / "models" / name, model, Path(work), sizes["vocab_size"])
        for name, (sizes, budget, workload) in ({} if options.small else TIMED).items():
            model = _model(Path(work) / f"{name}.onnx", sizes, sparse=True)
            _pack_model(options.out / "timed" / name, model, archs, budget, workload, None)
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    print(f"{options.out}: {size / (1 << 20):.1f} MiB")
    return int(size > LARGEST)


def _runtime(out: Path, python: str) -> None:
    """kvc's modules, TVM's libraries for running, and tvm_ffi for another version of Python."""
    skipped = shutil.ignore_patterns("__pycache__", "frontend", "codegen", "*.egg-info")
    shutil.copytree(ROOT / "compiler" / "kvc", out / "kvc", ignore=skipped)
    shutil.copytree(ROOT / "passes" / "kvc_passes", out / "kvc_passes", ignore=skipped)
    (out / "tvm" / "lib").mkdir(parents=True)
    (out / "tvm" / "__init__.py").write_text('"""Only the libraries of TVM\'s runtime are here."""\n')
    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        shutil.copy(tvm_library(name), out / "tvm" / "lib")
    with tempfile.TemporaryDirectory() as folder:
        wanted = next(line for line in _requirements() if line.startswith("apache-tvm-ffi=="))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        command += ["--only-binary=:all:", "--python-version", python, wanted]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("tvm_ffi/") and _is_needed(n)]
            archive.extractall(out, names)


def _requirements() -> list[str]:
    import importlib.metadata

    return [line.split(";")[0].strip() for line in importlib.metadata.requires("kvc") or []]


def _is_needed(name: str) -> bool:
    # libtvm_ffi_testing.so is loaded by the library itself.
    return not {"include", "3rdparty", "src", "cython", "share"} & set(Path(name).parts)


def _below(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    (folder / name).mkdir(parents=True, exist_ok=True)
    return folder / name


def _model(path: Path, sizes: dict[str, int], sparse: bool = False) -> Path:
    """A Llama of these sizes in float16, its large weights seeded by their names (or a hole)."""
    make_big(path, "1b", dtype="float16", sparse=True, **sizes)
    if sparse:
        return path
    graph = onnx.load(path, load_external_data=False).graph
    with path.with_name(f"{path.name}.data").open("r+b") as data:
        for tensor in graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                data.seek(int(place["offset"]))
                data.write(seeded(tensor.name, tuple(tensor.dims), "float16").tobytes())
    return path


def _pack_model(
    out: Path, model: Path, archs: tuple[str, ...], budget: str, workload: str, dump: Path | None
) -> None:
    """An artifact for GPUs without its weights; recipe.json says what those are made of."""
    runner, machine = Runner(dump=dump), CudaMachine(archs)
    understood = read_model(import_onnx(model), Permissions(), machine.page_size, runner)
    lowered = lower_model(understood, machine, runner)
    price = costs(understood, lowered, machine.runtime_bytes(model.parent, 0))
    plan = make_plan(price, parse_size(budget), parse_workload(workload))
    out.mkdir(parents=True)
    build_libraries(lowered, plan, out, runner)
    (out / "plan.json").write_text(to_json(plan))
    (out / "facts.json").write_text(to_json(understood.facts))
    recipes, small = [], {}
    sources = understood.imported.weights
    for name, part in lowered.recipes.items():
        tensor = lowered.tensors[name]
        entry: dict[str, Any] = {"name": name, "dtype": tensor.dtype, "shape": tensor.shape}
        if all(sources[s.name].nbytes > INSIDE for s in part.weight.sources):
            entry["made_of"] = [
                {"name": s.name, "transposed": s.transposed, "shape": sources[s.name].shape}
                for s in part.weight.sources
            ]
        else:
            small[name] = machine.store(part, tensor, sources)
        recipes.append(entry)
    (out / "recipe.json").write_text(json.dumps(recipes))
    np.savez(out / "small.npz", **small)  # type: ignore[arg-type]


def _expect(out: Path, model: Path, work: Path, vocab: int) -> None:
    """Logits of the CPU's build of the same file: of two prompts in one call, and of steps after them."""
    artifact = kvc.compile(
        model, budget="20GB", workload="2x256", output=work / f"{model.stem}.kvc", force=True
    )
    executor = Executor(artifact)
    rng = np.random.default_rng(0)
    tokens = [[int(t) for t in rng.integers(0, vocab, n + STEPS)] for n in LENGTHS]
    sequences = Sequences(executor)
    kept = [sequences.open(t) for t in tokens]
    rows = [sequences.prefill(list(zip(kept, LENGTHS))).copy()]
    rows += [sequences.decode(kept).copy() for _ in range(STEPS)]
    executor.close()
    shutil.rmtree(artifact.path)
    expected: dict[str, Any] = {f"tokens{i}": np.array(t) for i, t in enumerate(tokens)}
    expected |= {"logits": np.stack(rows).astype(np.float32), "lengths": np.array(LENGTHS)}
    np.savez(out / "expected.npz", **expected)


if __name__ == "__main__":
    sys.exit(main())
