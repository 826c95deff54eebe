"""Python functions compiled by numba at their first call, and kept between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """The function as machine code. Threads run it side by side; arrays are not checked for their bounds."""
    return cast(F, njit(nogil=True, cache=True)(function))
