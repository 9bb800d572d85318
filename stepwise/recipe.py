"""The recipe in a PNG of the service."""

import json
from typing import Any

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_KEYWORD = b"parameters\0"


def read_recipe(png: bytes) -> dict[str, Any]:
    """The JSON in a PNG's text chunk `parameters`: all that is needed to make the image again.

    Raises:
        ValueError: the PNG has no recipe.
    """
    if not png.startswith(PNG_MAGIC):
        raise ValueError("this is no PNG")
    begin = len(PNG_MAGIC)
    while begin + 12 <= len(png):  # a chunk: length, name, data, checksum
        end = begin + 12 + int.from_bytes(png[begin : begin + 4], "big")
        name, data = png[begin + 4 : begin + 8], png[begin + 8 : end - 4]
        if name == b"tEXt" and data.startswith(_KEYWORD):
            return _object(data.removeprefix(_KEYWORD))
        begin = end
    raise ValueError("this PNG has no recipe: it has no text chunk `parameters`")


def _object(text: bytes) -> dict[str, Any]:
    try:
        match json.loads(text):
            case dict(recipe):
                return recipe
    except (ValueError, RecursionError):
        pass
    raise ValueError("this PNG has no recipe: its text chunk `parameters` is no JSON object")
