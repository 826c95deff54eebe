"""Triton's interpreter, made fast enough for whole models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def hasten(*, overflow: bool = True) -> None:
    """Spare the interpreter of this process what it does over and over; Triton compiles nothing here then.

    At every call of a function it puts its own operations in place of the language's: once a module will do.
    overflow: whether integer operations are checked for overflow, as no compiled kernel does. It takes
    longer than the operations.
    """
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    modules: set[int] = set()

    def once(function: Any) -> Any:
        if id(function.__globals__) not in modules:
            modules.add(id(function.__globals__))
            patch(function)
        return interpreter._LangPatchScope()  # has nothing to undo

    interpreter._patch_lang = once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=overflow)
