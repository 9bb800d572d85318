"""AUTOMATIC1111's syntax in prompts: weights, and what is drawn of the rest."""

import math
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.rows import Condition, Fragment
from service.errors import Invalid
from service.plan import prompt_syntax
from service.plan.emphasis import MAX_DEPTH, weighted
from service.plan.prompt_syntax import ALTERNATE, AND, BREAK, COMMENT, NETWORK, SCHEDULE, WHOLE, read
from service.plan.shared_fields import MAX_PROMPT
from tests.properties import examples
from tests.test_responses import SERVED, planned
from tests.texts import LENGTH, TEXT, XL, tokenize, tokenize_twice

Pairs = list[tuple[str, float]]

SECRET = "qzx"
STEPS = 10


def fragments(prompt: str) -> Pairs:
    return [(one.text, one.weight) for one in weighted(prompt, "prompt").fragments]


# Weights.


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # the first seven are the examples of AUTOMATIC1111's own documentation
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        ("", []),
        ("a) b]", [("a) b]", 1.0)]),
        ("a:1.2) b", [("a:1.2) b", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)]),
        ("(a:0)(b:-1)(c:+.5)", [("a", 0.0), ("b", -1.0), ("c", 0.5)]),
        ("16:9 (at 5:30:2)", [("16:9 ", 1.0), ("at 5:30", 2.0)]),
        (r"back\slash \\", [("backslash \\", 1.0)]),
        ("(a BREAK b) BREAK c", [("a", 1.1), ("b", 1.1), ("c", 1.0)]),
        ("BREAKs and aBREAK", [("BREAKs and aBREAK", 1.0)]),
    ],
)
def test_weights(prompt: str, expected: Pairs) -> None:
    assert fragments(prompt) == expected


def reference(prompt: str) -> Pairs:
    """The same, letter by letter: the weight of each is found by going through the whole prompt once more."""
    letters: list[tuple[str, float]] = []
    for at, (letter, is_text) in enumerate(elements := marks_of(prompt)):
        if is_text:
            letters.append((letter, weight_at(at, elements)))
    runs = (("".join(letter for letter, _ in run), weight) for weight, run in groupby(letters, lambda pair: pair[1]))
    return [(text, weight) for text, weight in runs if text]


def marks_of(prompt: str) -> list[tuple[str, bool]]:
    """Letters, and brackets with what they mean; each with whether it is text."""
    found: list[tuple[str, bool]] = []
    at, opened = 0, {"(": 0, "[": 0}
    while at < len(prompt):
        letter, rest = prompt[at], prompt[at + 1 :]
        if letter == "\\":
            escaped = rest[:1] if rest[:1] in ("(", ")", "[", "]", "\\") else ""
            found.append((escaped, True))
            at += 1 + len(escaped)
            continue
        number = rest.partition(")")[0] if letter == ":" and ")" in rest else ""
        unsigned = number[1:] if number[:1] in ("+", "-") else number
        is_number = bool(unsigned) and not unsigned.strip("0123456789.")
        if letter in opened:
            opened[letter] += 1
            found.append((letter, False))
        elif is_number and opened["("]:
            opened["("] -= 1
            found.append((number, False))
            at += len(number) + 1
        elif is_number:
            found += [(one, True) for one in f":{number})"]
            at += len(number) + 1
        elif letter in ")]" and opened["(" if letter == ")" else "["]:
            opened["(" if letter == ")" else "["] -= 1
            found.append((letter, False))
        else:
            found.append((letter, True))
        at += 1
    return found


def weight_at(place: int, elements: list[tuple[str, bool]]) -> float:
    weight, opened = 1.0, {"(": [False] * 0, "[": [False] * 0}  # of each open bracket, whether it is before the place
    for at, (mark, is_text) in enumerate(elements):
        if is_text:
            continue
        if mark in opened:
            opened[mark].append(at < place)
        elif opened["[" if mark == "]" else "("].pop() and at > place:
            weight *= {")": 1.1, "]": 1 / 1.1}.get(mark) or float(mark)
    for _ in filter(None, opened["("]):
        weight *= 1.1
    for _ in filter(None, opened["["]):
        weight *= 1 / 1.1
    return weight


PIECES = ("a", "b c", " ", "(", ")", "[", "]", "(", "[", ":", "\\", ":1.3)", ":.5)", ":-2)", ":0)", ":x)")


@examples(600)
@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_weights_are_those_of_a_reading_letter_by_letter(prompt: str) -> None:
    assert fragments(prompt) == reference(prompt)


@examples(100)
@given(st.text("aé🦊 ,.'\n-|{}0", max_size=20))
def test_text_without_brackets_is_drawn_as_it_is_written(prompt: str) -> None:
    assert read(prompt, "prompt", STEPS, is_negative=False) == (prompt, ())


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (f"({SECRET}:1.2.3)", "has a weight that is no number"),
        (f"({SECRET}:.)", "has a weight that is no number"),
        (f"({SECRET}:100.1)", "has a weight that is not from -100 to 100"),
        (f"(({SECRET}:-20):20)", "has a weight that is not from -100 to 100"),
        (f"(({SECRET}:{'9' * 400}):0)", "has a weight that is not from -100 to 100"),
        ("(" * (MAX_DEPTH + 1) + SECRET, "has more than 32 brackets that are open at once"),
        ("([" * (MAX_DEPTH // 2) + f"({SECRET}", "has more than 32 brackets that are open at once"),
        (f"a <lora:{SECRET}:0.8> b", "LoRAs are not chosen by requests"),
        (f"a <LyCO:{SECRET}> b", "LyCORIS networks are not chosen by requests"),
        (f"a <hypernet:{SECRET}:1> b", "hypernetworks are not served"),
    ],
)
def test_what_cannot_be_read_is_refused_without_a_word_of_the_prompt(prompt: str, said: str) -> None:
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(Invalid) as refused:
            planned(TEXT, emphasis="original", **{name: prompt})
        assert str(refused.value).startswith(f"{name}: ")
        assert said in str(refused.value)
        assert SECRET not in str(refused.value)


# The rest of the syntax.


@pytest.mark.parametrize(
    ("prompt", "drawn", "notes"),
    [
        ("a [b:3]", "a b", [SCHEDULE]),
        ("a [b: 3]", "a b", [SCHEDULE]),
        ("a [b:8]", "a ", [SCHEDULE]),
        ("[(a:2):3]", [("a", 2.0)], [SCHEDULE]),
        ("a [b : c : 1] d", "a  c  d", [SCHEDULE]),
        ("a[b:[c:d:2]:1]e", "ade", [SCHEDULE]),
        ("a [b:.5] c", "a  c", [SCHEDULE]),  # both parts hold for as long: the first is drawn
        ("a [b:.4] c", "a b c", [SCHEDULE]),
        ("[fox::0.7]", "fox", [SCHEDULE]),
        ("[fox::0.2] ox", " ox", [SCHEDULE]),
        ("[a:b:-1]", "b", [SCHEDULE]),
        ("[a:b:99]", "a", [SCHEDULE]),
        ("[a:b:" + "9" * 400 + "]", "a", [SCHEDULE]),
        (r"[a\:b:c:0.9]", r"a:b", [SCHEDULE]),
        ("[cow|horse] in a [field|wood|]", "cow in a field", [ALTERNATE]),
        ("[|a]", "", [ALTERNATE]),
        ("[[a|b]:c:0.9]", "a", [ALTERNATE, SCHEDULE]),
        ("[a:b:0.9] c|d", "a c|d", [SCHEDULE]),
        ("a AND b :1.2 AND c", [("a ", 1.0), (" b ", 1.0), (" c", 1.0)], [AND, WHOLE]),
        ("(a AND b", [("a ", 1.1), (" b", 1.0)], [AND]),
        ("SAND", "SAND", []),
        ("a fox: 1.5", "a fox", [WHOLE]),
        ("a BREAK b", [("a", 1.0), ("b", 1.0)], [BREAK]),
        ("a # (b\nc", "a \nc", [COMMENT]),
        ("# x\na", "\na", [COMMENT]),
        ("a <segs:b:1> c", "a  c", [NETWORK]),
        ("a <3 b> c", "a <3 b> c", []),
    ],
)
def test_what_is_drawn_of_the_rest_and_said(prompt: str, drawn: str | Pairs, notes: list[str]) -> None:
    expected = drawn if isinstance(drawn, list) else [(drawn, 1.0)] if drawn else []
    found = read(prompt, "prompt", STEPS, is_negative=False)
    got = (Fragment(found.prompt),) if isinstance(found.prompt, str) else found.prompt
    assert [(one.text, one.weight) for one in got] == expected
    assert list(found.notes) == notes


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("[b:c]", "b:c"),  # no number
        ("[a:b:c:0.5]", "a:b:c:0.5"),  # too many parts
        ("[(a]:b:0.5]", "(a"),
    ],
)
def test_what_is_no_schedule_is_text(prompt: str, text: str) -> None:
    found = read(prompt, "prompt", STEPS, is_negative=False)
    assert text[-1] in "".join(one.text for one in found.prompt if isinstance(one, Fragment))
    assert found.notes == ()


def test_and_is_a_word_in_negative_prompts() -> None:
    assert read("a AND b :2", "negative_prompt", STEPS, is_negative=True) == ("a AND b :2", ())


def test_a_schedule_depends_on_the_steps() -> None:
    for steps, drawn in ((4, "a"), (20, "b")):
        [row] = planned(TEXT, prompt="[a:b:4]", emphasis="original", num_inference_steps=steps, sampler="ddim").rows
        assert row.branches[0].text == tokenize(drawn).text()
    [row] = planned(TEXT, prompt="[a:b:2]", emphasis="original", timesteps=[900, 500, 100], sampler="ddim").rows
    assert row.branches[0].text == tokenize("a").text()


BRACKETS = ["(", ")", "[", "]", "(a)", "[a:", "[:", "[a|", "[a:b:1]", "(a:1.1)", "([", "[a]:"]
UNITS = [*BRACKETS, "<a:", "<a:>", "#", "#\n", "\\", ":", ": ", "AND", " AND ", "BREAK ", "1", ":1", "\n"]


@pytest.mark.parametrize("unit", UNITS)
def test_the_longest_prompts_are_read_or_refused(unit: str) -> None:
    repeated = unit * (MAX_PROMPT // len(unit))
    for prompt in (repeated, f"({repeated[:-4]}>1)"):
        try:
            drawn = read(prompt, "prompt", STEPS, is_negative=False).prompt
        except Invalid:
            continue
        texts = [drawn] if isinstance(drawn, str) else [one.text for one in drawn]
        assert len("".join(texts)) <= MAX_PROMPT


# Requests.


def weights(condition: Condition) -> tuple[float, ...]:
    assert condition.text is not None
    return condition.text.weights


def test_a_token_has_the_weight_of_its_fragment() -> None:
    asked: dict[str, Any] = {"prompt": "a(bc:1.5)", "negative_prompt": "[.x]", "guidance_scale": 3}
    [row] = planned(XL, **asked, emphasis="original").rows
    own, negative = (branch.text for branch in row.branches)
    assert own is not None
    assert negative is not None
    assert own.ids == tokenize("abc").ids
    assert own.weights == own.weights_2 == (1, 1, 1.5, 1.5, *[1] * (LENGTH - 4))
    assert negative.weights == (1, 1 / 1.1, 1 / 1.1, *[1] * (LENGTH - 3))
    assert negative.weights_2 == (1, 1 / 1.1, *[1] * (LENGTH - 2))  # this encoder has no token for the dot
    [plain] = planned(XL, **asked).rows
    assert plain.branches[0].text == tokenize_twice("a(bc:1.5)").text()


def test_zero_has_no_sign() -> None:
    """Texts that are equal have contexts of the same bits."""
    [(_, zero)] = fragments("(a:-0)")
    assert math.copysign(1, zero) == 1


def test_what_does_not_fit_is_cut_with_its_weights() -> None:
    plan = planned(TEXT, prompt="abcdef(ghi:2)", emphasis="original")
    assert plan.warnings == ("the prompt has 9 tokens, and 6 fit: the last 3 were cut",)
    assert weights(plan.rows[0].branches[0]) == ()


def test_a_weight_of_one_draws_what_the_same_tokens_draw() -> None:
    one, other = (planned(TEXT, prompt=prompt, emphasis="original") for prompt in ("(cat:1.0)", "cat"))
    assert one.rows[0].branches == other.rows[0].branches
    assert one.recipes != other.recipes


def test_a_recipe_has_emphasis_only_where_it_has_an_effect() -> None:
    prompts = ["a (b)", "a b"]
    plan = planned(TEXT, prompt=prompts, num_images=2, emphasis="original")
    assert [recipe.get("emphasis") for recipe in plan.recipes] == ["original", None]
    assert plan.canonical["emphasis"] == "original"
    assert plan.parameters["emphasis"] == "original"
    plain = planned(TEXT, prompt=prompts, num_images=2)
    assert "emphasis" not in plain.canonical.keys() | plain.parameters.keys() | plain.recipes[0].keys()
    unguided = planned(TEXT, prompt="a", negative_prompt="(b)", guidance_scale=1, emphasis="original")
    assert "emphasis" not in unguided.recipes[0]


def test_notes_are_warnings_each_once() -> None:
    plan = planned(TEXT, prompt=["a|[b|c]", "[b|c]"], negative_prompt="[b|c] BREAK", num_images=2, emphasis="original")
    assert plan.warnings == (ALTERNATE, BREAK)


def test_notes_are_ascii_and_end_like_other_warnings() -> None:
    notes = [value for name, value in vars(prompt_syntax).items() if name.isupper() and isinstance(value, str)]
    assert len(notes) == 7
    for note in notes:
        assert note.isascii()
        assert not note.endswith(".")
        assert "; " not in note


def test_models_without_text_have_no_emphasis() -> None:
    with pytest.raises(Invalid, match="emphasis: must be none: this model has no text"):
        planned(SERVED, emphasis="original")
    assert "emphasis" not in planned(SERVED, emphasis="none").canonical
