"""Text models without a network: their descriptions, their servers, and tokenizers that can be followed by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from model.description import ModelDescription, Recommended, TextDescription
from model.rows import Condition, Fragment, Prompt, Row, Text, Tokenize, Tokens
from model.schedule import Schedule
from service.plan.served import Served
from tests import local, test_responses
from tests.engines import FakeRunner
from tests.local import FakeServer, serving_fake

LENGTH = 8  # of a context
FITS = LENGTH - 2  # tokens of a prompt
START, END = 0, 1
OFFSET = 2  # from a character's code point to its token


def tokenize(prompt: Prompt) -> Tokens:
    """A token for each character."""
    ids, cut, weights = _tokens(prompt, FITS)
    return Tokens(ids, cut, weights=weights)


def tokenize_twice(prompt: Prompt) -> Tokens:
    """The same, and for the second encoder, which fits fewer, a token for each letter that is no dot."""
    ids, cut, weights = _tokens(prompt, FITS)
    ids_2, cut_2, weights_2 = _tokens(prompt, FITS - 1, without=".")
    return Tokens(ids, max(cut, cut_2), ids_2, weights, weights_2)


def _tokens(prompt: Prompt, fits: int, without: str = "") -> tuple[tuple[int, ...], int, tuple[float, ...]]:
    """Tokens, how many were cut, and weights."""
    fragments = (Fragment(prompt),) if isinstance(prompt, str) else prompt
    letters = [(letter, one.weight) for one in fragments for letter in one.text if letter not in without]
    kept = letters[:fits]
    ids = [START, *(ord(letter) + OFFSET for letter, _ in kept)]
    weights = [1.0, *(weight for _, weight in kept)]
    missing = LENGTH - len(ids)
    is_weighted = any(weight != 1 for weight in weights)
    return (*ids, *[END] * missing), len(letters) - len(kept), (*weights, *[1.0] * missing) if is_weighted else ()


def text_of(prompt: str, clip_skip: int = 0) -> Condition:
    """What a row is told by a prompt."""
    return Condition(text=Text(tokenize(prompt).ids, clip_skip))


def drawn(row: Row) -> tuple[object, ...]:
    """All that decides the image of a row."""
    steps = row.table.timesteps.tobytes(), row.table.lines.tobytes(), row.table.init
    how = (row.guidance_scale, row.guidance_rescale, row.guidance_interval) if len(row.branches) > 1 else ()
    return row.seed, row.group, steps, row.branches, how


def with_text(model: ModelDescription) -> ModelDescription:
    """The description of a text model like this one."""
    return replace(
        model,
        num_classes=None,
        no_label=None,
        class_names=(),
        text=TextDescription(length=LENGTH, layers=4, num_parameters=9),
        recommended=Recommended("ddim", 4, guidance_scale=3.0),
    )


def like_xl(model: ModelDescription, has_zeros: bool = True) -> ModelDescription:
    """The description of a text model like SDXL.

    Args:
        has_zeros: a negative prompt of null means zeros.
    """
    model = with_text(model)
    assert model.text is not None
    text = replace(model.text, encoders=2, force_zeros_for_empty_prompt=has_zeros)
    return replace(model, text=text, embeds_sizes=True)


def like_lcm(model: ModelDescription) -> ModelDescription:
    """The description of a text model like LCM_Dreamshaper."""
    recommended = Recommended("ddim", 4, guidance_scale=8.5)
    return replace(with_text(model), embeds_guidance=True, recommended=recommended)


def like_lcm_xl(model: ModelDescription) -> ModelDescription:
    """The description of a text model like an SDXL whose U-Net is LCM's."""
    return replace(like_xl(model), embeds_guidance=True)


def served_with(tokenize: Tokenize = tokenize, served: Served = test_responses.SERVED) -> Served:
    """A text model, served like this one."""
    return replace(served, model=with_text(served.model), tokenize=tokenize)


TEXT = served_with()
XL = replace(TEXT, model=like_xl(TEXT.model), tokenize=tokenize_twice)
XL_WITHOUT_ZEROS = replace(XL, model=like_xl(TEXT.model, has_zeros=False))
LCM = replace(TEXT, model=like_lcm(TEXT.model))
LCM_XL = replace(XL, model=like_lcm_xl(TEXT.model))


@contextmanager
def serving_text(
    tokenize: Tokenize = tokenize,
    schedule: Schedule = local.MODEL.schedule,
    recipe_prompts: bool = True,
    runner: FakeRunner | None = None,
    like: Callable[[ModelDescription], ModelDescription] = with_text,
    **settings: Any,
) -> Iterator[FakeServer]:
    """Serve a text model with the fake runner of tests.engines.

    Args:
        like: makes the description of the text model from another.
    """
    model = like(replace(local.MODEL, schedule=schedule))
    served = replace(local.SERVED, model=model, tokenize=tokenize, recipe_prompts=recipe_prompts)
    with serving_fake(runner, served=served, **settings) as server:
        yield server
