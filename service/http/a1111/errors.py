"""Errors as AUTOMATIC1111's programs read them."""

from collections.abc import Mapping
from typing import Any

PREFIX = "/sdapi/"  # of the paths whose errors have this form


def told(document: Mapping[str, Any]) -> dict[str, Any]:
    """A problem document, whose `detail` these programs show, with the member `error`: the kind of the error."""
    return {**document, "error": document["title"]}
