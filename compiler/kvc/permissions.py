"""What a user can allow: changes of results beyond rounding, and what they do to a model's attention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvc_passes.errors import InputError
from kvc_passes.facts import ModelFacts, StateForm
from kvc_passes.plans import Plan
from kvc_passes.sites import CODES, AttentionSite, FormName, MaskFact

KNOWN: Final = {
    "token-scales": "activations that a graph quantizes by one scale for all tokens get one for each token",
    "window=N": "layers that see all tokens see the last N only",
    "sinks=N": "beside a window, they see the first N tokens too",
    "kv-int8": "keys and values are kept in 8 bits, with a scale for every token and head",
    "kv-fp8": "keys and values are kept as 8-bit floats (e4m3), with a scale for every token and head",
    "kv-int4": "keys and values are kept in 4 bits, with a scale for every token and head",
}


@dataclass(frozen=True)
class Permissions:
    """What is allowed; nothing by default."""

    token_scales: bool = False
    window: int | None = None
    sinks: int = 0
    codes: tuple[FormName, ...] = ()
    """Forms of sites.CODES that layers may have; a plan says which do."""

    @property
    def names(self) -> frozenset[str]:
        """Permissions that the importer asks for."""
        return frozenset({"token-scales"} if self.token_scales else ())

    def applied(self, sites: Sequence[AttentionSite], page: int) -> tuple[AttentionSite, ...]:
        """The sites with the masks that are allowed, with pages of `page` tokens.

        Raises:
            InputError: a window that applies to no layer, or is too small.
        """
        return tuple(sites) if self.window is None else self._windowed(tuple(sites), page)

    def check(self, forms: Sequence[Sequence[StateForm]]) -> None:
        """Raises InputError where a form in codes is allowed that no layer can have."""
        for name in self.codes:
            own = [form for each in forms for form in each if form.name == name]
            if not any(form.legal for form in own):
                raise InputError(f"--allow {name} applies to no layer: {own[0].detail}")

    def _windowed(self, sites: tuple[AttentionSite, ...], page: int) -> tuple[AttentionSite, ...]:
        assert self.window is not None
        if self.window < page:
            raise InputError(
                f"--allow window={self.window}: a window is at least a page, {page} tokens on this target"
            )
        if not any(site.mask.kind == "causal" for site in sites):
            raise InputError(
                f"--allow window={self.window} applies to no layer: none of this model sees all tokens"
            )
        near = f"k > q - {self.window}"
        seen = f"k <= q and (k < {self.sinks} or {near})" if self.sinks else f"k <= q and {near}"
        mask = MaskFact(
            "sinks" if self.sinks else "window",
            self.window,
            "allowed, not proved: the model's own mask is k <= q",
            sinks=self.sinks or None,
            predicate=seen,
        )
        return tuple(replace(site, mask=mask) if site.mask.kind == "causal" else site for site in sites)

    def used(self, imported: Iterable[str]) -> tuple[str, ...]:
        """All that holds for every plan, as the user writes it; `imported` is what the importer used."""
        names = list(imported)
        if self.window is not None:
            names += [f"window={self.window}"] + ([f"sinks={self.sinks}"] if self.sinks else [])
        return tuple(names)


def explain(name: str) -> str:
    """What a permission that was used changes."""
    return KNOWN.get(name) or KNOWN[name.partition("=")[0] + "=N"].replace("N", name.partition("=")[2])


def unused(facts: ModelFacts, plan: Plan) -> tuple[FormName, ...]:
    """Forms in codes that are allowed and that no layer of a plan has."""
    legal = {form.name for forms in facts.forms for form in forms if form.legal}
    return tuple(name for name in CODES if name in legal - set(plan.forms))


def parse_permissions(text: str | Iterable[str]) -> Permissions:
    """Permissions such as "token-scales" or "window=4096,sinks=4".

    Raises:
        InputError: one that does not exist, a number that is none, two that contradict each other.
    """
    parts = [text] if isinstance(text, str) else list(text)
    given = [name for part in parts for name in map(str.strip, part.split(",")) if name]
    numbers: dict[str, int] = {}
    for name in given:
        sized = re.fullmatch(r"(window|sinks)=(\d{1,9})", name)
        if sized:
            if numbers.setdefault(sized[1], int(sized[2])) != int(sized[2]):
                raise InputError(f"--allow {name}: {sized[1]}={numbers[sized[1]]} is allowed, too; give one")
        elif name not in ("token-scales", *CODES):
            raise InputError(f"there is no permission '{name}'; there are: {', '.join(KNOWN)}")
    codes = tuple(name for name in CODES if name in given)
    result = Permissions("token-scales" in given, numbers.get("window"), numbers.get("sinks", 0), codes)
    _check(result)
    return result


def _check(given: Permissions) -> None:
    if given.sinks and given.window is None:
        raise InputError(
            f"--allow sinks={given.sinks} needs window=N beside it: without a window, all is seen"
        )
    if given.window is not None and not given.window:
        raise InputError("--allow window=0 hides a token from itself; give a window of at least a page")
    if given.window is not None and given.sinks > given.window:
        raise InputError(
            f"--allow window={given.window},sinks={given.sinks}: more sinks than the window has tokens; "
            "give fewer sinks or a larger window"
        )
