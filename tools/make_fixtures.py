"""Writes tests/fixtures: tiny decoders by exporters that cannot live in this project's environment.

    python tools/make_fixtures.py [optimum] [genai] [--work FOLDER] [--only FAMILY]

Each exporter gets a virtual environment in the work folder. The models have seeded random weights, hidden
size 64, 2 layers and 128 tokens. Beside FILE.onnx, whose weights are inside, FILE.assets/config.json is the
configuration that it was exported from.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx

ROOT: Final = Path(__file__).resolve().parents[1]
FIXTURES: Final = ROOT / "tests" / "fixtures"
TORCH: Final = "torch==2.13.0"
LARGEST: Final = 400_000
"""Bytes that a fixture may have."""

SMALL: Final[dict[str, Any]] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "gpt2": {"vocab_size": 128, "n_embd": 64, "n_inner": 64, "n_positions": 128},
    "gemma2": {**SMALL, "query_pre_attn_scalar": 16},
    "phi": {
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        "num_attention_heads": 2,  # ONNX Runtime rotates a multiple of 16 elements
        "num_key_value_heads": 2,
    },
    "phi3": {name: value for name, value in SMALL.items() if name != "head_dim"},
    "gpt-oss": {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Exporter:
    """A foreign exporter: what to install, what it can write, and how it is called."""

    packages: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    """Family and type; behind a dash, the provider that it is for, where that is not the CPU."""


EXPORTERS: Final = {
    "optimum": Exporter(
        ("optimum-onnx==0.1.0", "transformers==4.57.6", "onnx", "onnxruntime"),
        tuple((name, "float32") for name in ("llama", "gpt2", "qwen2", "mistral", "gemma2", "phi3")),
    ),
    "genai": Exporter(
        ("onnxruntime-genai==0.18.0", "transformers==5.23.0", "onnx", "onnx-ir"),
        (
            *((name, "float32") for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma", "phi")),
            *((name, "int4") for name in ("llama", "mistral", "qwen3", "gemma2")),
            ("llama", "float16"),
            *(("llama", f"{dtype}-cuda") for dtype in ("float16", "bfloat16", "int4")),
            *((name, "float16-cuda") for name in ("mistral", "qwen3", "gemma2")),
        ),
    ),
}


def environment(name: str, work: Path) -> Path:
    """The Python of the exporter's virtual environment, made if it is not there."""
    folder = work / f"venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, TORCH, *EXPORTERS[name].packages], check=True)
        (folder / "ready").touch()
    return python


def checkpoint(family: str, work: Path) -> Path:
    """The folder of a tiny model as `save_pretrained` writes it."""
    from kvc_models import make_tiny
    from kvc_models.tiny import tokenizer

    folder = work / "checkpoints" / family
    model = make_tiny(family, **OPTIONS.get(family, SMALL))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def export(name: str, family: str, dtype: str, work: Path) -> Path:
    """Run the exporter; the committed file."""
    source, python = checkpoint(family, work), environment(name, work)
    out = work / "out" / f"{name}-{family}-{dtype}"
    shutil.rmtree(out, ignore_errors=True)
    if name == "optimum":
        command = [str(python), "-m", "optimum.commands.optimum_cli", "export", "onnx"]
        command += [
            "--model",
            str(source),
            "--task",
            "text-generation-with-past",
            "--no-post-process",
            str(out),
        ]
    else:
        dtype_name, _, provider = dtype.partition("-")
        precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(dtype_name, dtype_name)
        command = [str(python), "-m", "onnxruntime_genai.models.builder", "-m", str(source), "-o", str(out)]
        command += ["-p", precision, "-e", provider or "cpu", "-c", str(work / "cache")]
    hidden = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, env={**hidden, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    suffix = "" if dtype == "float32" else f"-{dtype}"
    return keep(out / "model.onnx", source / "config.json", FIXTURES / name / f"{family}{suffix}.onnx")


def keep(model: Path, config: Path, out: Path) -> Path:
    """Copy an exported model, its weights moved inside, without the names of where it was made."""
    proto = onnx.load(model)
    for node in proto.graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, out)
    if out.stat().st_size > LARGEST:
        raise SystemExit(f"{out}: {out.stat().st_size} bytes are more than {LARGEST}")
    assets = out.with_suffix(".assets")
    assets.mkdir(exist_ok=True)
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    (assets / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return out


def main() -> int:
    """Write the fixtures; 1 if an exporter failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "exporters", nargs="*", metavar="EXPORTER", help=f"{', '.join(EXPORTERS)}; all by default"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "fixtures", help="folder for everything else"
    )
    parser.add_argument("--only", help="one family")
    options = parser.parse_args()
    work, failed = options.work.resolve(), False
    work.mkdir(parents=True, exist_ok=True)
    for name in options.exporters or EXPORTERS:
        for family, dtype in EXPORTERS[name].files:
            if options.only not in (None, family):
                continue
            try:
                out = export(name, family, dtype, work)
                print(f"{out.relative_to(ROOT)}: {out.stat().st_size} bytes", flush=True)
            except subprocess.CalledProcessError as error:
                failed = True
                last = (error.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{name} cannot export {family} as {dtype}: {last}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
