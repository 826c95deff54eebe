"""What each form of the state keeps, how exact it is and how long a decode step takes, against paged K and V.

For models of real shapes with random float16 weights, every legal form is compiled beside K and V:

    bytes      of a token over all layers
    error      of logits, as a multiple of that of K and V: root mean square over 64 rows, against ONNX
               Runtime with the same weights in float32
    decode     median seconds of a step behind 1k to 32k tokens, in rounds that alternate with K and V
    prefill    seconds of 2048 tokens

The decoder of whisper-small reads an encoder's output of 1500 rows: bytes are those of a row, decode is
behind 64 and 440 tokens, prefill is of 4 tokens, and `encode` has the seconds until the output is kept.

And, for what decides about keys alone, the singular values of W_K: of these models, and of the trained
SmolLM2-135M (whose keys are fewer than what they are projections of, so that no exact form is made of them).

    python -m benchmarks.state_forms [--only gpt2-124m ...] [--quick]

Results are merged into benchmarks/results/state_forms.json.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from benchmarks.common import MODEL, WORK, destination, parser, run_python, show, write_results

MODELS: Final = ("gpt2-124m", "opt-350m", "deepseek-slice", "llama2-slice", "phi3-slice", "gemma4-slice")
PAIRS: Final = ("whisper-small",)
MEMORY: Final = 1500
"""Rows of an encoder's output."""
CONTEXTS: Final = (1024, 4096, 16384, 32000)
PAIR_CONTEXTS: Final = (64, 440)
ROUNDS: Final = 9
CHECKED: Final = 200
"""Tokens of a prompt whose logits are compared, with those of 63 steps after it."""
PREFILL: Final = 2048


def exported(name: str) -> Path:
    """The model's ONNX file, written if it is not there."""
    out = WORK / "forms" / f"{name}.onnx"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        if name in PAIRS:
            from kvc_models.pairs import export_pair_decoder, make_pair

            return export_pair_decoder(make_pair(name, "float16"), out, external_data=True)
        run_python(["-m", "kvc_models", "export", name, str(out), "--dtype", "float16"])
    return out


def compiled(model: Path, form: str) -> Path:
    import kvc

    out = model.with_name(f"{model.stem}-{form}.kvc")
    pair = model.stem in PAIRS
    workload = f"1x448+{MEMORY}" if pair else f"1x{CONTEXTS[-1] + 64}"
    kvc.compile(model, budget="16GB", workload=workload, state=form, output=out, force=True)
    return out


def memory_of(facts: Any) -> np.ndarray | None:
    """A random encoder output, for a model that reads one."""
    if facts.memory is None:
        return None
    return np.random.default_rng(1).standard_normal((MEMORY, facts.memory[0])).astype(np.float32)


class Decoder:
    """A compiled model with room for one long sequence, whose contents do not matter for the time."""

    def __init__(self, artifact: Path) -> None:
        from kvc.artifact import Artifact
        from kvc.runtime.executor import Executor, Segment

        self.executor, self.segment = Executor(Artifact.open(artifact)), Segment
        plan = self.executor.plan
        # Behind a window pages are used again.
        self.pages = [
            [place % group.pages for place in range(plan.table_columns(group.reach.memory))]
            for group in plan.groups
        ]
        self.memory = memory_of(self.executor.facts)
        self.rows = 0 if self.memory is None else MEMORY
        if self.memory is not None:
            self.encode()

    @property
    def contexts(self) -> tuple[int, ...]:
        return PAIR_CONTEXTS if self.rows else CONTEXTS

    def step(self, context: int) -> float:
        start = time.perf_counter()
        self.executor.decode([self.segment([1], context - 1, self.pages, memory=self.rows)])
        return time.perf_counter() - start

    def prefill(self) -> float:
        tokens = 4 if self.rows else PREFILL
        start, chunk = time.perf_counter(), self.executor.plan.chunk
        for first in range(0, tokens, chunk):
            count = min(chunk, tokens - first)
            self.executor.prefill([self.segment([1] * count, first, self.pages, memory=self.rows)])
        return time.perf_counter() - start

    def encode(self) -> float:
        """Keep the encoder's output."""
        start = time.perf_counter()
        assert self.memory is not None
        groups = zip(self.executor.plan.groups, self.pages)
        self.executor.encode(self.memory, next(pages for group, pages in groups if group.reach.memory))
        return time.perf_counter() - start


def timed(artifact: str, base: str, quick: bool) -> dict[str, Any]:
    """Decode steps and a prefill of two artifacts, in turns."""
    decoders = [Decoder(Path(path)) for path in (artifact, base)]
    result: dict[str, Any] = {"decode": {}}
    contexts = decoders[0].contexts
    for context in contexts[:2] if quick else contexts:
        times: list[list[float]] = [[], []]
        for turn in range(3 if quick else ROUNDS + 1):
            for each, decoder in zip(times, decoders):
                seconds = decoder.step(context)
                if turn:  # the first touches memory
                    each.append(seconds)
            if sum(times[0]) > 60:  # steps that make all keys again take long, and vary little
                break
        own, other = (statistics.median(each) for each in times)
        result["decode"][context] = {"seconds": own, "paged_kv": other, "ratio": round(own / other, 3)}
    parts = {"prefill": Decoder.prefill} | ({"encode": Decoder.encode} if decoders[0].rows else {})
    for name, run in parts.items():
        own, other = (min(run(decoder) for _ in range(2)) for decoder in decoders)
        result[name] = {"seconds": own, "paged_kv": other, "ratio": round(own / other, 3)}
    return result


def rows(artifact: str, out: str) -> None:
    """Write the logits after a prompt and after each of 63 tokens behind it."""
    from kvc.artifact import Artifact
    from kvc.runtime.executor import Executor
    from kvc.runtime.sequences import Sequences

    executor = Executor(Artifact.open(Path(artifact)))
    sequences = Sequences(executor, share=False)
    kept = sequences.open(tokens(executor.facts.vocab), memory_of(executor.facts))
    chunk = executor.plan.chunk
    for first in range(0, CHECKED, chunk):
        found = [row.copy() for row in sequences.prefill([(kept, min(chunk, CHECKED - first))])]
    found += [sequences.decode([kept])[0].copy() for _ in range(63)]
    np.save(out, np.stack(found))


def tokens(vocab: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(0).integers(0, vocab, CHECKED + 63)]


def reference(model: Path) -> np.ndarray:
    """The same rows of ONNX Runtime, with all numbers widened to float32."""
    import kvc
    from kvc.reference import Reference
    from kvc.widen import widen

    out = model.with_name(f"{model.stem}-wide.onnx")
    if not out.is_file():
        widen(model, out)
    facts = kvc.Artifact.open(model.with_name(f"{model.stem}-paged_kv.kvc"), verify=False).facts
    given = np.array(tokens(facts.vocab)), memory_of(facts)
    return Reference(out, facts.sites[0].head_dim).logits(*given)[CHECKED - 1 :]


def spectrum(model: Path) -> list[dict[str, Any]]:
    """The singular values of W_K [d, keys] of every layer, relative to the largest."""
    from kvc.compilation import read_model
    from kvc.frontend.importer import import_onnx
    from kvc.permissions import Permissions
    from kvc.pipeline import Runner
    from kvc.reconstruction import columns_of
    from kvc_passes.conditions import Unprovable
    from kvc_passes.graph import graph_of
    from kvc_passes.rotations import Rotations
    from kvc_passes.state_forms import Forms
    from kvc_passes.weights import weight_of

    imported = import_onnx(model, frozenset())
    read = read_model(imported, Permissions(), 16, Runner())
    forms = Forms(graph_of(read.understood.module["main"]))
    found = []
    for index, marker in sorted(forms.markers().items()):
        pieces = forms.provenance.pieces(marker.args[2])
        try:
            key = Rotations(forms.graph, forms.provenance).read(marker.args[2], pieces).key
        except Unprovable:
            projections = [piece for piece in pieces if piece.projection is not None]
            if not projections:  # a norm comes between
                continue
            key = projections[0]
        assert key.projection is not None
        weight = weight_of(forms.graph, key.projection.weight)
        assert weight is not None
        place = (key.first, key.stride or 0, read.facts.sites[index].kv_heads, key.width)
        matrix = columns_of(weight.sources[0], place, imported.weights)
        values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        shares = {
            str(q): round(float(np.quantile(values / values[0], q / 100)), 6) for q in (0, 1, 5, 25, 50)
        }
        condition = float(values[0] / max(values[-1], 1e-300))
        found.append(
            {"layer": index, "shape": list(matrix.shape), "condition": condition, "quantiles": shares}
        )
    return found


def legal_states(facts: Any) -> list[str]:
    """Forms that are legal for some layer, with K and V for the others where they are not legal for all."""
    layers = [{form.name for form in forms if form.legal} for forms in facts.forms]
    names = [form.name for form in facts.forms[0] if form.name != "paged_kv"]
    found = [name for name in names if any(name in layer for layer in layers)]
    return [n if all(n in layer for layer in layers) else f"{n},paged_kv" for n in found]


def measured(name: str, quick: bool) -> dict[str, Any]:
    """All forms of one model."""
    import kvc

    model = exported(name)
    facts = kvc.inspect(model)
    legal = legal_states(facts)
    if name in PAIRS:
        legal = ["encoder_output", "x_absorbed,encoder_output"]
    if "x_absorbed" in legal:  # which keeps the same for less work
        legal = [form for form in legal if form != "x_gemm"]
    base = compiled(model, "paged_kv")
    exact = reference(model)
    result: dict[str, Any] = {"forms": {}, "layers": len(facts.sites)}
    for form in ("paged_kv", *legal):
        artifact = base if form == "paged_kv" else compiled(model, form)
        out = model.with_name("rows.npy")
        run_python(["-m", "benchmarks.state_forms", "--rows", str(artifact), str(out)])
        sites = kvc.Artifact.open(artifact, verify=False)
        entry: dict[str, Any] = {
            "form": "; ".join(group.form for group in sites.plan.groups),
            "bytes_per_token": sites.facts.memory_row_bytes() or sites.facts.kv_token_bytes(),
            "weights": sites.plan.bytes.weights,
            "error": float(np.sqrt(np.mean((np.load(out) - exact) ** 2))),
        }
        if form != "paged_kv":
            arguments = ["--timed", str(artifact), str(base), str(int(quick))]
            done = run_python(["-m", "benchmarks.state_forms", *arguments])
            entry |= json.loads(done.stdout)
        result["forms"][form] = entry
        print(f"{name} {form}: {entry}", file=sys.stderr)
    result["judged"] = [f.detail for f in facts.forms[0]]
    return result


def _rows_of(models: dict[str, Any]) -> Iterator[list[object]]:
    for name, model in models.items():
        base = model["forms"]["paged_kv"]
        for form, entry in model["forms"].items():
            decode = entry.get("decode", {})
            yield [
                name,
                form,
                f"{entry['bytes_per_token']:,}",
                f"{entry['bytes_per_token'] / base['bytes_per_token']:.3f}",
                f"{entry['error'] / base['error']:.2f}",
                *(
                    f"{decode[c]['ratio']:.2f}" if (c := str(context)) in decode else ""
                    for context in (PAIR_CONTEXTS if name in PAIRS else CONTEXTS)
                ),
                *([""] * (2 if name in PAIRS else 0)),
                f"{entry['prefill']['ratio']:.2f}" if "prefill" in entry else "",
            ]


def main() -> int:
    arguments = parser(__doc__, "state_forms")
    arguments.add_argument("--only", nargs="+", choices=(*MODELS, *PAIRS), default=(*MODELS, *PAIRS))
    options = arguments.parse_args()
    path = destination(options, "state_forms")
    models: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        models = json.loads(path.read_text())["models"]
    for name in options.only:
        models[name] = measured(name, options.quick)
        if name not in PAIRS:
            models[name]["spectra"] = spectrum(exported(name))
        body = {"contexts": CONTEXTS, "models": json.loads(json.dumps(models))}
        if MODEL.is_file():
            body["trained"] = {"smollm2-135m": spectrum(MODEL)}
        write_results("state_forms", body, path)
    columns = ["model", "form", "bytes a token", "of K and V", "error", *(f"{c // 1024}k" for c in CONTEXTS)]
    show(
        "ratios to paged K and V", [*columns, "prefill 2k"], _rows_of(json.loads(path.read_text())["models"])
    )
    print(path)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        print(json.dumps(timed(sys.argv[2], sys.argv[3], sys.argv[4] == "1")))
    elif sys.argv[1:2] == ["--rows"]:
        rows(sys.argv[2], sys.argv[3])
    else:
        sys.exit(main())
