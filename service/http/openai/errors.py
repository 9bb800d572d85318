"""Errors as OpenAI's API tells them."""

from collections.abc import Sequence
from typing import Any

from service.errors import FieldError


def openai_error(status: int, message: str, errors: Sequence[FieldError]) -> dict[str, Any]:
    """The content of an error.

    Args:
        errors: the invalid fields; the first is the error's `param`.
    """
    kind = "invalid_request_error" if status < 500 else "server_error"
    param = str(errors[0]["loc"][0]) if errors and errors[0]["loc"] else None
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
