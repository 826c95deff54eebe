"""Memory of long contexts: what keys and values take, and the peak of the process, for kvc and its peers.

Models with the shapes of real ones and random weights; weights, keys and values in float16 where they can be:

    smollm2-long    32 requests of 500 tokens at once, then 1 of 16,000, in one process: one artifact, one
                    configuration, where the engine can
    gemma3-1b       1 request of 32,768 tokens; five of six layers have a window of 512
    mistral-window  1 request of 32,768 tokens; every layer has a window of 4096
    longest         the longest context within budgets, of each model; see benchmarks/longest.py

A request is a prompt of random token ids and 8 generated tokens, which fill its context. Every engine is a
process of its own, one at a time. Results are merged by scenario and engine, so that they can be measured in
pieces. Peers are installed elsewhere:

    python -m venv build/peers-venv
    build/peers-venv/bin/pip install onnxruntime-genai openvino-genai optimum-intel[openvino] onnx onnx_ir \\
        llama-cpp-python
    build/peers-venv/bin/pip install --target build/transformers-4 "transformers==4.57.*"
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import longest, scenario_models
from benchmarks.common import BUILD, WORK, destination, run_python, show, write_results
from benchmarks.peer_models import Missing
from benchmarks.peers import Peer, Worker

NEW: Final = 8
"""Tokens that are generated after every prompt."""
CHUNK: Final = 512
"""Prompt tokens that an engine computes at once, where it can be told."""

Case = tuple[int, int]
"""Requests at once, and the tokens of each."""

SCENARIOS: Final[dict[str, tuple[Case, ...]]] = {
    "smollm2-long": ((32, 500), (1, 16000)),
    "gemma3-1b": ((1, 32768),),
    "mistral-window": ((1, 32768),),
}
QUICK: Final[dict[str, tuple[Case, ...]]] = {
    "smollm2-long": ((2, 64), (1, 256)),
    "gemma3-1b": ((1, 1024),),
    "mistral-window": ((1, 4608),),
}


@dataclass(frozen=True)
class Engine:
    """How an engine is set up for a model and what it is to answer.

    Attributes:
        module: of benchmarks/engines.
        model: makes the model's file or folder.
        settings: what its process is told, given the cases.
        sizing: in words, what fixes the room for keys and values.
        notes: what differs from float16, and what is missing, by model; "" for all.
    """

    module: str
    model: Callable[[str, argparse.Namespace], Path]
    settings: Callable[[Sequence[Case]], dict[str, Any]]
    sizing: str
    notes: dict[str, str]
    kv_number: int = 2
    """Bytes of a number in its keys and values."""


def _tokens(cases: Sequence[Case], page: int) -> int:
    """Tokens in flight, each request rounded up to whole pages."""
    return max(batch * -(-context // page) * page for batch, context in cases)


ENGINES: Final = {
    "kvc": Engine(
        "kvc_engine",
        scenario_models.onnx_file,
        lambda cases: {},
        "one artifact for all cases; the smallest budget at which prompts are computed in the largest chunks",
        {"": "weights and KV float16, arithmetic float32"},
    ),
    "onnxruntime-genai": Engine(
        "ort_genai_engine",
        scenario_models.genai,
        lambda cases: {"chunk": CHUNK},
        "buffers of batch x max_length, allocated anew for each case (windowed layers: a ring)",
        {
            "": "float32: its float16 model does not run on CPUs (fails at the first decode step)",
            "smollm2-long": "no chunks where there are 32 prompts: it refuses chunks of several",
            "gemma3-1b": "its builder needed the rotary bases as transformers 4 names them",
            "mistral-window": "its builder needed layer_types, else caches are as long as the context",
        },
        kv_number=4,
    ),
    "openvino-genai": Engine(
        "openvino_engine",
        scenario_models.openvino,
        lambda cases: {"precision": "bf16", "kv": "f16", "tokens": CHUNK, "blocks": _tokens(cases, 32) // 32},
        "num_kv_blocks of 32 tokens, as many as the largest case needs; one pool for all cases",
        {"": "weights float16 in the file, arithmetic bfloat16, KV float16"},
    ),
    "llama.cpp": Engine(
        "llama_engine",
        scenario_models.gguf_file,
        lambda cases: {
            "kv": "f16",
            "weights": "float16",
            "cells": -(-_tokens(cases, 1) // 256) * 256,
            "sequences": max(batch for batch, _ in cases),
        },
        "n_ctx, as large as the largest case needs, for all sequences (kv_unified); swa_full off",
        {
            "": "weights and KV float16",
            "mistral-window": "its llama architecture knows no windows: every layer keeps all tokens",
        },
    ),
}


def kvc_artifact(name: str, cases: Sequence[Case], options: argparse.Namespace) -> tuple[Path, int]:
    """The artifact of all cases together, compiled anew, and its budget."""
    model = scenario_models.onnx_file(name, options)
    workload = ",".join(f"{batch}x{context}" for batch, context in cases)
    budget = options.budget or longest.kvc_budget(model, workload)
    out = scenario_models.FOLDER / f"{name}.kvc"
    arguments = ["-m", "kvc.cli", "compile", str(model), "--force", "--output", str(out)]
    run_python([*arguments, "--budget", str(budget), "--workload", workload])
    return out, budget


def measure(engine: str, name: str, cases: Sequence[Case], options: argparse.Namespace) -> dict[str, Any]:
    """All cases in one process, in their order. Why an engine has no result is a result too."""
    kind = ENGINES[engine]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    notes = [kind.notes[key] for key in ("", name) if key in kind.notes]
    row: dict[str, Any] = {"scenario": name, "engine": engine, "date": now, "notes": notes}
    worker = None
    try:
        if engine == "kvc":
            model, row["budget_bytes"] = kvc_artifact(name, cases, options)
        else:
            model = kind.model(name, options)
        peer = Peer(engine, kind.module, lambda _: model, kind.settings(cases))
        log = WORK / f"scenarios-{kind.module}.txt"
        worker = Worker(peer, model, options.peer_python, options.threads, log)
        vocabulary = scenario_models.configuration(name)["vocab_size"]
        runs = []
        for seed, (batch, context) in enumerate(cases):
            asked = {"batch": batch, "context": context, "new": NEW, "vocabulary": vocabulary, "seed": seed}
            answer = worker.ask("run", **asked)
            runs.append({"batch": batch, "context": context, **answer})
            print(f"{name}, {engine}, {batch}x{context}: {answer}", flush=True)
    except (Missing, RuntimeError, ImportError, OSError) as error:
        return {**row, "missing": str(error)}
    finally:
        if worker is not None:
            worker.stop()
    held = max(run["kv_bytes"] for run in runs)
    return {
        **row,
        **worker.about,
        "sizing": kind.sizing,
        "kv_bytes": held,
        "kv_bytes_at_2": held * 2 // kind.kv_number,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "cases": runs,
    }


def least(name: str, cases: Sequence[Case]) -> dict[str, int]:
    """What keys and values take at 2 bytes a number, of all tokens and of those that windows still show."""
    config = scenario_models.configuration(name)
    return {
        key: max(scenario_models.kv_bytes(config, *case, windows=windows) for case in cases)
        for key, windows in (("all_tokens", False), ("seen_tokens", True))
    }


def main() -> int:
    options = _options()
    path = destination(options, "scenarios")
    scenarios = QUICK if options.quick else SCENARIOS
    for name, cases in scenarios.items():
        for engine in options.engines if name in options.only else ():
            _save(path, "runs", measure(engine, name, cases, options), options)
    for name in options.models if "longest" in options.only else ():
        for engine in options.engines:
            runs = {(row["scenario"], row["engine"]): row for row in _read(path).get("runs", ())}
            found = longest.contexts(engine, name, runs.get((name, engine)), measure, options)
            _save(path, "longest", found, options)
    body = _read(path)
    _show(body.get("runs", ()), scenarios)
    longest.table(body.get("longest", ()))
    print(f"written: {path.name}")
    return 0


def _read(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return body


def _save(path: Path, table: str, row: dict[str, Any], options: argparse.Namespace) -> None:
    """Put `row` into `table` of the results, in place of that of the same scenario and engine."""
    body = _read(path)
    rows = {(one["scenario"], one["engine"]): one for one in [*body.get(table, ()), row]}
    tables = {name: body.get(name, []) for name in ("runs", "longest")}
    tables[table] = [rows[key] for key in sorted(rows, key=_order)]
    scenarios = QUICK if options.quick else SCENARIOS
    head = {
        "threads": options.threads,
        "new_tokens": NEW,
        "kv_bytes_least": {name: least(name, cases) for name, cases in scenarios.items()},
    }
    write_results("scenarios", {**head, **tables}, path)


def _order(key: tuple[str, str]) -> tuple[int, int]:
    return list(SCENARIOS).index(key[0]), list(ENGINES).index(key[1])


def _options() -> argparse.Namespace:
    result = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    python = BUILD / "peers-venv" / "bin" / "python"
    add = result.add_argument
    add("--output", type=Path, help="the JSON file (benchmarks/results/scenarios.json; --quick: below build)")
    add("--quick", action="store_true", help="short contexts, which only show that it works")
    add("--only", nargs="+", choices=[*SCENARIOS, "longest"], default=[*SCENARIOS, "longest"])
    add("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    add("--models", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="of `longest`")
    add("--peer-python", default=str(python if python.exists() else sys.executable), help="has the peers")
    add("--transformers-4", type=Path, default=BUILD / "transformers-4", help="for OpenVINO's Gemma 3")
    add("--threads", type=int, default=2, help="threads of every engine (%(default)s)")
    add("--budget", help="kvc's (the smallest at which it has the largest chunks)")
    return result.parse_args()


def _show(rows: Sequence[dict[str, Any]], scenarios: dict[str, tuple[Case, ...]]) -> None:
    for name, cases in scenarios.items():
        cells = [
            (row["engine"], row["missing"], "", "", "")
            if "missing" in row
            else (
                row["engine"],
                f"{row['kv_bytes'] / 1e6:.1f}",
                f"{row['kv_bytes_at_2'] / 1e6:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                ", ".join(f"{run['seconds'][0]:.0f}" for run in row["cases"]),
            )
            for row in rows
            if row["scenario"] == name
        ]
        needs = least(name, cases)
        title = f"{name}, {', '.join(f'{b} x {c}' for b, c in cases)}: KV of all tokens "
        title += (
            f"{needs['all_tokens'] / 1e6:.1f} MB at 2 bytes, of those seen {needs['seen_tokens'] / 1e6:.1f}"
        )
        if cells:
            show(title, ["engine", "KV, MB", "at 2 bytes", "peak, MB", "seconds"], cells)


if __name__ == "__main__":
    sys.exit(main())
