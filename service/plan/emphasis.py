"""Weights in prompts, as AUTOMATIC1111 writes them: brackets → fragments, each with the weight of its tokens.

`(a)` times 1.1, `[a]` divided by 1.1, `(a:1.3)` times 1.3. Brackets nest, and `\\(` is a letter.
Round and square brackets may cross: in `(a [b) c]` b is in both. What is left open ends
with the prompt; what closes nothing is a letter.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from model.rows import Fragment
from service.errors import Invalid

MAX_DEPTH = 32  # brackets that are open at once
MAX_WEIGHT = 100.0

_ROUND, _SQUARE = 1.1, 1 / 1.1
_MARKS = re.compile(r"\\[()\[\]\\]?|[(\[]|:(?P<weight>[+-]?[.\d]+)\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Weighted(NamedTuple):
    """A prompt in fragments.

    Attributes:
        fragments: those of one weight that follow each other are one, unless a BREAK is between them.
        breaks: how many BREAKs were left out.
    """

    fragments: list[Fragment]
    breaks: int


class _Span(NamedTuple):
    """A pair of brackets: the pieces between them, and what it does to their weights."""

    begin: int
    end: int
    factor: float


def weighted(prompt: str, field: str) -> Weighted:
    """Read the weights of a prompt.

    Args:
        field: what the prompt is given in, for messages.

    Raises:
        Invalid: a weight is no number or beyond its range, or too many brackets are open. Nothing in the message is of
            the prompt.
    """
    pieces, spans = _read(prompt, field)
    weights = np.ones(len(pieces))
    for begin, end, factor in spans:  # in this order: products of floats depend on it
        weights[begin:end] *= factor
    weights += 0.0  # so that no 0 is negative: texts with 0 and −0 are equal
    if not (np.abs(weights) <= MAX_WEIGHT).all():
        raise _beyond(field)
    texts: list[Fragment] = []
    breaks = pieces.count(None)
    for (is_break, weight), group in groupby(
        zip(pieces, weights.tolist(), strict=True), lambda pair: (pair[0] is None, pair[1])
    ):
        text = "".join(piece or "" for piece, _ in group)
        if text and not is_break:
            texts.append(Fragment(text, weight))
    return Weighted(texts, breaks)


def _read(prompt: str, field: str) -> tuple[Sequence[str | None], Sequence[_Span]]:
    """The pieces of a prompt, None for each BREAK, and its pairs of brackets in the order in which they close."""
    pieces: list[str | None] = []
    spans: list[_Span] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        spans.append(_Span(opened[bracket].pop(), len(pieces), factor))

    for mark in _MARKS.finditer(prompt):
        token, weight = mark[0], mark["weight"]
        if token.startswith("\\"):
            pieces.append(token[1:])
        elif token in opened:
            opened[token].append(len(pieces))
            if sum(map(len, opened.values())) > MAX_DEPTH:
                raise Invalid.field(field, f"has more than {MAX_DEPTH} brackets that are open at once")
        elif weight is not None and opened["("]:
            close("(", _number(weight, field))
        elif token == ")" and opened["("]:
            close("(", _ROUND)
        elif token == "]" and opened["["]:
            close("[", _SQUARE)
        else:
            pieces += _without_breaks(token)
    spans += [_Span(begin, len(pieces), _ROUND) for begin in opened["("]]
    spans += [_Span(begin, len(pieces), _SQUARE) for begin in opened["["]]
    return pieces, spans


def _without_breaks(text: str) -> Iterator[str | None]:
    first, *others = _BREAK.split(text) if "BREAK" in text else [text]
    yield first
    for other in others:
        yield None
        yield other


def _number(text: str, field: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise Invalid.field(field, "has a weight that is no number") from None
    if not abs(number) <= MAX_WEIGHT:
        raise _beyond(field)
    return number


def _beyond(field: str) -> Invalid:
    return Invalid.field(field, f"has a weight that is not from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
