"""The classes of a request's rows."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from model.description import ModelDescription
from service.errors import Invalid
from service.plan.shared_fields import Label


def labels_of(label: Label | Sequence[Label], num_images: int, model: ModelDescription) -> list[int | None]:
    """The class of each image, by index.

    Raises:
        Invalid: there is no such class, or the list is not as long as the images.
    """
    if isinstance(label, int | str | None):
        return [label_of(label, model)] * num_images
    if len(label) != num_images:
        raise Invalid.field("class_label", f"must be one label, or {num_images} in a list, and is {len(label)}")
    return [label_of(one, model) for one in label]


def label_of(label: Label, model: ModelDescription) -> int | None:
    """The index of a class.

    Raises:
        Invalid: there is no such class.
    """
    if label is None:
        return None
    if model.num_classes is None:
        why = "this model has no classes" if model.text is None else "a prompt tells this model what to draw"
        raise Invalid.field("class_label", f"must be null: {why}, and the label is {label!r}")
    if label in model.class_names:
        return model.class_names.index(str(label))
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10:
        label = int(label)
    if isinstance(label, int) and 0 <= label < model.num_classes:
        return label
    named = model.class_names != tuple(map(str, range(model.num_classes)))  # bare numbers add nothing
    names = f", or one of {', '.join(model.class_names[:20])}" if model.class_names and named else ""
    more = ", …" if len(model.class_names) > 20 else ""
    raise Invalid.field("class_label", f"must be 0 to {model.num_classes - 1}{names}{more}, and is {label!r}")


def named_in(prompt: str, model: ModelDescription) -> int | None:
    """The class that a prompt names: by its name or its index alone, or by its name among other words.

    A name within a longer name that the prompt has, too, does not count. An empty prompt names no class.

    Raises:
        Invalid: the prompt names no class, or several.
    """
    words = _words(prompt)
    if not words:
        return None
    classes = _classes(model.class_names)
    if words in classes:
        return classes[words]
    if prompt.strip().isascii() and prompt.strip().isdigit():
        return label_of(prompt.strip(), model)
    lengths = {len(name) for name in classes}
    found = classes.keys() & _parts(words, lengths)
    longest = found - {part for name in found for part in _parts(name, lengths - {len(name)})}
    if len(longest) == 1:
        return classes[longest.pop()]
    examples = ", ".join(model.class_names[:20]) or f"0 to {(model.num_classes or 1) - 1}"
    more = ", …" if len(model.class_names) > 20 else ""
    many = "names several classes" if longest else "names none"
    raise Invalid.field("prompt", f"must name one class, and {many}; the classes are {examples}{more}")


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


@lru_cache(maxsize=1)
def _classes(class_names: tuple[str, ...]) -> dict[tuple[str, ...], int]:
    """The index of each class by the words of its name. Of classes with equal names, the first."""
    named = {_words(name): index for index, name in reversed([*enumerate(class_names)])}
    return {words: index for words, index in named.items() if words}


def _parts(words: tuple[str, ...], lengths: Iterable[int]) -> set[tuple[str, ...]]:
    """All runs of words that have one of these lengths."""
    return {words[i : i + length] for length in lengths for i in range(len(words) - length + 1)}


def class_of(seed: int, model: ModelDescription) -> int:
    """A class chosen by the seed, for an image without a class and a network that needs one."""
    assert model.num_classes is not None
    digest = hashlib.sha256(f"class of {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % model.num_classes
