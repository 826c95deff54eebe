"""What tuning asks of a target, and which answers for a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..cuda_machine import CudaMachine
from ..machine import CpuMachine, Machine
from .cpu import CpuTarget
from .cuda import CudaTarget
from .programs import Operands
from .space import Choices
from .tasks import Bucket, Found, Task

if TYPE_CHECKING:
    from ..planning.decide import Decision


class Target(Protocol):
    """One library's target: a CPU, or an architecture of GPUs."""

    @property
    def key(self) -> str:
        """What its records are found by."""

    @property
    def version(self) -> str:
        """What changes when its kernels do: records of another version are stale."""

    @property
    def description(self) -> dict[str, Any]:
        """The machine, for `targets.described` in another process."""

    @property
    def lasting(self) -> bool:
        """Whether an error of the device lasts as long as the process that caused it."""

    def check(self) -> None:
        """Raises TargetError if this machine cannot measure for it."""

    def found(self, decision: Decision) -> Iterator[Found]:
        """Every call of a kernel that can be tuned, in the workload of a plan."""

    def space(self, task: Task, alone: bool) -> Choices:
        """The values of each parameter, the default first.

        alone: whether no other task has prefill attention, whose tile all layers of a model share.
        """

    def possible(self, task: Task, values: Mapping[str, int]) -> bool:
        """Whether a candidate is worth building: it can fit the target, and is no other one in disguise."""

    def operands(self, task: Task, bucket: Bucket, values: Mapping[str, int]) -> Operands:
        """Arguments of the kernel for one size; the same numbers whatever the parameters are."""

    def build(self, task: Task, values: Mapping[str, int], library: Path) -> None:
        """Write a library with the function `size<i>` for every bucket, as `programs.functions` makes it.

        Raises PlanningError for parameters that do not compile.
        """

    def device(self, session: Any) -> Any:
        """The device of a session of TVM's RPC that measures."""

    def tolerance(self, task: Task) -> float:
        """What results in another order of sums may differ by, of the largest."""


def targets_of(machine: Machine) -> tuple[Target, ...]:
    """The targets of a machine's libraries, in their order."""
    if isinstance(machine, CudaMachine):
        return tuple(CudaTarget(arch) for arch in machine.archs)
    assert isinstance(machine, CpuMachine)
    return (CpuTarget(machine.products.traits, machine.key, machine.target),)
