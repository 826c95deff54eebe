"""What a compilation asks of its target, and the CPU's answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tvm
from tvm import IRModule
from tvm.target import Target

from kvc_passes.base import Pass
from kvc_passes.kernel_sets import AttentionKernels, MatmulKernels, TensorType
from kvc_passes.sites import STATE_FORMS, AttentionSite, FormName
from kvc_passes.weights import WeightPart

from .codegen.link import link
from .codegen.schedule_kernels import ScheduleKernels
from .codegen.workspaces import ALREADY_COMPACT, compacted, pool_bytes, reserve, thread_buffers
from .kernels import packing
from .kernels.cpu import PAGE_SIZE, CpuAttention, CpuProducts
from .kernels.knobs import DEFAULTS, AttentionTimes, Knobs
from .kernels.shapes import attention_shape
from .kernels.traits import CpuTraits
from .pipeline import Phase, Runner
from .planning.rates import Rates, measured, nominal
from .runtime.library import RESERVE
from .runtime.overhead import measure
from .stored_weights import Array, stored


class Machine(Protocol):
    """A target: its kernels, its code, and what it costs beside the model."""

    @property
    def target(self) -> Target:
        """What TVM generates code for."""

    @property
    def description(self) -> dict[str, Any]:
        """The target as plan.json has it."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """Prefill chunks that are tried, in tokens, the best first."""

    @property
    def widens(self) -> bool:
        """Whether graphs of 16-bit floats are computed in float32."""

    @property
    def page_size(self) -> int:
        """Tokens a page."""

    @property
    def forms(self) -> tuple[FormName, ...]:
        """Forms of the state that there are kernels for."""

    @property
    def rates(self) -> Rates:
        """How fast it is."""

    def attention_times(self, site: AttentionSite) -> AttentionTimes:
        """What was measured of a site's kernels, in prefill and in decode."""

    @property
    def products(self) -> MatmulKernels: ...

    def attention(self, sites: tuple[AttentionSite, ...], context: int | None) -> AttentionKernels:
        """Kernels for attention over at most `context` tokens, None for any number."""

    def choosing(self, vocab: int, columns: int) -> IRModule | None:
        """The function that chooses tokens from `vocab` of `columns` logits; None where the host does."""

    @property
    def fuse(self) -> tuple[Pass, ...]:
        """Passes on operators before TVM's own fusion."""

    def schedule(self, phase: Phase) -> Pass:
        """The pass that schedules what TVM generated."""

    def build(
        self, module: IRModule, folder: Path, runner: Runner, bounds: Mapping[str, int] = {}
    ) -> list[str]:
        """Write the library or libraries of `module` into `folder`; their names. Raises TargetError.

        bounds: of symbols in the shapes of kernels' local buffers.
        """

    def store(self, part: WeightPart, tensor: TensorType, weights: Mapping[str, Array]) -> Array:
        """A weight as the products' kernels take it."""

    def workspace_bytes(self, modules: Iterable[IRModule], bounds: Mapping[str, int] = {}) -> int:
        """Bytes that kernels allocate for themselves, where a budget counts them; `bounds` as for `build`."""

    def runtime_bytes(self, assets: Path, weights: int) -> int:
        """Bytes of the process itself, where a budget counts them; `weights` bytes come on top at least."""


@dataclass(frozen=True)
class CpuMachine:
    """A CPU; generated code is for what `target` names."""

    target: Target
    chunks: tuple[int, ...] = (512, 256, 128, 64, 32)
    """Beyond 512 tokens a CPU gains nothing."""
    widens: bool = True
    page_size: int = PAGE_SIZE
    forms: tuple[FormName, ...] = STATE_FORMS
    fuse: tuple[Pass, ...] = ()
    knobs: Knobs = DEFAULTS
    """What of the kernels was tuned."""
    given_rates: Rates | None = None
    """Instead of those of the machine."""

    @cached_property
    def description(self) -> dict[str, Any]:
        attrs = {key: self.target.attrs[key] for key in self.target.attrs.keys()}  # noqa: SIM118  a TVM map
        kept = {
            k: str(v) if isinstance(v, str) else int(v)
            for k, v in attrs.items()
            if k in ("mcpu", "mtriple", "num-cores")
        }
        return {"kind": "llvm", **kept}

    @cached_property
    def rates(self) -> Rates:
        return self.given_rates or measured(self.key) or nominal(self.products.traits)

    @property
    def key(self) -> str:
        """What measured rates depend on."""
        return f"{self.target.attrs.get('mcpu', '')}, {self.products.traits.threads} threads"

    @cached_property
    def products(self) -> CpuProducts:
        return CpuProducts(CpuTraits.of(self.target), knobs=self.knobs)

    def attention_times(self, site: AttentionSite) -> AttentionTimes:
        return self.knobs.attention_times(attention_shape(site, self.page_size))

    def attention(self, sites: tuple[AttentionSite, ...], context: int | None) -> CpuAttention:
        return CpuAttention.for_sites(self.target, sites, self.knobs)

    def choosing(self, vocab: int, columns: int) -> None:
        return None

    def schedule(self, phase: Phase) -> ScheduleKernels:
        return ScheduleKernels(self.target, phase != "decode")

    def build(
        self, module: IRModule, folder: Path, runner: Runner, bounds: Mapping[str, int] = {}
    ) -> list[str]:
        module = compacted(module)
        function = reserve(thread_buffers([module], bounds), self.products.traits.threads)
        module = IRModule({**module.functions, RESERVE: function.with_attr("global_symbol", RESERVE)})
        with self.target, ALREADY_COMPACT:
            executable = tvm.compile(
                module, self.target, relax_pipeline=tvm.transform.Sequential([]), tir_pipeline="default"
            )
        runner.report("link")
        export(executable, folder / "model.so")
        return ["model.so"]

    def store(self, part: WeightPart, tensor: TensorType, weights: Mapping[str, Array]) -> Array:
        return stored(part, tensor, weights, packing)

    def workspace_bytes(self, modules: Iterable[IRModule], bounds: Mapping[str, int] = {}) -> int:
        return self.products.traits.threads * pool_bytes(thread_buffers(modules, bounds))

    def runtime_bytes(self, assets: Path, weights: int) -> int:
        return measure(assets, others=weights)


def export(executable: Any, library: Path) -> None:
    """Link a compiled module into the shared library `library`. Raises TargetError without a linker."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # not where temporary files may be few
        executable.export_library(str(library), fcompile=link, workspace_dir=folder)
