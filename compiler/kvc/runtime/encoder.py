"""The encoder at run time: what a request may come with, and the call that makes rows of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvc.runtime.host_memory import Region, Shapes, padded
from kvc_passes.errors import InputError
from kvc_passes.facts import EncoderFacts, EncoderInput, ModelFacts
from kvc_passes.plans import Plan

Inputs = Mapping[str, NDArray[Any]]
"""The encoder's inputs of one request, by their names in the ONNX file, each with a batch of 1; perhaps in
another type than the encoder takes, and without masks."""
_PAGE: Final = 4096


def encoder_shapes(plan: Plan, facts: ModelFacts) -> Shapes:
    """Dtype and elements of what the largest call of the encoder is given."""
    if facts.encoder is None or plan.encoder is None:
        return {}
    longest = plan.encoder.longest
    return {_name(i): (i.dtype, (math.prod(_shape(i, longest)),)) for i in facts.encoder.inputs}


def encoder_bytes(plan: Plan, facts: ModelFacts) -> int:
    """Bytes of the encoder's inputs: its own, and those that requests came with (Bytes.encoder).

    A page for every request on top: what the encoder made for it, counted with the tables, fills whole pages.
    On a GPU requests have neither in the memory that is counted.
    """
    if facts.encoder is None:
        return 0
    inputs = sum(padded(*each) for each in encoder_shapes(plan, facts).values())
    if plan.target["kind"] == "cuda":
        return inputs
    return (1 + plan.max_batch) * inputs + plan.max_batch * _PAGE


class EncoderMemory(Protocol):
    """What is needed of an executor's memory."""

    vm: Any
    arrays: dict[str, NDArray[Any]]

    def shaped(self, name: str, shape: tuple[int, ...]) -> Any:
        """The first elements of an input of one dimension, as a tensor of another shape."""

    def run(self, function: Any, arguments: Sequence[Any], shape: None) -> Any:
        """Call a function; what it returns."""

    def read(self, tensor: Any, array: NDArray[Any]) -> None:
        """Copy a tensor into an array of its type and shape."""


class EncoderCall:
    """The compiled encoder of a loaded model."""

    def __init__(self, memory: EncoderMemory, weights: Sequence[Any], plan: Plan, facts: ModelFacts) -> None:
        assert facts.encoder is not None
        assert plan.encoder is not None
        self._memory, self._weights = memory, weights
        self._facts, self._longest = facts.encoder, plan.encoder.longest
        self._function, self._release = memory.vm["encoder"], memory.vm["release"]

    def __call__(self, inputs: Inputs) -> NDArray[np.float32]:
        """Rows [rows, width] of a request's inputs, in memory of the host that goes back with the array."""
        given, extent = [], _extent(inputs, self._facts)
        for each in self._facts.inputs:
            shape = _shape(each, extent)
            place = self._memory.arrays[_name(each)][: math.prod(shape)].reshape(shape)
            place[...] = 1 if each.mask else inputs[each.name]
            given.append(self._memory.shaped(_name(each), shape))
        result = self._memory.run(self._function, [*given, *self._weights], None)
        try:
            kept = Region(4 * math.prod(result.shape)).array("float32", tuple(result.shape))
            self._memory.read(result, kept)
        finally:
            del result  # it lies in the arena, which the next call needs
            self._memory.run(self._release, [], None)
        rows: NDArray[np.float32] = kept[0]
        return rows

    def largest(self) -> Inputs:
        """Inputs of the largest call."""
        return {i.name: np.zeros(_shape(i, self._longest), i.dtype) for i in self._facts.inputs}


def batched(inputs: Mapping[str, Any], count: int) -> Iterator[Mapping[str, Any]]:
    """The inputs of each of `count` requests, which stand along the first axis; of one as they are.

    Raises InputError for another number of them.
    """
    for name, array in inputs.items():
        if count != 1 and (found := _length(array)) != count:
            raise InputError(
                f"{count} prompts, and the encoder's input '{name}' for {found}: give one for each prompt, "
                "or one array with all along its first axis"
            )
    for i in range(count):
        yield inputs if count == 1 else {name: array[i] for name, array in inputs.items()}


def random_inputs(facts: EncoderFacts, extent: int, random: np.random.Generator) -> Inputs:
    """Inputs of a request of that extent, for checks."""

    def one(each: EncoderInput) -> NDArray[Any]:
        shape = _shape(each, extent)
        if each.mask:
            return np.ones(shape, each.dtype)
        if np.dtype(each.dtype).kind == "f":
            return random.standard_normal(shape).astype(each.dtype)
        return random.integers(0, each.ids or 2, shape).astype(each.dtype)

    return {each.name: one(each) for each in facts.inputs}


def checked_inputs(given: Mapping[str, Any], plan: Plan, facts: EncoderFacts) -> Inputs:
    """What a request comes with, not copied, so that one that waits holds no more than it was given.

    Raises InputError for what the encoder does not take.
    """
    assert plan.encoder is not None
    listed = ", ".join(map(described, facts.inputs))
    for name in given:
        if name not in {each.name for each in facts.inputs}:
            raise InputError(f"the encoder has no input '{name}'; it reads {listed}")
    arrays: dict[str, NDArray[Any]] = {}
    for each in facts.inputs:
        if each.name in given:
            array = _whole(as_array(given[each.name], f"the encoder's input '{each.name}'"), each)
            _check_values(array, each)
            arrays[each.name] = array
        elif not each.mask:
            raise InputError(f"the encoder's input '{each.name}' is missing; it reads {listed}")
    chosen = _chosen(arrays, facts)
    if not chosen and facts.least:  # only masks have the open extent
        name = next(each.name for each in facts.inputs if None in each.shape)
        raise InputError(f"the encoder's input '{name}' is missing: nothing else says how long it is")
    if len(chosen) > 1:
        (a, first), (b, second) = list(chosen.items())[:2]
        raise InputError(f"the encoder's inputs '{first}' and '{second}' are {a} and {b} long, not alike")
    for extent, name in chosen.items():
        if not facts.least <= extent <= plan.encoder.longest:
            raise InputError(
                f"the encoder's input '{name}' is {extent} long; one request may have {facts.least} to "
                f"{plan.encoder.longest}: compile the model for a workload with more rows"
            )
    return arrays


def as_array(value: Any, what: str) -> NDArray[Any]:
    """What a person gave as an array. Raises InputError, which says `what` it is, if it is none."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is no array of numbers: {error}") from None


def described(each: EncoderInput) -> str:
    """An input as a person is told of it."""
    extents = ", ".join("any" if extent is None else str(extent) for extent in (1, *each.shape))
    return f"{each.name} {each.dtype} [{extents}]{' (optional)' if each.mask else ''}"


def _whole(array: NDArray[Any], each: EncoderInput) -> NDArray[Any]:
    """An array with its batch. Raises InputError for another kind or shape than the input's."""
    wanted = (1, *each.shape)
    whole = array[None] if array.ndim == len(each.shape) else array
    fits = whole.ndim == len(wanted) and all(k in (None, n) for n, k in zip(whole.shape, wanted))
    kinds = "biuf" if each.mask else {"f": "fV", "b": "b"}.get(np.dtype(each.dtype).kind, "iu")
    unknown = array.dtype.kind == "V" and not np.can_cast(array.dtype, each.dtype)  # no bfloat16
    if not fits or array.dtype.kind not in kinds or unknown:
        raise InputError(
            f"the encoder's input '{each.name}' is {array.dtype} {list(array.shape)}; it reads "
            f"{described(each)}"
        )
    return whole


def _check_values(array: NDArray[Any], each: EncoderInput) -> None:
    """Raises InputError for token ids that there are not, numbers beyond the input's type, and padding."""
    if each.mask:
        if not (array == 1).all():
            raise InputError(
                f"the encoder's input '{each.name}' is not all ones; requests are not padded: leave padding "
                "away here and in the other inputs"
            )
        return
    if each.ids is None and np.can_cast(array.dtype, each.dtype):
        return
    least, most = (0, each.ids - 1) if each.ids is not None else _range(np.dtype(each.dtype))
    finite = np.isfinite(array)
    for number in (array.min(initial=0, where=finite).item(), array.max(initial=0, where=finite).item()):
        if not least <= number <= most:
            beyond = f"is beyond {each.dtype}"
            if each.ids is not None:
                beyond = f"does not exist: it has 0 .. {most}"
            raise InputError(f"the encoder's input '{each.name}' has {number}, which {beyond}")


def _range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The least and the largest finite number of a type."""
    if dtype.kind == "f":
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    return np.iinfo(dtype).min, np.iinfo(dtype).max


def _chosen(arrays: Inputs, facts: EncoderFacts) -> dict[int, str]:
    """What open extents are in the arrays, each with an input that has it."""
    chosen: dict[int, str] = {}
    for each in facts.inputs:
        if each.name in arrays:
            extents = zip(arrays[each.name].shape[1:], each.shape)
            chosen |= {extent: each.name for extent, known in extents if known is None}
    return chosen


def _extent(arrays: Inputs, facts: EncoderFacts) -> int:
    """The open extent of checked inputs; 0 where there is none."""
    return next(iter(_chosen(arrays, facts)), 0)


def _length(value: Any) -> int | str:
    """How many there are along the first axis."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        return "one"
    try:
        return len(value)
    except TypeError:  # an array without axes
        return "one"


def _shape(each: EncoderInput, extent: int) -> tuple[int, ...]:
    return (1, *(extent if known is None else known for known in each.shape))


def _name(each: EncoderInput) -> str:
    """Among the arrays of the largest calls' inputs."""
    return f"encoder {each.name}"
