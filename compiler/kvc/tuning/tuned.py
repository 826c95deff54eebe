"""What a database says at compile time: a machine with tuned kernels, and plans with their seconds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cuda_machine import CudaMachine, number_of
from ..machine import CpuMachine, Machine
from ..planning.decide import Decision
from ..planning.rates import Rates
from .database import Database
from .records import Choice, CudaRecords, Records
from .target import targets_of
from .tasks import find_tasks


@dataclass(frozen=True, kw_only=True)
class TunedRates(Rates):
    """Rates that know what products of some weights take.

    kernels: by (bits, weights), (rows, seconds) of what was measured; other rows are in proportion.
    """

    kernels: Mapping[tuple[int, int], tuple[tuple[int, float], ...]]

    def product(self, bits: int, weights: int, rows: int) -> float:
        general = super().product(bits, weights, rows)
        known = self.kernels.get((bits, weights))
        if not known:
            return general
        near, seconds = min(known, key=lambda pair: abs(math.log(pair[0] / rows)))
        return general * seconds / super().product(bits, weights, near)


def chosen_kernels(decision: Decision, machine: Machine) -> list[tuple[str, Choice]]:
    """Every kernel of a plan that can be tuned, of every library, and where its parameters come from."""
    targets, found = targets_of(machine), []
    for target in targets:
        records = _records(machine, target.key)
        before = f"{target.key}: " if len(targets) > 1 else ""
        if records is not None:
            found += [(before + task.name, records.of(task)) for task in find_tasks(decision, target)]
    return found


def _records(machine: Machine, key: str) -> Records | None:
    """What is known of one target of a machine."""
    if isinstance(machine, CudaMachine):
        return machine.knobs.of[number_of(key)] if isinstance(machine.knobs, CudaRecords) else None
    assert isinstance(machine, CpuMachine)
    return machine.knobs if isinstance(machine.knobs, Records) else None


def with_records(machine: Machine, folder: Path) -> Machine:
    """The machine with tuned kernels, and rates that know them; warns of records that are of no use.

    Raises InputError without a database in `folder`.
    """
    database, targets = Database(folder), targets_of(machine)
    contents = database.read(*(t.key for t in targets), wanted=targets[0].version)
    for text in contents.notes(database.path):
        warnings.warn(text, stacklevel=2)
    if isinstance(machine, CudaMachine):
        known = CudaRecords(
            {number_of(a): [r for r in contents.records if r.target == a] for a in machine.archs}
        )
        first = known.of[number_of(machine.archs[0])]
        return replace(machine, knobs=known, given_rates=_rates(machine, first))
    assert isinstance(machine, CpuMachine)
    records = Records(contents.records)
    return replace(machine, knobs=records, given_rates=_rates(machine, records))


def _rates(machine: Machine, records: Records) -> Rates | None:
    times = records.product_times(machine.products)
    if not times:
        return None
    general: dict[str, Any] = dict(vars(machine.rates))
    general["source"] += ", products as tuned"
    return TunedRates(**general, kernels=times)
