"""The lines of the table of request fields, and how to read them. The table itself is service/plan/fields.py.

The client imports this module, so the module needs only the standard library.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

_TOLD = 10**6  # people are not told of larger limits

# A number, or the name of a limit. A named limit depends on the model or on a setting: service/plan/limits.py.
Limit = float | str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The properties of a field beside its name, type and default.

    Attributes:
        help: the meaning of the field, for every reader.
        ge: the least value; for a list, the least value of a member.
        gt: an exclusive lower bound.
        le: the greatest value, for a list of a member.
        length: of a list, the number of its members; None for any number from 1 on.
        max_bytes: of a text, or of each text of a list: the most bytes in UTF-8. Messages never show such a text.
        decides: whether the field changes the bytes of each image, the bytes of the whole answer, or neither. Recipes
            keep fields of the first kind. ETags depend on fields of the first two kinds.
        refused: values within the limits that are refused all the same.
        is_optional: recipes and other documents leave the field out if it is null.
        flags: of the command line; by default the field's name.
    """

    help: str
    ge: Limit | None = None
    gt: Limit | None = None
    le: Limit | None = None
    length: int | None = None
    max_bytes: int | None = None
    decides: Literal["image", "answer", "neither"] = "image"
    refused: str = ""
    is_optional: bool = False
    flags: tuple[str, ...] = ()


class Field(NamedTuple):
    """A line of the table.

    Attributes:
        annotation: the field's type, without the entry.
        default: MISSING for a required field.
    """

    name: str
    annotation: Any
    default: Any
    entry: Entry

    @property
    def help(self) -> str:
        """The entry's help, the limits that every model shares, and the default."""
        low, high = self.entry.ge, self.entry.le
        is_told = isinstance(low, int | float) and isinstance(high, int | float) and high <= _TOLD
        limits = f" {low:g} to {high:g}." if is_told else ""
        default = "" if self.is_required or self.default is None else f" Default: {self.default}."
        return self.entry.help + limits + default

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def is_nullable(self) -> bool:
        return type(None) in get_args(self.annotation)

    @property
    def is_list(self) -> bool:
        """Whether the field may hold a list."""
        return any(get_origin(kind) is Sequence for kind in get_args(self.annotation))

    @property
    def is_only_list(self) -> bool:
        """Whether the field holds only a list or null."""
        return all(kind is type(None) or get_origin(kind) is Sequence for kind in get_args(self.annotation) or [None])

    @property
    def kinds(self) -> frozenset[type]:
        """The types of the field's values, or of its list's members: int, float, str and bool."""
        return frozenset(_kinds(self.annotation))


def table(request: type) -> Mapping[str, Field]:
    """The fields of a request by name."""
    hints = get_type_hints(request, include_extras=True)
    rows = {}
    for one in fields(request):
        kind, entry = get_args(hints[one.name])
        rows[one.name] = Field(one.name, kind, one.default, entry)
    return rows


@cache
def deciding(request: type, *what: str) -> Sequence[Field]:
    """The fields that decide the bytes of an `image`, of an `answer`, or of `neither`."""
    return [row for row in table(request).values() if row.entry.decides in what]


def _kinds(annotation: Any) -> Iterator[type]:
    if get_origin(annotation) is Literal:
        yield str
    elif arguments := get_args(annotation):
        for argument in arguments:
            yield from _kinds(argument)
    elif annotation is not type(None):
        yield annotation
