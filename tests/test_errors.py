"""Every error maps to an answer, and every answer is a problem document."""

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

import service.errors
import service.http.app
import service.http.problems
from service.errors import (
    BodyTooLarge,
    ComputationFailed,
    DeadlinePassed,
    Draining,
    Failed,
    Invalid,
    Loading,
    NotAcceptable,
    QueueFull,
    ServiceError,
    ShareTaken,
    TooLate,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
)
from service.http.problems import STATUS, answer, problem

assert service.http.app  # imports the whole program, so all errors are known


def descendants(kind: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


KINDS = sorted(set(descendants(ServiceError)), key=lambda kind: kind.__name__)
DRAWN = re.compile(r"[├└]── (\w+)", re.MULTILINE)
MAPPED = re.compile(r"^ *(\w+) +(\d{3})\b", re.MULTILINE)


def an_error(kind: type[ServiceError]) -> ServiceError:
    return kind([{"loc": ["seed"], "msg": "is wrong"}]) if issubclass(kind, Invalid) else kind("it went wrong")


def document(response: Response) -> dict[str, object]:
    parsed = json.loads(bytes(response.body))
    assert isinstance(parsed, dict)
    return parsed


def test_all_errors_are_found() -> None:
    assert len(KINDS) >= 14


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_an_answer(kind: type[ServiceError]) -> None:
    response = answer(an_error(kind))
    assert response.status_code in STATUS.values()
    assert response.media_type == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    content = document(response)
    assert content["type"] == "about:blank"
    assert content["status"] == response.status_code
    assert isinstance(content["title"], str)
    assert content["detail"] == str(an_error(kind))
    assert set(content) - {"type", "title", "status", "detail"} == ({"errors"} if issubclass(kind, Invalid) else set())


@pytest.mark.parametrize(
    ("kind", "status", "title"),
    [
        (Unauthorized, 401, "Unauthorized"),
        (NotAcceptable, 406, "Not Acceptable"),
        (BodyTooLarge, 413, None),
        (UnsupportedMedia, 415, "Unsupported Media Type"),
        (Invalid, 422, None),
        (ComputationFailed, 500, "Internal Server Error"),
        (Loading, 503, "Service Unavailable"),
        (Draining, 503, "Service Unavailable"),
        (Failed, 503, "Service Unavailable"),
        (QueueFull, 503, "Service Unavailable"),
        (TooLate, 503, "Service Unavailable"),
        (ShareTaken, 429, "Too Many Requests"),
        (DeadlinePassed, 504, "Gateway Timeout"),
    ],
)
def test_status_and_title_are_those_of_http(kind: type[ServiceError], status: int, title: str | None) -> None:
    response = answer(an_error(kind))
    assert response.status_code == status
    if title is not None:  # two phrases differ between versions of Python
        assert document(response)["title"] == title


def test_the_tree_in_the_docstring_is_the_tree_of_the_code() -> None:
    drawn = DRAWN.findall(service.errors.__doc__ or "")
    assert sorted(drawn) == [kind.__name__ for kind in KINDS]


def test_the_map_in_the_docstring_is_the_map_of_the_code() -> None:
    mapped = {name: int(status) for name, status in MAPPED.findall(service.http.problems.__doc__ or "")}
    kinds = {kind.__name__: kind for kind in KINDS}
    assert mapped == {name: answer(an_error(kinds[name])).status_code for name in mapped}
    assert mapped.keys() >= {kind.__name__ for kind in STATUS}


def test_the_tree_in_the_docstring_shows_who_descends_from_whom() -> None:
    above = ["ServiceError"]
    parents = set()
    for line in (service.errors.__doc__ or "").splitlines():
        if match := DRAWN.search(line):
            depth = match.start() // 4
            above[depth:] = [match[1]]
            parents.add((match[1], above[depth - 1]))
    assert parents == {(kind.__name__, kind.__mro__[1].__name__) for kind in KINDS}


@given(st.floats(0, 1e6))
def test_retry_after_is_rounded_up_to_whole_seconds_and_at_least_one(seconds: float) -> None:
    text = answer(QueueFull("full", retry_after=seconds)).headers["Retry-After"]
    assert text.isdecimal()
    assert int(text) >= 1
    assert seconds <= int(text) < max(seconds, 1) + 1


@pytest.mark.parametrize(("seconds", "text"), [(0, "1"), (0.2, "1"), (1, "1"), (1.01, "2"), (90, "90")])
def test_retry_after_by_example(seconds: float, text: str) -> None:
    assert answer(Loading("loading", retry_after=seconds)).headers["Retry-After"] == text


@pytest.mark.parametrize("kind", KINDS)
def test_only_who_should_ask_again_is_told_when(kind: type[ServiceError]) -> None:
    assert ("Retry-After" in answer(an_error(kind)).headers) is issubclass(kind, Unavailable)


def test_an_unauthorized_answer_says_how_to_authorize() -> None:
    assert answer(Unauthorized("no key")).headers["WWW-Authenticate"] == "Bearer"


def test_after_a_body_that_is_too_large_the_connection_is_closed() -> None:
    assert answer(BodyTooLarge("too large")).headers["Connection"] == "close"


def test_invalid_fields_are_listed_and_told_in_the_detail() -> None:
    fields: list[service.errors.FieldError] = [
        {"loc": ["class_label", 2], "msg": "is unknown"},
        {"loc": [], "msg": "is odd"},
    ]
    content = document(answer(Invalid(fields)))
    assert content["errors"] == fields
    assert content["detail"] == "class_label.2: is unknown; is odd"
    assert document(answer(Invalid.field("eta", "is high")))["errors"] == [{"loc": ["eta"], "msg": "is high"}]


@pytest.mark.parametrize(("status", "title"), [(404, "Not Found"), (405, "Method Not Allowed"), (499, "Error")])
def test_any_status_makes_a_problem_document(status: int, title: str) -> None:
    response = problem(status, "it went wrong", headers={"Allow": "GET"})
    assert response.headers["Allow"] == "GET"
    assert document(response) == {"type": "about:blank", "title": title, "status": status, "detail": "it went wrong"}


@given(st.text(st.characters(exclude_categories=())))
def test_what_a_client_sent_is_told_in_printable_characters(text: str) -> None:
    """The field's name is unchanged, except for lone surrogates, which no answer can hold."""
    said = document(answer(Invalid.field(text, f"{text} is no such field")))
    assert str(said["detail"]).isprintable()
    named = text.encode("utf-8", "backslashreplace").decode()
    assert said["errors"] == [{"loc": [named], "msg": f"{named} is no such field"}]


def test_half_a_character_is_escaped() -> None:
    said = document(answer(Invalid.field("\ud800", "is given twice")))
    assert said["errors"] == [{"loc": ["\\ud800"], "msg": "is given twice"}]
    assert said["detail"] == "\\ud800: is given twice"


def test_what_cannot_be_printed_is_escaped() -> None:
    assert (
        document(answer(Invalid.field("time\x7ftep", "ist überflüssig")))["detail"] == "time\\x7ftep: ist überflüssig"
    )
