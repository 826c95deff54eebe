"""The models that can be exported, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvc_models import pairs, sized, smollm2, tiny
from kvc_models.export import DEFAULT_OPSET, ModelError, export_decoder, save_assets

Load = Callable[[Path | None], tuple[Any, Any]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One model: what it is, and how to get it and its tokenizer, given a folder for downloads.

    Of encoder-decoder models the decoder is exported, see `kvc_models.pairs`.
    """

    name: str
    about: str
    load: Load
    external_data: bool
    pair: bool = False


def _load_smollm2(cache: Path | None) -> tuple[Any, Any]:
    file = smollm2.fetch(cache or smollm2.default_cache())
    return smollm2.load_model(file), smollm2.load_tokenizer(file)


def _load_sized(name: str, _cache: Path | None) -> tuple[Any, Any]:
    return sized.make_sized(name), tiny.tokenizer()


def _load_pair(name: str, _cache: Path | None) -> tuple[Any, Any]:
    return pairs.make_pair(name), tiny.tokenizer()


def _load_tiny(family: str, _cache: Path | None) -> tuple[Any, Any]:
    return tiny.make_tiny(family), tiny.tokenizer()


ENTRIES: Final = (
    Entry("smollm2-135m", "SmolLM2-135M-Instruct, trained; 538 MB as fp32", _load_smollm2, True),
    *(
        Entry(name, f"{about}, random weights", partial(_load_sized, name), True)
        for name, (about, _) in sized.SIZED.items()
    ),
    *(
        Entry(f"tiny-{family}", f"{family}, random weights, for tests", partial(_load_tiny, family), False)
        for family in tiny.FAMILIES
    ),
    *(
        Entry(
            name,
            f"the decoder of {name.removeprefix('tiny-')}, random weights" + ", for tests" * tiny_one,
            partial(_load_pair, name),
            not tiny_one,
            pair=True,
        )
        for name in pairs.PAIRS
        for tiny_one in [name.startswith("tiny-")]
    ),
)


def find(name: str) -> Entry:
    """The entry called `name`.

    Raises:
        ModelError: there is none.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise ModelError(f"no model is called {name!r}; there are {', '.join(entry.name for entry in ENTRIES)}")


def export_named(
    name: str,
    out: Path,
    *,
    with_past: bool = False,
    opset: int = DEFAULT_OPSET,
    dtype: str = "float32",
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Export the model `name` to `out`, tokenizer and configurations to `assets_folder(out)`; return `out`.

    Args:
        name: a model of `ENTRIES`.
        out: the ONNX file; the weights of models of real size go beside it into `out` + ".data".
        with_past: take and return keys and values, see `kvc_models.export`.
        opset: the ONNX operator set.
        dtype: "float32", "float16" or "bfloat16", of the weights.
        cache: where downloads are kept; $KVC_CACHE, otherwise a folder `cache` beside `out`.
        say: is told what is being done.

    Raises:
        ModelError: no such model, its weights cannot be had, or PyTorch cannot export it at this opset.
    """
    entry = find(name)
    say(f"loading {name}")
    model, tokenizer = entry.load(cache or smollm2.default_cache(out.parent / "cache"))
    say("exporting, " + ("with" if with_past else "without") + f" past, opset {opset}")
    model = tiny.cast(model, dtype)
    if entry.pair:
        if with_past:
            raise ModelError(f"{name} is exported without a past: the encoder's output is read instead")
        return pairs.export_pair_decoder(model, out, opset=opset, external_data=entry.external_data)
    save_assets(model, tokenizer, out)
    return export_decoder(model, out, with_past=with_past, opset=opset, external_data=entry.external_data)
