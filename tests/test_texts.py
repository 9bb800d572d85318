"""What a request's prompts mean: the texts of rows, recipes that draw again, and what was cut."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.description import Recommended
from model.rows import Condition, Prompt, Tokens
from service.errors import Invalid
from service.http.responses import EVENTS, JSON, NPY, PNG, ZIP, encoding, etag
from service.plan.entries import table
from service.plan.fields import DenoiseRequest, Sample, SampleRequest
from service.plan.plan import Plan, plan_denoise
from service.plan.served import Served
from service.plan.texts import words_of
from tests.properties import examples
from tests.test_responses import MODEL, SERVED, planned
from tests.texts import (
    FITS,
    LCM_XL,
    TEXT,
    XL,
    XL_WITHOUT_ZEROS,
    drawn,
    served_with,
    text_of,
    tokenize,
    tokenize_twice,
)

T = TypeVar("T")

IMAGE = np.zeros((1, 4, 4), np.float32)
HIDING = replace(TEXT, recipe_prompts=False)
WITHOUT_CLASSES = replace(SERVED, model=replace(MODEL, num_classes=None, no_label=None, class_names=()))

# No sentence of ours has such letters.
PROMPTS = st.text("αβγδ", max_size=FITS + 3)


@st.composite
def requests(draw: st.DrawFn) -> SampleRequest:
    count = draw(st.integers(1, 3))

    def each_of(texts: st.SearchStrategy[T]) -> st.SearchStrategy[list[T]]:
        return st.lists(texts, min_size=count, max_size=count)

    return SampleRequest(
        seed=draw(st.integers(0, 2)),
        num_images=count,
        prompt=draw(st.none() | PROMPTS | each_of(PROMPTS)),
        negative_prompt=draw(st.none() | PROMPTS | each_of(st.none() | PROMPTS)),
        clip_skip=draw(st.integers(0, 3)),
        guidance_scale=draw(st.none() | st.sampled_from((0.0, 0.5, 1.0, 1.5, 30.0))),
        guidance_rescale=draw(st.sampled_from((0.0, 0.7))),
        guidance_interval=draw(st.sampled_from((None, [0, 1], [0.25, 0.5]))),
    )


def plan_of(request: SampleRequest, served: Served = TEXT) -> Plan:
    return planned(served, **vars(request))


def spread(texts: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """The text of each image."""
    return [texts] * count if isinstance(texts, str | None) else list(texts)


def each(texts: str | Sequence[str | None] | None, count: int) -> list[str]:
    """The same, with the empty text where none is given."""
    return ["" if text is None else text for text in spread(texts, count)]


@examples(200)
@given(requests())
def test_a_row_has_its_prompt_and_where_guided_its_negative_one(request: SampleRequest) -> None:
    """Guidance of 1 and less is off. Only the prompt skips layers."""
    scale = 3.0 if request.guidance_scale is None else request.guidance_scale
    n = request.num_images
    pairs = zip(each(request.prompt, n), each(request.negative_prompt, n), strict=True)
    for row, (prompt, negative) in zip(plan_of(request).rows, pairs, strict=True):
        own = text_of(prompt, request.clip_skip)
        assert row.branches == ((own, text_of(negative)) if scale > 1 else (own,))
        assert row.guidance_scale == max(1.0, scale)
        assert row.guidance_rescale == (request.guidance_rescale if scale > 1 else 0)


@examples(200)
@given(requests(), st.booleans())
def test_each_recipe_draws_its_image_again(request: SampleRequest, has_prompts: bool) -> None:
    served = TEXT if has_prompts else HIDING
    plan = plan_of(request, served)
    prompts = each(request.prompt, request.num_images)
    negatives = spread(request.negative_prompt, request.num_images)
    for i, (row, recipe) in enumerate(zip(plan.rows, plan.recipes, strict=True)):
        assert json.loads(json.dumps(recipe)) == recipe
        again = {name: value for name, value in recipe.items() if name in table(Sample)}
        if not has_prompts:
            assert not {"prompt", "negative_prompt"} & recipe.keys()
            again |= {"prompt": prompts[i], "negative_prompt": negatives[i]}
        [alone] = planned(served, **again).rows
        assert drawn(alone) == drawn(row)
        assert planned(served, **again).recipes == [recipe]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"prompt": ""}),
        ({"prompt": "a", "num_images": 2}, {"prompt": ["a", "a"], "num_images": 2}),
        ({"prompt": ["a"]}, {"prompt": "a"}),
        ({"negative_prompt": [None, None], "num_images": 2}, {"num_images": 2}),
        ({"guidance_scale": 0}, {"guidance_scale": 1.0}),
        ({"guidance_scale": 0, "negative_prompt": "b"}, {"guidance_scale": 0}),
        ({"guidance_scale": 1, "guidance_rescale": 0.5, "guidance_interval": [0, 0.5]}, {"guidance_scale": 0.5}),
        ({"guidance_scale": 3, "guidance_rescale": -0.0, "guidance_interval": [0, 1]}, {}),
        ({"clip_skip": 0}, {}),
    ],
    ids=str,
)
def test_what_has_no_effect_is_in_no_recipe(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert planned(TEXT, **one).canonical == planned(TEXT, **other).canonical
    assert planned(TEXT, **one).recipes == planned(TEXT, **other).recipes


def test_no_negative_prompt_and_an_empty_one_are_apart_in_recipes() -> None:
    """They draw the same image, and need not in other kinds of models."""
    none, empty = planned(TEXT, prompt="a"), planned(TEXT, prompt="a", negative_prompt="")
    assert drawn(none.rows[0]) == drawn(empty.rows[0])
    assert "negative_prompt" not in none.recipes[0]
    assert empty.recipes[0]["negative_prompt"] == ""
    assert none.canonical != empty.canonical


NOTHING = Condition(text=None)  # zeros


def said(prompt: str, clip_skip: int = 0) -> Condition:
    """What a row of a model with two encoders is told by a prompt."""
    return Condition(text=tokenize_twice(prompt).text(clip_skip))


def branches(served: Served, **fields: Any) -> list[tuple[Condition, ...]]:
    """Of each row, without the sizes."""
    rows = planned(served, **fields).rows
    return [tuple(replace(branch, time_ids=None) for branch in row.branches) for row in rows]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "a"}, [(said("a"), NOTHING)]),
        ({"prompt": "a", "negative_prompt": ""}, [(said("a"), said(""))]),
        ({"prompt": "a", "negative_prompt": "b", "clip_skip": 1}, [(said("a", 1), said("b"))]),
        (
            {"negative_prompt": [None, "", "b"], "num_images": 3},
            [(said(""), one) for one in (NOTHING, said(""), said("b"))],
        ),
        ({"prompt": None}, [(said(""), NOTHING)]),  # zeros are for the negative prompt alone
        ({"prompt": "a", "guidance_scale": 1}, [(said("a"),)]),
    ],
    ids=str,
)
def test_no_negative_prompt_is_zeros_where_the_pipeline_says_so(
    fields: dict[str, Any], expected: list[tuple[Condition, ...]]
) -> None:
    assert branches(XL, **fields) == expected
    as_text = [tuple(said("") if one == NOTHING else one for one in row) for row in expected]
    assert branches(XL_WITHOUT_ZEROS, **fields) == as_text


def test_zeros_have_no_tokens_and_are_not_encoded() -> None:
    asked: list[Prompt] = []

    def counted(prompt: Prompt) -> Tokens:
        asked.append(prompt)
        return tokenize_twice(prompt)

    [row] = planned(replace(XL, tokenize=counted), prompt="a").rows
    assert asked == ["a"]
    assert row.texts == [row.branches[0].text]


def test_secret_recipes_keep_zeros_and_the_empty_text_apart() -> None:
    secret = replace(XL, recipe_prompts=False)
    none, empty = (planned(secret, prompt="a", negative_prompt=one) for one in (None, ""))
    assert "negative_prompt_sha256" not in none.recipes[0]
    assert empty.recipes[0]["negative_prompt_sha256"] == sha256("")
    assert none.canonical != empty.canonical
    unguided = [planned(secret, prompt="a", negative_prompt=one, guidance_scale=1).canonical for one in (None, "")]
    assert unguided[0] == unguided[1]


def test_the_recipe_of_a_contact_sheet_has_all_prompts() -> None:
    plan = planned(TEXT, prompt=["a", "b"], negative_prompt=[None, "c"], num_images=2)
    assert (plan.canonical["prompt"], plan.canonical["negative_prompt"]) == (["a", "b"], [None, "c"])


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_recipes_may_have_hashes_in_the_place_of_prompts() -> None:
    plan = planned(HIDING, prompt=["å fox", "b"], negative_prompt=[None, ""], num_images=2, clip_skip=1)
    assert plan.recipes[0]["prompt_sha256"] == sha256("å fox")
    assert "negative_prompt_sha256" not in plan.recipes[0]
    assert (plan.recipes[1]["prompt_sha256"], plan.recipes[1]["negative_prompt_sha256"]) == (sha256("b"), sha256(""))
    assert plan.canonical["prompt_sha256"] == [sha256("å fox"), sha256("b")]
    assert plan.canonical["negative_prompt_sha256"] == [None, sha256("")]
    assert plan.parameters["prompt"] == ["å fox", "b"]  # the client sent them
    assert etag(plan, PNG) != etag(planned(HIDING, prompt=["å fox", "c"], num_images=2, clip_skip=1), PNG)


@pytest.mark.parametrize("served", [TEXT, XL], ids=["one encoder", "two encoders"])
def test_a_repr_has_nothing_of_a_prompt(served: Served) -> None:
    """Errors and logs may show the repr of any of these."""
    prompts: dict[str, Any] = {"prompt": "αβγδ", "negative_prompt": "βγδα"}
    sample = SampleRequest(seed=0, guidance_scale=2.0, **prompts)
    denoise = DenoiseRequest(timestep=2, seed=0, guidance_scale=2.0, **prompts)
    plans = [plan_of(sample, served), plan_denoise(denoise, IMAGE, served, timeout=10.0)]
    words, _ = words_of(sample, 1, 2, True, served)
    encodings = [encoding(plan, kind, served) for plan in plans for kind in (PNG, JSON, ZIP, NPY, EVENTS)]
    shown = repr([sample, denoise, plans, words, encodings])
    assert not set("αβγδ") & set(shown)
    assert not any(str(token) in repr(words) for token in tokenize("αβγδ").ids[1:5])


def test_a_prompt_becomes_tokens_once() -> None:
    asked: list[Prompt] = []

    def counted(prompt: Prompt) -> Tokens:
        asked.append(prompt)
        return tokenize(prompt)

    planned(served_with(counted), prompt="a", negative_prompt=["b", None, "a"], num_images=3)
    assert sorted(map(str, asked)) == ["", "a", "b"]


def test_a_negative_prompt_without_guidance_has_no_tokens_and_a_warning() -> None:
    asked: list[Prompt] = []

    def counted(prompt: Prompt) -> Tokens:
        asked.append(prompt)
        return tokenize(prompt)

    plan = planned(served_with(counted), prompt="a", negative_prompt="b", guidance_scale=1)
    assert asked == ["a"]
    said = "the negative prompt has no effect: guidance_scale is at most 1, which is no guidance"
    assert plan.warnings == (said,)
    assert planned(TEXT, negative_prompt="", guidance_scale=0).warnings == ()


# What was cut.


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "α" * 6}, []),
        ({"prompt": "α" * 7}, ["the prompt has 7 tokens, and 6 fit: the last token was cut"]),
        ({"prompt": "α" * 9, "num_images": 3}, ["the prompt has 9 tokens, and 6 fit: the last 3 were cut"]),
        ({"negative_prompt": "α" * 8}, ["the negative prompt has 8 tokens, and 6 fit: the last 2 were cut"]),
        (
            {"prompt": ["α", "β" * 8, "β" * 8, "γ" * 7], "num_images": 4},
            [
                "the prompt of image 2 of 4 has 8 tokens, and 6 fit: the last 2 were cut",
                "the prompt of image 4 of 4 has 7 tokens, and 6 fit: the last token was cut",
            ],
        ),
        (
            {"negative_prompt": [None, "α" * 7], "num_images": 2},
            ["the negative prompt of image 2 of 2 has 7 tokens, and 6 fit: the last token was cut"],
        ),
        (
            {"prompt": [chr(945 + i) * 9 for i in range(9)], "num_images": 9},
            [
                *(f"the prompt of image {i} of 9 has 9 tokens, and 6 fit: the last 3 were cut" for i in range(1, 9)),
                "1 more prompt was cut",
            ],
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_was_cut_is_said(fields: dict[str, Any], said: list[str]) -> None:
    assert list(planned(TEXT, **fields).warnings) == said


def test_of_two_encoders_the_larger_cut_is_said() -> None:
    """The second one fits one letter fewer, and reads no dots."""
    for prompt, cut in (("α" * 5, 0), ("α" * 6, 1), ("α" * 4 + "." * 5, 3)):
        said = f"the prompt has {6 + cut} tokens, and 6 fit: the last {'token was' if cut == 1 else f'{cut} were'} cut"
        for served in (XL, LCM_XL):
            assert planned(served, prompt=prompt).warnings == ((said,) if cut else ())


@examples(200)
@given(requests(), st.integers(1, 64))
def test_warnings_are_few_and_have_nothing_of_a_prompt(request: SampleRequest, count: int) -> None:
    lists = {"prompt": [f"α{'β' * i}" for i in range(count)], "negative_prompt": [f"γ{'δ' * i}" for i in range(count)]}
    for plan in (plan_of(request), planned(TEXT, num_images=count, **lists)):
        assert all(warning.isascii() and warning.isprintable() for warning in plan.warnings)
        assert sum(map(len, plan.warnings)) < 2000
        assert len(set(plan.warnings)) == len(plan.warnings)


# Who knows what.


@pytest.mark.parametrize(
    ("served", "fields", "said"),
    [
        (SERVED, {"prompt": "β"}, "prompt: must be null: this model has no text; a class_label says what it draws"),
        (SERVED, {"prompt": ["β"]}, "prompt: must be null: this model has no text; a class_label says what it draws"),
        (WITHOUT_CLASSES, {"prompt": ""}, "prompt: must be null: this model has no text"),
        (WITHOUT_CLASSES, {"negative_prompt": "β"}, "negative_prompt: must be null: this model has no text"),
        (WITHOUT_CLASSES, {"clip_skip": 1}, "clip_skip: must be 0: this model has no text; it is 1"),
        (
            WITHOUT_CLASSES,
            {"guidance_scale": 2},
            "guidance_scale: must be at most 1: this model knows no guidance; it is 2",
        ),
        (
            WITHOUT_CLASSES,
            {"guidance_rescale": 0.5},
            "guidance_rescale: must be 0: this model knows no guidance; it is 0.5",
        ),
        (SERVED, {"guidance_scale": 2}, "guidance_scale: must be at most 1 without a class_label, and is 2"),
        (
            TEXT,
            {"class_label": "zero"},
            "class_label: must be null: a prompt tells this model what to draw, and the label is 'zero'",
        ),
        (TEXT, {"prompt": ["β"], "num_images": 2}, "prompt: must be one text, or 2 in a list, and is 1"),
        (TEXT, {"negative_prompt": ["β", None]}, "negative_prompt: must be one text, or 1 in a list, and is 2"),
    ],
    ids=lambda value: value.model.name if isinstance(value, Served) else str(value),
)
def test_what_a_model_cannot_use_is_refused(served: Served, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(served, **fields)
    assert str(refused.value) == said


def test_what_changes_nothing_is_taken_by_every_model() -> None:
    for served in (SERVED, WITHOUT_CLASSES):
        plain = planned(served)
        plan = planned(served, prompt=None, negative_prompt=None, clip_skip=0, guidance_rescale=0, guidance_scale=0.5)
        assert (plan.canonical, plan.recipes) == (plain.canonical, plain.recipes)
        assert not {"prompt", "negative_prompt", "clip_skip"} & {*plan.parameters, *plan.recipes[0], *plan.canonical}
    assert planned(TEXT, class_label=[None, None], num_images=2).canonical == planned(TEXT, num_images=2).canonical


def test_labels_are_rescaled_as_texts_are() -> None:
    bare, labelled = planned(num_images=2, class_label=[None, 1], guidance_rescale=0.5).rows
    assert (bare.guidance_rescale, labelled.guidance_rescale) == (0.0, 0.5)


@pytest.mark.parametrize("scale", [0, 0.99, 1])
def test_small_guidance_is_off_for_labels_too(scale: float) -> None:
    plan = planned(class_label=1, guidance_scale=scale)
    assert len(plan.rows[0].branches) == 1
    assert plan.canonical == planned(class_label=1, guidance_scale=1).canonical
    assert plan.parameters["guidance_scale"] == scale


def test_a_recommended_guidance_below_one_is_off() -> None:
    turbo = replace(TEXT, model=replace(TEXT.model, recommended=Recommended("ddim", 4, guidance_scale=0.0)))
    plan = planned(turbo, prompt="a", negative_prompt="b")
    assert plan.rows[0].branches == (text_of("a"),)
    assert plan.parameters["guidance_scale"] == 0.0
    assert len(plan.warnings) == 1


# /denoise


def denoised(served: Served = TEXT, **fields: Any) -> Plan:
    return plan_denoise(DenoiseRequest(500, **{"seed": 7, **fields}), IMAGE, served, 300)


def test_denoising_is_told_by_prompts_too() -> None:
    plan = denoised(prompt="α" * 7, negative_prompt="β", clip_skip=2, guidance_scale=4, guidance_rescale=0.25)
    [row] = plan.rows
    assert row.branches == (text_of("α" * 7, 2), text_of("β"))
    assert (row.guidance_scale, row.guidance_rescale) == (4.0, 0.25)
    assert plan.warnings == ("the prompt has 7 tokens, and 6 fit: the last token was cut",)
    told = {name: plan.recipes[0][name] for name in ("prompt", "negative_prompt", "clip_skip", "guidance_rescale")}
    assert told == {"prompt": "α" * 7, "negative_prompt": "β", "clip_skip": 2, "guidance_rescale": 0.25}


def test_denoising_is_not_guided_unless_asked() -> None:
    plan = denoised(prompt="a")
    assert plan.rows[0].branches == (text_of("a"),)
    assert plan.recipes[0]["guidance_scale"] == 1.0
    assert denoised(HIDING, prompt="a").recipes[0]["prompt_sha256"] == sha256("a")
    with pytest.raises(Invalid, match="this model has no text"):
        denoised(SERVED, prompt="a")
