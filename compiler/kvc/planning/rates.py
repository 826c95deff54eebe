"""How fast a target is: what predicted times are made of."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvc_passes.errors import InputError

from ..kernels.traits import CpuTraits

ROWS: Final = (1, 4, 8, 16, 32, 128, 512)
"""Rows of x for which the rates of products are given."""
_HERTZ: Final = 3.0e9
_CPU_READ: Final = 13e9
"""Bytes a second and thread."""
CODES: Final[dict[str, tuple[float, float]]] = {"int8": (0.9, 0.75), "fp8": (0.65, 0.5), "int4": (0.55, 0.35)}
"""Rates.codes where they were not measured: what a CPU with AVX-512 has."""


@dataclass(frozen=True)
class Rates:
    """What a target does in a second, as far as plans depend on it.

    Attributes:
        source: where the numbers come from, in words.
        read: bytes that products and attention read from memory a second.
        products: by bits of a weight, seconds a weight and call for each of ROWS rows.
        attention: operations a second of attention, for (prefill, decode) over K and V.
        shared: the same for attention over what is key and value in one.
        rebuild: operations a second of products that make keys and values again in prefill.
        element: bytes a second that all other kernels read and write.
        call: seconds that a kernel takes beside that.
        launch: and beside both, one that runs on all threads: to wake them, and to wait for the last.
        codes: by what keys and values are kept in, how fast attention is, as a share of what it is over
            floats: operations of prefill, bytes that decode reads.
    """

    source: str
    read: float
    products: dict[int, tuple[float, ...]]
    attention: tuple[float, float]
    shared: tuple[float, float]
    rebuild: float
    element: float
    call: float
    codes: Mapping[str, tuple[float, float]] = field(default_factory=lambda: CODES)
    launch: float = 0.0

    @property
    def kernel(self) -> float:
        """Seconds that a kernel on all threads takes beside its work."""
        return self.call + self.launch

    def product(self, bits: int, weights: int, rows: int) -> float:
        """Seconds of y = x w^T for `rows` rows of x and so many weights of `bits` bits."""
        table = self.products[min(self.products, key=lambda known: abs(known - bits))]
        if rows >= ROWS[-1]:
            return weights * table[-1] * rows / ROWS[-1]
        above = next(i for i, known in enumerate(ROWS) if known >= rows)
        if above == 0:
            return weights * table[0]
        low, high = ROWS[above - 1], ROWS[above]
        share = (rows - low) / (high - low)
        return weights * (table[above - 1] + share * (table[above] - table[above - 1]))


def nominal(traits: CpuTraits) -> Rates:
    """Rates of a CPU by its vector width and threads; the same on every machine, so that plans are."""
    flops = 2.2 * traits.lanes * _HERTZ * traits.threads
    read = min(_CPU_READ * traits.threads, 200e9)

    def table(bits: int) -> tuple[float, ...]:
        # Few rows wait for memory; what expands codes or 16-bit floats counts as two rows.
        extra = 0 if bits == 32 else 2
        return tuple(max(bits / 8 / read, 2 * (rows + extra) / flops) for rows in ROWS)

    return Rates(
        source=f"nominal for {traits.threads} threads of {traits.lanes} lanes",
        read=read,
        products={bits: table(bits) for bits in (32, 16, 8, 4)},
        attention=(0.6 * flops, 0.35 * flops),
        shared=(0.5 * flops, 0.45 * flops),
        rebuild=0.6 * flops,
        element=4e9 * traits.threads,
        call=4e-6,
    )


_GPUS: Final = {
    "sm_80": (1.5e12, 310e12),
    "sm_86": (0.6e12, 125e12),
    "sm_89": (0.86e12, 330e12),
    "sm_90": (3.3e12, 900e12),
    "sm_100": (8e12, 2200e12),
}
"""Bytes and 16-bit operations a second, as data sheets have them (A100, A10, L40S, H100, B200)."""


def nominal_gpu(arch: str) -> Rates:
    """Rates of a GPU by its architecture: 0.8 of a data sheet's bandwidth and 0.6 of its operations."""
    bandwidth, flops = _GPUS.get(arch, min(_GPUS.values()))  # of one that is not known, the slowest
    read, rate = 0.8 * bandwidth, 0.6 * flops

    def table(bits: int) -> tuple[float, ...]:
        return tuple(max(bits / 8 / read, 2 * rows / rate) for rows in ROWS)

    return Rates(
        source=f"nominal for {arch}, not measured",
        read=read,
        products={bits: table(bits) for bits in (32, 16, 8, 4)},
        attention=(0.7 * rate, 0.3 * rate),
        shared=(0.5 * rate, 0.3 * rate),
        rebuild=0.7 * rate,
        element=read,
        call=4e-6,
    )


def profile_file() -> Path:
    """Where `kvc profile` keeps what it measured on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "kvc" / "rates.json"


def save(rates: Rates, key: str) -> Path:
    """Remember what was measured for the target `key`. Raises InputError where it cannot be written."""
    path = profile_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _read(path) | {key: dataclasses.asdict(rates)}
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: the rates cannot be written ({error.strerror})") from None
    return path


def measured(key: str) -> Rates | None:
    """What `kvc profile` measured for a target, None if it never did."""
    data = _read(profile_file()).get(key)
    if data is None:
        return None
    try:
        products = {int(bits): tuple(row) for bits, row in data["products"].items()}
        if any(len(row) != len(ROWS) for row in products.values()):
            return None
        pairs = {name: (float(data[name][0]), float(data[name][1])) for name in ("attention", "shared")}
        codes = {name: (float(pair[0]), float(pair[1])) for name, pair in data.get("codes", CODES).items()}
        if set(codes) != set(CODES):
            return None
        return Rates(**{**data, **pairs, "products": products, "codes": codes})
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
