"""A text model without a network: its description, its server, and a tokenizer that can be followed by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from model.description import ModelDescription, Recommended, TextDescription
from model.rows import Condition, Text, Tokenize, Tokens
from model.schedule import Schedule
from service.plan.served import Served
from tests import local, test_responses
from tests.engines import FakeRunner
from tests.local import FakeServer, serving_fake

LENGTH = 8  # of a context
FITS = LENGTH - 2  # tokens of a prompt
START, END = 0, 1
OFFSET = 2  # from a character's code point to its token


def tokenize(prompt: str) -> Tokens:
    """A token for each character."""
    tokens = [ord(letter) + OFFSET for letter in prompt]
    kept = tokens[:FITS]
    return Tokens((START, *kept, *[END] * (LENGTH - 1 - len(kept))), len(tokens) - len(kept))


def text_of(prompt: str, clip_skip: int = 0) -> Condition:
    """What a row is told by a prompt."""
    return Condition(text=Text(tokenize(prompt).ids, clip_skip))


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


def served_with(tokenize: Tokenize = tokenize, served: Served = test_responses.SERVED) -> Served:
    """A text model, served like this one."""
    return replace(served, model=with_text(served.model), tokenize=tokenize)


TEXT = served_with()


@contextmanager
def serving_text(
    tokenize: Tokenize = tokenize,
    schedule: Schedule = local.MODEL.schedule,
    recipe_prompts: bool = True,
    runner: FakeRunner | None = None,
    **settings: Any,
) -> Iterator[FakeServer]:
    """Serve a text model with the fake runner of tests.engines."""
    like = replace(local.SERVED, model=replace(local.MODEL, schedule=schedule))
    served = replace(served_with(tokenize, like), recipe_prompts=recipe_prompts)
    with serving_fake(runner, served=served, **settings) as server:
        yield server
