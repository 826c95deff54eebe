"""Which form the state of every layer has: judged, asked for, the smallest; and the model with it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from kvc_passes.errors import InputError
from kvc_passes.facts import StateForm
from kvc_passes.sites import CODES, FormName
from kvc_passes.state_forms import ABSORBED, KEYS, LAST, UNJUDGED, VALUES

from .compilation import Model
from .pipeline import (
    Runner,
    Understood,
    absorb,
    keep_keys,
    keep_values,
    key_weights,
    remake,
    tables_of,
)
from .reconstruction import decided, solver_of


def judged(model: Model, runner: Runner) -> Model:
    """The model with forms decided that depend on the rounding of the real weights."""
    facts, weights = model.facts, model.imported.weights
    forms = [list(forms) for forms in facts.forms]
    for layer in key_weights(model.understood):
        runner.report(f"measure the rounding of layer {layer.index}")
        kept = model.facts.sites[layer.index]
        judgement = solver_of(layer, weights).judge(kept.kv_dtype, kept.kv_heads)
        forms[layer.index] = [
            decided(form, judgement, kept.kv_dtype) if form.name in KEYS else form
            for form in forms[layer.index]
        ]
    return replace(model, facts=replace(facts, forms=tuple(map(tuple, forms))))


def forced_forms(model: Model, names: Sequence[FormName]) -> tuple[StateForm, ...]:
    """The form of every layer where they are asked for, of a model that was judged if one needs that.

    names: one for attention over the model's own tokens, one for that over an encoder's output, or both;
        layers of the other kind keep K and V; codes alone are for both. With paged_kv beside them, layers
        that a form is not legal for keep K and V, unless it is for none. Raises InputError where a form is
        not legal for a layer.
    """
    others = [name for name in names if name != "paged_kv"]
    wanted = {"encoder_output" if name == "encoder_output" else "tokens": name for name in others}
    if set(others) & set(CODES):
        wanted.setdefault("encoder_output", wanted["tokens"])
    if "encoder_output" in names and not model.facts.reads_memory:
        raise InputError("--state encoder_output: no layer of the model reads an encoder's output")
    asked: list[FormName] = [
        wanted.get("encoder_output" if site.mask.reach.memory else "tokens", "paged_kv")
        for site in model.facts.sites
    ]
    legal = [{form.name for form in forms if form.legal} for forms in model.facts.forms]
    if "paged_kv" in names:
        possible = set().union(*legal)
        asked = [n if n in own or n not in possible else "paged_kv" for n, own in zip(asked, legal)]
    return legal_forms(model, asked, "--state {}")


def legal_forms(model: Model, asked: Sequence[FormName], who: str) -> tuple[StateForm, ...]:
    """The form of every layer by name. Raises InputError, which begins with `who`, where one is not legal."""
    chosen = []
    for site, forms, name in zip(model.facts.sites, model.facts.forms, asked, strict=True):
        form = next(form for form in forms if form.name == name)
        if not form.legal:
            raise InputError(
                f"{who.format(name)}: layer {site.index}, attention at node '{site.node}', cannot be kept "
                f"so: {form.detail}"
            )
        chosen.append(form)
    return tuple(chosen)


def most_saved(model: Model, only: Container[FormName], *, memory: bool = False) -> int:
    """Bytes of a token that forms of `only` save at most, those whose weights were not judged among them.

    memory: of a row of the encoder's output instead.
    """
    saved = 0
    for site, forms in zip(model.facts.sites, model.facts.forms):
        if site.mask.reach.memory != memory:
            continue
        possible = [f for f in forms if f.name in only and (f.legal or f.detail.endswith(UNJUDGED))]
        saved += forms[0].token_bytes - min(f.token_bytes for f in possible)
    return saved


def smallest_forms(model: Model, only: Container[FormName]) -> tuple[StateForm, ...]:
    """The smallest legal form of `only`, which has K and V, for every layer.

    Those that read an encoder's output have one together, where it is legal.
    """
    legal = [{f.name: f for f in forms if f.legal and f.name in only} for forms in model.facts.forms]
    found = [min(forms.values(), key=_size) for forms in legal]
    reading = [i for i, site in enumerate(model.facts.sites) if site.mask.reach.memory]
    names = dict.fromkeys(name for i in reading for name in legal[i])
    together = [[legal[i].get(name, legal[i]["paged_kv"]) for i in reading] for name in names]
    for i, form in zip(reading, min(together, key=lambda forms: sum(map(_size, forms)), default=[])):
        found[i] = form
    return tuple(found)


def _size(form: StateForm) -> int:
    return form.token_bytes


def kept_in(model: Model, chosen: Sequence[StateForm], runner: Runner) -> Model:
    """The model with the state of each layer in its chosen form."""
    understood = _in_codes(model.understood, chosen)
    by_site = {site.index: form for site, form in zip(model.facts.sites, chosen)}
    absorbed = frozenset(i for i, form in by_site.items() if form.name in ABSORBED)
    keys = {i: form.rest for i, form in by_site.items() if form.name in KEYS}
    if absorbed:
        understood = absorb(understood, absorbed, runner)
    if keys:
        understood = keep_keys(understood, keys, runner)
    values = frozenset(i for i, form in by_site.items() if form.name == VALUES)
    if values:
        understood = keep_values(understood, values, tables_of(model.imported), runner)
    remade = frozenset(i for i, form in by_site.items() if form.name == LAST)
    if remade:
        understood = remake(understood, remade, runner)
    used = {form.name for form in chosen}
    allowed = (*model.facts.allowed, *(name for name in CODES if name in used))
    facts = replace(model.facts, sites=understood.sites, allowed=allowed)
    return replace(model, understood=understood, facts=facts)


def _in_codes(model: Understood, chosen: Sequence[StateForm]) -> Understood:
    pairs = zip(model.sites, chosen, strict=True)
    return replace(model, sites=tuple(replace(site, stored=CODES.get(form.name)) for site, form in pairs))
