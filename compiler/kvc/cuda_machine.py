"""NVIDIA GPUs as targets: one library for every architecture, holding machine code alone."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule, tirx
from tvm.ir import Call
from tvm.target import Target
from tvm_ffi import structural_map

from kvc_passes.base import Pass
from kvc_passes.errors import PlanningError, TargetError
from kvc_passes.fuse_rows import FuseRows
from kvc_passes.kernel_sets import TensorType
from kvc_passes.sites import STATE_FORMS, AttentionSite, FormName
from kvc_passes.weights import WeightPart

from .codegen.cuda_modules import cuda_module, prepare
from .codegen.cuda_text import compile_text, compiling
from .codegen.schedule_kernels import ScheduleForCuda
from .kernels.cuda import rows
from .kernels.cuda.device import Compiled, DeviceKernel, compile_kernel
from .kernels.cuda.host_attention import CudaAttention
from .kernels.cuda.host_pages import PAGE_SIZE
from .kernels.cuda.host_products import CudaProducts
from .kernels.cuda.knobs import DEFAULTS, Knobs
from .kernels.cuda.launches import Variants, is_launch, launched
from .kernels.cuda.sampling import choosing
from .kernels.knobs import AttentionTimes
from .kernels.shapes import attention_shape
from .machine import export
from .pipeline import Phase, Runner
from .planning.rates import Rates, nominal_gpu
from .stored_weights import Array, stored

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
CONTEXT_BYTES = 640 << 20
"""Device memory that CUDA's context and the loaded machine code take: a bound, until it is measured."""


@dataclass(frozen=True)
class CudaMachine:
    """GPUs of the architectures `archs`, of which an artifact holds code for each."""

    archs: tuple[str, ...]
    chunks: tuple[int, ...] = (8192, 4096, 2048, 1024, 512, 256, 128)
    widens: bool = False
    page_size: int = PAGE_SIZE
    forms: tuple[FormName, ...] = STATE_FORMS
    fuse: tuple[Pass, ...] = (FuseRows(),)
    knobs: Knobs = DEFAULTS
    """What of the kernels was tuned."""
    given_rates: Rates | None = None
    """Instead of those of the first architecture."""

    @cached_property
    def target(self) -> Target:
        return _target(self.archs[0])

    @cached_property
    def variants(self) -> Variants:
        """The Triton kernels that functions of this compilation launch."""
        return Variants(number_of(self.archs[0]), self.knobs)

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "cuda", "archs": list(self.archs)}

    @cached_property
    def rates(self) -> Rates:
        return self.given_rates or nominal_gpu(self.archs[0])

    def attention_times(self, site: AttentionSite) -> AttentionTimes:
        return self.knobs.attention_times(number_of(self.archs[0]), attention_shape(site, self.page_size))

    @cached_property
    def products(self) -> CudaProducts:
        return CudaProducts(self.variants)

    def attention(self, sites: tuple[AttentionSite, ...], context: int | None) -> CudaAttention:
        return CudaAttention.for_sites(sites, context, self.variants)

    def choosing(self, vocab: int, columns: int) -> IRModule:
        return choosing(vocab, columns, self.variants)

    def schedule(self, phase: Phase) -> ScheduleForCuda:
        return ScheduleForCuda(self.target)

    def build(
        self, module: IRModule, folder: Path, runner: Runner, bounds: Mapping[str, int] = {}
    ) -> list[str]:
        """One library an architecture, and kernels.json with what every kernel takes."""
        prepare()
        report, files = [], []
        for arch in self.archs:
            own, code = self._compiled(module, arch, runner)
            report += [_entry(self.variants.kernels[name], arch, each) for name, each in code.items()]
            files.append(self.library(own, arch, code, folder, runner))
        (folder / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
        return [*files, "kernels.json"]

    def _compiled(self, module: IRModule, arch: str, runner: Runner) -> tuple[IRModule, dict[str, Compiled]]:
        """`module` for `arch`, and its kernels; those of transferred parameters may not compile."""
        code: dict[str, Compiled] = {}
        refused: set[str] = set()
        while True:
            own = self.variants.remade(module, number_of(arch), refused)
            names = self.launched(own)
            for number, name in enumerate(names, 1):
                if name in code:
                    continue
                runner.report(f"compile kernel {number} of {len(names)} for {arch}")
                try:
                    code[name] = compile_kernel(self.variants.kernels[name], number_of(arch))
                except PlanningError as error:
                    if name in refused or self.knobs is DEFAULTS:
                        raise
                    refused.add(name)
                    warnings.warn(f"{error}: it is built as by default", stacklevel=2)
            if not set(names) & refused:
                return own, {name: code[name] for name in names}

    def launched(self, module: IRModule) -> list[str]:
        """The kernels that the functions of a module launch, in order."""
        functions = (f for f in module.functions.values() if isinstance(f, tirx.PrimFunc))
        return sorted(set().union(*map(launched, functions)) & set(self.variants.kernels))

    def library(
        self, module: IRModule, arch: str, code: Mapping[str, Compiled], folder: Path, runner: Runner
    ) -> str:
        """Write model.ARCH.so with functions that were made for `arch`, and their kernels; its name."""
        modules = [cuda_module(self.variants.kernels[name], each) for name, each in code.items()]
        module = _with_shared_memory(module, code).with_attr("external_mods", modules)

        def to_machine_code(text: str) -> bytes:
            runner.report(f"compile generated code for {arch}")
            if runner.dump is not None:
                (runner.dump / f"kernels.{arch}.cu").write_text(text)
            return compile_text(text, arch)

        target = _target(arch)
        with target, compiling(to_machine_code):
            executable = tvm.compile(
                module, target, relax_pipeline=tvm.transform.Sequential([]), tir_pipeline="default"
            )
        runner.report("link")
        name = f"model.{arch}.so"
        export(executable, folder / name)
        return name

    def store(self, part: WeightPart, tensor: TensorType, weights: Mapping[str, Array]) -> Array:
        return stored(part, tensor, weights, rows)

    def workspace_bytes(self, modules: Iterable[IRModule], bounds: Mapping[str, int] = {}) -> int:
        return 0

    def runtime_bytes(self, assets: Path, weights: int) -> int:
        return CONTEXT_BYTES


def parse_archs(text: str) -> tuple[str, ...]:
    """Architectures such as "sm_80,sm_90"; all for "". Raises TargetError."""
    if not text:
        return ("sm_80", "sm_90")
    archs = tuple(dict.fromkeys(text.split(",")))
    for arch in archs:
        if arch not in ARCHS:
            raise TargetError(f"unknown architecture '{arch}'; code can be generated for {', '.join(ARCHS)}")
    return archs


def number_of(arch: str) -> int:
    """90 of "sm_90"."""
    return int(arch.removeprefix("sm_"))


def _target(arch: str) -> Target:
    limits = {"max_num_threads": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
    host = {"kind": "llvm", "mtriple": str(Target("llvm").attrs["mtriple"])}
    return Target({"kind": "cuda", "arch": arch, "max_threads_per_block": 1024, **limits}, host=host)


def _with_shared_memory(module: IRModule, code: Mapping[str, Compiled]) -> IRModule:
    """`module` with the shared memory of compiled kernels in their launches."""

    def place(call: Any) -> Any:
        if not is_launch(call) or str(call.args[0].value) not in code:
            return call
        name = str(call.args[0].value)
        return tirx.call_packed(name, *list(call.args)[1:-1], tirx.const(code[name].shared, "int64"))

    functions = {
        v: f.with_body(structural_map(f.body, [(Call, place)])) if isinstance(f, tirx.PrimFunc) else f
        for v, f in module.functions_items()
    }
    return IRModule(functions)


def _entry(kernel: DeviceKernel, arch: str, code: Compiled) -> dict[str, Any]:
    """A kernel's line in kernels.json."""
    taken = {"registers": code.registers, "shared": code.shared, "bytes": len(code.cubin)}
    return {"name": kernel.name, "arch": arch, **taken, **dataclasses.asdict(kernel)}
