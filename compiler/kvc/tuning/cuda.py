"""GPUs as targets of tuning: their kernels in a plan, candidates, and programs that run one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tvm import relax

from kvc_passes.errors import TargetError
from kvc_passes.graph import dims, graph_of, static
from kvc_passes.plans import Plan, Workload
from kvc_passes.row_slices import is_kernel_call
from kvc_passes.sites import FLOAT_BYTES

from ..codegen.cuda_modules import prepare
from ..codegen.lower import allocated, to_vm
from ..cuda_machine import CudaMachine, number_of
from ..kernels.cuda import attention, products
from ..kernels.cuda.device import compile_kernel, shared_bytes
from ..kernels.cuda.knobs import BY_ENGINE, BY_THREADS
from ..pipeline import Runner
from ..runtime.cuda import Device
from . import cuda_programs, programs
from .database import version
from .programs import Operands
from .space import Choices, knobs_of
from .tasks import (
    Bucket,
    Found,
    Serving,
    Task,
    calls_of,
    keys_of,
    phases,
    product_parameters,
    shape_parameters,
)

if TYPE_CHECKING:  # which processes that measure do not need
    from ..compilation import Lowered
    from ..planning.decide import Decision

_TOLERANCE: Final = {"float32": 2e-4, "float16": 2.0**-9, "bfloat16": 2.0**-6}
"""Of the largest result: sums of float32 in another order; of 16 bits two units in the last place, as both
results are rounded, and in attention the weights of the values before."""
_REGISTERS: Final = 255


@dataclass(frozen=True)
class CudaTarget:
    """Implements kvc.tuning.target.Target for an architecture such as "sm_90"."""

    arch: str
    lasting: bool = True

    @property
    def key(self) -> str:
        return self.arch

    @property
    def version(self) -> str:
        return version("cuda")

    @property
    def description(self) -> dict[str, Any]:
        return CudaMachine((self.arch,)).description

    @cached_property
    def number(self) -> int:
        return number_of(self.arch)

    def check(self) -> None:
        try:
            major, minor = Device.find().capability
        except TargetError as error:
            raise TargetError(
                f"--target cuda:{self.arch}: kernels are measured on a GPU, and this machine has none "
                f"of use ({error}); give --rpc HOST:PORT and --key NAME of servers that have one"
            ) from None
        if (major, minor) != divmod(self.number, 10):
            raise TargetError(
                f"--target cuda:{self.arch}: this machine's GPU is sm_{major}{minor}; tune for that, or give "
                "--rpc HOST:PORT and --key NAME of servers that have the other"
            )

    def found(self, decision: Decision) -> Iterator[Found]:
        """Products and attention as the plan's functions call them; other kernels have no parameters."""
        for workload in decision.plan.workload:
            for phase in phases(decision.plan, workload):
                for number, key, symbol in _calls(decision.variant.lowered, phase.name):
                    for rows, calls in calls_of(decision, phase, number, phase.bounds.get(symbol, 1)):
                        if rows and calls:
                            yield from _found(decision.plan, workload, phase, key, rows, calls)

    def space(self, task: Task, alone: bool) -> Choices:
        usual, data = _facts(task, self.number).usual, json.loads(task.parameters)
        if task.kernel == "gpu_product":
            least = 64 if data["format"]["dtype"] == "uint4" else 32
            tall = max(16, min(data["most"] or 256, 256))
            _, depth, format = task.weight()
            boxable = products.boxable(depth, format, data["dtype"], self.number)
            values = {
                "copy": _copies(boxable),
                "rows": [n for n in (16, 32, 64, 128, 256) if n <= tall],
                "columns": [16, 32, 64, 128, 256],
                "depth": [n for n in (32, 64, 128, 256) if n >= least],
                "warps": [2, 4, 8],
                "stages": [1, 2, 3, 4, 5],
            }
        elif task.kernel == "gpu_prefill":
            tile = int(data["tile"])
            tiles = {max(1, tile // 2), max(1, tile // 4), 2 * tile} if alone else {tile}
            shape = task.shape()
            boxable = attention.boxable(shape, usual["keys"], shape.kv_dtype, self.number)
            values = {
                "copy": _copies(boxable),
                "rows": [16, 32, 64, 128, 256],
                "keys": [16, 32, 64, 128],
                "warps": [4, 8],
                "stages": [1, 2, 3, 4],
                "tile": sorted(tiles),
            }
        else:
            shares = int(data["splits"])
            splits = sorted(
                {max(1, shares // 4), max(1, shares // 2), min(128, 2 * shares), min(128, 4 * shares)}
            )
            values = {
                "keys": [16, 32, 64, 128, 256],
                "warps": [2, 4, 8],
                "stages": [1, 2, 3, 4, 5],
                "splits": splits,
            }
        return {name: (0, *(v for v in some if v != usual[name])) for name, some in values.items()}

    def possible(self, task: Task, values: Mapping[str, int]) -> bool:
        """By what accumulators and the operands under way take of registers and shared memory at least."""
        facts = _facts(task, self.number)
        usual, own = facts.usual, {**facts.usual, **values}
        if task.kernel == "gpu_product":
            sums = own["rows"] * own["columns"]
            step = own["depth"] * (own["rows"] * facts.x_bits + own["columns"] * facts.kept_bits) // 8
        else:
            rows = attention.power(facts.group)
            if task.kernel == "gpu_prefill":
                shape, boxed = task.shape(), own["copy"] == BY_ENGINE
                if boxed and not attention.boxable(shape, own["keys"], shape.kv_dtype, self.number):
                    return False  # a block is in one page
                rows = max(attention.power(own["tile"] * facts.group), 16)
                if "rows" in values and min(rows, own["rows"]) == min(rows, usual["rows"]):
                    return False  # as by default
                rows = min(rows, own["rows"])
                if rows < facts.group:
                    return False  # a token's heads stay together
            sums = max(rows, 16) * (facts.value + own["keys"])
            step = own["keys"] * (facts.key + facts.value) * facts.kept_bits // 8
        fits = step * (own["stages"] - 1) <= shared_bytes(self.number)
        return fits and sums <= _REGISTERS * 32 * own["warps"]

    def operands(self, task: Task, bucket: Bucket, values: Mapping[str, int]) -> Operands:
        if task.kernel == "gpu_product":
            return cuda_programs.product_operands(cuda_programs.product_of(task), bucket.rows)
        shape, own = task.shape(), {**_facts(task, self.number).usual, **values}
        if task.kernel == "gpu_prefill":
            return cuda_programs.prefill_operands(shape, bucket, own["tile"])
        return cuda_programs.decode_operands(shape, bucket, own["splits"])

    def build(self, task: Task, values: Mapping[str, int], library: Path) -> None:
        prepare()
        knobs = cuda_programs.Given(knobs_of(task.kernel, values))
        machine, runner = CudaMachine((self.arch,), knobs=knobs), Runner()
        kernel = cuda_programs.kernel_of(task, machine, _facts(task, self.number).usual)
        given = [self.operands(task, bucket, values) for bucket in task.buckets]
        module = to_vm(allocated(programs.functions(kernel, given), runner), runner)
        module = relax.transform.AttachGlobalSymbol()(module)
        kernels = machine.variants.kernels
        code = {name: compile_kernel(kernels[name], self.number) for name in machine.launched(module)}
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            name = machine.library(module, self.arch, code, Path(folder), runner)
            shutil.move(Path(folder) / name, library)

    def device(self, session: Any) -> Any:
        return session.cuda(0)

    def tolerance(self, task: Task) -> float:
        data = json.loads(task.parameters)
        if task.kernel == "gpu_product":
            return _TOLERANCE["float32" if data["flat"] else data["dtype"]]
        return _TOLERANCE[data["kv_dtype"]]


def _copies(boxable: bool) -> list[int]:
    return [BY_THREADS, BY_ENGINE] if boxable else [BY_THREADS]


@dataclass(frozen=True)
class _Facts:
    """What candidates of a task are weighed by.

    Attributes:
        usual: the parameters that 0 stands for.
        x_bits, kept_bits: of a number of x, and of the weight or of what pages hold, as they are multiplied.
        group: heads of a group, of attention.
        key, value: elements of a key and of a value, the next powers of two.
    """

    usual: dict[str, int]
    x_bits: int
    kept_bits: int
    group: int = 0
    key: int = 0
    value: int = 0


@lru_cache(maxsize=256)
def _facts(task: Task, arch: int) -> _Facts:
    data = json.loads(task.parameters)
    if task.kernel == "gpu_product":
        columns, depth, format = task.weight()
        table = products.blocks(columns, depth, format, data["dtype"], arch)
        row = next(row for most, *row in table if (most or 0) == data["most"])
        usual = {
            **dict(zip(("rows", "columns", "depth", "warps", "stages"), row)),
            "copy": BY_THREADS,
        }
        bits = {"uint4": 4, "uint8": 8}.get(format.dtype, 8 * FLOAT_BYTES.get(format.dtype, 4))
        return _Facts(usual, 8 * FLOAT_BYTES[data["dtype"]], bits)
    shape = task.shape()
    if task.kernel == "gpu_prefill":
        found: tuple[int, ...] = attention.prefill_blocks(shape, shape.kv_dtype, arch)
        blocks = dict(zip(("rows", "keys", "warps", "stages"), found))
        usual = {**blocks, "tile": data["tile"], "copy": BY_THREADS}
    else:
        found = attention.decode_blocks(shape, shape.kv_dtype)
        usual = {**dict(zip(("keys", "warps", "stages"), found)), "splits": data["splits"]}
    x_bits = 8 * FLOAT_BYTES[shape.kv_dtype]
    key, value = attention.power(shape.head_dim), attention.power(shape.value_dim)
    return _Facts(usual, x_bits, 8 if shape.stored else x_bits, shape.group, key, value)


def _calls(lowered: Lowered, phase: Any) -> Iterator[tuple[int, tuple[Any, ...], str]]:
    """Every call of a function that launches Triton's kernels: its binding's number, its key, and the symbol
    of its rows."""
    assert isinstance(lowered.machine, CudaMachine)
    module = lowered.functions[phase]
    graph = graph_of(module["main"])
    for number, var in enumerate(graph.order):
        call = graph.definitions[var]
        key = lowered.machine.variants.key_of(module[call.op]) if is_kernel_call(call) else None
        if key is not None:
            result = [a for a in call.args if isinstance(a, relax.Var)][-1]
            symbols = [str(d) for d in dims(result) if static(d) is None]
            yield number, key, symbols[0] if symbols else ""


def _found(
    plan: Plan, workload: Workload, phase: Serving, key: tuple[Any, ...], rows: int, calls: int
) -> Iterator[Found]:
    """A call of a kernel that has parameters."""
    kind, *given = key
    if kind == "matmul":
        columns, depth, format, bias, residual, flat, dtype = given
        table = products.blocks(columns, depth, format, dtype, 0)
        most = next(most or 0 for most, *_ in table if most is None or rows <= most)
        more = {"bias": bias, "residual": residual, "flat": flat, "dtype": dtype, "most": most}
        yield "gpu_product", product_parameters(columns, depth, format, **more), rows, 0, calls
    if kind not in ("prefill", "decode"):
        return
    shape, _, usual, _, dtype = given  # of all views, tiles and contexts
    if shape.shared or dtype != shape.kv_dtype:  # without parameters; a mixture that is not measured
        return
    length = keys_of(plan, workload, phase, shape)
    if kind == "prefill":
        yield "gpu_prefill", shape_parameters(shape, tile=usual), rows, length, calls
    else:
        yield "gpu_decode", shape_parameters(shape, splits=usual), rows, length, calls
