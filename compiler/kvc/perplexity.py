"""How well a compiled model predicts a text, beside the ONNX file it was compiled from."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from kvc_passes.errors import InputError

from .reference import Reference
from .runtime.sequences import Sequences
from .runtime.text import Text

MOST: Final = 4096
"""Tokens that are compared: the reference computes all logits at once."""


@dataclass(frozen=True)
class Perplexity:
    """e to the mean of -ln p of every token of a text, given those before it."""

    tokens: int
    ours: float
    reference: float
    agreement: float
    """Share of the positions at which both have the same likeliest token."""


def measure(sequences: Sequences, reference: Reference, text: Text, file: Path | None) -> Perplexity:
    """The perplexities of a text, a file's or one that comes with kvc, token by token.

    Raises InputError if the file cannot be read or has too few tokens.
    """
    tokens = text.encode(_read(file))[: min(MOST, sequences.model.plan.max_context)]
    if len(tokens) < 2:
        raise InputError(f"{file or 'the text'}: a perplexity needs at least two tokens")
    expected = reference.logits(np.array(tokens))[:-1]
    vocab, next_ones = sequences.model.facts.vocab, tokens[1:]
    own, theirs, same = 0.0, 0.0, 0
    for got, row, token in zip(_rows(sequences, tokens), expected, next_ones):
        own += _surprise(got[:vocab], token)
        theirs += _surprise(row[:vocab], token)
        same += int(got[:vocab].argmax() == row[:vocab].argmax())
    count = len(next_ones)
    return Perplexity(len(tokens), _exp(own / count), _exp(theirs / count), same / count)


def _read(file: Path | None) -> str:
    if file is None:
        return (importlib.resources.files("kvc") / "sample_text.txt").read_text(encoding="utf-8")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{file}: the text cannot be read: {reason}") from None


def _rows(sequences: Sequences, tokens: list[int]) -> Iterator[np.ndarray]:
    """The logits after every token but the last."""
    kept = sequences.open(tokens)
    for _ in tokens[:-1]:
        yield sequences.decode([kept])[0]
    sequences.close(kept)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def _surprise(row: np.ndarray, token: int) -> float:
    """-ln of the softmax."""
    wide = row.astype(np.float64)
    top = wide.max()
    return float(np.log(np.exp(wide - top).sum()) + top - wide[token])
