"""Graphs of all kinds under a part of the memory that they take as they stand, and the arena of long prompts.

graphs   a U-Net, a ResNet-50 and a BERT-base forward, and a step of training of a residual network and of a
         transformer through Relax's gradients, at 90, 80, 60 and 40 % of the natural peak (temporaries and
         results): what was promised, what a fresh process was measured to take, the time against the graph
         as it stands, the largest difference of a result, and how many chains of kernels run in slices
arenas   temporaries of the decoder Llama-3-8B's shapes, float16, for prompts of 4k to 128k tokens (planned;
         of the graph as it was exported a prompt of 16k would take 50 to 65 GiB)

python -m benchmarks.remat_graphs [--only unet ...] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from benchmarks.common import BUILD, WORK, destination, run_python, show, write_results

PARTS: Final = (0.9, 0.8, 0.6, 0.4)
PROMPTS: Final = (4096, 16384, 65536, 131072)
FOLDER: Final = WORK / "graphs"

Arrays = list[np.ndarray]


def _forward(module: Any, *given: Any) -> tuple[Any, Arrays]:
    """A network's forward pass through ONNX, its weights as constants."""
    import onnx
    import torch

    from kvc.frontend.importer import import_graph

    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "graph.onnx"
    with torch.no_grad():
        torch.onnx.export(module.eval(), given, str(file), dynamo=True, external_data=False, verbose=False)
    return import_graph(onnx.load(file), "graph"), [x.numpy() for x in given]


def _training(module: Any, given: Any, wanted: Any) -> tuple[Any, Arrays]:
    """The loss and the gradients of all weights."""
    import torch
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program
    from tvm.relax.training.loss import MSELoss
    from tvm.relax.training.utils import AppendLoss

    program = torch.export.export(module, (given,))
    mod, params = relax.frontend.detach_params(
        from_exported_program(program, keep_params_as_input=True, unwrap_unit_return_tuple=True)
    )
    result = mod["main"].ret_ty
    loss = MSELoss(reduction="sum")(relax.Var("result", result), relax.Var("wanted", result))
    mod = AppendLoss("main", loss, num_backbone_outputs=1, new_func_name="loss")(mod)
    weights = list(mod["loss"].params[1:-1])
    mod = relax.transform.Gradient("loss", require_grads=weights)(mod)
    main = mod["loss_adjoint"].with_attr("global_symbol", "main")
    arrays = [given.numpy(), *(p.numpy() for p in params["main"]), wanted.numpy()]
    return tvm.IRModule({"main": main}), arrays


def unet(quick: bool) -> tuple[Any, Arrays]:
    import torch
    from benchmarks import networks

    torch.manual_seed(0)
    side = 64 if quick else 256
    return _forward(networks.UNet(), torch.randn(1, 3, side, side))


def resnet50(quick: bool) -> tuple[Any, Arrays]:
    import torch
    from benchmarks import networks

    torch.manual_seed(0)
    side = 64 if quick else 224
    return _forward(networks.ResNet50(), torch.randn(1, 3, side, side))


def bert(quick: bool) -> tuple[Any, Arrays]:
    import torch
    from benchmarks import networks

    torch.manual_seed(0)
    return _forward(networks.bert(2 if quick else 12), torch.randint(0, 30000, (1, 64 if quick else 128)))


def train_resnet(quick: bool) -> tuple[Any, Arrays]:
    import torch
    from benchmarks import networks

    torch.manual_seed(0)
    side, width, depth = (16, 8, 3) if quick else (32, 32, 16)
    return _training(networks.Residual(width, depth), torch.randn(2, 3, side, side), torch.zeros(2, 10))


def train_transformer(quick: bool) -> tuple[Any, Arrays]:
    import torch
    from benchmarks import networks

    torch.manual_seed(0)
    length, width, depth = (16, 32, 2) if quick else (128, 128, 8)
    module = networks.Transformer(width, depth)
    return _training(module, torch.randn(2, length, width), torch.zeros(2, length, width))


GRAPHS: Final[dict[str, Callable[[bool], tuple[Any, Arrays]]]] = {
    "unet": unet,
    "resnet50": resnet50,
    "bert": bert,
    "train-resnet": train_resnet,
    "train-transformer": train_transformer,
}


def _flat(result: Any) -> Arrays:
    if hasattr(result, "numpy"):
        return [result.numpy()]
    return [array for each in result for array in _flat(each)]


def measured(library: str, arguments: str) -> None:
    """In a fresh process: the memory that a call takes, then its seconds, and its results."""
    import tvm
    from tvm import relax

    from kvc.runtime.peak import peak_bytes

    vm = relax.VirtualMachine(tvm.runtime.load_module(library), tvm.cpu())
    given = [tvm.runtime.tensor(array) for array in np.load(arguments).values()]
    before, code = _resident(), _resident("RssFile")
    assert before <= peak_bytes()
    if before < peak_bytes() - (1 << 20):  # what loading took for a moment would hide the call
        Path("/proc/self/clear_refs").write_text("5")
    result = vm["main"](*given)
    # Code is mapped from the library, and is there once it has run: no temporary.
    peak = peak_bytes() - before - (_resident("RssFile") - code)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = vm["main"](*given)
        times.append(time.perf_counter() - start)
    np.savez(f"{library}.npz", *_flat(result))
    print(json.dumps({"peak": peak, "seconds": statistics.median(times)}))


def _resident(kind: str = "VmRSS") -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(kind))
    return int(line.split()[1]) * 1024


def graph(name: str, quick: bool) -> dict[str, Any]:
    """One graph as it stands and at every part of its natural peak."""
    from kvc.graphs import compile_graph
    from kvc_passes.errors import BudgetError

    mod, arrays = GRAPHS[name](quick)
    FOLDER.mkdir(parents=True, exist_ok=True)
    arguments = FOLDER / f"{name}.arguments.npz"
    np.savez(arguments, *arrays)

    def run(compiled: Any, part: float) -> tuple[dict[str, Any], Arrays]:
        library = FOLDER / f"{name}-{part}.so"
        compiled.executable.export_library(str(library))
        done = run_python(["-m", "benchmarks.remat_graphs", "--measured", str(library), str(arguments)])
        results = list(np.load(f"{library}.npz").values())
        return json.loads(done.stdout.splitlines()[-1]), results

    base = compile_graph(mod)
    plain, expected = run(base, 1)
    rows: list[dict[str, Any]] = [{"part": 1, "promised": base.peak, **plain, "slower": 1.0, "off": 0.0}]
    for part in PARTS:
        start = time.perf_counter()
        try:
            compiled = compile_graph(mod, budget=int(base.peak * part))
        except BudgetError as error:
            rows.append({"part": part, "lowest": error.needed})
            print(f"{name} {part}: {error}", file=sys.stderr)
            continue
        took = time.perf_counter() - start
        own, results = run(compiled, part)
        again, _ = run(base, 1)  # in turns
        solution = compiled.solution
        off = max(float(np.max(np.abs(a - b))) for a, b in zip(results, expected, strict=True))
        row = {"part": part, "promised": compiled.peak, **own, "slower": own["seconds"] / again["seconds"]}
        row |= {"off": off, "overhead": solution.overhead if solution else 0.0, "compile_seconds": took}
        row["splits"] = compiled.splits
        rows.append(row)
        print(f"{name} {part}: {row}", file=sys.stderr)
    return {"natural": base.peak, "results": base.outputs, "rows": rows}


def arenas(quick: bool) -> list[dict[str, int]]:
    """Planned temporaries of a prompt, by its length."""
    model = BUILD / "llama-8b.onnx"
    if not model.is_file():
        run_python(["-m", "kvc_models", "make-big", str(model), "--params", "8b", "--sparse"])
    found = []
    for prompt in PROMPTS[:1] if quick else PROMPTS:
        arguments = ["plan", str(model), "--budget", "80GB", "--workload", f"1x{prompt}", "--json"]
        plan = json.loads(run_python(["-m", "kvc.cli", *arguments]).stdout)
        found.append({"prompt": prompt, "arena": plan["bytes"]["arena"], "chunk": plan["chunk"]})
    return found


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").strip())
    arguments.add_argument("--only", nargs="+", choices=(*GRAPHS, "arenas"), default=(*GRAPHS, "arenas"))
    arguments.add_argument("--output", type=Path)
    arguments.add_argument("--quick", action="store_true", help="small networks, a short run")
    options = arguments.parse_args()
    path = destination(options, "remat_graphs")
    body: dict[str, Any] = {"graphs": {}, "arenas": []}
    if path.is_file():
        before = json.loads(path.read_text())
        body = {key: before[key] for key in body}
    for name in options.only:
        if name == "arenas":
            body["arenas"] = arenas(options.quick)
        else:
            body["graphs"][name] = graph(name, options.quick)
        write_results("remat_graphs", body, path)
    rows = [
        [
            name,
            f"{row['part']:.0%}",
            f"{row.get('promised', row.get('lowest')):,}",
            f"{row['peak']:,}" if "peak" in row else "refused: the lowest",
            f"{row['slower']:.2f}" if "slower" in row else "",
            f"{row['off']:.1e}" if "off" in row else "",
            str(row.get("splits", "")),
        ]
        for name, found in body["graphs"].items()
        for row in found["rows"]
    ]
    columns = [
        "graph",
        "of the natural peak",
        "promised, bytes",
        "measured",
        "times as long",
        "difference",
        "splits",
    ]
    show("graphs under a budget", columns, rows)
    show(
        "temporaries of a prompt, Llama-3-8B's shapes",
        ["tokens", "MiB", "chunk"],
        [[f"{a['prompt']:,}", f"{a['arena'] / 2**20:.0f}", str(a["chunk"])] for a in body["arenas"]],
    )
    print(path)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        measured(sys.argv[2], sys.argv[3])
    else:
        sys.exit(main())
