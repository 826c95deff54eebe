"""Chains of kernels whose large values are computed slice by slice, where a graph takes most memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tvm import IRModule, relax
from tvm.ir import GlobalVar

from .base import Result
from .boxes import Box, extents
from .chains import Chain, Chains
from .loads import Loads
from .loop_nests import overwritten
from .rebuild import substitute
from .rematerialize import Operations
from .slice_kernels import sliced

_SLICES: Final = (2, 3, 4, 6, 7, 8, 12, 14, 16, 28)
_WORTH: Final = 64
"""What is alive has to fall by one part in so many, or a chain stays whole."""
_WAITING: Final = 16
"""A value that waits is computed again where it is more than one part in so many of what is alive."""
_FINEST: Final = 2
"""Numbers of slices that are tried first: the finest, and one that may divide better."""
_TRIES: Final = 5000
"""Chains that are looked at, in all."""


@dataclass(frozen=True)
class SplitChains:
    """Where more than `bytes` are alive, kernels around it run for one part of their output after another.

    Before: a dataflow function of kernel calls, as Rematerialize takes it; kernels as TVM generates them.
    After: chains of calls whose inner values nothing else reads are calls for every slice: `call_tir` of
        kernels that compute only what the slice needs. The last of a chain writes the slice into the whole
        output: `call_tir` that leaves the rest of it open, then `call_tir_inplace` on it.
    Needs: FuseTIR and RewriteDataflowReshape; kernels that are not scheduled yet.
    Refuses: nothing; what cannot be split, or does not get smaller by it, stays. Facts tell what is alive.

    Every element is computed as before, from the same elements. Those that two slices need, such as the rows
    around a part of a convolution's, are computed in both.
    """

    bytes: int
    bounds: Mapping[str, int] = field(default_factory=dict)

    def run(self, mod: IRModule) -> Result:
        """Facts of the result: Splits."""
        chains = Chains(Operations(mod, self.bounds, {}))
        chosen = _Search(chains, self.bytes).run()
        chains.assume(chosen)
        peak = chains.loads(chosen).peak
        if not chosen:
            return Result(mod, 0, Splits((), peak))
        return Result(_Writer(mod, chains, chosen).written(), len(chosen), Splits(tuple(chosen), peak))


@dataclass(frozen=True)
class Splits:
    """What was split: chains by numbers of operations, and the bytes alive in the order as it stands."""

    chains: tuple[Chain, ...]
    peak: int


class _Search:
    """Chains are split where most is alive, one after another, those that cost least first."""

    def __init__(self, chains: Chains, bytes_: int) -> None:
        self.chains, self.limit = chains, bytes_
        self.chosen: list[Chain] = []
        self.tries = 0

    def run(self) -> list[Chain]:
        blocked: set[int] = set()
        loads = self.chains.loads([])
        while self.tries < _TRIES:
            high = [
                (bytes_, -step)
                for step, (bytes_, owner) in enumerate(zip(loads.bytes, loads.owners, strict=True))
                if bytes_ > self.limit and owner not in blocked
            ]
            if not high:
                break
            owner = loads.owners[-max(high)[1]]
            better = self._better(owner, loads)
            if better is None:
                blocked.update(self._alike(owner, loads))
                continue
            self.chosen, loads = self._repeated(*better)
        return self.chosen

    def _alike(self, owner: int, loads: Loads) -> list[int]:
        """Operations of the same kernel with as much alive: what does not help in one layer does in none."""
        names, most = self.chains.of.names, loads.most([owner])
        return [op for op in set(loads.owners) if names[op] == names[owner] and loads.most([op]) == most]

    def _repeated(self, chosen: list[Chain], loads: Loads) -> tuple[list[Chain], Loads]:
        """The chain that was found last, also where its kernels stand again: layers repeat."""
        found = chosen[-1]
        for other in [] if found.again else self.chains.like(found.members):
            if any(set(c.own) & set(other) for c in chosen) or loads.most(other) <= self.limit:
                continue
            more = [*chosen, Chain(other, found.axis, found.slices)]
            if self.chains.boxes(more[-1]) is None:
                continue
            after = self.chains.loads(more)
            if after.peak <= max(loads.peak, self.limit) and after.most(other) < loads.most(other):
                chosen, loads = more, after
        return chosen, loads

    def _better(self, owner: int, before: Loads) -> tuple[list[Chain], Loads] | None:
        """Other chains, with less alive while `owner` and what is split with it run."""
        best: _Try | None = None
        current = before.most([owner])
        seen: set[Chain] = set()
        for members, again in self._candidates(owner, current):
            if again and best is not None and best.local <= self.limit:
                break  # nothing has to be computed again
            for axis, size in enumerate(self.chains.of.shape(members[-1])):
                for found in self._in_slices(Chain(members, axis, 1, again), size, owner, before, seen):
                    if best is None or found.score < best.score:
                        best = found
        self.chains.assume(self.chosen if best is None else best.chosen)
        return None if best is None else (best.chosen, best.loads)

    def _in_slices(
        self, chain: Chain, size: int, owner: int, before: Loads, seen: set[Chain]
    ) -> Iterator[_Try]:
        """Numbers of slices with which less is alive, from few on, as far as the limit asks for."""
        counts, current = self._counts(size), before.most([owner])

        def tried(slices: int) -> _Try | None:
            split = self.chains.without_whole(replace(chain, slices=slices))
            if split is None or split in seen or not (split.again or owner in split.members):
                return None
            seen.add(split)
            found = self._tried(split, owner, before)
            return found if found is not None and found.local < current - current // _WORTH else None

        # What does not help in many slices does not in few, and most chains do not.
        finest = [found for found in map(tried, counts[-_FINEST:]) if found is not None]
        for found in map(tried, counts[:-_FINEST] if finest else ()):
            if found is not None:
                yield found
                if found.local <= self.limit:
                    return
        yield from finest

    def _candidates(self, owner: int, current: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Members of chains, and which of them they compute again."""
        for members in self.chains.around(owner):
            if self._promising(members, owner, current):
                yield members, ()
        problem = self.chains.problem
        for op in range(owner):  # what waits for a later chain, which may compute it again
            users = self.chains.users[op]
            if problem.sizes[op] <= current // _WAITING or not users or users[-1] <= owner:
                continue
            bases = [(c.members, c.again) for c in self.chosen if users[-1] in c.own and op not in c.members]
            for members, before in bases or [(m, ()) for m in self.chains.around(users[-1]) if op not in m]:
                for more, again in self.chains.repeating(members, op):
                    yield more, tuple(sorted({*again, *before}))

    def _counts(self, size: int) -> list[int]:
        """Numbers of slices: equal ones, such as of heads, or many elements in each."""
        return [n for n in _SLICES if n <= size and (size % n == 0 or size >= 4 * n)]

    def _promising(self, members: tuple[int, ...], owner: int, current: int) -> bool:
        """Whether the values that would be there in parts alone are a part of what is alive."""
        problem = self.chains.problem
        return sum(problem.sizes[op] for op in members[:-1]) > current // _WORTH or any(
            owner in chain.members for chain in self.chosen
        )

    def _tried(self, chain: Chain, owner: int, before: Loads) -> _Try | None:
        """The chain in slices, instead of those that share operations; None where more is alive by that."""
        self.tries += 1
        if self.chains.boxes(chain) is None:
            return None
        touching = [c for c in self.chosen if not set(c.own).isdisjoint(chain.own)]
        chosen = [*(c for c in self.chosen if c not in touching), chain]
        valid = self.chains.assume(chosen)
        loads = self.chains.loads(chosen) if valid else before
        self.chains.assume(self.chosen)
        if not valid or loads.peak > max(before.peak, self.limit):
            return None
        local = loads.most([owner, *(op for c in (*touching, chain) for op in c.own)])
        extra = self.chains.extra(chain) - sum(map(self.chains.extra, touching))
        share = max(0, extra) / max(1, self.chains.problem.cost)
        return _Try(chosen, loads, local, (max(local, self.limit) * (1 + share), extra))


@dataclass(frozen=True)
class _Try:
    """Chains, what is alive with them, and while those run that are new or gone. Low scores are good.

    It weighs what is alive against what is computed again: a tenth less for a tenth more.
    """

    chosen: list[Chain]
    loads: Loads
    local: int
    score: tuple[float, int]


class _Writer:
    """The function with chains in slices."""

    def __init__(self, mod: IRModule, chains: Chains, chosen: list[Chain]) -> None:
        self.mod, self.chains = mod, chains
        self.inside = {op: chain for chain in chosen for op in chain.own}
        self.builder = relax.BlockBuilder(
            IRModule({v: f for v, f in mod.functions_items() if v.name_hint != "main"})
        )
        self.values: dict[relax.Var, relax.Expr] = {}
        self.kernels: dict[Any, GlobalVar] = {}

    def written(self) -> IRModule:
        function, graph = self.mod["main"], self.chains.of.operations.graph
        attrs = dict(function.attrs) if function.attrs else None
        with self.builder.function("main", list(function.params), attrs=attrs):
            with self.builder.dataflow():
                for var in graph.order:
                    op = self.chains.of.number.get(var, -1)
                    chain = self.inside.get(op)
                    if op >= 0 and self.chains.is_dead(op):
                        continue
                    if chain is None:
                        value = substitute(graph.definitions[var], self.values)
                        self.values[var] = self.builder.emit(value, name_hint=var.name)
                    elif op == chain.exit:
                        self._write(chain)
                result = self.builder.emit_output(substitute(function.body.body, self.values))
            self.builder.emit_func_output(result)
        return relax.transform.DeadCodeElimination()(self.builder.get())

    def _write(self, chain: Chain) -> None:
        of, over = self.chains.of, self.chains.over(chain)
        variables = of.operations.vars
        outside = dict(self.values)
        whole: relax.Expr | None = None if over < 0 else self.values[variables[over]]
        for part in self.chains.boxes(chain) or ():
            for op in chain.members:
                if of.views[op]:
                    source = self.values[of.values[op].args[0]]
                    value = relax.op.reshape(source, list(extents(part[op])))
                else:
                    value = self._call(op, part) if op != chain.exit else self._last(chain, part, whole)
                self.values[variables[op]] = self.builder.emit(value, name_hint=variables[op].name)
            whole = self.values[variables[chain.exit]]
            if over >= 0:  # what is left of it to be read lies there
                self.values[variables[over]] = whole
        self.values = {**outside, variables[chain.exit]: whole}

    def _call(self, op: int, part: dict[int, Box]) -> relax.Call:
        """The kernel of an operation within a chain, for a slice."""
        dtype = str(self.chains.of.operations.vars[op].ty.dtype.dtype)
        made = relax.TensorType(list(extents(part[op])), dtype)
        return relax.op.call_tir(self._kernel(op, part, False, None), self._given(op), made)

    def _last(self, chain: Chain, part: dict[int, Box], whole: relax.Expr | None) -> relax.Call:
        """The kernel of the last operation, which writes its slice into `whole`; None: there is none yet."""
        op, over = chain.exit, self.chains.over(chain)
        ty, given, numbers = (
            self.chains.of.operations.vars[op].ty,
            self._given(op),
            self.chains.of.arguments[op],
        )
        if whole is None:
            return relax.op.call_tir(self._kernel(op, part, True, None), given, ty)
        place = numbers.index(over) if over >= 0 and over in numbers else None
        if place is not None:
            given.pop(place)
        kernel = self._kernel(op, part, True, place)
        return relax.op.call_tir_inplace(kernel, [*given, whole], len(given), ty)

    def _given(self, op: int) -> list[relax.Expr]:
        return [substitute(value, self.values) for value in self.chains.of.values[op].args[1].fields]

    def _kernel(self, op: int, part: dict[int, Box], last: bool, place: int | None) -> GlobalVar:
        """The kernel for a slice, without the input number `place`, which its output lies over."""
        of = self.chains.of
        access, name = of.accesses[op], of.names[op]
        held = tuple(part.get(number) for number in of.arguments[op])
        key = (name, part[op], held, last, place)
        if key not in self.kernels:
            assert access is not None
            kernel = sliced(access, part[op], held, last)
            kernel = kernel if place is None else overwritten(kernel, place)
            self.kernels[key] = self.builder.add_func(kernel, f"{name}_part")
        return self.kernels[key]
