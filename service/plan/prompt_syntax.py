"""AUTOMATIC1111's syntax beside weights: what is drawn in its place, and the sentences that say so.

Nothing of this syntax becomes tokens. A sentence has no word of the prompt.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from model.rows import Fragment, Prompt
from service.errors import Invalid
from service.plan.emphasis import weighted

COMMENT = "a comment, from # to the end of its line, is not drawn"
NETWORK = "a name in angle brackets with a colon is left out: no network of that kind is served"
AND = "AND is not served: the prompts that it joins are drawn as one"
WHOLE = "a number after a colon at the end of a prompt, the weight of the whole prompt, is left out"
SCHEDULE = "[from:to:when] is not served: of each, the part that holds for most of the steps is drawn in all steps"
ALTERNATE = "[a|b] is not served: the first part of each is drawn in all steps"
BREAK = "BREAK is not served: the prompt is not divided into chunks"

_REFUSED = {
    "lora": "LoRAs are not chosen by requests: who runs the server merges them into the weights",
    "lyco": "LyCORIS networks are not chosen by requests: who runs the server merges them into the weights",
    "hypernet": "hypernetworks are not served",
}
_COMMENT = re.compile(r"#[^\n]*(?:\n|\Z)")
_WHOLE_LINE = re.compile(r"(?:\A|\n)#[^\n]*(?:\n|\Z)")
_NETWORK = re.compile(r"<(\w+):[^>]+>")
_AND = re.compile(r"\bAND\b")
_WHOLE = re.compile(r":\s*[-+]?(?:\d+\.?|\d*\.\d+)\s*\Z")
_TOKENS = re.compile(r"\\.|[^\\\[\]():|]+|.", re.DOTALL)
_WHEN = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*", re.ASCII)
_PAIRS = {")": "(", "]": "["}


class Read(NamedTuple):
    """A prompt, as it is drawn.

    Attributes:
        prompt: the text itself if all of it is drawn with weight 1; else its fragments.
        notes: sentences on syntax beside weights that was found.
    """

    prompt: Prompt
    notes: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the prompt is drawn as it is written."""
        return isinstance(self.prompt, str)

    @property
    def text(self) -> str:
        """What is drawn, without brackets and weights."""
        return self.prompt if isinstance(self.prompt, str) else "".join(one.text for one in self.prompt)

    def __repr__(self) -> str:
        """Tells nothing of the prompt, because an error with this in it may reach the log."""
        return f"Read({len(self.prompt)} characters or fragments)"


class _Open(NamedTuple):
    """A bracket that is not closed yet.

    Attributes:
        at: its place among the tokens.
        marks: the places of the colons and bars that it holds itself.
    """

    bracket: str
    at: int
    marks: list[int]


def read(prompt: str, field: str, steps: int, is_negative: bool) -> Read:
    """Read a prompt as AUTOMATIC1111 does.

    Args:
        field: what the prompt is given in, for messages.
        steps: of the request.
        is_negative: AND is a word in negative prompts.

    Raises:
        Invalid: the prompt names a network, or its weights cannot be read.
    """
    notes: dict[str, None] = {}  # in order, each once
    text = _without_networks(_without_comments(prompt, notes), field, notes)
    fragments: list[Fragment] = []
    for part in [text] if is_negative else _joined(text, notes):
        found, breaks = weighted(_in_most_steps(part, steps, notes), field)
        fragments += found
        if breaks:
            notes[BREAK] = None
    is_plain = fragments == ([Fragment(prompt)] if prompt else [])
    return Read(prompt if is_plain else tuple(fragments), tuple(notes))


def _without_comments(text: str, notes: dict[str, None]) -> str:
    if "#" not in text:
        return text
    notes[COMMENT] = None
    return _COMMENT.sub("\n", _WHOLE_LINE.sub("\n", text))


def _without_networks(text: str, field: str, notes: dict[str, None]) -> str:
    """The text without `<name:arguments>`."""
    head, end, rest = text.rpartition(">")  # beyond the last > the expression would search in vain, again and again
    for found in _NETWORK.finditer(head + end):
        if why := _REFUSED.get(found[1].lower()):
            raise Invalid.field(field, f"names a network in angle brackets: {why}")
        notes[NETWORK] = None
    return _NETWORK.sub("", head + end) + rest


def _joined(text: str, notes: dict[str, None]) -> list[str]:
    """The prompts that AND joins, without the weight of each."""
    parts = _AND.split(text)
    if len(parts) > 1:
        notes[AND] = None
    without = [_WHOLE.sub("", part) for part in parts]
    if without != parts:
        notes[WHOLE] = None
    return without


def _in_most_steps(text: str, steps: int, notes: dict[str, None]) -> str:
    """The text with the one part of `[from:to:when]` and `[a|b]` that is drawn."""
    out: list[str] = []
    opened: list[_Open] = []
    for match in _TOKENS.finditer(text):
        token = match[0]
        if token in ("(", "["):
            opened.append(_Open(token, len(out), []))
        elif token in (":", "|") and opened:
            opened[-1].marks.append(len(out))
        out.append(token)
        if token in _PAIRS and opened:
            last = opened.pop()
            if last.bracket != _PAIRS[token]:
                opened.clear()  # what encloses a wrong bracket is no syntax
            elif token == "]" and (drawn := _drawn(out, last, steps, notes)) is not None:
                out[last.at :] = [drawn]
    return "".join(out)


def _drawn(out: Sequence[str], last: _Open, steps: int, notes: dict[str, None]) -> str | None:
    """The part of square brackets that is drawn; None if they are no such syntax.

    Args:
        out: tokens, of which the last closes the brackets.
    """
    bars = [mark for mark in last.marks if out[mark] == "|"]
    if bars:
        notes[ALTERNATE] = None
        return "".join(out[last.at + 1 : bars[0]])
    if len(last.marks) not in (1, 2):
        return None
    *_, colon = last.marks
    when = _WHEN.fullmatch("".join(out[colon + 1 : -1]))
    if when is None:
        return None
    notes[SCHEDULE] = None
    value = float(when[1])
    before = int(min(steps, value * steps if value < 1 else value))  # steps
    if len(last.marks) == 1:
        first, second = "", "".join(out[last.at + 1 : colon])
    else:
        first, second = "".join(out[last.at + 1 : last.marks[0]]), "".join(out[last.marks[0] + 1 : colon])
    return first if 2 * before >= steps else second
