"""The prompts of a request: a text for each image and its negative one, and what did not fit.

Prompts belong to those who write them. No message here has a word of a prompt.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from model.description import ModelDescription, TextDescription
from model.rows import Condition, Row, Tokenize, Tokens
from service.errors import Invalid
from service.plan.fields import Denoise, Sample
from service.plan.guidance import EMBEDDED, UNGUIDED
from service.plan.prompt_syntax import Read, read
from service.plan.served import Served
from service.plan.shared_fields import MAX_PROMPT

Prompts = str | Sequence[str | None] | None

_NO_PROMPTS: Mapping[str, object] = {"prompt": None, "negative_prompt": None}
_READ_AS_WRITTEN: Mapping[str, object] = {"emphasis": None, "clip_skip": None}
HASHES = ("prompt_sha256", "negative_prompt_sha256")  # of the texts in UTF-8, where recipes have no prompts

_SPECIAL = 2  # tokens of a context that are no tokens of the prompt: its start and its end
_MOST_WARNINGS = 8  # of prompts that were cut; more are counted


@dataclass(frozen=True)
class Words:
    """The texts of one image.

    Attributes:
        prompt: the empty text if none was given.
        negative_prompt: None if none was given, or if it has no effect. Its branch then has the empty text, or no text
            where the pipeline says so (force_zeros_for_empty_prompt).
        drawn: both as they are drawn, where emphasis makes a difference; else None.
        clip_skip: of the prompt.
        branches: of the row.
    """

    prompt: str = field(repr=False)
    negative_prompt: str | None = field(repr=False)
    drawn: tuple[str, str | None] | None = field(repr=False)
    clip_skip: int
    branches: tuple[Condition, ...]


class _Drawn(NamedTuple):
    """A text, as it is drawn."""

    read: Read
    tokens: Tokens


def words_of(
    request: Sample | Denoise, num_images: int, steps: int, is_guided: bool, served: Served
) -> tuple[list[Words], list[str]]:
    """The texts of each image, and sentences that warn of what did not fit or has no effect.

    Each text becomes tokens once. A model without text has no words.

    Args:
        steps: of the request.

    Raises:
        Invalid: the model has no text or no negative prompt, or a list is not as long as the images, or a prompt's
            emphasis cannot be read.
    """
    text = served.model.text
    if text is None:
        _check_no_text(request, served.model)
        return [], []
    if served.model.embeds_guidance and request.negative_prompt is not None:
        raise Invalid.field("negative_prompt", f"must be null: {EMBEDDED}")
    assert served.tokenize is not None
    prompts = ["" if prompt is None else prompt for prompt in _each("prompt", request.prompt, num_images)]
    negatives = _each("negative_prompt", request.negative_prompt, num_images)
    warnings: list[str] = []
    if not is_guided:
        if any(negatives):
            warnings.append(f"the negative prompt has no effect: {UNGUIDED}")
        negatives = [None] * num_images
    zeros = text.force_zeros_for_empty_prompt
    against = [None if zeros and one is None else one or "" for one in negatives] if is_guided else []

    tokenize = cache(served.tokenize)
    own, other = (
        {one: _drawn(name, one, steps, request, tokenize) for one in dict.fromkeys(texts) if one is not None}
        for name, texts in (("prompt", prompts), ("negative_prompt", against))
    )
    fits = prompt_limits(text)["max_prompt_tokens"]
    warnings += _cuts("prompt", prompts, own, fits)
    warnings += _cuts("negative prompt", against, other, fits)
    warnings += dict.fromkeys(note for one in (*own.values(), *other.values()) for note in one.read.notes)

    words = []
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        branches = [Condition(text=own[prompt].tokens.text(request.clip_skip))]
        its = [own[prompt].read, *([] if negative is None else [other[negative].read])]
        if is_guided:
            counter = against[i]
            branches.append(Condition(text=None if counter is None else other[counter].tokens.text()))
        words.append(Words(prompt, negative, _as_drawn(*its), request.clip_skip, tuple(branches)))
    return words, warnings


def fields_of(request: Sample | Denoise, model: ModelDescription) -> dict[str, object]:
    """The fields of a request, with their defaults filled in; null for a model without text."""
    if model.text is None:
        return {**_NO_PROMPTS, **_READ_AS_WRITTEN}
    prompt = "" if request.prompt is None else request.prompt
    read_as = {"emphasis": "original" if _has_emphasis(request) else None, "clip_skip": request.clip_skip}
    return {"prompt": prompt, "negative_prompt": request.negative_prompt, **read_as}


def recipe_of(words: Sequence[Words], has_prompts: bool) -> dict[str, object]:
    """The fields, as the recipe of these images has them: null for what has no effect, one text if all are the same.

    Args:
        words: of one image, or of all images of an answer.
        has_prompts: whether recipes have prompts, or their hashes.
    """
    if not words:
        return {**_NO_PROMPTS, **_READ_AS_WRITTEN}
    prompt, negative = _one([each.prompt for each in words]), _one([each.negative_prompt for each in words])
    emphasis = "original" if any(each.drawn for each in words) else None
    read_as = {"emphasis": emphasis, "clip_skip": words[0].clip_skip or None}
    if has_prompts:
        return {"prompt": prompt, "negative_prompt": negative, **read_as}
    hashed = dict(zip(HASHES, map(_hashed, (prompt, negative)), strict=True))
    return {**_NO_PROMPTS, **read_as, **hashed}


def prompt_limits(text: TextDescription) -> dict[str, int]:
    """What fits into a prompt: bytes, beyond which it is refused, and tokens, beyond which it is cut."""
    return {"max_prompt_bytes": MAX_PROMPT, "max_prompt_tokens": text.length - _SPECIAL}


def read_by(rows: Sequence[Row], served: Served) -> list[int]:
    """For each row, how many tokens of its prompt the text encoder reads, without start, end and padding."""
    if served.tokenize is None:
        return [0] * len(rows)
    end = served.tokenize("").ids[1]  # comes after the start
    texts = [row.branches[0].text for row in rows]
    return [0 if text is None else text.ids.index(end, 1) - 1 for text in texts]


def length_of(request: Sample | Denoise) -> int:
    """How many characters must become tokens."""
    given: list[Prompts] = [request.prompt, request.negative_prompt]
    return sum(len(text or "") for texts in given for text in ([texts] if isinstance(texts, str | None) else texts))


def _check_no_text(request: Sample | Denoise, model: ModelDescription) -> None:
    why = "this model has no text" + ("" if model.num_classes is None else "; a class_label says what it draws")
    for name, value in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        if value is not None:
            raise Invalid.field(name, f"must be null: {why}")
    if request.clip_skip:
        raise Invalid.field("clip_skip", f"must be 0: this model has no text; it is {request.clip_skip}")
    if _has_emphasis(request):
        raise Invalid.field("emphasis", f"must be none: {why}; it is original")


def _drawn(name: str, text: str, steps: int, request: Sample | Denoise, tokenize: Tokenize) -> _Drawn:
    has_emphasis = _has_emphasis(request)
    found = read(text, name, steps, is_negative=name != "prompt") if has_emphasis else Read(text)
    return _Drawn(found, tokenize(found.prompt))


def _as_drawn(prompt: Read, negative: Read | None = None) -> tuple[str, str | None] | None:
    """Both texts without their syntax; None if they have none."""
    if prompt.is_plain and (negative is None or negative.is_plain):
        return None
    return prompt.text, None if negative is None else negative.text


def _has_emphasis(request: Sample | Denoise) -> bool:
    return isinstance(request, Sample) and request.emphasis == "original"


def _each(name: str, texts: Prompts, num_images: int) -> list[str | None]:
    """The text of each image."""
    if isinstance(texts, str | None):
        return [texts] * num_images
    if len(texts) != num_images:
        raise Invalid.field(name, f"must be one text, or {num_images} in a list, and is {len(texts)}")
    return list(texts)


def _cuts(name: str, texts: Sequence[str | None], drawn: Mapping[str, _Drawn], fits: int) -> Iterator[str]:
    """A sentence for each text that was cut."""
    cut = [text for text in dict.fromkeys(texts) if text is not None and drawn[text].tokens.cut]
    for text in cut[:_MOST_WARNINGS]:
        which = "" if len(set(texts)) == 1 else f" of image {texts.index(text) + 1} of {len(texts)}"
        lost = drawn[text].tokens.cut
        what = "token was" if lost == 1 else f"{lost} were"
        yield f"the {name}{which} has {fits + lost} tokens, and {fits} fit: the last {what} cut"
    more = len(cut) - _MOST_WARNINGS
    if more > 0:
        yield f"{more} more {name}{'s were' if more > 1 else ' was'} cut"


def _one(texts: Sequence[str | None]) -> object:
    """The text of all images, or the list of them."""
    return texts[0] if len(set(texts)) == 1 else list(texts)


def _hashed(texts: object) -> object:
    if isinstance(texts, str):
        return hashlib.sha256(texts.encode()).hexdigest()
    return [_hashed(text) for text in texts] if isinstance(texts, list) else None
