"""The engines that are compared: which model each takes, and its process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import peer_models
from benchmarks.common import ROOT, WORK, require_model, run_python


@dataclass(frozen=True)
class Peer:
    """An engine: its module, the model it takes, what else it is told, and whether it runs elsewhere."""

    name: str
    module: str
    model: Callable[[argparse.Namespace], Path]
    options: dict[str, Any] = field(default_factory=dict)


def _transformers(options: argparse.Namespace) -> Path:
    return peer_models.once(WORK / "smollm2-hf", peer_models.transformers_folder)


def _gguf(options: argparse.Namespace) -> Path:
    return peer_models.once(WORK / "smollm2-f32.gguf", peer_models.gguf_float32)


def _ort(options: argparse.Namespace) -> Path:
    source = require_model(options.past)
    out = source.with_name(f"{source.stem}.last.onnx")
    return peer_models.once(out, lambda path: peer_models.last_logits(source, path))


def _genai(options: argparse.Namespace) -> Path:
    source, python = _transformers(options), options.peer_python
    return peer_models.once(
        WORK / "smollm2-genai", lambda path: peer_models.genai_folder(python, source, path)
    )


def _openvino(options: argparse.Namespace) -> Path:
    source, python = _transformers(options), options.peer_python
    return peer_models.once(
        WORK / "smollm2-openvino", lambda path: peer_models.openvino_folder(python, source, path)
    )


def _kvc(options: argparse.Namespace) -> Path:
    out = WORK / "peers.kvc"
    if not (options.reuse and out.exists()):
        arguments = ["-m", "kvc.cli", "compile", str(require_model(options.model)), "--force"]
        arguments += ["--budget", options.budget, "--workload", options.workload, "--output", str(out)]
        run_python(arguments)
    return out


PEERS = [
    Peer("kvc", "kvc_engine", _kvc),
    Peer("onnxruntime", "ort_engine", _ort),
    Peer("onnxruntime-genai", "ort_genai_engine", _genai),
    Peer("openvino-genai", "openvino_engine", _openvino),
    Peer("llama.cpp", "llama_engine", _gguf, {"kv": "f32"}),
    Peer("llama.cpp, KV f16", "llama_engine", _gguf, {"kv": "f16"}),
]


class Worker:
    """An engine's process. Raises RuntimeError, with the engine's own words, when it fails."""

    def __init__(self, peer: Peer, model: Path, python: str, threads: int, log: Path) -> None:
        own = peer.name == "kvc"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p and own)])
        self.process = subprocess.Popen(
            [sys.executable if own else python, "-m", f"benchmarks.engines.{peer.module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.about = self.ask("prepare", model=str(model), threads=threads, **peer.options)

    def ask(self, action: str, **request: Any) -> dict[str, Any]:
        """The answer to one request of engines/protocol.py."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": action, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
