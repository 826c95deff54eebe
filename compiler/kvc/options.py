"""What the user gives: budget, workload, target. Parsing, and every error a bad value can cause."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from kvc_passes.errors import InputError
from kvc_passes.plans import Workload

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_MOST = 1 << 63
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_WORKLOAD = re.compile(
    r"\s*([0-9]+)\s*[xX]\s*([0-9]+)\s*(?:\+\s*(?P<memory>[0-9]+)\s*)?(?:/\s*(?P<prefix>[0-9]+)\s*)?"
)


def parse_size(text: str | int) -> int:
    """Bytes of a budget such as "8GB" (decimal), "512MiB" (binary) or "1000000".

    Raises:
        InputError: not a size, or not positive.
    """
    found = _SIZE.fullmatch(str(text))
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(
            f"'{text}' is not a size; write for example 8GB (8,000,000,000), 512MiB (536,870,912) or bytes"
        )
    size = round(Fraction(found[1]) * _UNITS[found[2].upper()])
    if size <= 0:
        raise InputError(f"a budget of {text} holds nothing; give a positive size")
    if size >= _MOST:
        raise InputError(
            f"a budget of {str(text)[:40]} is beyond what a machine can address; give less than 8 EiB"
        )
    return size


def parse_workload(text: str | Workload | Iterable[str | Workload]) -> tuple[Workload, ...]:
    """Alternatives such as "8x256,1x2048": each, batch x context in tokens, must fit on its own.

    "8x256/100": of the 256 tokens, the first 100 are the same for all 8. "8x256+1500": each request comes
    with 1500 rows of an encoder's output.

    Raises:
        InputError: not of this form, or a zero.
    """
    if isinstance(text, Workload):
        text = [text]
    parts = text.split(",") if isinstance(text, str) else list(text)
    result = tuple(_workload(str(part)) for part in parts)
    if not result:
        raise InputError("the workload is empty; write BATCHxCONTEXT, for example 8x256,1x2048")
    return result


def _workload(text: str) -> Workload:
    found = _WORKLOAD.fullmatch(text)
    if found is None:
        raise InputError(
            f"'{text}' is not a workload; write BATCHxCONTEXT, for example 8x256 or 8x256,1x2048"
        )
    more = {name: int(number or 0) for name, number in found.groupdict().items()}
    workload = Workload(int(found[1]), int(found[2]), **more)
    if workload.batch == 0 or workload.context == 0:
        raise InputError(f"the workload '{text}' is empty: batch and context must be at least 1")
    if workload.prefix >= workload.context:
        raise InputError(f"the workload '{text}' has no tokens behind its common prefix; give a shorter one")
    return workload


def format_size(size: int) -> str:
    """Bytes for people: `512.3 MB`, decimal units as in a budget."""
    value = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
