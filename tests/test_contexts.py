"""Contexts are kept by content, in bounded memory; and nothing of a prompt is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.rows import Condition, Row, Text, Tokens
from service.engine.contexts import Contexts, Prompts
from tests.engines import a_context, a_row, a_text, a_text_row
from tests.properties import examples

A_CONTEXT = a_context(0).nbytes


@examples(100)
@given(st.integers(0, 5), st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_the_contexts_asked_for_last_are_kept_up_to_the_limit(places: int, asked: list[tuple[int, bool]]) -> None:
    contexts, newest = Contexts(places * A_CONTEXT + A_CONTEXT // 2), list[int]()
    for token, keep in asked:
        found = contexts.find(a_text(token))
        assert (found is not None) == (token in newest)
        if found is not None:
            assert found.tokens.tolist() == a_context(token).tokens.tolist()
            newest.remove(token)
            newest.append(token)
        elif keep and places:
            newest = [*newest, token][-places:]
        if keep:
            contexts.keep(a_text(token), a_context(token))


def test_texts_with_other_layers_are_other_texts() -> None:
    contexts = Contexts()
    contexts.keep(Text((1, 2)), a_context(1))
    assert contexts.find(Text((1, 2), clip_skip=1)) is None
    assert contexts.find(Text((1, 2), clip_skip=0)) is not None


def test_the_texts_of_a_request_are_encoded_once_and_known_ones_are_not() -> None:
    contexts = Contexts()
    contexts.keep(a_text(2), a_context(2))
    rows = [a_text_row(1, 1, 2), a_text_row(2, 1, 3), a_text_row(3, 2)]
    prompts = Prompts.of(rows, contexts)
    assert list(prompts.contexts) == [a_text(2)]
    assert prompts.unknown == [a_text(1), a_text(3)]
    for text in prompts.unknown:
        prompts.contexts[text] = a_context(text.ids[0])
    given_to = prompts.given_to(rows)
    assert [[one.context.tokens[0, 0] for one in row.branches if one.context is not None] for row in given_to] == [
        [1, 2], [1, 3], [2]
    ]  # fmt: skip
    assert Prompts.of(given_to, contexts) == ({}, [])


def test_rows_without_texts_stay_as_they_are() -> None:
    row = a_row(1)
    assert Prompts.of([row], Contexts()) == ({}, [])
    assert Prompts({}, ()).given_to([row])[0] is row


@pytest.mark.parametrize("of", [lambda text: text, lambda text: Condition(text=text), lambda text: {text: 1}])
def test_no_repr_tells_anything_of_a_prompt(of: object) -> None:
    """An error may have one in its message, and logs have errors."""
    assert callable(of)
    assert "4711" not in repr(of(Text((4711, 4711))))
    assert "4711" not in repr(Tokens((4711,), 4711))


def test_nor_does_the_repr_of_a_row() -> None:
    row: Row = a_text_row(1, 4711)
    assert "4711" not in repr(row)
