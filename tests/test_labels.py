"""Classes that prompts name."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.description import ModelDescription
from service.errors import Invalid
from service.plan.labels import named_in
from tests.properties import examples
from tests.test_responses import MODEL

WORDS = st.sampled_from(["cat", "big", "dog", "hot", "7", "naïve"])
NAMES = st.lists(st.lists(WORDS, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=6, unique=True)
OTHERS = st.lists(st.sampled_from(["a", "of", "THE", "fox", "—", "2nd"]), max_size=3).map(" ".join)


def named(*class_names: str) -> ModelDescription:
    return replace(MODEL, num_classes=len(class_names), no_label=len(class_names), class_names=class_names)


@examples(100)
@given(NAMES, st.data(), OTHERS, OTHERS)
def test_a_name_among_other_words_is_that_class(names: list[str], data: st.DataObject, before: str, after: str) -> None:
    index = data.draw(st.integers(0, len(names) - 1))
    wanted = names[index]
    assert named_in(f"{before} {wanted.upper()}, {after}", named(*names)) == index
    assert named_in(f" {wanted.title()}! ", named(*names)) == index


@examples(100)
@given(NAMES, st.text("catdogbih7 -é½²_", max_size=20))
def test_any_prompt_names_a_class_or_is_refused(names: list[str], prompt: str) -> None:
    model = named(*names)
    try:
        found = named_in(prompt, model)
    except Invalid as error:
        refused = [one["loc"] for one in error.errors]
    else:
        refused = []
        assert (found is None) is (re.search(r"\w", prompt) is None)
        assert found is None or 0 <= found < len(names)
    assert refused in ([], [["prompt"]], [["class_label"]])  # the last for an index alone


@pytest.mark.parametrize(
    ("prompt", "index"),
    [("hot dog", 1), ("a dog", 0), ("a hot dog and its shadow", 1), ("2", 2), (" 1 ", 1), ("HOTDOG", 2), ("", None)],
)
def test_the_longest_name_counts_and_an_index_alone(prompt: str, index: int | None) -> None:
    assert named_in(prompt, named("dog", "hot dog", "hotdog")) == index


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a cat and a dog", "must name one class, and names several classes; the classes are cat, dog"),
        ("scattered dogs", "must name one class, and names none; the classes are cat, dog"),
        ("draw 1", "must name one class, and names none; the classes are cat, dog"),
    ],
)
def test_a_prompt_that_names_none_or_several_is_refused_with_the_names(prompt: str, said: str) -> None:
    with pytest.raises(Invalid) as refused:
        named_in(prompt, named("cat", "dog"))
    assert str(refused.value) == f"prompt: {said}"


def test_an_index_beyond_the_classes_is_refused() -> None:
    with pytest.raises(Invalid, match="must be 0 to 1"):
        named_in("2", named("cat", "dog"))
