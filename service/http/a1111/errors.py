"""Errors as programs for AUTOMATIC1111's API read them."""

from collections.abc import Mapping
from typing import Any


def a1111_error(document: Mapping[str, Any]) -> dict[str, Any]:
    """A problem document with the member `error`, which names the kind of the error. `detail` is the sentence."""
    return {**document, "error": document["title"]}
